"""Attention sampling: the expectation over all locations as reference, the whole image as baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import spread_in_errors
from scrimp.primitives.draw import generator_for
from scrimp.select import Locations, expected_features, sample_locations

Estimate = Callable[..., Tensor]
_LOCATIONS, _BUDGET, _DIM = 6, 3, 3
_PROBLEMS = 8
_MANY = 200_000
BATCH, SIDE, SHRUNK, PATCH, PATCHES, CLASSES = 2, 512, 8, 32, 10, 10


def check(
    *, seed: int = 0, sample: Callable[..., Locations] = sample_locations, estimate: Estimate = expected_features
) -> list[Finding]:
    """Hold value and gradients, averaged over every ordered sample, against the expectation; count the draws."""
    problems = [_problem(seed, number) for number in range(_PROBLEMS)]
    found, noise = [], {}
    for replacement, control in itertools.product((False, True), repeat=2):
        way = f"{'with' if replacement else 'without'} replacement{', control variate' if control else ''}"
        outcomes = [_outcome(item, estimate, replacement=replacement, control=control) for item in problems]
        for part, name in enumerate(("value", "gradient of features", "gradient of attention")):
            found.append(at_most(f"{way}: {name}, bias", max(one.bias[part] for one in outcomes), 1e-9))
        noise[replacement, control] = torch.tensor([one.variance for one in outcomes])
    return [
        *found,
        *(_frequencies(sample, seed, replacement=replacement) for replacement in (False, True)),
        _at_median("variance without replacement over that with", noise[False, False] / noise[True, False], 0.65),
        _at_median("the same with the control variate", noise[False, True] / noise[True, True], 0.65),
        _at_median("variance that the control variate leaves", noise[False, True] / noise[False, False], 0.65),
    ]


def sides(*, seed: int = 0, device: str = "cpu", repeats: int = 5) -> Sides:
    """One training step on two images of 512 x 512: 10 patches of 32 x 32, or all pixels through the same layers."""
    step = _Step(seed, device)
    return Sides(step.sampled, step.whole, repeats=repeats)


def _at_median(what: str, ratios: Tensor, bound: float) -> Finding:
    return at_most(f"{what}, median of {len(ratios)} problems", float(ratios.quantile(0.5)), bound)


@dataclass(frozen=True)
class _Problem:
    """Logits [locations], features [locations, dim] and the direction [dim] in which gradients are taken."""

    logits: Tensor
    features: Tensor
    direction: Tensor


@dataclass(frozen=True)
class _Outcome:
    """Largest biases of value, feature and attention gradient; variance of the last over its mean's squared norm."""

    bias: tuple[float, float, float]
    variance: float


def _problem(seed: int, number: int) -> _Problem:
    """Features with a part in common, as those after a rectifier have."""
    generator = generator_for(seed, number)
    shapes = ((_LOCATIONS,), (_LOCATIONS, _DIM), (_DIM,))
    logits, features, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return _Problem(logits, features + 3.0, direction)


def _samples(attention: Tensor, *, replacement: bool) -> tuple[Tensor, Tensor]:
    """Every ordered sample, [samples, budget], and its probability, [samples]."""
    places = range(_LOCATIONS)
    all_ways = itertools.product(places, repeat=_BUDGET) if replacement else itertools.permutations(places, _BUDGET)
    draws = torch.tensor(list(all_ways))
    chances = torch.ones(len(draws), dtype=torch.float64)
    left = torch.ones_like(chances)
    for drawn in attention[draws].unbind(1):
        chances = chances * drawn / left
        left = left if replacement else left - drawn
    return draws, chances


