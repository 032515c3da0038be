"""A scene while it is trained: tensors that take gradients, Adam's moments, and Gaussians that come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from scrimp.primitives.errors import InputError
from scrimp.splats.adam import BETAS, EPSILON, AdamField, sparse_adam_
from scrimp.splats.scene import Splats


class Model:
    """What is trained, with all that has a row for each Gaussian.

    Attributes:
        leaves: the tensors of a scene by name, which take gradients.
        statistics: further numbers of each Gaussian, [n], that those who refine the scene keep; new rows start at 0.
        updates: of Adam so far.
        sparse: whether an update leaves out the Gaussians that its view did not show, see `scrimp.splats.adam`. A price
            on all Gaussians then reaches each only while it is seen.
    """

    def __init__(self, splats: Splats, *, sparse: bool = False) -> None:
        self.leaves = {name: _leaf(values) for name, values in splats.tensors().items()}
        self.first = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        self.second = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        self.statistics: dict[str, Tensor] = {}
        self.updates, self.sparse, self.antialiased = 0, sparse, splats.antialiased

    def __len__(self) -> int:
        return len(self.leaves["means"])

    def splats(self) -> Splats:
        """The scene, through which gradients reach the leaves."""
        return scene_of(self.leaves, antialiased=self.antialiased)

    def detached(self) -> Splats:
        """The scene as numbers; they change with the next update."""
        leaves = {name: leaf.detach() for name, leaf in self.leaves.items()}
        return scene_of(leaves, antialiased=self.antialiased)

    def update_(self, rates: Mapping[str, float], seen: Tensor | None = None) -> None:
        """One step of Adam with the gradients there are, which are forgotten.

        Args:
            rates: for each field.
            seen: bool [n], the Gaussians that the view showed; looked at where the model is `sparse`.

        Raises:
            InputError: a sparse model that is not told what was seen.
        """
        if self.sparse and (seen is None or seen.shape != (len(self),) or seen.dtype != torch.bool):
            got = "None" if seen is None else f"{seen.dtype} {list(seen.shape)}"
            raise InputError(f"seen, bool [{len(self)}]", got, "pass rendered.radii > 0")
        fields = [
            AdamField(leaf.detach(), leaf.grad.contiguous(), self.first[name], self.second[name], rates[name])
            for name, leaf in self.leaves.items()
            if leaf.grad is not None and leaf.numel()
        ]
        if self.sparse and seen is not None:
            sparse_adam_(fields, seen, self.updates + 1)
        else:
            _dense(fields, self.updates)
        for leaf in self.leaves.values():
            leaf.grad = None
        self.updates += 1

    def take_(self, rows: Tensor) -> None:
        """Keep these Gaussians alone: indices, or bool [n]."""
        self._each(lambda values: values[rows])

    def append_(self, splats: Splats) -> None:
        """Add Gaussians, without moments."""
        added = splats.tensors()
        for name, leaf in self.leaves.items():
            self.leaves[name] = _leaf(torch.cat([leaf.detach(), added[name].to(leaf)]))
            for moments in (self.first, self.second):
                moments[name] = torch.cat([moments[name], torch.zeros_like(added[name]).to(leaf)])
        for name, values in self.statistics.items():
            self.statistics[name] = torch.cat([values, values.new_zeros(len(splats))])

    def set_(self, rows: Tensor, splats: Splats, fields: Iterable[str] | None = None) -> None:
        """Put other Gaussians in the place of these, without moments; ``fields`` of them only."""
        values = splats.tensors()
        for name in self.leaves if fields is None else fields:
            self.leaves[name].detach()[rows] = values[name].to(self.leaves[name])
        self.forget_(rows, fields)

    def forget_(self, rows: Tensor, fields: Iterable[str] | None = None) -> None:
        """Set the moments of these Gaussians to 0."""
        for name in self.leaves if fields is None else fields:
            self.first[name][rows] = 0
            self.second[name][rows] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone, copied, by dotted names."""
        found = {"updates": torch.tensor(self.updates)}
        for kind, named in self._kinds().items():
            found |= {f"{kind}.{name}": values.detach().clone() for name, values in named.items()}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was called, with as many Gaussians as there were then.

        Raises:
            InputError: a state of another kind, or whose tensors do not fit together.
        """
        device = self.leaves["means"].device
        loaded: dict[str, dict[str, Tensor]] = {kind: {} for kind in self._kinds()}
        for key, values in state.items():
            kind, _, name = key.partition(".")
            if kind in loaded:
                loaded[kind][name] = values.to(device, copy=True).contiguous()
        _check_whole(loaded, self.leaves)
        if "updates" not in state:
            raise InputError("the state of a fit", "one that counts no updates", "pass what state_dict returned")
        self.leaves = {name: _leaf(values) for name, values in loaded["leaves"].items()}
        self.first, self.second, self.statistics = loaded["first"], loaded["second"], loaded["statistics"]
        self.updates = int(state["updates"])

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        return {"leaves": self.leaves, "first": self.first, "second": self.second, "statistics": self.statistics}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.leaves = {name: _leaf(change(leaf.detach())) for name, leaf in self.leaves.items()}
        for named in (self.first, self.second, self.statistics):
            named.update({name: change(values) for name, values in named.items()})


def scene_of(named: Mapping[str, Any], *, antialiased: bool = False) -> Splats:
    """A scene of the tensors that `Splats.tensors` names.

    Raises:
        InputError: shapes that do not fit together.
    """
    return Splats(**named, antialiased=antialiased)


def _dense(fields: Iterable[AdamField], updates: int) -> None:
    for field in fields:
        before = torch.tensor(float(updates), device=field.values.device)
        adam(
            *([field.values], [field.pull], [field.first], [field.second], [], [before]),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=field.rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


def _check_whole(loaded: Mapping[str, Mapping[str, Tensor]], leaves: Mapping[str, Tensor]) -> None:
    """Refuse fields or moments that are missing, of other shapes, or of another degree."""
    shapes = [{name: values.shape for name, values in loaded[kind].items()} for kind in ("leaves", "first", "second")]
    whole = shapes[0].keys() == leaves.keys() and all(other == shapes[0] for other in shapes)
    if not whole or shapes[0]["harmonics"][1:] != leaves["harmonics"].shape[1:]:
        got = f"{len(shapes[0])} fields, or moments or a degree that do not fit"
        raise InputError("the state of a fit of the same degree", got, "pass what state_dict returned")
    scene_of(loaded["leaves"])  # refuses fields of different lengths


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
