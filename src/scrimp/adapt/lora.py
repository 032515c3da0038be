"""LoRA: both factors trained as they are. The baseline."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


def lora(rank: int = 4, *, alpha: float | None = None, seed: int = 0) -> Lora:
    """Low-rank adapters ``delta = (alpha / rank) B A`` (Hu et al. 2022), A Kaiming-uniform and B zero at the start.

    Args:
        rank: r, at least 1.
        alpha: of the scale; by default the rank, so that the scale is 1.
        seed: fixes the first A, a function of the seed and the weight's place alone.

    Raises:
        InputError: a rank below 1.
    """
    if rank < 1:
        raise InputError("a rank of at least 1", f"{rank}", "correct it")
    return Lora(rank=rank, alpha=float(rank if alpha is None else alpha), seed=seed)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """See `lora`."""

    rank: int
    alpha: float
    seed: int
    name: str = "lora"
    also: None = None
    bits: None = None

    def factors(self, shapes: list[tuple[int, int]]) -> list[nn.Module]:
        """One pair of factors a weight."""
        return [LoraFactors(self, shape, number) for number, shape in enumerate(shapes)]

    def settings(self) -> dict[str, Any]:
        """The fields."""
        return {key: value for key, value in asdict(self).items() if key not in ("also", "bits")}


class LoraFactors(nn.Module):
    """``a`` [r, in] and ``b`` [out, r], both trained."""

    def __init__(self, method: Lora, shape: tuple[int, int], number: int) -> None:
        super().__init__()
        out, inn = shape
        bound = 1 / math.sqrt(inn)
        self.a = nn.Parameter(torch.empty(method.rank, inn))
        if not self.a.is_meta:  # where only shapes are asked for
            drawn = torch.rand(method.rank, inn, generator=generator_for(method.seed, number), device="cpu")
            self.a.data.copy_((2 * drawn - 1) * bound)
        self.b = nn.Parameter(torch.zeros(out, method.rank))
        self.scale = method.alpha / method.rank

    def forward(self) -> tuple[Tensor, Tensor]:
        """The factors, the scale in ``b``."""
        return self.a.float(), self.b.float() * self.scale
