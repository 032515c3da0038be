"""Scenes for the tests of files, and what to hold them against."""

from __future__ import annotations

import torch

from scrimp.splats.scene import COUNTS, Splats


def scene(n: int, degree: int = 0, *, seed: int = 0) -> Splats:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    harmonics = 0.3 * normal(n, COUNTS[degree], 3)
    return Splats(5 * normal(n, 3), 3 * normal(n, 4), normal(n, 3) - 4, 3 * normal(n), normal(n, 3), harmonics)


def same(a: Splats, b: Splats) -> bool:
    fields = [(a.tensors(), b.tensors()), (a.extra, b.extra)]
    return all(
        x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x) for x, y in fields
    )


def values_of(splats: Splats, row: int) -> dict[str, float]:
    """One Gaussian by the names that 3DGS gives its numbers, harmonics by channel."""
    count = splats.harmonics.shape[1]
    named = dict(zip("xyz", splats.means[row].tolist(), strict=True)) | {"opacity": splats.opacities[row].item()}
    for prefix, field in (("f_dc", splats.colors), ("scale", splats.scales), ("rot", splats.quaternions)):
        named |= {f"{prefix}_{i}": value for i, value in enumerate(field[row].tolist())}
    for channel in range(3):
        for k in range(count):
            named[f"f_rest_{channel * count + k}"] = splats.harmonics[row, k, channel].item()
    return named
