"""What a sampler remembers of every sample, and the shape of a policy that plans from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scrimp.select.importance import variance_reduction
from scrimp.select.selection import Selection


@dataclass(frozen=True)
class Record:
    """Scores of all samples as last seen.

    Attributes:
        scores: [count], float32; NaN where a sample was never seen.
        ages: [count], int64; passes (of ``count`` draws) since each score was taken.
        progress: share of the training budget that is spent, 0 to 1.
    """

    scores: Tensor
    ages: Tensor
    progress: float = 0.0

    @property
    def known(self) -> Tensor:
        """[count], bool: which samples have been seen."""
        return ~self.scores.isnan()

    def filled(self) -> Tensor:
        """Scores [count] with the mean of the known ones where none is known (1 where none is known at all)."""
        known = self.known
        mean = self.scores[known].mean() if bool(known.any()) else torch.tensor(1.0)
        return torch.where(known, self.scores, mean)

    def tau(self) -> float | None:
        """`variance_reduction` of the known scores; ``None`` before any is known."""
        known = self.scores[self.known]
        return variance_reduction(known) if len(known) else None


class Policy(Protocol):
    """Plans one round: a pure function of the record, the budget of draws and a generator."""

    def __call__(self, record: Record, budget: int, *, generator: torch.Generator) -> Selection: ...
