"""Samplers of noise levels: unbiased by enumeration and by counting, what they learn, and resuming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scrimp.denoise import Draw, ImportanceLevels, LevelSampler, LogitNormalLevels, UniformLevels, gradient_bound
from scrimp.denoise.timesteps import systematic
from scrimp.primitives.errors import InputError

LEVELS = 30


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norms_of(index: Tensor) -> Tensor:
    """Large gradients at the ends, small ones between."""
    return 0.05 + (index.double() / LEVELS - 0.5).square() * 8


def learned(levels: int = LEVELS, **options: Any) -> ImportanceLevels:
    sampler = ImportanceLevels(levels, **options)
    index = torch.arange(levels)
    sampler.update_(index, norms_of(index))
    return sampler


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(1, 70), st.floats(0.01, 1), st.integers(0, 5))
def test_weights_times_probabilities_are_the_uniform_mean(levels: int, bins: int, floor: float, seed: int) -> None:
    sampler = ImportanceLevels(levels, bins=bins, floor=floor)
    values = torch.rand(levels, generator=generator(seed), dtype=torch.float64) ** 3
    sampler.update_(torch.arange(levels), values)
    p = sampler.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert float(p.min()) >= floor / levels - 1e-12
    draw = sampler.draw(200, generator=generator(seed))
    weight = {int(i): float(w) for i, w in zip(draw.index, draw.weight, strict=True)}
    for level, w in weight.items():
        assert w * float(p[level]) * levels == pytest.approx(1, rel=1e-6)
        assert w <= 1 / floor + 1e-4


@pytest.mark.parametrize("count", [1, 7, 64])
def test_counts_and_mean_by_enumeration_of_all_offsets(count: int) -> None:
    """Offsets between two at which a level changes give the same draws: one stands for each stretch."""
    sampler = learned(bins=11)
    p = sampler.probabilities()
    turns = sorted({float(edge) * count % 1 for edge in p.cumsum(0)} | {0.0, 1.0})
    values, total = norms_of(torch.arange(LEVELS)), 0.0
    counts = torch.zeros(LEVELS, dtype=torch.float64)
    for low, high in itertools.pairwise(turns):
        index = systematic(p, count, (low + high) / 2)
        counts += (high - low) * torch.bincount(index, minlength=LEVELS)
        total += (high - low) * float((values[index] / (LEVELS * p[index])).mean())
    assert torch.allclose(counts, count * p)
    assert total == pytest.approx(float(values.mean()), rel=1e-6)


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 90), st.floats(0, 0.999999), st.integers(0, 99))
def test_any_run_of_levels_comes_as_often_as_it_should(levels: int, count: int, offset: float, seed: int) -> None:
    p = torch.rand(levels, generator=generator(seed), dtype=torch.float64).square() + 1e-3
    p /= p.sum()
    counts = torch.bincount(systematic(p, count, offset), minlength=levels)
    assert len(counts) == levels
    for low in range(levels):
        for high in range(low + 1, levels + 1):
            assert abs(float(counts[low:high].sum()) - count * float(p[low:high].sum())) < 1 + 1e-9


def test_levels_without_a_chance_never_come() -> None:
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    for offset in (0.0, 0.5, 1 - 1e-16):
        assert set(systematic(p, 10, offset).tolist()) == {1, 3}


def mean_is_unbiased(sampler: LevelSampler) -> None:
    values = torch.linspace(0, 1, LEVELS, dtype=torch.float64) ** 3
    own, found = generator(1), []
    for _ in range(1500):
        draw = sampler.draw(8, generator=own)
        found.append(float((draw.weight * values[draw.index]).mean()))
    estimates = torch.tensor(found, dtype=torch.float64)
    assert abs(float(estimates.mean() - values.mean())) < 4 * float(estimates.std()) / 1500**0.5 + 1e-7


def counts_kept(sampler: LevelSampler) -> None:
    for count in (1, 5, 37):
        draw = sampler.draw(count, generator=generator())
        assert draw.index.shape == draw.weight.shape == (count,)
        assert draw.index.dtype == torch.int64
        assert draw.weight.dtype == torch.float32
        assert 0 <= int(draw.index.min()) <= int(draw.index.max()) < sampler.levels


def same_generator_same_result(sampler: LevelSampler) -> None:
    first, second = (sampler.draw(20, generator=generator(5)) for _ in range(2))
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.weight, second.weight)
    other = sampler.draw(20, generator=generator(6))
    assert not torch.equal(first.index, other.index)


def arguments_untouched(sampler: LevelSampler) -> None:
    index = torch.arange(LEVELS)
    norms = norms_of(index)
    sampler.update_(index, norms)
    assert torch.equal(index, torch.arange(LEVELS))
    assert torch.equal(norms, norms_of(index))


def global_generator_untouched(sampler: LevelSampler) -> None:
    before = torch.get_rng_state()
    sampler.draw(20, generator=generator())
    assert torch.equal(before, torch.get_rng_state())


MAKERS: dict[str, Callable[[], LevelSampler]] = {
    "uniform": lambda: UniformLevels(LEVELS),
    "even": lambda: UniformLevels(LEVELS, even=True),
    "logit-normal": lambda: LogitNormalLevels(LEVELS),
    "importance": learned,
    "importance, nothing learnt": lambda: ImportanceLevels(LEVELS, bins=7),
}
# Biased on purpose: another objective.
BIASED = {"logit-normal"}
PROMISES: list[Callable[[LevelSampler], None]] = [
    mean_is_unbiased,
    counts_kept,
    same_generator_same_result,
    arguments_untouched,
    global_generator_untouched,
]


def resumes(make: Callable[[], LevelSampler]) -> None:
    """A fresh sampler with the state goes on as the old one would; the state is a copy."""
    first, index = make(), torch.arange(0, LEVELS, 3)
    first.update_(index, norms_of(index))
    state = first.state_dict()
    want = first.draw(40, generator=generator(3))
    first.update_(index, 100 * norms_of(index + 1))
    second = make()
    second.load_state_dict(state)
    found = second.draw(40, generator=generator(3))
    assert torch.equal(found.index, want.index)
    assert torch.equal(found.weight, want.weight)
    second.update_(index, 100 * norms_of(index + 1))
    one, other = (sampler.draw(40, generator=generator(4)) for sampler in (first, second))
    assert torch.equal(one.index, other.index)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("name", MAKERS)
def test_promises(name: str, promise: Callable[[LevelSampler], None]) -> None:
    if name in BIASED and promise is mean_is_unbiased:
        with pytest.raises(AssertionError):
            promise(MAKERS[name]())
    else:
        promise(MAKERS[name]())


@pytest.mark.parametrize("name", MAKERS)
def test_resuming(name: str) -> None:
    resumes(MAKERS[name])


class Unweighted(ImportanceLevels):
    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        index = super().draw(count, generator=generator).index
        return Draw(index, torch.ones(count))


class Short(UniformLevels):
    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        drawn = super().draw(count, generator=generator)
        return Draw(drawn.index[:-1], drawn.weight[:-1])


class Stuck(UniformLevels):
    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        return Draw(torch.randperm(self.levels, generator=torch.Generator())[:count], torch.ones(count))


class Scribbling(UniformLevels):
    def update_(self, index: Tensor, norms: Tensor) -> None:
        norms.square_()


class Global(UniformLevels):
    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        return Draw(torch.randint(self.levels, (count,)), torch.ones(count))


def unweighted() -> ImportanceLevels:
    sampler, index = Unweighted(LEVELS), torch.arange(LEVELS)
    sampler.update_(index, norms_of(index) + index)
    return sampler


@pytest.mark.touches_global_rng
@pytest.mark.parametrize(
    ("promise", "make"),
    [
        (mean_is_unbiased, unweighted),
        (counts_kept, lambda: Short(LEVELS)),
        (same_generator_same_result, lambda: Stuck(LEVELS)),
        (arguments_untouched, lambda: Scribbling(LEVELS)),
        (global_generator_untouched, lambda: Global(LEVELS)),
    ],
)
def test_promises_fail_on_broken_samplers(promise: Any, make: Any) -> None:
    with pytest.raises(AssertionError):
        promise(make())


class Forgetful(ImportanceLevels):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.squares = state["squares"].clone()


def test_resuming_fails_on_a_forgetful_sampler() -> None:
    def make() -> LevelSampler:
        sampler = Forgetful(LEVELS, bins=3)
        return sampler

    with pytest.raises(AssertionError):
        resumes(make)


def test_states_of_other_settings_are_refused() -> None:
    for one, other in (
        (ImportanceLevels(LEVELS, bins=5), ImportanceLevels(LEVELS, bins=6)),
        (UniformLevels(LEVELS), UniformLevels(LEVELS + 1)),
        (LogitNormalLevels(LEVELS), LogitNormalLevels(LEVELS, mean=1.0)),
    ):
        with pytest.raises(InputError, match="sampler state"):
            other.load_state_dict(one.state_dict())


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_variance_ratio_is_that_of_the_second_moments(levels: int, bins: int, seed: int) -> None:
    """Two gradients a level: the second moment under uniform draws over that under the best draws, one by one."""
    pairs = (
        torch.randn(2, levels, 3, generator=generator(seed), dtype=torch.float64) * torch.arange(1, levels + 1)[:, None]
    )
    sampler = ImportanceLevels(levels, bins=bins)
    index = torch.arange(levels).repeat(2)
    sampler.update_(index, pairs.norm(dim=2).flatten())
    members: dict[int, list[int]] = {}
    for level in range(levels):
        members.setdefault(level * sampler.bins // levels, []).append(level)
    square = {
        level: math.fsum(float(pairs[k, m].square().sum()) for m in bin_ for k in (0, 1)) / (2 * len(bin_))
        for bin_ in members.values()
        for level in bin_
    }
    total = math.fsum(value**0.5 for value in square.values())
    best = {level: value**0.5 / total for level, value in square.items()}
    uniform = math.fsum(square.values()) / levels
    least = math.fsum(best[level] * (1 / (levels * best[level])) ** 2 * square[level] for level in square)
    found = sampler.variance_ratio()
    assert found == pytest.approx(uniform / least)
    assert found is not None
    assert found >= 1 - 1e-12


def test_the_variance_falls_as_promised() -> None:
    """Independent draws of one level by p: the spread of the weighted value, beside uniform draws."""
    sampler = learned(bins=LEVELS, floor=1e-9)
    values = norms_of(torch.arange(LEVELS))  # the gradients themselves, one number a level
    p = sampler.probabilities()
    weights = 1 / (LEVELS * p)
    second = float((p * (weights * values).square()).sum())
    assert sampler.variance_ratio() == pytest.approx(float(values.square().mean()) / second)
    assert sampler.variance_ratio() == pytest.approx(float(values.square().mean() / values.mean().square()))


def test_nothing_is_promised_before_anything_is_known() -> None:
    for make in MAKERS.values():
        fresh = make()
        known = isinstance(fresh, ImportanceLevels) and bool((fresh.counts > 0).all())
        assert (fresh.variance_ratio() is not None) == known
    sampler = ImportanceLevels(LEVELS, bins=3)
    sampler.update_(torch.tensor([0, 15]), torch.tensor([1.0, 2.0]))
    assert sampler.variance_ratio() is None
    assert torch.equal(sampler.draw(9, generator=generator()).weight, torch.ones(9))
    sampler.update_(torch.tensor([29]), torch.tensor([2.0]))
    assert sampler.variance_ratio() == pytest.approx(9 / 3 / (5 / 3) ** 2)
    still = ImportanceLevels(4)
    still.update_(torch.arange(4), torch.zeros(4))
    assert still.variance_ratio() is None
    assert torch.allclose(still.draw(9, generator=generator()).weight, torch.ones(9))
    flat = ImportanceLevels(LEVELS)
    flat.update_(torch.arange(LEVELS), torch.full((LEVELS,), 0.3))
    assert flat.variance_ratio() == pytest.approx(1)


def test_scores_are_means_at_first_and_forget_later() -> None:
    sampler = ImportanceLevels(4, bins=1, memory=10)
    total = 0.0
    for step in range(1, 10):
        sampler.update_(torch.tensor([step % 4]), torch.tensor([float(step)]))
        total += step * step
        assert float(sampler.squares) == pytest.approx(total / step)
    for _ in range(100):
        sampler.update_(torch.tensor([2]), torch.tensor([3.0]))
    assert float(sampler.squares) == pytest.approx(9, rel=1e-3)
    # A batch of n counts as n samples, in whatever order.
    sampler.update_(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert float(sampler.squares) == pytest.approx(9 + (1 - 0.9**2) * (2.5 - 9), rel=1e-3)


def test_even_draws_take_one_level_in_each_part() -> None:
    index = UniformLevels(100, even=True).draw(10, generator=generator()).index
    assert sorted((index // 10).tolist()) == list(range(10))
    assert index.tolist() != sorted(index.tolist())


def test_logit_normal_levels_are_where_the_normal_says() -> None:
    index = LogitNormalLevels(10, mean=0.5, std=0.8).draw(20_000, generator=generator()).index
    counts = torch.bincount(index, minlength=10).double()
    edges = torch.linspace(0, 1, 11, dtype=torch.float64).logit()
    shares = torch.special.ndtr((edges - 0.5) / 0.8).diff()
    assert bool(((counts - 20_000 * shares).abs() < 4.5 * (20_000 * shares * (1 - shares)).sqrt()).all())


def test_the_bound_is_the_gradients_norm_by_the_output() -> None:
    output, target = (torch.randn(3, 2, 4, 4, generator=generator(k), dtype=torch.float64) for k in range(2))
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    output.requires_grad_()
    loss = (output - target).square().flatten(1).mean(1)
    (slopes,) = torch.autograd.grad((weight * loss).sum(), output)
    bound = gradient_bound(loss, weight)
    assert not bound.requires_grad
    want = slopes.flatten(1).norm(dim=1).float()
    assert torch.allclose(bound / want, torch.full((3,), 32**0.5 / 2))
    assert torch.allclose(gradient_bound(loss) * weight, bound.double())


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: ImportanceLevels(0), "at least one of noise levels"),
        (lambda: ImportanceLevels(5, bins=0), "at least one of bins"),
        (lambda: ImportanceLevels(5, floor=0), "floor"),
        (lambda: ImportanceLevels(5, floor=1.5), "floor"),
        (lambda: ImportanceLevels(5, memory=0.5), "memory"),
        (lambda: LogitNormalLevels(5, std=0), "standard deviation"),
        (lambda: UniformLevels(5).draw(0, generator=generator()), "at least one of draws"),
        (lambda: ImportanceLevels(5).update_(torch.arange(3), torch.ones(2)), "one shape"),
        (lambda: ImportanceLevels(5).update_(torch.arange(2), torch.tensor([1.0, math.nan])), "finite norms"),
        (lambda: ImportanceLevels(5).update_(torch.arange(2), torch.tensor([1.0, -1.0])), "finite norms"),
        (lambda: ImportanceLevels(5).update_(torch.tensor([5]), torch.ones(1)), "levels from 0 to 4"),
    ],
)
def test_wrong_input(act: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        act()
