"""Importance sampling: exact per-sample gradients as the reference, uniform sampling as the baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.compare.comparison import Finding, Sides, at_least, at_most
from scrimp.compare.exact import Problem, deviation, drifted, spread_in_errors
from scrimp.compare.step import BATCH, Workload, advance
from scrimp.select import (
    Selection,
    gradient_norm_bound,
    importance_sample,
    output_gradient_norm,
    uniform_sample,
    variance_reduction,
)

MEANS, DRAWS = 2000, 512  # means over which the estimate runs, and draws in each: noise of 0.32 % against 1 %
_MANY = 1_000_000  # draws after which the rarest sample (p = 2e-5) has been seen, and frequencies are sharp
_POOL = 3


def check(
    *,
    seed: int = 0,
    sample: Callable[..., Selection] = importance_sample,
    bound: Callable[[Tensor, Tensor], Tensor] = gradient_norm_bound,
    tau: Callable[[Tensor], float] = variance_reduction,
) -> list[Finding]:
    """Hold the draws, their weights, the bound and tau against exact gradients and the paper's formulas."""
    problem, generator = drifted(), torch.Generator().manual_seed(seed)
    scores = bound(problem.logits, problem.targets)
    exact = output_gradient_norm(
        lambda logits: functional.cross_entropy(logits, problem.targets, reduction="none"), problem.logits
    )
    norms = problem.gradients.norm(dim=1)
    return [
        *_unbiased(problem, scores, sample, generator),
        at_least("rank correlation of bound and exact gradient norms", _spearman(norms, scores), 0.9),
        at_most("bound against the gradient at the outputs", float((scores - exact).abs().max()), 1e-12),
        at_most("tau against the paper's formula", abs(tau(scores) - _papers_tau(scores)), 1e-9),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 4, repeats: int = 30) -> Sides:
    """Steps that score 192 images and train on 64 of them, beside steps that train on 64 as they come."""
    problem, work = drifted(), Workload(seed=seed, device=device)
    scores = gradient_norm_bound(problem.logits, problem.targets)
    even = torch.full_like(scores, 1.0 / len(scores))
    noise = tuple(deviation(problem.gradients, each, BATCH) for each in (scores / scores.sum(), even))
    return Sides(
        method=advance(_presampled(work, torch.Generator().manual_seed(seed)), steps),
        baseline=advance(_uniform(work, torch.Generator().manual_seed(seed)), steps),
        quality={"gradient_noise": (noise[0], noise[1])},
        repeats=repeats,
    )


def _unbiased(
    problem: Problem, scores: Tensor, sample: Callable[..., Selection], generator: torch.Generator
) -> list[Finding]:
    gradients, count = problem.gradients, len(scores)
    mean, p = gradients.mean(0), scores / scores.sum()
    many = sample(scores, _MANY, generator=generator)
    weights = torch.zeros_like(p)
    weights[many.indices] = many.weights.to(p.dtype)
    frequency = torch.bincount(many.indices, minlength=count) / _MANY
    shares = torch.zeros_like(p)
    for _ in range(MEANS):
        chosen = sample(scores, DRAWS, generator=generator)
        shares.index_add_(0, chosen.indices, chosen.weights.to(p.dtype))
    estimate = shares @ gradients / (DRAWS * MEANS)
    return [
        at_most("expected weighted gradient against the mean, relative", _apart((p * weights) @ gradients, mean), 1e-6),
        at_most(
            f"frequencies of {_MANY:,} draws, standard errors off",
            spread_in_errors(frequency, p, (p * (1 - p) / _MANY).sqrt()),
            6,
        ),
        at_most(f"mean of {MEANS:,} weighted gradients against the full batch", _apart(estimate, mean), 0.01),
    ]


def _apart(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([item.argsort().argsort().double() for item in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _papers_tau(scores: Tensor) -> float:
    """1 / sqrt(1 - ||g - u||^2 / sum g^2), section 3.3 of the paper, term by term."""
    g = [float(item) / float(scores.sum()) for item in scores]
    distance = sum((item - 1 / len(g)) ** 2 for item in g)
    return 1 / math.sqrt(1 - distance / sum(item**2 for item in g))


def _presampled(work: Workload, generator: torch.Generator) -> Iterator[None]:
    while True:
        pool = uniform_sample(len(work), _POOL * BATCH, generator=generator).indices
        images, labels = work.images[pool], work.labels[pool]
        with torch.no_grad():
            scores = gradient_norm_bound(work.model(images), labels)
        chosen = importance_sample(scores, BATCH, generator=generator)
        losses = functional.cross_entropy(work.model(images[chosen.indices]), labels[chosen.indices], reduction="none")
        work.learn((chosen.weights * losses).mean())
        yield


def _uniform(work: Workload, generator: torch.Generator) -> Iterator[None]:
    while True:
        rows = uniform_sample(len(work), BATCH, generator=generator).indices
        work.learn(functional.cross_entropy(work.model(work.images[rows]), work.labels[rows]))
        yield
