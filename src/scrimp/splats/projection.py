"""Gaussians in the world to ellipses in a picture, in plain torch: EWA splatting as 3DGS uses it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.splats.camera import Camera
from scrimp.splats.scene import Splats

BLUR = 0.3
"""Added to the variance in the picture, square pixels: about a pixel's own extent."""
FAINTEST = 1 / 255
"""Opacities below are not drawn."""


@dataclass(frozen=True, eq=False)
class Projected:
    """Ellipses of every Gaussian, seen or not.

    Attributes:
        means: [n, 2], pixels, x and y.
        covariances: [n, 3], of xx, xy and yy, square pixels, blurred.
        opacities: [n], 0 to 1, at the mean.
        depths: [n], along the camera's axis.
        radii: [n], the longest distance from the mean at which a Gaussian is drawn, pixels; 0 where it is not seen.
    """

    means: Tensor
    covariances: Tensor
    opacities: Tensor
    depths: Tensor
    radii: Tensor


def project(splats: Splats, camera: Camera, *, antialias: bool = False, offsets: Tensor | None = None) -> Projected:
    """Project every Gaussian (Zwicker et al. 2001; Kerbl et al. 2023, arXiv 2308.04079).

    Args:
        antialias: dim a Gaussian by as much as the blur widens it (Yu et al. 2024, arXiv 2311.16493).
        offsets: [n, 2], added to the means in the picture, pixels.
    """
    motion = camera.world_to_camera.to(splats.means)
    points = splats.means @ motion[:3, :3].T + motion[:3, 3]
    depths = points[:, 2]
    # What lies behind would divide by 0; it is not seen, and must leave no NaN in the gradients either.
    ahead = torch.where((depths > camera.near)[:, None], points, torch.ones_like(points))
    spans = _jacobian(ahead, camera) @ motion[:3, :3] @ _axes(splats)
    sharp = spans @ spans.mT
    blurred = sharp + BLUR * torch.eye(2).to(sharp)
    means = ahead[:, :2] / ahead[:, 2:] * ahead.new_tensor(camera.focal) + ahead.new_tensor(camera.centre)
    opacities = splats.opacities.sigmoid()
    if antialias:
        opacities = opacities * (_determinant(sharp) / _determinant(blurred)).clamp_min(0).sqrt()
    means = means if offsets is None else means + offsets
    covariances = torch.stack([blurred[:, 0, 0], blurred[:, 0, 1], blurred[:, 1, 1]], 1)
    radii = _radii(means.detach(), covariances.detach(), opacities.detach(), camera) * (depths > camera.near)
    return Projected(means, covariances, opacities, depths, radii.detach())


def _axes(splats: Splats) -> Tensor:
    """[n, 3, 3]: columns are a Gaussian's axes in the world, as long as its standard deviations."""
    w, x, y, z = torch.nn.functional.normalize(splats.quaternions, dim=1).unbind(1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, 1).reshape(-1, 3, 3) * splats.scales.exp()[:, None]


def _jacobian(points: Tensor, camera: Camera) -> Tensor:
    """[n, 2, 3], of the pixel by the point; taken at the border outside 1.3 of the field of view, where it explodes."""
    depths, rows = points[:, 2], []
    for axis, size in enumerate((camera.width, camera.height)):
        focal, centre, zero = camera.focal[axis], camera.centre[axis], torch.zeros_like(depths)
        margin = 0.15 * size / focal
        slope = (points[:, axis] / depths).clamp(-centre / focal - margin, (size - centre) / focal + margin)
        row = [zero, zero, -focal * slope / depths]
        row[axis] = focal / depths
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def _determinant(matrices: Tensor) -> Tensor:
    return matrices[:, 0, 0] * matrices[:, 1, 1] - matrices[:, 0, 1] * matrices[:, 1, 0]


def _radii(means: Tensor, covariances: Tensor, opacities: Tensor, camera: Camera) -> Tensor:
    xx, xy, yy = covariances.unbind(1)
    room = 2 * (opacities / FAINTEST).clamp_min(1).log()
    longest = (xx + yy) / 2 + (((xx - yy) / 2).square() + xy.square()).sqrt()
    size = means.new_tensor([camera.width, camera.height])
    reach = (room[:, None] * torch.stack([xx, yy], 1)).sqrt()
    met = ((means - reach <= size - 0.5) & (means + reach >= 0.5)).all(1)
    return (room * longest).sqrt() * met
