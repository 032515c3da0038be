"""Presampling: Algorithm 1 of the paper term by term as the reference, a plain loop as the baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import spread_in_errors
from scrimp.compare.step import Workload, advance
from scrimp.select import Gate, Presampler, gradient_norm_bound, speedup_threshold

_SIZE, _POOL = 16, 3
_STEPS = 500


def check(*, seed: int = 0, presampler: Callable[..., Presampler] = Presampler) -> list[Finding]:
    """Hold a shut gate against the plain loader, an open one against exact expectations, its opening against tau."""
    return [
        *_shut(presampler, seed),
        *_open(presampler, seed),
        at_most("steps at which the gate is not as Algorithm 1 has it", _gate_errors(presampler, seed), 0),
        at_most("threshold against eq. 29, B = 3b", abs(speedup_threshold(384, 128) - (384 + 3 * 128) / 384), 1e-12),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 8, repeats: int = 80) -> Sides:
    """Steps through a presampler whose gate is shut, beside a plain loop's."""
    work = Workload(seed=seed, device=device)
    return Sides(advance(_through(work), steps), advance(work.plain(), steps), repeats=repeats)


def _shut(presampler: Callable[..., Presampler], seed: int) -> list[Finding]:
    """Every batch as the loader gave it, bit for bit, with weights 1 and no scoring pass."""
    generator, passes = torch.Generator().manual_seed(seed), 0
    batches = [
        (torch.randn(_SIZE, 2, generator=generator), torch.randint(0, 9, (_SIZE,), generator=generator))
        for _ in range(10)
    ]

    def score(inputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return inputs.square().sum(1)

    subject, different = presampler(score, pool=_POOL, gate=Gate(math.inf), seed=seed), 0
    for ours, plain in itertools.zip_longest(subject(batches), batches):
        alike = ours is not None and plain is not None and all(map(torch.equal, ours[:2], plain))
        different += not (alike and bool((ours[2] == 1).all()))
        subject.observe(torch.rand(_SIZE, generator=generator).square())
    return [
        at_most("gate shut: batches that differ from the loader's", different, 0),
        at_most("gate shut: scoring passes", passes, 0),
    ]


def _open(presampler: Callable[..., Presampler], seed: int) -> list[Finding]:
    """Draws from one pool again and again; inputs are the samples' values, targets their numbers."""
    generator = torch.Generator().manual_seed(seed)
    count = _POOL * _SIZE
    scores = 0.05 + torch.rand(count, generator=generator).square()
    values = torch.randn(count, 1, generator=generator)
    pool = list(zip(values.split(_SIZE), torch.arange(count).split(_SIZE), strict=True))
    gate = Gate(0.0)
    gate.tau = 1.0
    subject = presampler(lambda inputs, targets: scores[targets], pool=_POOL, gate=gate, seed=seed)
    stream = itertools.islice(itertools.cycle(pool), _POOL * _STEPS)
    taken = [tuple(item.clone() for item in batch) for batch in subject(stream)]
    inputs, targets, weights = (torch.cat(part) for part in zip(*taken, strict=True))
    p = scores.double() / scores.double().sum()
    known, draws = torch.zeros_like(p), len(targets)
    known[targets] = weights.double()
    frequency = torch.bincount(targets, minlength=count) / draws
    mean = values.double().mean()
    return [
        at_most("gate open: draws more or fewer than b a step", abs(draws - _STEPS * _SIZE), 0),
        at_most("gate open: rows that do not belong to their targets", int((inputs != values[targets]).sum()), 0),
        at_most(
            "gate open: expected weighted value against the mean",
            float(((p * known) @ values.double() - mean).abs()),
            1e-5,
        ),
        at_most(
            "gate open: frequencies, standard errors off",
            spread_in_errors(frequency, p, (p * (1 - p) / draws).sqrt()),
            6,
        ),
    ]


def _gate_errors(presampler: Callable[..., Presampler], seed: int) -> int:
    """Heavy scores come one batch after another: when does the moving average of tau pass the threshold?"""
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(1.5, momentum=0.9)
    subject = presampler(lambda inputs, targets: inputs, pool=_POOL, gate=gate, seed=seed)
    average, errors = 0.0, 0
    batch = (torch.ones(_SIZE), torch.zeros(_SIZE))
    stream = subject(itertools.repeat(batch))
    for _ in range(30):
        next(stream)
        scores = torch.rand(_SIZE, generator=generator) ** 8
        g = scores.double() / scores.double().sum()
        expected = average > 1.5
        errors += (subject.consumed == _POOL) != expected
        if expected:  # the pool's own even scores, tau = 1, have moved the gate already
            average = 0.9 * average + 0.1
            continue
        subject.observe(scores)
        average = 0.9 * average + 0.1 * math.sqrt(_SIZE * float(g.square().sum()))
    return errors


def _through(work: Workload) -> Iterator[None]:
    def score(images: Tensor, labels: Tensor) -> Tensor:
        return gradient_norm_bound(work.model(images), labels)

    presampler = Presampler(score, pool=_POOL, gate=Gate(math.inf))
    for images, labels, weights in presampler(work.batches()):
        logits = work.model(images)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        work.learn((weights * losses).mean())
        presampler.observe(gradient_norm_bound(logits, labels))
        yield
