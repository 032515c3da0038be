"""The distribution of a pixel's value, 0 to 255, from a network's outputs: exact log-probabilities and draws."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 256
MIXTURES = 10
DRAWS = 2
"""Uniform numbers that one pixel's draw takes."""
_FINEST = -7.0  # log of the least scale: a hundredth of the distance between two values


class PixelOutput(Protocol):
    """How outputs [..., width] stand for a distribution over 0 to 255."""

    width: int

    def first(self) -> Tensor:
        """Outputs [width] to begin training at: nearly every value alike."""

    def nats(self, outputs: Tensor, pixels: Tensor) -> Tensor:
        """``-ln p(pixel)``, [...], of whole numbers ``pixels`` [...]; the probabilities of 0 to 255 sum to 1."""

    def draw(self, outputs: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        """A pixel each, int64 [batch], from outputs [batch, width] and uniform numbers [batch, DRAWS] in [0, 1)."""


class Categorical:
    """One logit for each value."""

    width = LEVELS

    def first(self) -> Tensor:
        return torch.zeros(LEVELS)

    def nats(self, outputs: Tensor, pixels: Tensor) -> Tensor:
        flat = functional.cross_entropy(outputs.flatten(0, -2), pixels.long().flatten(), reduction="none")
        return flat.view(pixels.shape)

    def draw(self, outputs: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        return _draw_index(outputs if temperature == 1 else outputs / temperature, uniforms[:, :1])


class Logistics:
    """A mixture of ten logistics, each cut into the 256 values; the outer two values take the tails.

    Source: Salimans et al., "PixelCNN++", ICLR 2017 (arXiv 1701.05517), section 2.1, each colour channel on its own.
    """

    width = 3 * MIXTURES

    def first(self) -> Tensor:
        means = torch.linspace(-1, 1, MIXTURES)
        return torch.cat([torch.zeros(MIXTURES), means, torch.full((MIXTURES,), math.log(1 / MIXTURES))])

    def nats(self, outputs: Tensor, pixels: Tensor) -> Tensor:
        logits, means, scales = outputs.split(MIXTURES, -1)
        inverse = scales.clamp_min(_FINEST).neg().exp()
        centre = (pixels.to(outputs.dtype) / 127.5 - 1).unsqueeze(-1) - means
        upper, lower = (centre + 1 / 255) * inverse, (centre - 1 / 255) * inverse
        # ln(s(u) - s(l)) = ln s(u) + ln s(-l) + ln(1 - exp(l - u)): exact where the plain difference rounds to 0.
        above, below = functional.logsigmoid(upper), functional.logsigmoid(-lower)
        between = above + below + torch.log(-torch.expm1(inverse * (-2 / 255)))
        value = pixels.unsqueeze(-1)
        inside = torch.where(value == 0, above, torch.where(value == LEVELS - 1, below, between))
        return -torch.logsumexp(logits.log_softmax(-1) + inside, -1)

    def draw(self, outputs: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        logits = outputs[:, :MIXTURES]
        chosen = _draw_index(logits if temperature == 1 else logits / temperature, uniforms[:, :1])[:, None]
        mean = outputs[:, MIXTURES : 2 * MIXTURES].gather(1, chosen)[:, 0]
        scale = outputs[:, 2 * MIXTURES :].gather(1, chosen)[:, 0].clamp_min(_FINEST).exp()
        value = mean + scale * temperature * torch.logit(uniforms[:, 1], eps=1e-6)
        return value.add_(1).mul_(127.5).round_().clamp_(0, LEVELS - 1).long()


OUTPUTS: dict[str, PixelOutput] = {"categorical": Categorical(), "logistics": Logistics()}


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


def _draw_index(logits: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform: the first index at which the cumulative probability passes ``uniform`` [batch, 1]."""
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    # The last sum may round to less than 1: scaled by it, no uniform number lies beyond.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0].clamp_max_(
        logits.shape[1] - 1
    )
