"""Gaussians to begin with: from a set's own points, or from photographs alone where it has none.

Without points, pixels are drawn from all photographs, and each is put where the neighbouring photographs agree with
it: a plane sweep (Collins 1996) over inverse depths, patches compared by normalised correlation. Where nothing agrees
the depth is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.dataset import Dataset, View
from scrimp.splats.morton import morton_order
from scrimp.splats.quality import photograph
from scrimp.splats.scene import COUNTS, SH_C0, Splats

_LONGEST = 200  # pixels, of the photographs that depths are sought in
_DEPTHS, _NEAREST, _FARTHEST = 96, 0.2, 8.0  # in distances from the focus
_PATCH, _SPACING = 1, 1.5  # samples to each side, pixels between them
_NEIGHBOURS, _AGREEING = 4, 2
_SURE = 0.8
_CHUNK = 2048  # pixels at a time
_OPACITY = 0.1


def first_splats(dataset: Dataset, *, count: int, degree: int, seed: int) -> Splats:
    """Round, faint Gaussians, as large as their surroundings are sparse.

    Args:
        count: how many to make where the set has no points; those it has are all taken.
        degree: of the harmonics, which are 0.

    Raises:
        InputError: a count below 1, or a degree beyond 4.
    """
    if count < 1 or not 0 <= degree < len(COUNTS):
        raise InputError("a count from 1 on and a degree from 0 to 4", f"{count}, {degree}", "correct them")
    if dataset.points is not None and len(dataset.points):
        points, colors = dataset.points.float(), dataset.colors
        shades = torch.full_like(points, 0.5) if colors is None else colors.float() / 255
    else:
        points, shades = points_from_views(dataset.train, lambda view: photograph(dataset, view), count, seed=seed)
    n = len(points)
    return Splats(
        means=points,
        quaternions=torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
        scales=_sizes(points).log()[:, None].repeat(1, 3),
        opacities=torch.full((n,), math.log(_OPACITY / (1 - _OPACITY))),
        colors=(shades - 0.5) / SH_C0,
        harmonics=torch.zeros(n, COUNTS[degree], 3),
    )


def focus_of(cameras: Sequence[Camera]) -> tuple[Tensor, Tensor]:
    """Where the cameras look: [3] float64, the point nearest to all their axes, and their distances from it, [n].

    Parallel axes have none; then it lies one unit, or the cameras' extent, before them.
    """
    places = torch.stack([camera.position for camera in cameras]).double()
    axes = torch.stack([camera.world_to_camera[2, :3] for camera in cameras]).double()
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    normal = across.sum(0)
    extent = float((places - places.mean(0)).norm(dim=1).max())
    focus = places.mean(0) + axes.mean(0) * (extent or 1.0)
    if float(torch.linalg.eigvalsh(normal)[0]) > 1e-3 * len(cameras):
        focus = torch.linalg.solve(normal, (across @ places[:, :, None]).sum(0)[:, 0])
    distances = (places - focus).norm(dim=1)
    return focus, distances.clamp_min(1e-3 * max(float(distances.max()), 1e-6))


def points_from_views(
    views: Sequence[View], load: Callable[[View], Tensor], count: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Points [count, 3] of the scene and their colours, 0 to 1, from photographs with poses.

    Args:
        load: a view's photograph, [h, w, 3], 0 to 1.
    """
    pictures = [_small(load(view)) for view in views]
    cameras = [view.camera.scaled(image.shape[1], image.shape[0]) for view, image in zip(views, pictures, strict=True)]
    _, distances = focus_of(cameras)
    points, colors = [], []
    for place, (camera, picture) in enumerate(zip(cameras, pictures, strict=True)):
        generator = generator_for(seed, place)
        share = count * (place + 1) // len(views) - count * place // len(views)
        pixels = torch.rand(share, 2, generator=generator) * torch.tensor([camera.width, camera.height])
        near, far = _NEAREST * float(distances[place]), _FARTHEST * float(distances[place])
        depths = 1 / torch.linspace(1 / near, 1 / far, _DEPTHS)
        around = float(distances[place])
        pieces = [_agreement(place, cameras, pictures, (piece, depths, around)) for piece in pixels.split(_CHUNK)]
        sure, best = torch.cat(pieces).max(1)
        guess = torch.randint(_DEPTHS, (share,), generator=generator)
        depth = depths[torch.where(sure > _SURE, best, guess)]
        points.append(_lifted(camera, pixels, depth[:, None])[:, 0])
        colors.append(picture[pixels[:, 1].long(), pixels[:, 0].long()])
    return torch.cat(points), torch.cat(colors)