def _outcome(problem: _Problem, estimate: Estimate, *, replacement: bool, control: bool) -> _Outcome:
    draws, chances = _samples(torch.softmax(problem.logits, 0), replacement=replacement)
    logits, features = (
        item.expand(len(draws), *item.shape).clone().requires_grad_() for item in (problem.logits, problem.features)
    )
    picked = features.gather(1, draws.unsqueeze(2).expand(-1, -1, _DIM))
    weights = torch.full(draws.shape, math.nan)
    values = estimate(torch.softmax(logits, 1), Locations(draws, weights, replacement), picked, control=control)
    by_logits, by_features = torch.autograd.grad((values @ problem.direction).sum(), [logits, features])
    value, exact_logits, exact_features = _exact(problem)
    pairs = ((values.detach(), value), (by_features, exact_features), (by_logits, exact_logits))
    bias = tuple(float((torch.tensordot(chances, ours, 1) - exact).abs().max()) for ours, exact in pairs)
    spread = chances @ (by_logits - exact_logits).square().sum(1) / exact_logits.square().sum()
    return _Outcome((bias[0], bias[1], bias[2]), float(spread))


def _exact(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Expected features over all locations, its gradient towards the logits and towards the features: written out."""
    attention = torch.softmax(problem.logits, 0)
    along = problem.features @ problem.direction
    return (
        attention @ problem.features,
        attention * (along - attention @ along),
        attention[:, None] * problem.direction,
    )


def _frequencies(sample: Callable[..., Locations], seed: int, *, replacement: bool) -> Finding:
    attention = torch.softmax(_problem(seed, 0).logits, 0)
    draws, chances = _samples(attention, replacement=replacement)
    bases = _LOCATIONS ** torch.arange(_BUDGET)
    drawn = sample(attention.expand(_MANY, -1), _BUDGET, replacement=replacement, generator=generator_for(seed, 99))
    counts = torch.bincount(drawn.indices @ bases, minlength=_LOCATIONS**_BUDGET)
    expected = torch.zeros(len(counts), dtype=torch.float64).index_put((draws @ bases,), chances)
    error = (expected * (1 - expected) / _MANY).sqrt()
    way = "with" if replacement else "without"
    what = f"{way} replacement: frequencies of {_MANY:,} ordered draws, standard errors off"
    return at_most(what, spread_in_errors(counts / _MANY, expected, error), 6)


class _Step:
    """Both ways of training on noise; nothing is updated, so that the work stays the same however often it is done.

    The sampled way looks at a view eight times smaller for its attention, then at patches in full resolution.
    """

    def __init__(self, seed: int, device: str) -> None:
        generator = generator_for(seed)
        self.generator = generator_for(seed, 1)
        self.images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).to(device)
        self.views = functional.avg_pool2d(self.images, SHRUNK)
        self.padded = functional.pad(self.images, [PATCH // 2] * 4)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which are replaced
            self.attend = nn.Sequential(_conv(3, 8), nn.Tanh(), _conv(8, 8), nn.Tanh(), _conv(8, 1), nn.Flatten())
            self.encode = nn.Sequential(
                *(_conv(3, 16, 2), nn.ReLU(), _conv(16, 32, 2), nn.ReLU(), _conv(32, 32, 2), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            )
            self.classify = nn.Linear(32, CLASSES)
        self.parts = nn.ModuleList([self.attend, self.encode, self.classify])
        for weight in self.parts.parameters():
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
        self.parts.to(device)

    def sampled(self) -> None:
        attention = torch.softmax(self.attend(self.views), 1)
        chosen = sample_locations(attention, PATCHES, generator=self.generator)
        features = self.encode(self._patches(chosen.indices)).view(BATCH, PATCHES, -1)
        self._learn(expected_features(attention, chosen, features))

    def whole(self) -> None:
        self._learn(self.encode(self.images))

    def _patches(self, indices: Tensor) -> Tensor:
        """Squares around the middles of the view's pixels, [batch * patches, 3, PATCH, PATCH]."""
        grid = SIDE // SHRUNK
        corners = [
            (row, place // grid * SHRUNK, place % grid * SHRUNK)
            for row, places in enumerate(indices.tolist())
            for place in places
        ]
        return torch.stack([self.padded[row, :, top : top + PATCH, left : left + PATCH] for row, top, left in corners])

    def _learn(self, features: Tensor) -> None:
        self.parts.zero_grad()
        functional.cross_entropy(self.classify(features), self.labels).backward()


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
