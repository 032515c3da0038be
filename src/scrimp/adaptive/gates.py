"""The gates of `scrimp.adaptive.gating`: a small module of its own, and what it decides for a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.primitives.draw import generator_for

_OPEN = 1.0  # by how many tau the logits of new gates are above the threshold: open, and noise closes some in training


@dataclass(frozen=True)
class Decision:
    """The gates of one block.

    Each kind has which are open, bool, and the gates as numbers 0 or 1 with the gradient of the sigmoid: layers
    [images, 2], attention and MLP, or [images, 1] for both; heads [images, heads]; tokens [images, tokens], where
    prefix tokens are always open.
    """

    layers: Tensor
    layer_gates: Tensor
    heads: Tensor
    head_gates: Tensor
    tokens: Tensor
    token_gates: Tensor

    def attention(self) -> Tensor:
        """Tokens that attention runs on, [images, tokens], bool."""
        return self.tokens & self.layers[:, :1]

    def mlp(self) -> Tensor:
        """Tokens that the MLP runs on."""
        return self.tokens & self.layers[:, -1:]

    def attention_gates(self) -> Tensor:
        """`attention` as numbers."""
        return self.token_gates * self.layer_gates[:, :1]

    def mlp_gates(self) -> Tensor:
        """`mlp` as numbers."""
        return self.token_gates * self.layer_gates[:, -1:]


class Gates(nn.Module):
    """Linear gates of some blocks: ``image[i]`` gives logits of block i's layers and heads, ``token[i]`` a token's.

    Attributes:
        steps: forwards in training so far, int64; part of the noise's seed, and of the state_dict.
    """

    steps: Tensor

    def __init__(
        self, width: int, layers: Sequence[int], heads: Sequence[int], tau: float, thresholds: tuple[float, float]
    ) -> None:
        super().__init__()
        self.layers, self.tau, self.thresholds = tuple(layers), tau, thresholds
        outs = [layer + head for layer, head in zip(layers, heads, strict=True)]
        coarse, fine = (tau * (math.log(threshold / (1 - threshold)) + _OPEN) for threshold in thresholds)
        self.image = nn.ModuleList(_linear(width, out, coarse) for out in outs)
        self.token = nn.ModuleList(_linear(width, 1, fine) for _ in outs)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def flops(self, index: int, tokens: int) -> int:
        """What the decisions of a block cost for an image."""
        image = self.image[index]
        assert isinstance(image, nn.Linear)
        return 2 * image.in_features * (image.out_features + tokens)

    def draw(self, seed: int) -> torch.Generator:
        """The generator of the next forward in training."""
        self.steps += 1
        return generator_for(seed, int(self.steps))

    def decide(
        self,
        index: int,
        x: Tensor,
        *,
        prefix: int,
        by_class: bool,
        cap: int | None,
        draw: torch.Generator | None,
    ) -> Decision:
        """The gates for tokens [images, tokens, dim] that come to a block; at most ``cap`` patch tokens are open."""
        coarse, fine = self.thresholds
        of_image = _apply(self.image[index], x[:, 0] if by_class else x.mean(1))
        of_token = _apply(self.token[index], x)[:, prefix:, 0]
        soft, soft_tokens = self._soft(of_image, draw), self._soft(of_token, draw)
        on, on_tokens = soft > coarse, soft_tokens > fine
        if cap is not None and cap < on_tokens.shape[1]:
            on_tokens = on_tokens & _largest(of_token.detach(), cap)
        always = torch.ones(len(x), prefix, dtype=torch.bool, device=x.device)
        gates, cut = _straight(on, soft), self.layers[index]
        return Decision(
            layers=on[:, :cut],
            layer_gates=gates[:, :cut],
            heads=on[:, cut:],
            head_gates=gates[:, cut:],
            tokens=torch.cat([always, on_tokens], 1),
            token_gates=torch.cat([always.to(x.dtype), _straight(on_tokens, soft_tokens)], 1),
        )

    def _soft(self, logits: Tensor, draw: torch.Generator | None) -> Tensor:
        if draw is not None:
            uniform = torch.rand(logits.shape, generator=draw, dtype=torch.float64).clamp_min(1e-300)
            logits = logits + (uniform.log() - (-uniform).log1p()).to(logits)
        return (logits / self.tau).sigmoid()


def through(on: Tensor, gate: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """``new`` where a gate is on, else ``old`` (None: 0); the gate's gradient is that of old + gate * (new - old).

    Not by that product: it rounds, and nothing that is off should come through, be it infinite.
    """
    out = torch.where(on, new, torch.zeros_like(new) if old is None else old)
    if not gate.requires_grad:
        return out
    return out + (gate - gate.detach()) * (new if old is None else new - old).detach()


def _straight(on: Tensor, soft: Tensor) -> Tensor:
    """0 or 1, with the gradient of ``soft``."""
    return on.to(soft.dtype) + (soft - soft.detach())


def _largest(logits: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest of each row; what is not a number is the least."""
    order = logits.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order[:, :count], True)


def _linear(width: int, out: int, bias: float) -> nn.Linear:
    """Weights 0: so it draws nothing, and starts the same for every image."""
    layer = nn.utils.skip_init(nn.Linear, width, out)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(bias)
    return layer


def _apply(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer where ``x`` is: the model may have been moved since."""
    assert isinstance(layer, nn.Linear)
    return functional.linear(x, layer.weight.to(x), layer.bias.to(x))
