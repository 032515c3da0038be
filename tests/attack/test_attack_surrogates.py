"""Each loss against loops in float64 and its gradient against finite differences; odd and degenerate sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scrimp.attack import (
    attention_surrogate,
    exits_surrogate,
    ponder_surrogate,
    prior_surrogate,
    running_surrogate,
    samples_surrogate,
    scores_surrogate,
    significance_surrogate,
    usage_surrogate,
)
from scrimp.primitives.errors import InputError


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _slopes(loss: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(loss, [one.clone().requires_grad_() for one in inputs])


def test_ponder_is_minus_blocks_and_remainder() -> None:
    layers, rest = torch.tensor([[1, 3, 2], [4, 4, 4]]), _draw(2, 3)
    wanted = [-sum(int(n) + float(r) for n, r in zip(*row, strict=True)) / 3 for row in zip(layers, rest, strict=True)]
    assert ponder_surrogate(layers, rest).tolist() == pytest.approx(wanted, rel=1e-14)
    _slopes(lambda r: ponder_surrogate(layers, r), rest)


def test_prior_is_the_divergence_of_each_image() -> None:
    scores = [_draw(2, 5, seed=seed) for seed in range(4)]
    scores[2] = scores[2] * 0
    bell = [math.exp(-(((place - 2.5) / 0.8) ** 2) / 2) for place in (1, 2, 3, 4)]
    wanted = []
    for image in range(2):
        mass = [float(score[image].sum()) for score in scores]
        share = [part / sum(mass) for part in mass]
        target = [b / sum(bell) for b in bell]
        wanted.append(-sum(p * math.log(p / t) for p, t in zip(share, target, strict=True) if p))
    got = prior_surrogate(scores, depth=2.5, spread=0.8)
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)
    _slopes(lambda *s: prior_surrogate(s, depth=2.5), scores[0], scores[1], scores[3])
    assert prior_surrogate([torch.zeros(1, 3)] * 2, depth=1.0).tolist() == [0]


def test_scores_fall_as_tokens_run_on_however_sure_they_halt() -> None:
    scores = [0.9 * _draw(2, 3, seed=seed) for seed in range(3)]
    layers = torch.tensor([[3, 3, 3], [1, 2, 3]])
    scores = [score * (layers > index) for index, score in enumerate(scores)]
    wanted = []
    for image in range(2):
        tokens = []
        for token in range(3):
            ran = sum(-math.log(1 - float(score[image, token])) for score in scores)
            tokens.append(ran - math.log(1e-6) * (3 - int(layers[image, token])))
        wanted.append(sum(tokens) / 3)
    assert scores_surrogate(scores, layers).tolist() == pytest.approx(wanted, rel=1e-12)
    _slopes(lambda *s: scores_surrogate(s, layers), *scores)
    sure = torch.tensor([[1.0, 0.9999]], requires_grad=True)
    loss = scores_surrogate([sure, torch.zeros(1, 2)], torch.tensor([[1, 1]]))
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert sure.grad is not None
    assert sure.grad[0].tolist() == [0, pytest.approx(0.5 / (1 - 0.9999), rel=1e-2)]


def test_attention_is_the_weighted_distance_from_uniform() -> None:
    attention = [_draw(2, 3, 5, seed=seed) for seed in range(6)]
    alive = [torch.ones(2, 5, dtype=torch.bool), *[torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()] * 5]
    wanted = [0.0, 0.0]
    for layer, (row, there) in enumerate(zip(attention, alive, strict=True)):
        weight = (1, 0.2, 0.05, 0.01, 0.005, 0.005)[layer]
        for image in range(2):
            left = [token for token in range(5) if there[image, token]]
            for head in range(3):
                for token in left[1:]:
                    wanted[image] += weight * (float(row[image, head, token]) - 1 / len(left)) ** 2
    assert attention_surrogate(attention, alive).tolist() == pytest.approx(wanted, rel=1e-12)
    _slopes(lambda *rows: attention_surrogate(rows, alive), *attention)
    even = torch.full((1, 2, 4), 0.25)
    assert attention_surrogate([even], [torch.ones(1, 4).bool()]).tolist() == [0]
    with pytest.raises(InputError, match="sample in some block"):
        attention_surrogate([], [])
    for surrogate in (significance_surrogate, lambda *two: samples_surrogate(*two, samples=3)):
        with pytest.raises(InputError, match="sample in some block"):
            surrogate([], [])


def test_significance_is_the_divergence_from_uniform() -> None:
    masses, alive = [_draw(3, 4), _draw(3, 4, seed=1)], torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    wanted = []
    for image in range(3):
        total = 0.0
        for mass in masses:
            there = [float(mass[image, token]) for token in range(4) if alive[image, token]]
            share = [one / sum(there) for one in there]
            total += sum(one * math.log(one * len(there)) for one in share)
        wanted.append(total)
    got = significance_surrogate(masses, [alive, alive])
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)
    _slopes(lambda *m: significance_surrogate(m, [alive, alive]), *masses)
    blank = torch.zeros(1, 4, requires_grad=True)
    nothing = significance_surrogate([blank], [torch.ones(1, 4).bool()])
    assert nothing.tolist() == [0]


def test_samples_are_the_tokens_hit_over_all_offsets_of_the_grid() -> None:
    mass = torch.rand(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    there = torch.ones(2, 7, dtype=torch.bool)
    there[1, 4:] = False
    found = samples_surrogate([mass, mass], [there, there], samples=5)
    for image in range(2):
        alive = mass[image][there[image]]
        edges = torch.cat([alive.new_zeros(1), (alive / alive.sum()).cumsum(0)])
        hits = []
        for offset in range(1000):
            points = (torch.arange(5) + (offset + 0.5) / 1000) / 5
            hits.append(len(torch.searchsorted(edges, points.double()).unique()))
        assert float(found[image]) == pytest.approx(-2 * sum(hits) / 1000, abs=0.03)
    assert torch.equal(samples_surrogate([mass], [there], samples=None), samples_surrogate([mass], [there], samples=99))


def test_running_is_the_count_of_tokens_as_the_step_gets_steep() -> None:
    scores = [torch.tensor([[0.5, 0.2, 1.0]]), torch.tensor([[0.6, 0.3, 0.0]]), torch.tensor([[0.0, 0.4, 0.0]])]
    steep = running_surrogate(scores, full=0.99, spread=1e-4)
    assert float(steep) == pytest.approx(-(2 + 1) / 3, abs=1e-6)  # two tokens in the second block, one in the third
    parts = [1 / (1 + math.exp(-(0.99 - spent) / 0.1)) for spent in (0.5, 0.2, 1.0, 1.1, 0.5, 1.0)]
    assert float(running_surrogate(scores)) == pytest.approx(-sum(parts) / 3, rel=1e-5)
    assert float(running_surrogate(scores[:1])) == 0


def test_usage_is_minus_the_squared_shares() -> None:
    tokens, heads, layers = _draw(2, 7), _draw(2, 4, seed=1), _draw(2, 3, seed=2)
    wanted = []
    for image in range(2):
        shares = [sum(map(float, kind[image])) / kind.shape[1] for kind in (tokens, heads, layers)]
        wanted.append(-(shares[0] ** 2 + 2 * shares[1] ** 2 + 3 * shares[2] ** 2))
    got = usage_surrogate(tokens, heads, layers, weights=(1, 2, 3))
    assert got.tolist() == pytest.approx(wanted, rel=1e-12)
    _slopes(usage_surrogate, tokens, heads, layers)


def test_exits_are_held_against_the_uniform_answer() -> None:
    exits = [_draw(2, 3, seed=seed) * 4 for seed in range(2)]
    wanted = []
    for image in range(2):
        total = 0.0
        for out in exits:
            whole = math.log(sum(math.exp(float(logit)) for logit in out[image]))
            total += sum((whole - float(logit)) / 3 for logit in out[image])
        wanted.append(total)
    assert exits_surrogate(exits).tolist() == pytest.approx(wanted, rel=1e-12)
    _slopes(lambda *outs: exits_surrogate(outs), *exits)
    assert float(exits_surrogate([torch.zeros(1, 3)])[0]) == pytest.approx(math.log(3))
