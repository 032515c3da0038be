"""Splats: what a decoded scene may differ by and the nearest of all codes as references, a plain .ply as baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.primitives.draw import generator_for
from scrimp.splats.canonical import canonical
from scrimp.splats.codebooks import nearest
from scrimp.splats.container import Bounds, bounds, decode, encode
from scrimp.splats.ply import write_ply
from scrimp.splats.rate import settings_at
from scrimp.splats.scene import COUNTS, Splats

_COUNTS = (1, 2, 257)  # a single one, an even and an odd number, none of them a square
_LOG2 = 1.4426950408889634
_ROUNDING = 1.001  # of float32, which decoded numbers are in
_SIZE = 20_000


def check(
    *,
    seed: int = 0,
    encode: Callable[..., bytes] = encode,
    decode: Callable[[bytes], Splats] = decode,
    nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = nearest,
) -> list[Finding]:
    """Hold decoded scenes within their stated bounds, field by field, and assigned codes against all distances."""
    found = []
    for count in _COUNTS:
        for rung in (-1.0, 2.0):
            settings = replace(settings_at(rung), levels=1)
            scene = _scene(count, seed)
            back = decode(encode(scene, settings=settings))
            found.append(at_most(f"{count} Gaussians, rung {rung:g}: left out", abs(count - len(back)), 0))
            if len(back) == count:
                found += _apart(f"{count} Gaussians, rung {rung:g}", scene, back, bounds(settings))
    return [*found, _nearest(seed, nearest)]


def sides(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """The same scene written as .sgs and as .ply; the bytes of each are its quality."""
    scene = _scene(_SIZE, seed).to(device)
    sizes = {"stored_bytes": (float(len(encode(scene))), float(len(write_ply(scene.to("cpu")))))}
    return Sides(lambda: encode(scene), lambda: write_ply(scene.to("cpu")), sizes, repeats)


def _scene(count: int, seed: int) -> Splats:
    """Visible Gaussians about as large as the gaps between them, each with its number."""
    generator = generator_for(seed, count)
    harmonics = 0.1 * torch.randn(count, COUNTS[2], 3, generator=generator)
    return Splats(
        means=torch.randn(count, 3, generator=generator),
        quaternions=torch.randn(count, 4, generator=generator),
        scales=torch.rand(count, 3, generator=generator) * 3 - 5,
        opacities=torch.rand(count, generator=generator) * 6 - 3,
        colors=torch.randn(count, 3, generator=generator),
        harmonics=harmonics,
        extra={"number": torch.arange(count).int()},
    )


def _apart(what: str, scene: Splats, back: Splats, limit: Bounds) -> list[Finding]:
    """Largest errors as parts of their bounds."""
    wanted, found = canonical(scene), back.take(back.extra["number"].argsort())
    extent = float((wanted.means.amax(0) - wanted.means.amin(0)).max())
    middle = wanted.scales.double().exp().median(1).values
    place = (limit.position * middle).clamp_min(limit.position_extent * extent) + 1e-6 * (1 + extent)
    most = wanted.harmonics.flatten(1).norm(dim=1)
    lost = (found.harmonics - wanted.harmonics).flatten(1).norm(dim=1)
    parts = {
        "means": (found.means - wanted.means).abs().amax(1) / place,
        "scales": (found.scales - wanted.scales).abs().amax(1) * _LOG2 / limit.scale,
        "opacities": (_octaves(found) - _octaves(wanted)).abs() / limit.alpha,
        "colors": (found.colors - wanted.colors).abs().amax(1) / limit.color,
    }
    if limit.harmonics is not None:
        parts["harmonics"] = lost / (
            limit.harmonics * most.new_tensor(wanted.harmonics[0].numel()).sqrt() + 0.01 * most
        )
    return [at_most(f"{what}: {name} over their bound", float(part.max()), _ROUNDING) for name, part in parts.items()]


def _octaves(splats: Splats) -> Tensor:
    """Logarithms of alphas, within what the container holds."""
    return splats.opacities.double().sigmoid().clamp(2.0**-16, 1 - 2.0**-12).log2()


def _nearest(seed: int, nearest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Finding:
    """How much farther than the nearest of all codes the assigned ones are, of the farthest apart."""
    generator = generator_for(seed, 3)
    rows, codes = (torch.randn(n, 45, generator=generator) for n in (301, 37))
    every = torch.cdist(rows.double(), codes.double())
    own = every.gather(1, nearest(rows, codes)[0][:, None])[:, 0]
    return at_most("codes: farther than the nearest", float((own - every.amin(1)).max() / every.max()), 1e-6)
