"""NOLA: both low-rank factors as combinations of frozen pseudo-random bases; only the combinations are trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adapt.basis import GENERATOR
from scrimp.adapt.cache import Cache
from scrimp.adapt.combine import independent, orthogonal
from scrimp.adapt.quantize import fake_quantize
from scrimp.primitives.errors import InputError

COMBINES: dict[str, Callable[..., Tensor]] = {"orthogonal": orthogonal, "independent": independent}
"""Kinds of bases by the name that files have for them."""
_FIRST = 2  # index of the vector of signs that A starts from


def nola(
    rank: int = 4,
    bases: int = 64,
    seed: int = 0,
    *,
    alpha: float | None = None,
    combine: Callable[..., Tensor] = orthogonal,
    shared: bool = False,
    bits: int | None = None,
    cache_bytes: int = 1 << 30,
) -> Nola:
    """Adapters whose factors are combinations of random bases (Koohpayegani et al., ICLR 2024, eq. 3).

    ``delta = (alpha / rank) B A``, ``A = A_0 + sum_i alpha_i A_i``, ``B = sum_j beta_j B_j``. A_0 is random and frozen;
    the alphas and betas start at zero, so that the model starts as it was. Trained are ``2 * bases`` numbers a weight,
    whatever its shape and rank.

    Args:
        rank: r.
        bases: how many a factor; where a factor has fewer entries, that many.
        seed: of the bases, in [0, 2^64).
        alpha: of the scale; by default the rank, so that the scale is 1.
        combine: `orthogonal` (bases of signs, orthogonal in blocks, combined by a fast transform) or `independent`
            (uniform numbers, as in the paper).
        shared: one set of ``2 * bases`` numbers for all weights together, each still with bases of its own.
        bits: train at 8, 4, 3 or 2 bits a number (straight-through), for a file of that size.
        cache_bytes: how much of the generated bases may be kept; the rest is made again in each pass.

    Raises:
        InputError: a number out of its range.
    """
    kinds = {value: key for key, value in COMBINES.items()}
    scale = float(rank if alpha is None else alpha)
    ranges: dict[str, tuple[bool, str, Any]] = {
        "rank": (rank >= 1, "at least 1", rank),
        "bases": (bases >= 1, "at least 1", bases),
        "seed": (0 <= seed < 2**64, "in [0, 2^64)", seed),
        "alpha": (math.isfinite(scale) and scale != 0, "finite and not 0", alpha),
        "bits": (bits in (None, 2, 3, 4, 8), "8, 4, 3, 2 or None", bits),
        "combine": (combine in kinds, "scrimp.adapt.orthogonal or independent", combine),
        "cache_bytes": (cache_bytes >= 0, "at least 0", cache_bytes),
    }
    for name, (holds, wanted, got) in ranges.items():
        if not holds:
            raise InputError(f"{name} {wanted}", f"{got}", "correct it")
    kind = kinds[combine]
    return Nola(
        rank=rank, bases=bases, seed=seed, alpha=scale, kind=kind, shared=shared, bits=bits, cache_bytes=cache_bytes
    )


@dataclass(frozen=True, kw_only=True)
class Nola:
    """See `nola`."""

    rank: int
    bases: int
    seed: int
    alpha: float
    kind: str
    shared: bool
    bits: int | None
    cache_bytes: int
    name: str = "nola"
    also: None = None

    def factors(self, shapes: list[tuple[int, int]]) -> list[nn.Module]:
        """One `NolaFactors` a weight; with ``shared`` the first one owns the numbers of all."""
        cache = Cache(bytes=self.cache_bytes)
        made: list[NolaFactors] = []
        for number, shape in enumerate(shapes):
            owner = made[0] if self.shared and made else None
            made.append(NolaFactors(self, shape, number, cache=cache, owner=owner))
        return list(made)

    def lengths(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """How many numbers each factor of weights of these (out, in) shapes has, in the order of `factors`."""
        counted = shapes[:1] if self.shared else shapes
        return [self.count(side) for out, inn in counted for side in (inn, out)]

    def count(self, side: int) -> int:
        """How many numbers a factor with ``rank * side`` entries has."""
        return self.bases if self.shared else min(self.bases, self.rank * side)

    def settings(self) -> dict[str, Any]:
        """The fields that fix what the numbers mean, the generator's version among them."""
        names = ("name", "rank", "bases", "seed", "alpha", "kind", "shared", "bits")
        return {name: getattr(self, name) for name in names} | {"generator": GENERATOR}


class NolaFactors(nn.Module):
    """``alpha`` and ``beta``, a number for each basis of A and of B.

    Args:
        method: rank, bases, seed and so on.
        shape: (out, in) of the weight.
        number: place of the weight among those adapted; its factors are streams ``2 * number`` and one more.
        cache: of generated bases, one for the whole model.
        owner: whose numbers are used, if not its own.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, method: Nola, shape: tuple[int, int], number: int, *, cache: Cache, owner: NolaFactors | None = None
    ) -> None:
        super().__init__()
        self.method, self.number, self.cache = method, number, cache
        self.out, self.inn = shape
        self._owner = (owner,)  # in a tuple, lest it becomes a child and its numbers appear twice
        if owner is None:
            self.alpha = nn.Parameter(torch.zeros(method.count(self.inn)))
            self.beta = nn.Parameter(torch.zeros(method.count(self.out)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The factors, float32 (float64 for such numbers), the scale in ``b``."""
        method, owner = self.method, self._owner[0] or self
        with torch.autocast(owner.alpha.device.type, enabled=False):
            alpha, beta = _rounded(owner.alpha, owner.beta, method.bits)
            a = self._combined(alpha, self.inn, 2 * self.number) + self._first(alpha)
            b = self._combined(beta, self.out, 2 * self.number + 1) * (method.alpha / method.rank)
            return a.view(method.rank, self.inn), b.view(self.out, method.rank)

    def _first(self, like: Tensor) -> Tensor:
        """A_0, of the variance 1 / (3 in) that a Linear starts with."""
        count = self.method.rank * self.inn
        signs = self.cache.signs(self.method.seed, _FIRST, count, stream=2 * self.number, device=like.device)
        return signs * torch.tensor((3 * self.inn) ** -0.5, dtype=_wide(like))

    def _combined(self, numbers: Tensor, side: int, stream: int) -> Tensor:
        method = self.method
        scaled = numbers.to(_wide(numbers)) * len(numbers) ** -0.5
        combine = COMBINES[method.kind]
        return combine(scaled, method.rank * side, seed=method.seed, stream=stream, cache=self.cache)


def _rounded(alpha: Tensor, beta: Tensor, bits: int | None) -> tuple[Tensor, Tensor]:
    """Both at ``bits``, together where they are equally long: rounding is many small operations."""
    if bits is None:
        return alpha, beta
    if alpha.shape != beta.shape:
        return fake_quantize(alpha, bits), fake_quantize(beta, bits)
    found = fake_quantize(torch.stack([alpha, beta]), bits)
    return found[0], found[1]


def _wide(numbers: Tensor) -> torch.dtype:
    return torch.promote_types(numbers.dtype, torch.float32)
