"""A transformer that writes an image pixel by pixel, in its parallel form, which trains; `pixels_step` has the others.

Source: Katharopoulos et al., "Transformers are RNNs", ICML 2020 (arXiv 2006.16236), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.attend import linear_attention, softmax_attention
from scrimp.jobs.pixels_output import LEVELS, OUTPUTS
from scrimp.primitives.errors import InputError

START = LEVELS
"""What stands before the first pixel, where the values before the others stand."""

ATTENTIONS: dict[str, Callable[..., Tensor]] = {"linear": linear_attention, "softmax": softmax_attention}
_LONGEST = 16_384
Kept = list[tuple[Tensor, Tensor]]
"""Keys and values, [batch, heads, tokens, dim], of each block."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward. What writes into the residual stream has no bias: the next norm's has."""

    def __init__(self, heads: int, head_dim: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.attend = heads, attend
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """[batch, tokens, width] to the same; adds this block's keys and values to ``kept``."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if kept is not None:
            kept.append((key, value))
        x = x + self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class PixelTransformer(nn.Module):
    """The distribution of every pixel given those before it, row by row, the channels of a pixel in turn.

    Args:
        shape: channels, height and width of the images.
        attention: a key of `ATTENTIONS`.
        output: a key of `scrimp.jobs.pixels_output.OUTPUTS`.
        layers, heads, head_dim: size; the model is ``heads * head_dim`` wide, its feed-forward 4 times that.

    Raises:
        InputError: images of too many pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        attention: str = "linear",
        output: str = "logistics",
        layers: int = 8,
        heads: int = 8,
        head_dim: int = 32,
    ) -> None:
        super().__init__()
        self.shape, self.tokens, self.attention = shape, math.prod(shape), attention
        if self.tokens > _LONGEST:
            raise InputError(f"images of at most {_LONGEST} values", f"{shape}", "pass --size 32")
        self.output, width = OUTPUTS[output], heads * head_dim
        self.value = nn.Embedding(LEVELS + 1, width)
        self.channel, self.row, self.column = (nn.Embedding(count, width) for count in shape)
        attend = partial(ATTENTIONS[attention], causal=True)
        self.blocks = nn.ModuleList(Block(heads, head_dim, attend) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.output.width)
        self._initialise_()

    def forward(self, images: Tensor) -> Tensor:
        """Outputs [batch, tokens, output width] for whole images, uint8 [batch, channels, height, width]."""
        return self.outputs(as_sequence(images)[:, :-1])

    def outputs(self, known: Tensor, kept: Kept | None = None) -> Tensor:
        """Outputs for the first n + 1 places, [batch, n + 1, output width], from their values ``known`` [batch, n]."""
        return self.head(self.norm(self.features(known, kept)))

    def features(self, known: Tensor, kept: Kept | None = None) -> Tensor:
        """What `outputs` reads its outputs from, [batch, n + 1, width]."""
        start = known.new_full((len(known), 1), START, dtype=torch.int64)
        inputs = torch.cat([start, known.long()], 1)
        x = self.value(inputs) + self.positions()[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x, kept)
        return x

    def positions(self) -> Tensor:
        """What each place adds to its input, [tokens, width]: one vector each for its row, column and channel."""
        places = self.row.weight[:, None, None] + self.column.weight[:, None] + self.channel.weight
        return places.flatten(0, 2)

    def _initialise_(self) -> None:
        """Normal with standard deviation 0.02; smaller where blocks add up in the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds_up = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if adds_up else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.head.bias.copy_(self.output.first())


def as_sequence(images: Tensor) -> Tensor:
    """[batch, channels, height, width] as [batch, tokens], in the order in which pixels are written."""
    return images.permute(0, 2, 3, 1).flatten(1)


def as_images(sequence: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[batch, tokens] as uint8 [batch, channels, height, width]."""
    channels, height, width = shape
    return sequence.view(-1, height, width, channels).permute(0, 3, 1, 2).to(torch.uint8).contiguous()
