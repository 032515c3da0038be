"""What one writes in torch where nothing else is there: a tiled rasteriser by autograd, and SSIM by conv2d."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from scrimp.splats.camera import Camera
from scrimp.splats.harmonics import colors_from
from scrimp.splats.loss import C1, C2, REACH, SIGMA
from scrimp.splats.projection import FAINTEST, Projected, project
from scrimp.splats.reference import FULLEST, OPAQUE
from scrimp.splats.scene import Splats

TILE = 16


def draw(splats: Splats, camera: Camera) -> Tensor:
    """[h, w, 3] on black, without harmonics. Gaussians are sorted by depth and by the tiles of 16 x 16 they meet."""
    seen = project(splats, camera)
    colors = colors_from(splats, camera.position.to(splats.means), 0)
    across, down = -(-camera.width // TILE), -(-camera.height // TILE)
    rows, counts = _sorted(seen, camera, across, down)
    # Gathered once for all tiles: a gather by tile would have a gradient of the whole scene by tile.
    drawn = torch.cat([seen.means, seen.covariances, seen.opacities[:, None], colors], 1)[rows]
    tiles = [
        _blend(mine, float(index % across * TILE), float(index // across * TILE))
        for index, mine in enumerate(drawn.split(counts))
    ]
    image = torch.stack(tiles).reshape(down, across, TILE, TILE, 3).transpose(1, 2)
    return image.reshape(down * TILE, across * TILE, 3)[: camera.height, : camera.width]


@torch.no_grad()
def _sorted(seen: Projected, camera: Camera, across: int, down: int) -> tuple[Tensor, list[int]]:
    """Gaussians tile by tile, front to back, and how many each tile has."""
    order = seen.depths.argsort()
    order = order[seen.radii[order] > 0]
    room = 2 * (seen.opacities[order] / FAINTEST).log()
    reach = (room[:, None] * seen.covariances[order][:, [0, 2]]).sqrt()
    last = torch.tensor([across - 1, down - 1])
    low = ((seen.means[order] - reach - 0.5) / TILE).floor().long().clamp_min(0).minimum(last)
    high = ((seen.means[order] + reach + 0.5) / TILE).floor().long().clamp_min(0).minimum(last)
    span = high - low + 1
    met = span.prod(1)
    which = torch.repeat_interleave(torch.arange(len(order)), met)
    step = torch.arange(len(which)) - (met.cumsum(0) - met)[which]
    x, y = low[which, 0] + step % span[which, 0], low[which, 1] + step // span[which, 0]
    tile, by_tile = (y * across + x).sort(stable=True)
    return order[which[by_tile]], torch.bincount(tile, minlength=across * down).tolist()


def _blend(drawn: Tensor, left: float, top: float) -> Tensor:
    """[256, 3]: one tile of Gaussians front to back, [k, 9] each with mean, covariance, opacity and colour."""
    means, covariances, opacities, colors = drawn.split((2, 3, 1, 3), 1)
    places = torch.arange(TILE, dtype=drawn.dtype) + 0.5
    xx, xy, yy = covariances.unbind(1)
    inverse = 1 / (xx * yy - xy * xy)
    a, b, c = ((part * inverse)[:, None, None] for part in (-0.5 * yy, xy, -0.5 * xx))
    x = (left + places - means[:, :1])[:, None, :]
    y = (top + places - means[:, 1:])[:, :, None]
    power = a * x.square() + c * y.square() + b * x * y
    alpha = (opacities[..., None] * power.exp()).clamp_max(FULLEST).flatten(1)
    alpha = torch.where(alpha >= FAINTEST, alpha, 0)
    after = torch.cumprod(1 - alpha, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    weights = torch.where(after > OPAQUE, before * alpha, 0)
    return weights.T @ colors


def image_loss(rendered: Tensor, target: Tensor, *, ssim_weight: float = 0.2, separable: bool = False) -> Tensor:
    """(1 - w) mean |x - y| + w (1 - SSIM) of pictures [h, w, 3], by conv2d as 3DGS has it, with windows of 11 x 11.

    Args:
        separable: by rows and then by columns, as pytorch-msssim has it.
    """
    places = torch.arange(-REACH, REACH + 1, dtype=rendered.dtype)
    taps = torch.exp(-places.square() / (2 * SIGMA**2))
    taps = taps / taps.sum()
    windows = [taps[None, :], taps[:, None]] if separable else [torch.outer(taps, taps)]
    x, y = (picture.permute(2, 0, 1)[None] for picture in (rendered, target))

    def blurred(planes: Tensor) -> Tensor:
        for window in windows:
            reach = (window.shape[0] // 2, window.shape[1] // 2)
            planes = conv2d(planes, window.expand(3, 1, -1, -1), padding=reach, groups=3)
        return planes

    mx, my = blurred(x), blurred(y)
    xx, yy, xy = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    similar = (2 * mx * my + C1) * (2 * xy + C2) / ((mx * mx + my * my + C1) * (xx + yy + C2))
    return (1 - ssim_weight) * (x - y).abs().mean() + ssim_weight * (1 - similar.mean())
