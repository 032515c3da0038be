"""Every format into every other: all Gaussians, each field within what the second one may lose, none of them NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splat_scenes import same, scene
from test_smallest import covariances
from test_splat_files import ksplat

from scrimp.primitives.errors import InputError
from scrimp.splats.codec import Settings
from scrimp.splats.container import bounds
from scrimp.splats.files import ENDINGS, read, write
from scrimp.splats.scene import SH_C0, Splats

EVEN = Settings(levels=1)
OPTIONS = {".spz": {"sh_bits": (8, 8)}, ".sgs": {"settings": EVEN}, ".splat": {"lossy": True}}
SOURCES = (*ENDINGS, ".ksplat")


def spread(n: int, degree: int) -> Splats:
    """Gaussians on a shuffled lattice, so that they are told apart by their places, within what every format holds."""
    side = math.ceil(n ** (1 / 3))
    lattice = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float32)] * 3)
    drawn, order = scene(n, degree), torch.randperm(side**3, generator=torch.Generator().manual_seed(1))[:n]
    return replace(
        drawn,
        means=lattice[order] - 1.3 + 0.02 * drawn.means,
        scales=drawn.scales.clamp(-6, -2),
        opacities=drawn.opacities.clamp(-4, 4),
        colors=drawn.colors.clamp(-1.6, 1.6),
        harmonics=drawn.harmonics.clamp(-0.9, 0.9),
    )


def allowed(ending: str, given: Splats) -> dict[str, float]:
    """Largest errors that each format's own text states; of covariances as a share of the largest entry."""
    extent = float((given.means.amax(0) - given.means.amin(0)).max())
    bent = given.means.abs().log1p() * given.means.sign()
    shade = float((given.colors.amax(0) - given.colors.amin(0)).max())
    own = bounds(EVEN)
    assert own.harmonics is not None
    return {
        ".ply": {"means": 0.0, "alphas": 0.0, "colors": 0.0, "harmonics": 0.0, "covariances": 1e-5},
        ".compressed.ply": {
            "means": extent / 2046,
            "alphas": 0.5 / 255,
            "colors": shade / 510,
            "harmonics": 0.5 / 32,
            "covariances": 0.02,
        },
        ".splat": {
            "means": 0.0,
            "alphas": 0.5 / 255,
            "colors": 0.5 / 255 / SH_C0,
            "harmonics": 0.0,
            "covariances": 0.06,
        },
        ".spz": {
            "means": 2**-13,
            "alphas": 0.5 / 255,
            "colors": 0.5 / 0.15 / 255,
            "harmonics": 0.5 / 128,
            "covariances": 0.08,
        },
        ".sog": {
            "means": float((bent.amax(0) - bent.amin(0)).max()) / 131070 * (1 + float(given.means.abs().max())),
            "alphas": 0.5 / 255,
            "colors": 0.0,
            "harmonics": 0.0,
            "covariances": 0.05,
        },
        ".sgs": {
            "means": max(own.position * math.exp(float(given.scales.max())), own.position_extent * extent),
            "alphas": own.alpha * math.log(2),
            "colors": own.color,
            "harmonics": own.harmonics * 3 + 0.01 * float(given.harmonics.flatten(1).norm(dim=1).max()),
            "covariances": 0.12,
        },
    }[ending]


def far(given: Splats, found: Splats) -> dict[str, float]:
    """Largest errors, each Gaussian against the one at its place."""
    places = torch.cdist(given.means.double(), found.means.double()).argmin(1)
    assert sorted(places.tolist()) == list(range(len(given)))
    found = found.take(places)
    one, other = covariances(given), covariances(found)
    size = one.abs().amax((1, 2), keepdim=True)
    return {
        "means": float((given.means - found.means).abs().max()),
        "alphas": float((given.opacities.sigmoid() - found.opacities.sigmoid()).abs().max()),
        "colors": float((given.colors - found.colors).abs().max()),
        "harmonics": float((given.harmonics - found.harmonics).abs().max()) if given.degree else 0.0,
        "covariances": float(((one - other) / size).abs().max()),
    }


@pytest.mark.parametrize("ending", ENDINGS)
def test_from_every_format_to_this_one(ending: str, tmp_path: Path) -> None:
    for source in SOURCES:
        if source == ".ksplat":
            (tmp_path / "a.ksplat").write_bytes(ksplat(0)[0])
            given = read(tmp_path / "a.ksplat").of_degree(1)
            given = replace(given, scales=given.scales - 2, harmonics=given.harmonics / 300)
        else:
            given = read(write(spread(17, 1), tmp_path / f"a{source}", **OPTIONS.get(source, {})))
        found = read(write(given, tmp_path / f"b{ending}", **OPTIONS.get(ending, {})))
        degree = 0 if ending == ".splat" else given.degree
        assert (len(found), found.degree) == (len(given), degree)
        limits = allowed(ending, given)
        for name, error in far(given.of_degree(degree), found).items():
            assert error <= limits[name] * 1.001 + 3e-6 * (1 + float(given.means.abs().max())), (source, name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_gaussian_is_dropped_whatever_their_number_and_however_faint(ending: str, tmp_path: Path) -> None:
    for n in (0, 1, 2, 16, 17, 257):
        given = spread(n, n % 4)
        given.opacities[n // 2 :] = -9.0
        options = {"lossy": True} if ending == ".splat" else {}
        found = read(write(given, tmp_path / f"a{ending}", **options))
        assert (len(found), found.degree) == (n, 0 if ending == ".splat" else given.degree)
        seen = given.means[: n // 2]
        assert n < 2 or len(torch.cdist(seen, found.means).argmin(1).unique()) == n // 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_finite_is_refused_by_name_or_dropped(ending: str, tmp_path: Path) -> None:
    path, options = tmp_path / f"a{ending}", {"lossy": True} if ending == ".splat" else {}
    damages: list[tuple[str, Callable[[torch.Tensor], object]]] = [
        (name, lambda values, worst=worst: values[3:4].fill_(worst))  # type: ignore[misc]
        for name in spread(5, 1).tensors()
        for worst in (math.nan, math.inf)
    ]
    for name, spoil in [*damages, ("quaternions", lambda values: values[3].zero_())]:
        given = spread(5, 1)
        spoil(getattr(given, name))
        if ending == ".ply":  # which has a place for every number
            write(given, path)
            with pytest.raises(InputError, match=f"{name} of 1 out of 5"):
                read(path)
            assert same(read(path, on_bad="drop"), given.take(torch.tensor([0, 1, 2, 4])))
            continue
        with pytest.raises(InputError, match=f"{name} of 1 out of 5"):
            write(given, path, **options)
        assert len(read(write(given.take(given.finite()), path, **options))) == 4


def test_three_formats_know_whether_a_scene_is_antialiased(tmp_path: Path) -> None:
    given = replace(spread(5, 1), antialiased=True)
    for changed in (given.take(torch.tensor([1, 0])), given.to(torch.float64), given.of_degree(0), given.of_degree(3)):
        assert changed.antialiased
    kept = {
        ending: [
            read(write(each, tmp_path / f"a{ending}", **OPTIONS.get(ending, {}))).antialiased
            for each in (given, replace(given, antialiased=False))
        ]
        for ending in ENDINGS
    }
    assert {ending for ending, found in kept.items() if found == [True, False]} == {".sgs", ".sog", ".spz"}
    assert [found for ending, found in kept.items() if ending not in (".sgs", ".sog", ".spz")] == [[False, False]] * 3
