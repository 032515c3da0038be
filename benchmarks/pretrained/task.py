"""What a pretrained model is asked: a number of samples, one small output a sample, a score over all outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Task:
    """A model on real data.

    Attributes:
        name: of the model, in receipts.
        about: model, data and metric in one line.
        metric: which of the scores is the task's own; higher is better.
        tokens: of one attention call; ``causal`` whether its queries see only what came before.
        model: frozen; its attention goes through torch's scaled_dot_product_attention.
        output: runs the model on one sample; number ``samples`` is one more, which is never scored.
        score: figures over the outputs of all samples, in their order.
        notes: what a reader of the figures must know.
    """

    name: str
    about: str
    metric: str
    tokens: int
    causal: bool
    samples: int
    model: nn.Module
    output: Callable[[int], Tensor]
    score: Callable[[Sequence[Tensor]], dict[str, float]]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def seen(self) -> float:
        """Share of all pairs of query and key that attention is over."""
        return (self.tokens + 1) / (2 * self.tokens) if self.causal else 1.0
