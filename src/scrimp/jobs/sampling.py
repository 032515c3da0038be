"""The sampling policies by the names the shell knows them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scrimp.jobs.config import ModelConfig
from scrimp.select import Policy, gradient_norm_bound, history, prune, uniform

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sampling:
    """A policy, the scores it plans by, and whether batches are presampled."""

    policy: Policy
    scores: Scores
    presample: bool = False


def by_bound(losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Score by the bound on the gradient norm, [batch]."""
    return gradient_norm_bound(logits, targets)


def by_loss(losses: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Score by the loss, [batch]."""
    return losses.detach()


SAMPLINGS: dict[str, Callable[[ModelConfig], Sampling]] = {
    "uniform": lambda config: Sampling(uniform, by_bound),
    "history": lambda config: Sampling(history(mix=config.mix, gate=config.gate), by_bound),
    "prune": lambda config: Sampling(prune(), by_loss),
    "presample": lambda config: Sampling(uniform, by_bound, presample=True),
}
