"""Quality against slow forms: eigenvalues of the product without symmetry, loops over rows, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from scrimp.denoise import quality
from scrimp.denoise.quality import frechet_distance, paired_error, precision_recall
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


def features(rows: int, dim: int, *key: int, shift: float = 0.0) -> Tensor:
    drawn = torch.randn(rows, dim, generator=generator_for(*key), dtype=torch.float64)
    mix = torch.randn(dim, dim, generator=generator_for(7, *key), dtype=torch.float64)
    return drawn @ mix + shift


def slow_frechet(a: Tensor, b: Tensor) -> float:
    """With the eigenvalues of A B itself, which has no symmetry."""
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + cov_a.trace() + cov_b.trace() - 2 * roots)


def slow_precision(real: Tensor, fake: Tensor, k: int) -> float:
    hits = 0
    for point in fake:
        inside = False
        for place, member in enumerate(real):
            others = sorted(float((member - other).norm()) for at, other in enumerate(real) if at != place)
            inside = inside or float((member - point).norm()) <= others[k - 1]
        hits += inside
    return hits / len(fake)


@settings(deadline=None, max_examples=25)
@given(rows=some.integers(2, 40), other=some.integers(2, 40), dim=some.integers(1, 9), seed=some.integers(0, 99))
def test_frechet_distance_is_that_of_the_product_without_symmetry(rows: int, other: int, dim: int, seed: int) -> None:
    a, b = features(rows, dim, seed, 0), features(other, dim, seed, 1, shift=0.5)
    assert frechet_distance(a, b) == pytest.approx(max(slow_frechet(a, b), 0.0), rel=1e-5, abs=1e-5)


def test_frechet_distance_of_a_set_to_itself_is_nothing() -> None:
    a = features(50, 20, 3)
    assert frechet_distance(a, a.clone()) < 1e-9


def test_frechet_distance_in_closed_form() -> None:
    """Shifting by d costs |d|^2; scaling by s costs (s - 1)^2 tr A."""
    a = features(30, 4, 5)
    shifted = frechet_distance(a, a + torch.tensor([3.0, 0, 4.0, 0]))
    assert shifted == pytest.approx(25, rel=1e-9)
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(a.T).trace()), rel=1e-9)


def test_frechet_distance_does_not_care_which_is_first() -> None:
    a, b = features(30, 6, 1), features(20, 6, 2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_float32_features_lose_nothing_on_the_way() -> None:
    a, b = features(64, 8, 1).float(), features(64, 8, 2).float()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


@settings(deadline=None, max_examples=10)
@given(rows=some.integers(5, 11), other=some.integers(5, 9), k=some.integers(1, 4), seed=some.integers(0, 99))
def test_precision_and_recall_are_those_of_the_loop(rows: int, other: int, k: int, seed: int) -> None:
    real, fake = features(rows, 2, seed, 0), features(other, 2, seed, 1, shift=1.0)
    precision, recall = precision_recall(real, fake, k)
    assert precision == pytest.approx(slow_precision(real, fake, k))
    assert recall == pytest.approx(slow_precision(fake, real, k))


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = features(23, 3, 0), features(17, 3, 1)
    whole = precision_recall(real, fake)
    monkeypatch.setattr(quality, "_PAIRS", 50)
    assert precision_recall(real, fake) == whole


def test_precision_and_recall_part_ways() -> None:
    """A generator of one mode only: all it makes is real, half of what is real it never makes."""
    near = features(40, 2, 0)
    real = torch.cat([near, near + 1000])
    precision, recall = precision_recall(real, near.clone())
    assert precision == 1
    assert recall == 0.5
    assert precision_recall(near, near + 1000) == (0, 0)


def test_paired_error_is_the_loops() -> None:
    images, reference = (
        torch.rand(3, 2, 4, 5, generator=generator_for(0)),
        torch.rand(3, 2, 4, 5, generator=generator_for(1)),
    )
    values = [float(value) for value in reference.flatten()]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    for image, other, error in zip(images, reference, paired_error(images, reference), strict=True):
        squares = [(float(a) - float(b)) ** 2 for a, b in zip(image.flatten(), other.flatten(), strict=True)]
        assert float(error) == pytest.approx(math.sqrt(sum(squares) / len(squares)) / spread, rel=1e-6)


def test_paired_error_of_equal_unrelated_and_broken_images() -> None:
    reference = torch.randn(4, 1, 64, 64, generator=generator_for(0))
    assert paired_error(reference, reference).tolist() == [0, 0, 0, 0]
    other = torch.randn(4, 1, 64, 64, generator=generator_for(1))
    assert torch.allclose(paired_error(other, reference), torch.tensor(2.0, dtype=torch.float64).sqrt(), atol=0.05)
    broken = reference.clone()
    broken[1, 0, 0, 0] = torch.nan
    assert paired_error(broken, reference).isnan().tolist() == [False, True, False, False]


def test_arguments_stay_as_they_are() -> None:
    a, b = features(12, 3, 0), features(12, 3, 1)
    before = a.clone(), b.clone()
    frechet_distance(a, b), precision_recall(a, b), paired_error(a, b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)), "at least 2 rows of features; got 1"),
        (lambda: frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4)), "same layer"),
        (lambda: frechet_distance(torch.zeros(5, 3, 2), torch.zeros(5, 3, 2)), "flattened"),
        (lambda: frechet_distance(torch.full((5, 3), torch.nan), torch.zeros(5, 3)), "finite features"),
        (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "at least 4 rows of features; got 3"),
        (lambda: precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), 0), "k of at least 1"),
        (lambda: paired_error(torch.zeros(2, 3), torch.zeros(3, 3)), "same shape"),
        (lambda: paired_error(torch.zeros(2, 3), torch.zeros(2, 3)), "differ from pixel to pixel"),
        (lambda: paired_error(torch.zeros(0, 3), torch.zeros(0, 3)), "same shape"),
    ],
)
def test_wrong_input_is_refused(call, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
