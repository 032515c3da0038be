"""Attention sampling by exact enumeration, against formulas in plain loops, and on maps that are hardly maps."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.select import (
    Locations,
    entropy,
    expectation,
    expected_features,
    sample_locations,
    smoothed,
    top_locations,
)

DOUBLE = torch.float64
WAYS = [(replacement, control) for replacement in (False, True) for control in (False, True)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(count: int, seed: int, *, dim: int = 3, common: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [count], features [count, dim] around ``common`` and a direction [dim] to differentiate along."""
    generator = seeded(seed)
    logits, features = (torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((count,), (count, dim)))
    return logits, features + common, torch.randn(dim, generator=generator, dtype=DOUBLE)


def all_draws(attention: list[float], budget: int, *, replacement: bool) -> tuple[list[tuple[int, ...]], Tensor]:
    """Every ordered sample and its probability, each a product over its steps."""
    places = range(len(attention))
    draws = list(itertools.product(places, repeat=budget) if replacement else itertools.permutations(places, budget))
    chances = []
    for draw in draws:
        chance, left = 1.0, 1.0
        for place in draw:
            chance *= attention[place] / left
            left -= 0.0 if replacement else attention[place]
        chances.append(chance)
    return draws, torch.tensor(chances, dtype=DOUBLE)


class Enumerated:
    """`expected_features` on every ordered sample at once: values, and gradients of one component by sample."""

    def __init__(self, logits, features, direction, budget, *, replacement, control):
        attention = torch.softmax(logits, 0)
        draws, self.chances = all_draws(attention.tolist(), budget, replacement=replacement)
        self.indices = torch.tensor(draws)
        count = len(draws)
        leaf = logits.expand(count, -1).clone().requires_grad_()
        everything = features.expand(count, -1, -1).clone().requires_grad_()
        picked = everything.gather(1, self.indices.unsqueeze(2).expand(-1, -1, features.shape[1]))
        chosen = Locations(self.indices, torch.empty(self.indices.shape), replacement)
        values = expected_features(torch.softmax(leaf, 1), chosen, picked, control=control)
        self.values = values.detach()
        self.logit_gradients, self.feature_gradients = torch.autograd.grad(
            (values @ direction).sum(), [leaf, everything]
        )

    def mean(self, values: Tensor) -> Tensor:
        return torch.tensordot(self.chances, values, 1)

    def noise(self, exact: Tensor) -> float:
        """Variance of the logits' gradient over the squared norm of its mean."""
        return float(self.mean((self.logit_gradients - exact).square().sum(1)) / exact.square().sum())


