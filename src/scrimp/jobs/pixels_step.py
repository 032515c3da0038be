"""The same transformer one pixel at a time: with a state of constant size, with a cache of keys and values, or anew.

Everything but attention is the same code, so that what differs in speed is attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.attend import LinearState, linear_attention_step, linear_attention_step_
from scrimp.jobs.pixels_model import START, Block, Kept, PixelTransformer
from scrimp.jobs.pixels_product import Products

SoftmaxStep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [batch, heads, 1, dim], keys and values [batch, heads, filled, dim] -> [batch, heads, 1, dim]."""


class Decoder(ABC):
    """A batch of images in the making: feed it each pixel, and it gives the outputs for the next.

    Use it under ``torch.inference_mode()``. Its buffers are made once and written in place.

    Attributes:
        place: the pixel that the next `step_` gives outputs for.
    """

    place = 0

    def __init__(self, model: PixelTransformer, batch: int) -> None:
        self.model, self.batch = model, batch

    def start(self) -> Tensor:
        """What to feed before the first pixel: int64 [batch]."""
        return torch.full((self.batch,), START, device=self.model.head.weight.device)

    @abstractmethod
    def prefill_(self, known: Tensor) -> None:
        """Take in the first pixels of each image, [batch, n], all at once; feed the last of them to `step_` next."""

    @abstractmethod
    def step_(self, pixels: Tensor) -> Tensor:
        """Outputs for the next pixel, [batch, output width], given the one before it, int64 [batch].

        The outputs are overwritten by the next call.
        """


