"""A network with several exits as a victim: it answers at the first one that is sure enough (Kaya et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scrimp.attack.surrogates import exits_surrogate
from scrimp.attack.victim import frozen
from scrimp.primitives.errors import InputError


class MultiExit:
    """A victim (`scrimp.attack.Victim`) of a model that gives a list of logits, [n, classes] of each exit in order.

    An image leaves at the first exit whose largest probability reaches the threshold, at the last one in any case.

    Args:
        model: images from 0 to 1 to the logits of all exits.
        costs: FLOPs an image up to each exit, as counted, not falling; the last is the full cost.
        threshold: above 0; above 1 no image ever leaves early.

    Raises:
        InputError: costs or threshold out of range.
    """

    def __init__(self, model: nn.Module, costs: Sequence[int], *, threshold: float = 0.9) -> None:
        if not costs or list(costs) != sorted(costs) or costs[0] < 0 or not threshold > 0:
            saw = f"costs={list(costs)}, threshold={threshold}"
            raise InputError("a cost for each exit, from 0, not falling, and a threshold above 0", saw, "correct them")
        self.model, self.costs, self.threshold = model, tuple(costs), threshold
        self.full = self.ceiling = int(costs[-1])

    def exits(self, images: Tensor) -> Tensor:
        """Which exit each image leaves by, [n], int64."""
        outs = self._outs(images)
        sure = [out.softmax(1).amax(1) >= self.threshold for out in outs[:-1]]
        last = torch.ones(len(images), dtype=torch.bool, device=images.device)
        return torch.stack([*sure, last], 1).int().argmax(1)

    def cost(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        with frozen(self.model), torch.no_grad():
            return torch.tensor(self.costs)[self.exits(images).cpu()]

    def policy_loss(self, images: Tensor) -> Tensor:
        """`exits_surrogate` of all exits but the last, which saves nothing."""
        return self.policy_and_logits(images)[0]

    def logits(self, images: Tensor) -> Tensor:
        """Of the exit that each image leaves by."""
        return self.policy_and_logits(images)[1]

    def policy_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one forward."""
        outs = self._outs(images)
        sure = [out.softmax(1).amax(1) >= self.threshold for out in outs[:-1]]
        chosen = outs[-1]
        for early, out in zip(reversed(sure), reversed(outs[:-1]), strict=True):
            chosen = torch.where(early[:, None], out, chosen)
        policy = exits_surrogate(outs[:-1]) if len(outs) > 1 else outs[0].sum(1) * 0
        return policy, chosen

    def _outs(self, images: Tensor) -> list[Tensor]:
        outs = list(self.model(images))
        if len(outs) != len(self.costs):
            raise InputError(f"logits of {len(self.costs)} exits", str(len(outs)), "pass one cost an exit")
        return outs
