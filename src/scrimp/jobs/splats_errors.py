"""By how much the numbers of a scene have changed, field by field, in units that mean something."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.splats.codec import visibility
from scrimp.splats.scene import SH_C0, Splats


@dataclass(frozen=True)
class FieldError:
    """Of all Gaussians.

    Attributes:
        field: what it is of.
        unit: of both numbers.
        rms: root of the mean square.
        seen: the same, each Gaussian weighted by its `visibility`: codecs keep less of what shows little.
        largest: of all.
    """

    field: str
    unit: str
    rms: float
    seen: float
    largest: float


def field_errors(before: Splats, after: Splats) -> list[FieldError]:
    """Errors of Gaussians in the same order, both with their axes described alike.

    Positions and sizes are measured along each axis, sizes by their natural logarithms, colours as coefficients of
    degree 0 times `SH_C0`: parts of full red, green and blue. Missing harmonics count as 0.
    """
    if not len(before):
        return []
    degree = max(before.degree, after.degree)
    errors = {
        ("position", "units of the scene"): after.means.double() - before.means.double(),
        ("size", "natural logarithm"): after.scales.double() - before.scales.double(),
        ("rotation", "degrees"): rotation_errors(before.quaternions, after.quaternions),
        ("alpha", "of 1"): after.opacities.double().sigmoid() - before.opacities.double().sigmoid(),
        ("colour", "of 1"): SH_C0 * (after.colors.double() - before.colors.double()),
    }
    if degree:
        lost = after.of_degree(degree).harmonics.double() - before.of_degree(degree).harmonics.double()
        errors["harmonics", "coefficients"] = lost
    weights = visibility(before)
    weights = weights / weights.sum().clamp_min(1e-300)
    return [_error(*named, values.reshape(len(before), -1), weights) for named, values in errors.items()]


def rotation_errors(before: Tensor, after: Tensor) -> Tensor:
    """[n] degrees between the rotations of quaternions [n, 4] of any length but 0."""
    one, other = (torch.nn.functional.normalize(each.double(), dim=1) for each in (before, after))
    # By the sine: the arc cosine of a number near 1 has no digits left.
    nearer = torch.where((one * other).sum(1, keepdim=True) < 0, -other, other)
    return torch.rad2deg(4 * torch.asin(((one - nearer).norm(dim=1) / 2).clamp(max=1)))


def _error(field: str, unit: str, values: Tensor, weights: Tensor) -> FieldError:
    squares = values.square().mean(1)
    rms, seen = float(squares.mean().sqrt()), float((squares @ weights).sqrt())
    return FieldError(field, unit, rms, seen, float(values.abs().max()))