class SteppingDecoder(Decoder):
    """A decoder that keeps something between pixels: seven operators a block beside those of attention."""

    def __init__(self, model: PixelTransformer, batch: int, *, weights: str = "float") -> None:
        super().__init__(model, batch)
        blocks = [cast(Block, block) for block in model.blocks]
        self._values = model.value.weight.detach()
        self._places = model.positions().detach().unbind(0)
        self.heads, self.width, self._eps = blocks[0].heads, self._values.shape[1], model.norm.eps
        # Every block writes to the same buffers, so that views of them need to be made only once.
        self._qkv, self._hidden = (self._values.new_empty(batch, times * self.width) for times in (3, 4))
        self._outputs = self._values.new_empty(batch, model.output.width)
        self._parts = self._qkv.view(batch, 3, self.heads, self.width // self.heads)
        self._layers = self._prepare(blocks, Products(batch, weights))
        self._head = Products(batch).after_norm(model.norm, model.head, self._outputs)

    def _prepare(self, blocks: list[Block], products: Products) -> list[tuple[Callable[..., Any], ...]]:
        """A norm's own factor and offset move into the product that follows it."""
        return [
            (
                products.after_norm(block.norm, block.qkv, self._qkv),
                products.adding_(block.out),
                products.after_norm(block.norm2, block.up, self._hidden),
                products.adding_(block.down),
            )
            for block in blocks
        ]

    def prefill_(self, known: Tensor) -> None:
        kept: Kept = []
        self.model.features(known[:, :-1], kept)
        self._keep_(kept)
        self.place = known.shape[1]

    def step_(self, pixels: Tensor) -> Tensor:
        width, eps, hidden = (self.width,), self._eps, self._hidden
        x = functional.embedding(pixels, self._values).add_(self._places[self.place])
        for (qkv_, add_out_, up_, add_down_), attend in zip(self._layers, self._attends(), strict=True):
            qkv_(torch.layer_norm(x, width, None, None, eps))
            add_out_(x, attend())
            up_(torch.layer_norm(x, width, None, None, eps))
            add_down_(x, functional.gelu(hidden))
        self.place += 1
        self._head(torch.layer_norm(x, width, None, None, eps))
        return self._outputs

    @abstractmethod
    def _keep_(self, kept: Kept) -> None:
        """Take the keys and values of a prefix."""

    @abstractmethod
    def _attends(self) -> list[Callable[[], Tensor]]:
        """Each block's attention at this place, from the buffer of queries, keys and values to [batch, width]."""


class LinearDecoder(SteppingDecoder):
    """Linear attention as a recurrent network: a state of heads x dim x (dim + 1) numbers a block and image."""

    def __init__(self, model: PixelTransformer, batch: int, *, weights: str = "float") -> None:
        super().__init__(model, batch, weights=weights)
        dim, like = self.width // self.heads, self._values
        # One buffer for all blocks: what is touched in turn lies in turn.
        kv = like.new_zeros(len(self._layers), batch, self.heads, dim, dim)
        normaliser = like.new_zeros(len(self._layers), batch, self.heads, dim)
        self.states = [LinearState(*pair) for pair in zip(kv.unbind(0), normaliser.unbind(0), strict=True)]
        self._all = [self._attend(state) for state in self.states]

    def _attend(self, state: LinearState) -> Callable[[], Tensor]:
        query, key, value = self._parts.unsqueeze(3).unbind(1)  # [batch, heads, 1, dim]
        shape = (self.batch, self.width)
        return lambda: linear_attention_step_(state, query, key, value).view(shape)

    def _attends(self) -> list[Callable[[], Tensor]]:
        return self._all

    def _keep_(self, kept: Kept) -> None:
        for state, (key, value) in zip(self.states, kept, strict=True):
            after, _ = linear_attention_step(None, key, key, value)  # only the state is asked for: any queries do
            state.kv.copy_(after.kv)
            state.normaliser.copy_(after.normaliser)


def fused_step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one query by torch's fused kernel."""
    return functional.scaled_dot_product_attention(query, key, value)


def plain_step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by two batched matrix products, which on some processors are quicker for a single query."""
    nothing, scale = query.new_empty(1, 1, 1), query.shape[3] ** -0.5
    scores = torch.baddbmm(nothing, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1), value.flatten(0, 1)).view(query.shape)


class CachedDecoder(SteppingDecoder):
    """Softmax attention with a cache of keys and values for the whole image, made at the start."""

    def __init__(
        self, model: PixelTransformer, batch: int, *, weights: str = "float", attend: SoftmaxStep = fused_step
    ) -> None:
        super().__init__(model, batch, weights=weights)
        dim = self.width // self.heads
        # [block, key or value, batch, heads, tokens, dim]: what a head reads lies in one piece.
        self.cache = self._values.new_zeros(len(self._layers), 2, batch, self.heads, model.tokens, dim)
        self._softmax = attend
        self._query = self._parts[:, 0].unsqueeze(2)
        self._fresh = self._parts[:, 1:].transpose(0, 1)

    def _attends(self) -> list[Callable[[], Tensor]]:
        # Sliced once for all blocks: a slice costs as much as a small product.
        places = self.cache[..., self.place, :].unbind(0)
        filled = self.cache[..., : self.place + 1, :].flatten(0, 1).unbind(0)
        return [self._attend(*item) for item in zip(places, filled[::2], filled[1::2], strict=True)]

    def _attend(self, place: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        def attend() -> Tensor:
            place.copy_(self._fresh)
            return self._softmax(self._query, keys, values).view(self.batch, self.width)

        return attend

    def _keep_(self, kept: Kept) -> None:
        for cache, pair in zip(self.cache, kept, strict=True):
            cache[..., : pair[0].shape[2], :].copy_(torch.stack(pair))


class RecomputingDecoder(Decoder):
    """No memory but the pixels: each step runs the parallel form on all of them."""

    def __init__(self, model: PixelTransformer, batch: int) -> None:
        super().__init__(model, batch)
        self.known = torch.zeros(batch, model.tokens, dtype=torch.int64, device=model.head.weight.device)

    def prefill_(self, known: Tensor) -> None:
        self.known[:, : known.shape[1]] = known
        self.place = known.shape[1]

    def step_(self, pixels: Tensor) -> Tensor:
        if self.place:
            self.known[:, self.place - 1] = pixels
        features = self.model.features(self.known[:, : self.place])[:, -1]
        self.place += 1
        return self.model.head(self.model.norm(features))


def make_decoder(model: PixelTransformer, batch: int, *, cache: str = "auto", weights: str = "float") -> Decoder:
    """The decoder of the model's attention; ``cache="none"`` computes everything anew at each pixel."""
    if cache == "none":
        return RecomputingDecoder(model, batch)
    if model.attention == "linear":
        return LinearDecoder(model, batch, weights=weights)
    return CachedDecoder(model, batch, weights=weights)