def exact_gradients(logits: Tensor, features: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expectation over all locations and its gradients, through a softmax, by autograd."""
    leaf, everything = logits.clone().requires_grad_(), features.clone().requires_grad_()
    value = torch.softmax(leaf, 0) @ everything
    slopes = torch.autograd.grad(value @ direction, [leaf, everything])
    return value.detach(), *slopes


@pytest.mark.parametrize(("replacement", "control"), WAYS)
@pytest.mark.parametrize(("count", "budget"), [(5, 3), (6, 2), (6, 3), (7, 5), (4, 4), (3, 1), (1, 1)])
def test_value_and_both_gradients_are_unbiased(count, budget, replacement, control):
    if replacement and count**budget > 5000:
        count = 5
    for seed in range(3):
        case = problem(count, seed, common=0.5)
        found = Enumerated(*case, budget, replacement=replacement, control=control)
        value, slope, feature_slope = exact_gradients(*case)
        assert float(found.chances.sum()) == pytest.approx(1, abs=1e-12)
        for ours, theirs in (
            (found.mean(found.values), value),
            (found.mean(found.logit_gradients), slope),
            (found.mean(found.feature_gradients), feature_slope),
        ):
            assert float((ours - theirs).abs().max()) < 1e-9


def test_without_control_the_gradient_towards_raw_attention_is_each_feature():
    """No softmax to hide a common shift behind: d Phi / d a_i = f_i."""
    _, features, direction = problem(5, 3)
    attention = torch.softmax(torch.randn(5, generator=seeded(1), dtype=DOUBLE), 0)
    for replacement in (False, True):
        draws, chances = all_draws(attention.tolist(), 3, replacement=replacement)
        indices = torch.tensor(draws)
        leaf = attention.expand(len(draws), -1).clone().requires_grad_()
        values = expected_features(
            leaf, Locations(indices, torch.empty(0), replacement), features[indices], control=False
        )
        (slopes,) = torch.autograd.grad((values @ direction).sum(), leaf)
        torch.testing.assert_close(chances @ slopes, features @ direction, atol=1e-10, rtol=0)


def noises(count: int, budget: int, *, replacement: bool, control: bool, common: float = 0.0) -> list[float]:
    found = []
    for seed in range(8):
        case = problem(count, seed, common=common)
        slope = exact_gradients(*case)[1]
        found.append(Enumerated(*case, budget, replacement=replacement, control=control).noise(slope))
    return found


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(("count", "budget"), [(6, 3), (7, 4)])
def test_drawing_without_replacement_takes_a_third_off_the_variance(count, budget, control):
    without, with_ = (noises(count, budget, replacement=way, control=control) for way in (False, True))
    assert all(ours < theirs for ours, theirs in zip(without, with_, strict=True))
    assert statistics.median(ours / theirs for ours, theirs in zip(without, with_, strict=True)) <= 0.65
    assert statistics.median(without) / statistics.median(with_) <= 0.65


@pytest.mark.parametrize("replacement", [False, True])
def test_the_control_variate_ignores_what_all_features_share(replacement):
    plain, shifted = (noises(6, 3, replacement=replacement, control=True, common=by) for by in (0.0, 3.0))
    assert shifted == pytest.approx(plain, rel=1e-9)
    uncontrolled = noises(6, 3, replacement=replacement, control=False, common=3.0)
    assert statistics.median(shifted) < 0.4 * statistics.median(uncontrolled)


def by_loops(
    attention: list[float], features: list[float], draw: tuple[int, ...], slope: str
) -> tuple[float, list[float], list[float]]:
    """One sample's estimate of scalar features, its gradients towards the drawn features and the drawn attentions.

    ``slope``: "official" for the published library's, "ours", or "ours, leave one out".
    """
    count, steps, masses = len(draw), [], []
    a, f = [attention[i] for i in draw], [features[i] for i in draw]
    for k in range(count):
        masses.append(1 - sum(a[:k]))
        steps.append(sum(a[j] * f[j] for j in range(k)) + masses[k] * f[k])
    towards_features = [(masses[k] + (count - k - 1) * a[k]) / count for k in range(count)]
    towards_attention = [0.0] * count
    for k in range(count):
        if slope == "official":
            towards_attention[k] = (steps[k] * masses[k] / a[k] + sum(f[:k]) - k * f[k]) / count
            continue
        others = sum(steps[m] for m in range(count) if m != k) / (count - 1) if slope != "ours" and count > 1 else 0.0
        towards_attention[k] += (f[k] - others) * masses[k] / a[k] / count
        for j in range(k):
            towards_attention[j] += (f[j] - others) / count
    return sum(steps) / count, towards_features, towards_attention


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize(("count", "budget"), [(5, 3), (4, 4), (3, 1)])
def test_every_sample_against_loops(count, budget, control):
    logits, features, _ = problem(count, 11, dim=1)
    attention = torch.softmax(logits, 0)
    draws, _ = all_draws(attention.tolist(), budget, replacement=False)
    indices = torch.tensor(draws)
    leaf = attention.expand(len(draws), -1).clone().requires_grad_()
    picked = features[indices].requires_grad_()
    values = expected_features(leaf, Locations(indices, torch.empty(0), False), picked, control=control)
    slopes = torch.autograd.grad(values.sum(), [leaf, picked])
    values = values.detach()
    for row, draw in enumerate(draws):
        way = "ours, leave one out" if control else "ours"
        expected = by_loops(attention.tolist(), features[:, 0].tolist(), draw, way)
        assert float(values[row]) == pytest.approx(expected[0], abs=1e-12)
        assert slopes[1][row, :, 0].tolist() == pytest.approx(expected[1], abs=1e-12)
        assert slopes[0][row, list(draw)].tolist() == pytest.approx(expected[2], abs=1e-9)


def test_the_published_gradient_is_what_is_biased():
    """Value and feature gradient agree with the published formulas, see above; their attention gradient is far off."""
    biases, cosines, ours = [], [], []
    for seed in range(8):
        logits, features, direction = problem(7, seed)
        attention, along = torch.softmax(logits, 0), features @ direction
        draws, chances = all_draws(attention.tolist(), 5, replacement=False)
        mean = torch.zeros(7, dtype=DOUBLE)
        for draw, chance in zip(draws, chances.tolist(), strict=True):
            slope = by_loops(attention.tolist(), along.tolist(), draw, "official")[2]
            mean[list(draw)] += chance * torch.tensor(slope, dtype=DOUBLE)
        through_softmax = attention * (mean - attention @ mean)
        exact = exact_gradients(logits, features, direction)[1]
        biases.append(float((through_softmax - exact).norm() / exact.norm()))
        cosines.append(float(torch.cosine_similarity(through_softmax, exact, 0)))
        found = Enumerated(logits, features, direction, 5, replacement=False, control=True)
        ours.append(float((found.mean(found.logit_gradients) - exact).norm() / exact.norm()))
    assert statistics.median(biases) > 0.8
    assert min(cosines) < -0.5
    assert statistics.median(cosines) < 0.5
    assert max(ours) < 1e-9


def test_with_one_draw_the_published_gradient_is_ours():
    for place in range(4):
        assert by_loops([0.1, 0.2, 0.3, 0.4], [1.0, -2.0, 3.0, 0.5], (place,), "official") == by_loops(
            [0.1, 0.2, 0.3, 0.4], [1.0, -2.0, 3.0, 0.5], (place,), "ours"
        )


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_come_as_often_as_their_probability(replacement):
    attention = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])
    draws, chances = all_draws(attention.tolist(), 2, replacement=replacement)
    many = 200_000
    chosen = sample_locations(attention.expand(many, -1), 2, replacement=replacement, generator=seeded(4))
    counts = torch.bincount(chosen.indices[:, 0] * 5 + chosen.indices[:, 1], minlength=25).double() / many
    expected = torch.zeros(25, dtype=DOUBLE)
    for draw, chance in zip(draws, chances, strict=True):
        expected[draw[0] * 5 + draw[1]] = chance
    assert bool((counts[expected == 0] == 0).all())
    errors = (counts - expected).abs() / (expected * (1 - expected) / many).sqrt().clamp_min(1e-12)
    assert float(errors[expected > 0].max()) < 4.5
    places = [i for i, value in enumerate(attention.tolist()) if value > 0]
    assert sorted(chosen.indices.unique().tolist()) == places


@pytest.mark.parametrize("replacement", [False, True])
def test_weights_are_what_each_feature_counts(replacement):
    attention = torch.rand(6, 30, generator=seeded(), dtype=DOUBLE)
    attention = attention / attention.sum(1, keepdim=True)
    chosen = sample_locations(attention, 7, replacement=replacement, generator=seeded(1))
    features = torch.randn(6, 7, 4, generator=seeded(2), dtype=DOUBLE)
    ours = expected_features(attention, chosen, features)
    torch.testing.assert_close((chosen.weights.unsqueeze(2) * features).sum(1), ours)
    torch.testing.assert_close(chosen.weights.sum(1), torch.ones(6, dtype=DOUBLE))
    if not replacement:
        for row, draw in enumerate(chosen.indices.tolist()):
            assert len(set(draw)) == 7
            expected = by_loops(attention[row].tolist(), [0.0] * 30, tuple(draw), "ours")[1]
            assert chosen.weights[row].tolist() == pytest.approx(expected, abs=1e-12)


def concentrated(mass: float, places: int, count: int) -> Tensor:
    """Logits of a map with this mass on so many places and the rest spread over the others, unevenly."""
    generator = seeded(7)
    parts = torch.rand(count, generator=generator, dtype=DOUBLE) + 0.2
    parts[:places] *= mass / parts[:places].sum()
    parts[places:] *= (1 - mass) / parts[places:].sum()
    return parts.log()[torch.randperm(count, generator=generator)]


def mean_gradient(logits: Tensor, along: Tensor, budget: int, draws: int, *, replacement: bool) -> Tensor:
    """Mean over ``draws`` samples of the gradient of one component, [count]."""
    generator, total, chunk = seeded(8), torch.zeros_like(logits), 2000
    attention = torch.softmax(logits, 0).expand(chunk, -1)
    for _ in range(draws // chunk):
        leaf = attention.clone().requires_grad_()
        chosen = sample_locations(attention, budget, replacement=replacement, generator=generator)
        values = expected_features(leaf, chosen, along[chosen.indices].unsqueeze(2))
        (slope,) = torch.autograd.grad(values.sum(), leaf)
        total += slope.sum(0)
    mean = total / draws
    return attention[0] * (mean - attention[0] @ mean)


def cosine(mass: float, places: int, draws: int, *, count: int = 1000, replacement: bool = False) -> float:
    logits, features, direction = concentrated(mass, places, count), *problem(count, 9, common=0.5)[1:]
    exact = exact_gradients(logits, features, direction)[1]
    found = mean_gradient(logits, features @ direction, 10, draws, replacement=replacement)
    return float(torch.cosine_similarity(found, exact, 0))


CONCENTRATED = [(0.9, 15), (0.99, 10), (0.9, 5)]


@pytest.mark.parametrize(("mass", "places"), CONCENTRATED)
def test_the_mean_gradient_points_the_right_way(mass, places):
    """Where the published one is at 0.88, -0.97 and -0.67."""
    assert cosine(mass, places, 4_000) > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("mass", "places"), CONCENTRATED)
def test_the_mean_gradient_points_the_right_way_with_many_draws(mass, places, replacement):
    assert cosine(mass, places, 120_000, replacement=replacement) > 0.9995


def test_the_top_is_exact_where_it_holds_all_mass():
    attention = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25, 0.0]], dtype=DOUBLE)
    features = torch.randn(2, 5, 3, generator=seeded(), dtype=DOUBLE)
    chosen = top_locations(attention, 4)
    assert chosen.indices.tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]
    assert chosen.replacement is None
    picked = features.gather(1, chosen.indices.unsqueeze(2).expand(-1, -1, 3))
    exact = expectation(attention, features)
    torch.testing.assert_close(expected_features(attention, chosen, picked), exact)
    torch.testing.assert_close((chosen.weights.unsqueeze(2) * picked).sum(1), exact)


def test_the_top_of_a_wider_map_is_renormalised_and_differentiable():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=DOUBLE, requires_grad=True)
    chosen = top_locations(attention, 2)
    assert chosen.weights.tolist()[0] == pytest.approx([4 / 7, 3 / 7])
    assert not chosen.weights.requires_grad
    features = torch.tensor([[[1.0], [5.0]]], dtype=DOUBLE)
    (slope,) = torch.autograd.grad(expected_features(attention, chosen, features).sum(), attention)
    value = (0.4 * 1 + 0.3 * 5) / 0.7
    assert slope.tolist()[0] == pytest.approx([0, (1 - value) / 0.7, 0, (5 - value) / 0.7])


@pytest.mark.parametrize("budget", [1, 3, 6])
@pytest.mark.parametrize("mass", [[1.0, 0, 0, 0, 0, 0], [0.6, 0, 0.4, 0, 0, 0]])
def test_a_budget_beyond_the_locations_with_mass_gives_the_exact_value(mass, budget):
    """Through a softmax whose other entries underflow, as when attention collapses; gradients stay finite."""
    logits = torch.tensor(mass).log().clamp_min(-1000).expand(50, -1).clone().requires_grad_()
    features = torch.randn(6, 2, generator=seeded(), dtype=torch.float32)
    attention = torch.softmax(logits, 1)
    chosen = sample_locations(attention, budget, generator=seeded(3))
    positive = sum(value > 0 for value in mass)
    first = chosen.indices[:, :positive].sort(1).values
    if budget >= positive:
        assert bool((attention.gather(1, first) > 0).all())
    assert all(len(set(row)) == budget for row in chosen.indices.tolist())
    values = expected_features(attention, chosen, features[chosen.indices])
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert bool(torch.isfinite(slope).all())
    if budget > positive:
        rest = chosen.indices[:, positive:]
        assert float(chosen.weights[:, positive:].abs().max()) == 0
        assert len(rest.unique()) == 6 - positive  # in random order, not always the first ones
    if positive == 1:
        exact = expectation(attention, features.expand(50, -1, -1))
        torch.testing.assert_close(values, exact)


def test_collapsed_maps_keep_an_unbiased_gradient():
    """Two places with mass, four draws: every order in which they can come, in float64."""
    logits = torch.tensor([0.3, -0.5], dtype=DOUBLE)
    attention = torch.cat([torch.softmax(logits, 0), torch.zeros(3, dtype=DOUBLE)])
    _, features, direction = problem(5, 2)
    mean = torch.zeros(5, dtype=DOUBLE)
    for control in (False, True):
        mean.zero_()
        for first, chance in ((0, attention[0]), (1, attention[1])):
            leaf = attention[None].clone().requires_grad_()
            indices = torch.tensor([[first, 1 - first, 4, 2]])
            values = expected_features(
                leaf, Locations(indices, torch.empty(0), False), features[indices], control=control
            )
            (slope,) = torch.autograd.grad((values @ direction).sum(), leaf)
            mean += chance * slope[0]
        exact = attention * (features @ direction - attention @ (features @ direction))
        torch.testing.assert_close(attention * (mean - attention @ mean), exact, atol=1e-12, rtol=0)


def test_one_location_is_its_feature():
    attention, features = torch.ones(3, 1), torch.randn(3, 1, 4, generator=seeded())
    chosen = sample_locations(attention, 1, generator=seeded())
    assert chosen.indices.tolist() == [[0], [0], [0]]
    torch.testing.assert_close(expected_features(attention, chosen, features), features[:, 0])
    again = sample_locations(attention, 5, replacement=True, generator=seeded())
    assert again.indices.tolist() == [[0] * 5] * 3


def test_very_small_attentions_are_finite_and_exact():
    """What is left after the first draw is far below the rounding error of 1."""
    logits = torch.tensor([[0.0, -40.0, -41.0, -42.0]], requires_grad=True)
    attention = torch.softmax(logits, 1)
    chosen = sample_locations(attention.expand(2000, -1), 3, generator=seeded(2))
    second = chosen.indices[:, 1]
    assert bool((chosen.indices[:, 0] == 0).all())
    share = float((second == 1).double().mean())
    expected = 1 / (1 + math.exp(-1) + math.exp(-2))
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5
    features = torch.tensor([[[1.0], [2.0], [-3.0]]])
    values = expected_features(attention, Locations(chosen.indices[:1], torch.empty(0), False), features)
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert bool(torch.isfinite(slope).all())
    assert float(slope.abs().max()) < 1e-15


@pytest.mark.parametrize("draw", [sample_locations, top_locations])
@pytest.mark.parametrize(
    ("attention", "said"),
    [
        (torch.tensor([[0.5, math.nan]]), "NaN"),
        (torch.tensor([[math.inf, 0.5]]), "infinite"),
        (torch.tensor([[1.5, -0.5]]), "negative"),
        (torch.tensor([[0.5, 0.6], [0.5, 0.5]]), "sums to 1.*0.1 off"),
        (torch.zeros(1, 4), "sums to 1"),
        (torch.ones(2, 0), "locations >= 1"),
        (torch.ones(1, dtype=torch.float32), "flatten"),
        (torch.full((1, 2, 2), 0.25), "flatten"),
        (torch.ones(2, 1, dtype=torch.int64), "floating"),
    ],
)
def test_what_is_no_distribution_is_refused(attention, said, draw):
    options = {"generator": seeded()} if draw is sample_locations else {}
    with pytest.raises(InputError, match=said):
        draw(attention, 1, **options)


def test_budgets_that_cannot_be_kept_are_refused():
    attention = torch.full((2, 4), 0.25)
    for draw in (lambda n: sample_locations(attention, n, generator=seeded()), lambda n: top_locations(attention, n)):
        with pytest.raises(InputError, match="at most 4"):
            draw(5)
        with pytest.raises(InputError, match="at least 1"):
            draw(0)
    with pytest.raises(InputError, match="at least 1"):
        sample_locations(attention, 0, replacement=True, generator=seeded())
    assert sample_locations(attention, 9, replacement=True, generator=seeded()).indices.shape == (2, 9)


@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 3, 3), (2, 3), (2, 3, 1, 1)])
def test_features_that_do_not_belong_are_refused(shape):
    attention = torch.full((2, 4), 0.25)
    chosen = sample_locations(attention, 3, generator=seeded())
    with pytest.raises(InputError, match=r"indices \[2, 3\]"):
        expected_features(attention, chosen, torch.zeros(shape))
    with pytest.raises(InputError, match=r"indices \[2, 3\]"):
        expected_features(attention[:1], chosen, torch.zeros(2, 3, 1))
    with pytest.raises(InputError, match="flatten"):
        expectation(attention, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("replacement", [False, True])
def test_half_precision_keeps_its_dtype_and_sums_in_single(dtype, replacement):
    logits = torch.randn(4, 1000, generator=seeded())
    attention = torch.softmax(logits, 1).to(dtype).requires_grad_()
    chosen = sample_locations(attention, 10, replacement=replacement, generator=seeded(1))
    assert chosen.weights.dtype == torch.float32
    features = torch.randn(4, 10, 8, generator=seeded(2)).to(dtype).requires_grad_()
    ours = expected_features(attention, chosen, features)
    wide = [tensor.detach().double().requires_grad_() for tensor in (attention, features)]
    theirs = expected_features(wide[0], chosen, wide[1])
    assert ours.dtype == dtype
    limit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=limit)
    for half, full in zip(
        torch.autograd.grad(ours.sum(), [attention, features]), torch.autograd.grad(theirs.sum(), wide), strict=True
    ):
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), full, rtol=limit, atol=limit * float(full.abs().max()))


def test_maps_of_half_precision_are_unbiased_although_their_sum_is_off():
    attention = torch.tensor([[0.3, 0.2, 0.1, 0.4]]).to(torch.bfloat16)
    features = torch.tensor([1.0, -2.0, 3.0, 5.0], dtype=DOUBLE)
    total = attention.double().sum()
    assert float(total) != 1
    mean = 0.0
    for draw in itertools.permutations(range(4), 2):
        a = attention[0, list(draw)].double()
        chance = a[0] / total * a[1] / (total - a[0])
        chosen = Locations(torch.tensor([draw]), torch.empty(0), False)
        mean += float(chance * expected_features(attention, chosen, features[list(draw)].view(1, 2, 1)))
    assert mean == pytest.approx(float(attention[0].double() @ features), abs=1e-12)


def both_draws() -> list[Callable[[Tensor, torch.Generator], Locations]]:
    return [
        lambda attention, generator, way=way: sample_locations(attention, 4, replacement=way, generator=generator)
        for way in (False, True)
    ]


@pytest.mark.parametrize("draw", both_draws())
def test_the_generator_alone_decides_and_nothing_is_changed(draw):
    attention = torch.softmax(torch.randn(3, 9, generator=seeded()), 1)
    features = torch.randn(3, 4, 2, generator=seeded(1))
    before = attention.clone(), features.clone(), torch.get_rng_state()
    first, second, other = (draw(attention, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)
    assert not torch.equal(first.indices, other.indices)
    again = draw(attention.double(), seeded(5))
    assert torch.equal(first.indices, again.indices)
    expected_features(attention, first, features)
    for was, now in zip(before, (attention, features, torch.get_rng_state()), strict=True):
        assert torch.equal(was, now)


def test_ties_are_drawn_evenly_and_rows_apart():
    chosen = sample_locations(torch.full((6000, 6), 1 / 6), 6, generator=seeded(1)).indices
    assert bool((chosen.sort(1).values == torch.arange(6)).all())
    first = torch.bincount(chosen[:, 0], minlength=6).double() / 6000
    assert float((first - 1 / 6).abs().max()) < 5 * (5 / 36 / 6000) ** 0.5


@pytest.mark.parametrize("way", [False, True, None])
def test_gradients_of_gradients_are_refused_or_right(way):
    attention = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    features = torch.ones(1, 2, 1, requires_grad=True)
    chosen = Locations(torch.tensor([[0, 1]]), torch.empty(0), way)
    value = expected_features(attention, chosen, features).sum()
    if way is not None:
        with pytest.raises(RuntimeError, match="no gradient of its own"):
            torch.autograd.grad(value, attention, create_graph=True)
        return
    (slope,) = torch.autograd.grad(value, attention, create_graph=True)
    (second,) = torch.autograd.grad(slope[0, 0], features)
    assert second[0, :, 0].tolist() == pytest.approx([0.3 / 0.64, -0.3 / 0.64])


def test_entropy_and_its_gradient():
    attention = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=DOUBLE)
    assert entropy(attention).tolist() == pytest.approx([math.log(4), 0, math.log(2)])
    assert entropy(attention.to(torch.bfloat16)).dtype == torch.float32
    logits = torch.tensor([[0.0, -2000.0, 1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(entropy(torch.softmax(logits, 1)).sum(), logits)
    p = math.e / (1 + math.e)
    assert slope[0, 2].item() == pytest.approx(p * (1 - p) * math.log((1 - p) / p), rel=1e-5)
    assert slope[0, 1].item() == 0
    draw = torch.softmax(torch.randn(2, 7, generator=seeded(), dtype=DOUBLE), 1)
    torch.testing.assert_close(entropy(draw), torch.distributions.Categorical(draw).entropy())


def test_smoothing_mixes_with_the_uniform_map():
    attention = torch.tensor([[1.0, 0, 0, 0]])
    assert smoothed(attention, 0.2).tolist()[0] == pytest.approx([0.85, 0.05, 0.05, 0.05])
    assert torch.equal(smoothed(attention, 0), attention)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="share"):
            smoothed(attention, share)


@cache
def loops() -> tuple[Tensor, Tensor, Tensor]:
    attention = torch.softmax(torch.randn(2, 5, generator=seeded()), 1)
    features = torch.randn(2, 5, 3, generator=seeded(1), dtype=DOUBLE)
    total = torch.zeros(2, 3, dtype=DOUBLE)
    for row, place, dim in itertools.product(range(2), range(5), range(3)):
        total[row, dim] += float(attention[row, place]) * float(features[row, place, dim])
    return attention, features, total


def test_the_expectation_is_the_sum_over_all_locations():
    attention, features, total = loops()
    torch.testing.assert_close(expectation(attention, features), total)
    every = sample_locations(attention, 5, generator=seeded())
    picked = features.gather(1, every.indices.unsqueeze(2).expand(-1, -1, 3))
    estimate = expected_features(attention, every, picked)
    assert estimate.dtype == DOUBLE
    assert float((estimate - total).abs().max()) > 1e-3  # a mean of estimates, of which the last is exact


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cpu_generator_draws_alike_for_a_gpu():
    attention = torch.softmax(torch.randn(3, 9, generator=seeded()), 1)
    for draw in both_draws():
        here, there = draw(attention, seeded(5)), draw(attention.cuda(), seeded(5))
        assert there.indices.is_cuda
        assert torch.equal(here.indices, there.indices.cpu())