def _small(picture: Tensor) -> Tensor:
    height, width = picture.shape[:2]
    factor = min(1.0, _LONGEST / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    planes = torch.nn.functional.interpolate(picture.permute(2, 0, 1)[None], size, mode="area")
    return planes[0].permute(1, 2, 0).contiguous()


def _agreement(
    place: int, cameras: Sequence[Camera], pictures: Sequence[Tensor], wanted: tuple[Tensor, Tensor, float]
) -> Tensor:
    """[pixels, depths]: mean correlation with the neighbours that agree best."""
    pixels, depths, distance = wanted
    around = torch.arange(-_PATCH, _PATCH + 1.0) * _SPACING
    places = (pixels[:, None] + torch.cartesian_prod(around, around)).reshape(-1, 2)
    own = _sampled(pictures[place], places, cameras[place]).reshape(len(pixels), 1, -1)
    # At twice the depth a point lies twice as far along its ray, so that each is turned once for all depths.
    eye = cameras[place].position
    rays = _lifted(cameras[place], places, torch.ones(1, 1).expand(len(places), 1))[:, 0] - eye
    found = []
    for other in _neighbours(place, cameras, distance):
        motion = cameras[other].world_to_camera
        turned = (rays @ motion[:3, :3].T).reshape(len(pixels), 1, -1, 3)
        shift = motion[:3, :3] @ eye + motion[:3, 3]
        across, down, away = (turned[..., i] * depths[:, None] + shift[i] for i in range(3))
        ahead = away.clamp_min(1e-6)
        (fx, fy), (cx, cy) = cameras[other].focal, cameras[other].centre
        at = torch.stack([across / ahead * fx + cx, down / ahead * fy + cy], -1)
        values = _sampled(pictures[other], at.reshape(-1, 2), cameras[other]).reshape(away.shape)
        middle = at[:, :, at.shape[2] // 2]
        inside = ((middle >= 0) & (middle <= at.new_tensor([cameras[other].width, cameras[other].height]))).all(-1)
        found.append(_correlation(own, values).masked_fill(~inside | (away[:, :, 0] < 1e-6), -1.0))
    if not found:
        return pixels.new_full((len(pixels), len(depths)), -1.0)
    return torch.stack(found).topk(min(_AGREEING, len(found)), dim=0).values.mean(0)


def _neighbours(place: int, cameras: Sequence[Camera], distance: float) -> list[int]:
    """The nearest cameras that look the same way from far enough aside."""
    own = cameras[place]
    apart = [float((camera.position - own.position).norm()) / distance for camera in cameras]
    along = [float(camera.world_to_camera[2, :3] @ own.world_to_camera[2, :3]) for camera in cameras]
    chosen = [i for i in range(len(cameras)) if i != place and apart[i] > 0.03 and along[i] > 0.7]
    return sorted(chosen, key=lambda i: apart[i])[:_NEIGHBOURS]


def _lifted(camera: Camera, pixels: Tensor, depths: Tensor) -> Tensor:
    """Points [n, m, 3] of the world at depths [n, m] behind pixels [n, 2]."""
    rays = (pixels - pixels.new_tensor(camera.centre)) / pixels.new_tensor(camera.focal)
    seen = torch.cat([rays, torch.ones_like(rays[:, :1])], 1)[:, None] * depths[..., None]
    motion = camera.world_to_camera.to(pixels)
    return (seen - motion[:3, 3]) @ motion[:3, :3]


def _sampled(picture: Tensor, places: Tensor, camera: Camera) -> Tensor:
    """Brightness at places [n, 2], between pixels."""
    grey = picture.mean(2)[None, None]
    at = places / places.new_tensor([camera.width / 2, camera.height / 2]) - 1
    found = torch.nn.functional.grid_sample(grey, at[None, None], padding_mode="border", align_corners=False)
    return found.reshape(-1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of patches along the last dimension; 0 of one without contrast."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    flat = 1e-4 * a.shape[-1]
    return (a * b).sum(-1) / ((a.square().sum(-1) + flat) * (b.square().sum(-1) + flat)).sqrt()


def _sizes(points: Tensor) -> Tensor:
    """[n]: root mean squared distance of the three nearest, of those that are near in Morton's order."""
    n = len(points)
    nearest, which = torch.full((n, 3), torch.inf), torch.full((n, 3), -1)
    for shift in (0.0, 0.37):
        extent = (points.amax(0) - points.amin(0)).amax()
        # A point far outside moves the cells, so that two near ones are not parted by the same wall twice.
        order = morton_order(torch.cat([points, points.amin(0, keepdim=True) - shift * extent - 1e-9]))
        order = order[order < n]
        for step in range(1, min(13, n)):
            a, b = order[:-step], order[step:]
            apart = (points[a] - points[b]).square().sum(1)
            for rows, others in ((a, b), (b, a)):
                known = (which[rows] == others[:, None]).any(1)
                far = torch.cat([nearest[rows], apart.masked_fill(known, torch.inf)[:, None]], 1)
                nearest[rows], places = far.sort(1).values[:, :3], far.argsort(1)[:, :3]
                which[rows] = torch.cat([which[rows], others[:, None]], 1).gather(1, places)
    squares = torch.where(nearest.isfinite(), nearest, 0).sum(1) / nearest.isfinite().sum(1).clamp_min(1)
    usual = squares[squares > 0].median() if bool((squares > 0).any()) else torch.tensor(1e-4)
    return squares.clamp_min(1e-4 * float(usual)).sqrt()
