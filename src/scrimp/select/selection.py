"""The one result of the family: which samples, and the factors that keep the mean unbiased."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        indices: [budget], int64; an index may come more than once.
        weights: [budget], floating; the mean of ``weights * values[indices]`` over the selection estimates the mean of
            ``values`` over everything that could have been chosen, without bias.
    """

    indices: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.indices)
