"""Leaving out easy samples: every outcome enumerated as the reference, a shuffled loop as the baseline."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import spread_in_errors
from scrimp.compare.history import rounds
from scrimp.compare.step import Workload, advance
from scrimp.select import Policy, Record, Selection, prune, uniform_sample

_SHARE, _PLANS = 0.3, 4000
_NAN = float("nan")
_SCORES = torch.tensor([0.1, 2.0, 0.4, _NAN, 3.0, 0.2, 1.9, _NAN, 0.3])
_EASY = (0, 2, 5, 8)  # below the mean of the known scores, 1.13


def check(*, seed: int = 0, policy: Callable[..., Policy] = prune) -> list[Finding]:
    """Hold the plans against all 16 outcomes for four easy samples and their probabilities."""
    plan, count = policy(share=_SHARE, final=0.125), len(_SCORES)
    record = Record(_SCORES, torch.zeros(count, dtype=torch.int64), progress=0.5)
    plans = [
        plan(record, count, generator=torch.Generator().manual_seed(seed * _PLANS + each)) for each in range(_PLANS)
    ]
    final = Record(record.scores, record.ages, progress=0.9)
    unseen = Record(torch.full((count,), _NAN), record.ages, progress=0.0)
    return [
        *_outcomes(plans),
        at_most("hard or unseen samples left out or reweighted", _disturbed(plans), 0),
        at_most("final phase: plans that differ from uniform's", _unlike_uniform(plan, final), 0),
        at_most("nothing seen yet: plans that differ from uniform's", _unlike_uniform(plan, unseen), 0),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 8, repeats: int = 80) -> Sides:
    """Steps on pruned rounds, with their planning and weighing, beside as many of a plain shuffled loop."""
    work = Workload(seed=seed, device=device)
    pruned = rounds(work, prune(), lambda losses, logits, labels: losses, seed=seed)
    return Sides(advance(pruned, steps), advance(work.plain(), steps), repeats=repeats)


def _outcomes(plans: list[Selection]) -> list[Finding]:
    """How often each subset of the easy samples stays, and what weighted value is to be expected over all subsets."""
    patterns = list(itertools.product([False, True], repeat=len(_EASY)))
    likely = torch.tensor([_probability(pattern) for pattern in patterns], dtype=torch.float64)
    seen, weights = torch.zeros(len(patterns)), torch.zeros(len(_SCORES), dtype=torch.float64)
    for plan in plans:
        kept = set(plan.indices.tolist())
        seen[patterns.index(tuple(item in kept for item in _EASY))] += 1
        weights[plan.indices] = plan.weights.double()
    values = torch.linspace(-1, 2, len(_SCORES), dtype=torch.float64)
    totals = torch.stack([_total(weights * values, pattern) for pattern in patterns])
    error = (likely * (1 - likely) / len(plans)).sqrt()
    return [
        at_most(
            "frequencies of all outcomes, standard errors off", spread_in_errors(seen / len(plans), likely, error), 6
        ),
        at_most("expected weighted sum against the sum over all", float(abs(likely @ totals - values.sum())), 1e-6),
    ]


def _probability(pattern: tuple[bool, ...]) -> float:
    result = 1.0
    for kept in pattern:
        result *= 1 - _SHARE if kept else _SHARE
    return result


def _total(weighted: Tensor, pattern: tuple[bool, ...]) -> Tensor:
    out = [item for item, kept in zip(_EASY, pattern, strict=True) if not kept]
    return weighted.sum() - weighted[out].sum()


def _disturbed(plans: list[Selection]) -> int:
    hard = [item for item in range(len(_SCORES)) if item not in _EASY]
    found = 0
    for plan in plans:
        weights = dict(zip(plan.indices.tolist(), plan.weights.tolist(), strict=True))
        found += sum(weights.get(item) != 1.0 for item in hard)
    return found


def _unlike_uniform(policy: Policy, record: Record) -> int:
    count, different = len(record.scores), 0
    for each in range(20):
        ours = policy(record, count, generator=torch.Generator().manual_seed(each))
        plain = uniform_sample(count, count, generator=torch.Generator().manual_seed(each))
        different += not (torch.equal(ours.indices, plain.indices) and torch.equal(ours.weights, plain.weights))
    return different
