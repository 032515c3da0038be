"""Adam for the Gaussians that a view showed, as gsplat's SelectiveAdam (Mallick et al. 2024, arXiv 2406.15643).

A Gaussian that was not seen keeps its values and both its moments: these do not decay meanwhile, however long, and
what had been its momentum goes on when it is seen again. One that was seen takes Adam's step (Kingma and Ba 2015), its
moments divided by 1 - beta^t for their start at 0, t the updates of the whole scene. So where all are seen it is Adam.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp import native

BETAS, EPSILON = (0.9, 0.999), 1e-15
"""Of Adam, as 3DGS sets them."""


@dataclass(frozen=True, eq=False)
class AdamField:
    """A tensor of a scene with one row for each Gaussian.

    Attributes:
        values, pull, first, second: of one shape, contiguous, without gradients of their own: what is trained, its
            gradient, and the two moments.
        rate: of learning.
    """

    values: Tensor
    pull: Tensor
    first: Tensor
    second: Tensor
    rate: float

    def corrected(self, updates: int) -> tuple[float, float]:
        """Rate and epsilon that make up for moments which started at 0, this many updates ago, the one now included."""
        first, second = (1 - beta**updates for beta in BETAS)
        return self.rate * second**0.5 / first, EPSILON * second**0.5


def sparse_adam_(fields: Sequence[AdamField], seen: Tensor, updates: int) -> None:
    """Update the Gaussians that were seen, in all fields.

    float32 on a CPU runs a native kernel, with the same bits whatever the number of threads; CUDA runs gsplat's where
    it is installed; anything else `sparse_adam_twin_`.

    Args:
        fields: whose values and moments change.
        seen: bool [n].
        updates: of the scene, this one included, from 1.
    """
    fields = [field for field in fields if field.values.numel()]
    if seen.is_cuda and importlib.util.find_spec("gsplat") is not None:
        return _by_gsplat(fields, seen, updates)
    plain = all(field.values.device.type == "cpu" and field.values.dtype == torch.float32 for field in fields)
    kernels = native.load() if plain else None
    if kernels is None or not hasattr(kernels, "splat_adam"):
        return sparse_adam_twin_(fields, seen, updates)
    addresses = [part.data_ptr() for f in fields for part in (f.values, f.pull, f.first, f.second)]
    numbers = [number for f in fields for number in (f.values[0].numel(), *f.corrected(updates))]
    seen = seen.contiguous()
    kernels.splat_adam(len(seen), seen.data_ptr(), addresses, numbers, *BETAS)
    return None


def sparse_adam_twin_(fields: Sequence[AdamField], seen: Tensor, updates: int) -> None:
    """`sparse_adam_` in plain torch, any dtype and device."""
    rows = torch.nonzero(seen)[:, 0]
    for field in fields:
        rate, least = field.corrected(updates)
        pull = field.pull[rows]
        first = BETAS[0] * field.first[rows] + (1 - BETAS[0]) * pull
        second = BETAS[1] * field.second[rows] + (1 - BETAS[1]) * pull.square()
        field.values[rows] -= rate * (first / (second.sqrt() + least))
        field.first[rows], field.second[rows] = first, second


def _by_gsplat(fields: Sequence[AdamField], seen: Tensor, updates: int) -> None:
    """By its optimiser, made for one step around the moments that are kept here: Gaussians come and go."""
    make = importlib.import_module("gsplat").SelectiveAdam
    for field in fields:
        rate, least = field.corrected(updates)
        leaf = field.values.requires_grad_()
        optimiser = make([{"params": [leaf], "lr": rate}], eps=least, betas=BETAS)
        optimiser.state[leaf] = {"step": torch.tensor(0.0), "exp_avg": field.first, "exp_avg_sq": field.second}
        leaf.grad = field.pull
        optimiser.step(seen)
