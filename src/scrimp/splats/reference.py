"""The rasteriser in plain torch, one Gaussian after another: what the fast ones are held against.

Works in any dtype and on any device, differentiates by autograd, and takes time by the Gaussian times the pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.splats.camera import Camera
from scrimp.splats.harmonics import colors_from
from scrimp.splats.projection import FAINTEST, Projected, project
from scrimp.splats.scene import Splats

FULLEST, OPAQUE = 0.999, 1e-4
"""Of one Gaussian's opacity, and of the light that must still pass for a further one to be drawn."""


def rasterize_reference(
    splats: Splats,
    camera: Camera,
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    degree: int | None = None,
    antialias: bool = False,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw front to back: alpha = min(0.999, opacity exp(-q)), none below 1/255, none once the rest is below 1e-4.

    Returns:
        colour [h, w, 3], alpha [h, w], depth weighted by alpha [h, w] and radii [n]; see `Projected`.
    """
    seen = project(splats, camera, antialias=antialias, offsets=offsets)
    position = camera.position.to(splats.means)
    values = torch.cat([colors_from(splats, position, _degree(splats, degree)), seen.depths[:, None]], 1)
    order = torch.argsort(seen.depths.detach(), stable=True)
    clear, found = _blend(seen, values, order[seen.radii[order] > 0].tolist(), camera)
    color = found[..., :3] + clear[..., None] * found.new_tensor(background)
    return color, 1 - clear, found[..., 3], seen.radii


def _degree(splats: Splats, degree: int | None) -> int:
    return splats.degree if degree is None else min(degree, splats.degree)


def _blend(seen: Projected, values: Tensor, order: list[int], camera: Camera) -> tuple[Tensor, Tensor]:
    """Light that passes everything [h, w] and the blended values [h, w, channels]."""
    x = torch.arange(camera.width).to(values) + 0.5
    y = torch.arange(camera.height)[:, None].to(values) + 0.5
    # Sums of nothing: where no Gaussian is seen gradients are 0, not missing.
    clear = values.new_ones(camera.height, camera.width) + seen.opacities[:0].sum()
    open_, found = clear > 0, values.new_zeros(*clear.shape, values.shape[1]) + values[:0].sum()
    for index in order:
        alpha = _alpha(seen, index, x, y)
        drawn = open_ & (alpha >= FAINTEST)
        after = clear * (1 - alpha)
        open_ = open_ & ~(drawn & (after <= OPAQUE))
        drawn = drawn & open_
        found = found + torch.where(drawn, clear * alpha, 0)[..., None] * values[index]
        clear = torch.where(drawn, after, clear)
    return clear, found


def _alpha(seen: Projected, index: int, x: Tensor, y: Tensor) -> Tensor:
    """[h, w]"""
    xx, xy, yy = seen.covariances[index]
    across, down = x - seen.means[index, 0], y - seen.means[index, 1]
    # The exponent as a sum of squares; written with the inverse matrix it would lose long thin Gaussians to rounding.
    along = across - xy / yy * down
    distance = yy / (xx * yy - xy * xy) * along.square() + down.square() / yy
    return (seen.opacities[index] * torch.exp(-distance / 2)).clamp_max(FULLEST)
