"""What every choice of images to label starts from: checked arguments, and which rows are left to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.seeding import CHUNK
from scrimp.select.selection import Selection


class Strategy(Protocol):
    """Which images to label next.

    ``features`` [n, d] of every image; ``probabilities`` [n, classes] of the present model, ``None`` where there is
    none; ``labelled`` the indices that have their label; ``budget`` how many more. The Selection holds
    ``min(budget, unlabelled)`` distinct unlabelled indices, in order of choice, with weights 1: choosing what teaches
    most is biased on purpose, so that only random labels estimate a mean.
    """

    def __call__(
        self,
        features: Tensor,
        probabilities: Tensor | None,
        labelled: Tensor,
        budget: int,
        /,
        *,
        generator: torch.Generator,
    ) -> Selection: ...


@dataclass(frozen=True)
class Pool:
    """Checked arguments.

    Attributes:
        features: [n, d].
        labelled: [m] int64, ascending, each once.
        left: [n - m] int64, ascending: the rows without a label.
        budget: at most as many as are left.
    """

    features: Tensor
    labelled: Tensor
    left: Tensor
    budget: int

    def unlabelled(self) -> Tensor:
        """Bool [n]."""
        mask = torch.ones(len(self.features), dtype=torch.bool, device=self.features.device)
        mask[self.labelled] = False
        return mask


def pool(features: Tensor, labelled: Tensor, budget: int) -> Pool:
    """The arguments as a `Pool`.

    Raises:
        InputError: features that are no finite floating [n, d]; labelled that are no indices of rows; a budget below 0.
    """
    if features.ndim != 2 or not features.is_floating_point():
        got = f"{str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        raise InputError("floating features [n, d]", got, "pass one row an image")
    if not all(bool(torch.isfinite(piece).all()) for piece in features.split(CHUNK)):
        raise InputError("finite features", "NaN or infinity", "check the encoder on those images")
    if budget < 0:
        raise InputError("a budget from 0 up", f"{budget}", "ask for no labels or more")
    known = _known(labelled, len(features)).to(features.device)
    mask = torch.ones(len(features), dtype=torch.bool, device=features.device)
    mask[known] = False
    left = mask.nonzero().flatten()
    return Pool(features.detach(), known, left, min(budget, len(left)))


def _known(labelled: Tensor, count: int) -> Tensor:
    whole = labelled.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if labelled.ndim != 1 or not (whole or labelled.numel() == 0):
        got = f"{str(labelled.dtype).removeprefix('torch.')} {list(labelled.shape)}"
        raise InputError("labelled as integer indices [m]", got, "for a mask pass mask.nonzero().flatten()")
    known = labelled.to(torch.int64).unique()
    if len(known) and not 0 <= int(known[0]) <= int(known[-1]) < count:
        got = f"{int(known[0])} to {int(known[-1])}"
        raise InputError(f"labelled indices from 0 to {count - 1}", got, "count rows of the features from 0")
    return known


def predictions(probabilities: Tensor | None, count: int) -> Tensor:
    """The model's probabilities, float32 or wider.

    Raises:
        InputError: there are none, or they are no distributions over classes, one an image.
    """
    if probabilities is None:
        got = "none, as before the first labels"
        raise InputError("probabilities [n, classes]", got, "begin with nearest_to_centres, or use cold_start")
    shape = f"{str(probabilities.dtype).removeprefix('torch.')} {list(probabilities.shape)}"
    if probabilities.ndim != 2 or len(probabilities) != count or probabilities.shape[1] < 1:
        raise InputError(f"probabilities [{count}, classes]", shape, "pass one row an image")
    if not probabilities.is_floating_point():
        raise InputError("floating probabilities", shape, "pass the softmax of the logits")
    values = probabilities.detach().to(torch.promote_types(probabilities.dtype, torch.float32))
    # NaN fails both comparisons.
    if not (bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() <= 2e-2).all())):
        raise InputError("probabilities >= 0 that sum to 1", "others", "pass the softmax of the logits")
    return values


def chosen(pool: Pool, indices: list[int] | Tensor, *, generator: torch.Generator) -> Selection:
    """The Selection of distinct unlabelled rows; what is missing to the budget is drawn at random from the rest."""
    device = pool.features.device
    found = torch.as_tensor(indices, dtype=torch.int64, device=device)[: pool.budget]
    if len(found) < pool.budget:
        rest = pool.unlabelled()
        rest[found] = False
        rows = rest.nonzero().flatten()
        more = torch.randperm(len(rows), generator=generator)[: pool.budget - len(found)]
        found = torch.cat([found, rows[more.to(device)]])
    return Selection(found, torch.ones(len(found), device=device))
