"""Quaternions without their largest component, the canonical form of a Gaussian, codebooks of 256 numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from splat_scenes import scene

from scrimp.splats.canonical import canonical
from scrimp.splats.levels import nearest_codes, number_codebook, opacity_levels, opacity_logits
from scrimp.splats.scene import Splats
from scrimp.splats.smallest_three import pack, pack_signed, unpack, unpack_signed

EDGES = [[1, 0, 0, 0], [0, -1, 0, 0], [1, -1, 1, -1], [0, 0, 1, -1], [-3, 1e-9, 0, 0], [1e-12, 0, 0, 2e-12]]


def covariances(splats: Splats) -> torch.Tensor:
    """[n, 3, 3] float64, by the sandwich of quaternions with each axis."""
    rows = []
    for quaternion, scales in zip(splats.quaternions.double(), splats.scales.double().exp(), strict=True):
        w, *v = (quaternion / quaternion.norm()).tolist()
        u = torch.tensor(v, dtype=torch.float64)
        axes = torch.eye(3, dtype=torch.float64)
        turned = [
            a + 2 * w * torch.linalg.cross(u, a) + 2 * torch.linalg.cross(u, torch.linalg.cross(u, a)) for a in axes
        ]
        basis = torch.stack(turned, 1) * scales
        rows.append(basis @ basis.T)
    return torch.stack(rows) if rows else torch.zeros(0, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize(("there", "back"), [(pack, unpack), (pack_signed, unpack_signed)])
@pytest.mark.parametrize("bits", [4, 8, 10])
def test_rotations_come_back_within_half_a_step(there: Callable, back: Callable, bits: int) -> None:
    given = torch.cat([torch.tensor(EDGES), scene(200).quaternions])
    largest, levels = there(given, bits)
    assert int(levels.min()) >= 0
    assert int(levels.max()) < 2**bits
    found = back(largest, levels, bits).double()
    unit = given.double() / given.double().norm(dim=1, keepdim=True)
    for row, (a, b) in enumerate(zip(unit, found, strict=True)):
        left_out = int(largest[row])
        assert abs(a[left_out]) >= a.abs().max() - 1e-6
        others = [i for i in range(4) if i != left_out]
        signed = a * (-1 if a[left_out] < 0 else 1)
        step = math.sqrt(2) / (2**bits - (1 if there is pack else 2))
        assert (signed - b)[others].abs().max() <= step / 2 + 1e-6
        assert b.norm() == pytest.approx(1, abs=1e-5)


def test_zero_has_a_signed_level() -> None:
    identity = torch.tensor([[2.0, 0, 0, 0]])
    assert torch.equal(unpack_signed(*pack_signed(identity, 10), 10), identity / 2)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_canonical_gaussians_are_the_same_ones(n: int) -> None:
    given = scene(n, 1)
    found = canonical(given)
    assert torch.equal(found.means, given.means)
    assert (found.scales.diff(dim=1) <= 0).all()
    assert torch.equal(found.scales.sort(dim=1).values, given.scales.sort(dim=1).values)
    assert (found.quaternions[:, :1] >= found.quaternions.abs() - 1e-6).all()
    assert torch.allclose(covariances(found), covariances(given), rtol=1e-4, atol=1e-9)


def test_few_numbers_are_kept_exactly() -> None:
    given = torch.randn(250, generator=torch.Generator().manual_seed(0))
    codebook = number_codebook(given.repeat(2))
    assert torch.equal(codebook[nearest_codes(given, codebook).long()], given)
    assert torch.equal(number_codebook(torch.zeros(0)), torch.zeros(256))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_codebook_is_where_no_code_can_be_moved_for_the_better(weighted: bool) -> None:
    draw = torch.Generator().manual_seed(1)
    given = torch.cat([torch.randn(3000, generator=draw), 8 + 0.1 * torch.randn(3000, generator=draw)])
    weights = torch.rand(6000, generator=draw) if weighted else torch.ones(6000)
    codebook = number_codebook(given, weights=weights if weighted else None)
    codes = nearest_codes(given, codebook).long()
    brute = (given[:, None] - codebook).abs()
    assert torch.allclose(brute.gather(1, codes[:, None])[:, 0], brute.amin(1), atol=1e-6)
    for code in codes.unique():
        members = codes == code
        mean = (given * weights)[members].double().sum() / weights[members].double().sum()
        assert codebook[code].item() == pytest.approx(mean.item(), abs=2e-3)
    error = (weights * (given - codebook[codes]).square()).sum() / weights.sum()
    best = (0.5 ** (1 / 3) * (1 + 0.1 ** (2 / 3)) * 3**0.5 * (2 * math.pi) ** (1 / 3)) ** 3 / 12 / 256**2
    assert error < 1.1 * best  # Panter and Dite's for the density that the numbers were drawn from


def test_a_codebook_where_one_number_has_all_the_weight() -> None:
    given = torch.linspace(-1, 1, 1001)
    for heavy in (0, 500, 1000):
        codebook = number_codebook(given, weights=torch.eye(1001)[heavy])
        assert codebook.isfinite().all()
        assert (codebook - given[heavy]).abs().min() < 1e-6


def test_opacities_are_rounded_and_stay_finite() -> None:
    logits = torch.tensor([-200.0, -3, 0, 0.7, 200])
    levels = opacity_levels(logits)
    assert levels.tolist() == [round(255 / (1 + math.exp(-x))) for x in logits.tolist()]
    again = opacity_logits(levels)
    assert again.isfinite().all()
    assert torch.equal(opacity_levels(again), levels)
