"""Several processes that train one scene: each looks at views of its own, and all take the same step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.optimise import Model


@dataclass(frozen=True)
class Together:
    """Which of the processes this one is, and how they add up.

    Attributes:
        rank, world: of this process, and of them all.
        sum_: a tensor over all processes, in place, to the same bits on each; such as
            `torch.distributed.all_reduce`. Not called where there is one process.

    Raises:
        InputError: a rank that is none of them.
    """

    rank: int = 0
    world: int = 1
    sum_: Callable[[Tensor], object] = lambda tensor: tensor

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise InputError(f"a rank from 0 to {self.world - 1}", f"{self.rank}", "number the processes from 0")

    def share(self, views: int) -> range:
        """Which of a step's views are this process's.

        Raises:
            InputError: views that cannot be shared evenly.
        """
        if views < 1 or views % self.world:
            raise InputError(f"views a step that {self.world} process(es) share evenly", f"{views}", "pass a multiple")
        return range(self.rank, views, self.world)

    def add_up_(self, model: Model, before: Mapping[str, Tensor], loss: Tensor) -> Tensor:
        """Sum gradients, losses, and what the statistics gained in this step; gives the loss.

        Args:
            before: the model's statistics before the step.
            loss: [], this process's part.
        """
        if self.world == 1:
            return loss
        names = sorted(model.statistics)
        origin = {name: before.get(name, torch.zeros_like(model.statistics[name])) for name in names}
        gained = [model.statistics[name] - origin[name] for name in names]
        pulls = [leaf.grad for leaf in model.leaves.values() if leaf.grad is not None]
        loss, *summed = self._summed([loss, *pulls, *gained])
        for pull, whole in zip(pulls, summed, strict=False):
            pull.copy_(whole)
        for name, whole in zip(names, summed[len(pulls) :], strict=True):
            model.statistics[name] = origin[name] + whole
        return loss

    def _summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In one message."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self.sum_(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
