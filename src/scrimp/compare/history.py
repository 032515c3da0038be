"""Sampling by the record of past scores: planned counts as the reference, a shuffled loop as the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import spread_in_errors
from scrimp.compare.step import BATCH, Workload, advance
from scrimp.select import Policy, Record, RoundSampler, gradient_norm_bound, history, uniform_sample

_COUNT, _BUDGET, _MIX = 40, 100, 0.2
_PLANS = 2000
_STALENESS = 4


def check(*, seed: int = 0, policy: Callable[..., Policy] = history) -> list[Finding]:
    """Hold plans against ``budget * p``, a shut gate against uniform plans, visits against the staleness bound."""
    return [
        *_counts(policy, seed),
        at_most("gate shut: plans that differ from uniform's", _unlike_uniform(policy, seed), 0),
        at_most("passes from visit to visit, at most staleness + 2", _longest_gap(policy, seed), _STALENESS + 2),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 8, repeats: int = 80) -> Sides:
    """Steps dealt, weighed and noted by a sampler whose gate is shut, beside a plain shuffled loop's."""
    work = Workload(seed=seed, device=device)
    shut = rounds(work, history(gate=math.inf), by_bound, seed=seed)
    return Sides(advance(shut, steps), advance(work.plain(), steps), repeats=repeats)


def rounds(
    work: Workload, policy: Policy, scores: Callable[[Tensor, Tensor, Tensor], Tensor], *, seed: int
) -> Iterator[None]:
    """Training steps through a `RoundSampler`, without end; ``scores`` is given losses, logits and labels."""
    sampler = RoundSampler(len(work), BATCH, policy=policy, seed=seed)
    while True:
        for rows in sampler:
            labels = work.labels[rows]
            logits = work.model(work.images[rows])
            losses = functional.cross_entropy(logits, labels, reduction="none")
            work.learn(sampler.weigh(losses, scores(losses, logits, labels)))
            yield


def by_bound(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return gradient_norm_bound(logits, labels)


def _record(seed: int) -> Record:
    scores = torch.rand(_COUNT, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-3
    return Record(scores, torch.zeros(_COUNT, dtype=torch.int64))


def _counts(policy: Callable[..., Policy], seed: int) -> list[Finding]:
    record, plan = _record(seed), policy(mix=_MIX, gate=1.0)
    p = (1 - _MIX) * record.scores.double() / record.scores.double().sum() + _MIX / _COUNT
    expected = _BUDGET * p
    counts, weights = [], torch.zeros_like(p)
    for each in range(_PLANS):
        chosen = plan(record, _BUDGET, generator=torch.Generator().manual_seed(seed * _PLANS + each))
        counts.append(torch.bincount(chosen.indices, minlength=_COUNT))
        weights[chosen.indices] = chosen.weights.double()
    found = torch.stack(counts).double()
    share = expected - expected.floor()  # how often the count is the next whole number up
    values = torch.linspace(-1, 2, _COUNT, dtype=torch.float64)
    return [
        at_most("count in any one plan against budget * p", float((found - expected).abs().max()), 1),
        at_most(
            f"mean count over {_PLANS:,} plans, standard errors off",
            spread_in_errors(found.mean(0), expected, (share * (1 - share) / _PLANS).sqrt()),
            6,
        ),
        at_most("expected weighted value against the mean", float(abs((p * weights) @ values - values.mean())), 1e-6),
    ]


def _unlike_uniform(policy: Callable[..., Policy], seed: int) -> int:
    record, shut, different = _record(seed), policy(gate=math.inf), 0
    for each in range(20):
        ours = shut(record, _BUDGET, generator=torch.Generator().manual_seed(each))
        plain = uniform_sample(_COUNT, _BUDGET, generator=torch.Generator().manual_seed(each))
        different += not (torch.equal(ours.indices, plain.indices) and torch.equal(ours.weights, plain.weights))
    return different


def _longest_gap(policy: Callable[..., Policy], seed: int) -> float:
    """The longest any sample waits, in passes, while a quarter of them would hardly ever be drawn for their scores.

    A score's age counts whole passes and is asked once a round: ``staleness`` may come to nearly two passes more.
    """
    count, batch = 96, 16
    scores = torch.where(torch.arange(count) % 4 == 0, 1e-4, 1.0)
    sampler = RoundSampler(count, batch, policy=policy(mix=0.05, gate=1.0, staleness=_STALENESS), seed=seed)
    seen, draws, longest = torch.zeros(count, dtype=torch.int64), 0, 0
    for _ in range(40):
        for rows in sampler:
            sampler.weigh(scores[rows])
            longest = max(longest, int((draws - seen).max()))
            seen[rows] = draws
            draws += batch
    return longest / count
