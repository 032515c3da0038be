"""A scene of Gaussians as tensors: what every format is read into and every renderer takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

COUNTS = (0, 3, 8, 15, 24)
"""Coefficients above degree 0 of real spherical harmonics of degree 0 to 4."""
SH_C0 = 0.28209479177387814
"""Of degree 0: colour = 0.5 + SH_C0 * coefficient, before harmonics of higher degree are added."""
_OTHERS = ("extra", "antialiased")


@dataclass(frozen=True, eq=False)
class Splats:
    """Gaussians as 3DGS trains them (Kerbl et al. 2023, arXiv 2308.04079): before any activation.

    Attributes:
        means: [n, 3], in the units of the scene.
        quaternions: [n, 4], w x y z, of any length but 0.
        scales: [n, 3], natural logarithms of the standard deviations along the three axes.
        opacities: [n], logits.
        colors: [n, 3], coefficients of degree 0, red green blue; see `SH_C0`.
        harmonics: [n, k, 3], coefficients of higher degree in the usual order, k of `COUNTS`.
        extra: further numbers of each Gaussian, [n] each, by the names that a file gives them.
        antialiased: whether they were trained to be drawn with the compensation of Mip-Splatting (arXiv 2311.16493).
            False also where the file has no place for it: of the formats only .sgs, .sog and .spz have.

    Raises:
        InputError: shapes that do not fit together.
    """

    means: Tensor
    quaternions: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    harmonics: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    antialiased: bool = False

    def __post_init__(self) -> None:
        n = len(self.means)
        wanted = {"means": (n, 3), "quaternions": (n, 4), "scales": (n, 3), "opacities": (n,), "colors": (n, 3)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} {list(shape)}", f"{list(getattr(self, name).shape)}", "pass one row each")
        shape = self.harmonics.shape
        if len(shape) != 3 or shape[0] != n or shape[1] not in COUNTS or shape[2] != 3:
            raise InputError(f"harmonics [{n}, k, 3], k of {COUNTS}", f"{list(shape)}", "pass whole degrees")
        for name, values in self.extra.items():
            if values.shape != (n,):
                raise InputError(f"extra {name} [{n}]", f"{list(values.shape)}", "pass one number each")

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Of the harmonics, 0 to 4."""
        return COUNTS.index(self.harmonics.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """All but the extra ones, by name."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _OTHERS}

    def take(self, rows: Tensor) -> Splats:
        """Only these Gaussians, in this order: int64 indices, or bool [n]."""
        return self._each(lambda values: values[rows])

    def to(self, *args: Any, **options: Any) -> Splats:
        """The same on another device or in another dtype, as `Tensor.to`."""
        return self._each(lambda values: values.to(*args, **options))

    def of_degree(self, degree: int) -> Splats:
        """With harmonics of this degree: higher ones dropped, missing ones 0."""
        count, have = COUNTS[degree], self.harmonics.shape[1]
        if count <= have:
            return replace(self, harmonics=self.harmonics[:, :count])
        zeros = self.harmonics.new_zeros(len(self), count - have, 3)
        return replace(self, harmonics=torch.cat([self.harmonics, zeros], 1))

    def finite(self) -> Tensor:
        """bool [n]: of which every number is finite and the quaternion has a length."""
        good = self.quaternions.square().sum(1) > 0
        for values in self.tensors().values():
            good = good & values.reshape(len(self), math.prod(values.shape[1:])).isfinite().all(1)
        return good

    def _each(self, change: Any) -> Splats:
        found = {name: change(values) for name, values in self.tensors().items()}
        return replace(self, **found, extra={name: change(values) for name, values in self.extra.items()})
