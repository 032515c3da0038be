"""A problem small enough for exact answers: a trained network, data that moved on, every sample's own gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_COUNT, _FEATURES, _HIDDEN, _CLASSES = 96, 6, 16, 3


@dataclass(frozen=True)
class Problem:
    """A classifier's view of some samples, float64.

    Attributes:
        logits: [count, classes].
        targets: [count], int64.
        gradients: each sample's cross-entropy gradient over all parameters, [count, parameters].
    """

    logits: Tensor
    targets: Tensor
    gradients: Tensor


@cache
def drifted() -> Problem:
    """A network trained on one set of samples, looking at 96 others whose classes have moved.

    On the training set itself the mean gradient all but vanishes beside its noise, so that no estimate of it could be
    held to 1 %. Here one draw under importance sampling deviates by 3.2 times the mean gradient's norm.
    """
    generator = torch.Generator().manual_seed(1)
    weights = _initial(generator)
    inputs = torch.randn(_COUNT, _FEATURES, generator=generator, dtype=torch.float64)
    weights = _trained(weights, inputs, _classes(inputs, 0.0))
    inputs = torch.randn(_COUNT, _FEATURES, generator=generator, dtype=torch.float64)
    targets = _classes(inputs, 0.5)
    return Problem(_logits(weights, inputs).detach(), targets, _sample_gradients(weights, inputs, targets))


def deviation(gradients: Tensor, probabilities: Tensor, batch: int) -> float:
    """Standard deviation of a batch's mean gradient, as a share of the norm of what it estimates; exact.

    Args:
        gradients: [count, parameters].
        probabilities: of each draw, [count]; each sample is weighted 1 / (count p).
        batch: independent draws.
    """
    mean = gradients.mean(0)
    weighted = gradients / (len(gradients) * probabilities[:, None])
    variance = (probabilities * weighted.square().sum(1)).sum() - mean.square().sum()
    return float((variance.clamp_min(0) / batch).sqrt() / mean.norm())


def spread_in_errors(found: Tensor, expected: Tensor, error: Tensor) -> float:
    """The largest deviation, in standard errors; where there is no error, as good as none is allowed."""
    return float(((found - expected).abs() / error.clamp_min(1e-9)).max())


def _initial(generator: torch.Generator) -> list[Tensor]:
    shapes = [(_HIDDEN, _FEATURES), (_HIDDEN,), (_CLASSES, _HIDDEN), (_CLASSES,)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]


def _classes(inputs: Tensor, moved: float) -> Tensor:
    return (inputs[:, 0] > 1.0 - moved).long() + (inputs[:, 1] > 1.2 - moved).long()


def _logits(weights: list[Tensor], inputs: Tensor) -> Tensor:
    hidden = torch.tanh(functional.linear(inputs, weights[0], weights[1]))
    return functional.linear(hidden, weights[2], weights[3])


def _trained(
    weights: list[Tensor], inputs: Tensor, targets: Tensor, *, steps: int = 60, rate: float = 0.5
) -> list[Tensor]:
    for _ in range(steps):
        weights = [item.detach().requires_grad_() for item in weights]
        loss = functional.cross_entropy(_logits(weights, inputs), targets)
        weights = [item - rate * slope for item, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
    return [item.detach().requires_grad_() for item in weights]


def _sample_gradients(weights: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    rows = []
    for one, target in zip(inputs, targets, strict=True):
        loss = functional.cross_entropy(_logits(weights, one[None]), target[None])
        rows.append(torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)
