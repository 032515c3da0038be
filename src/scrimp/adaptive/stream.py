"""Where every row of a forward's tokens belongs: which image, which place in its sequence, how many it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

Layout = Literal["dense", "masked", "packed"]


@dataclass(frozen=True)
class Stream:
    """The tokens between two blocks.

    ``dense``: [images, width, dim], as many tokens for every image. ``masked``: [images, tokens, dim], all rows are
    there and ``alive`` [images, tokens] says which count (None: all). ``packed``: [1, sum(lengths), dim], image after
    image.

    Attributes:
        images: images in the batch.
        tokens: tokens an image had before the first block.
        prefix: class and register tokens among them, always the first rows of an image.
        width: rows of the longest image.
        lengths: rows by image in the packed layout, else None.
        positions: place of each row in the original sequence, [images, width] or [sum(lengths)]; None: in order.
        sizes: how many original tokens each row stands for, [images, width]; None: one.
        source: row that each original token went to, [images, tokens]; None: itself, or none.
    """

    layout: Layout
    images: int
    tokens: int
    prefix: int
    width: int
    lengths: tuple[int, ...] | None = None
    positions: Tensor | None = None
    alive: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    _rope: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, compare=False, repr=False)
    _where: list[Tensor] = field(default_factory=list, init=False, compare=False, repr=False)

    def count(self) -> int | tuple[int, ...] | Tensor:
        """Tokens that count by image: one number for all, numbers by image, or [images] on the device."""
        if self.alive is not None:
            return self.alive.sum(1)
        return self.width if self.lengths is None else self.lengths

    @cached_property
    def starts(self) -> list[int]:
        """First row of each image in the packed layout."""
        return [0, *accumulate(self.lengths or ())][:-1]

    @property
    def uniform(self) -> bool:
        """Whether the rows are, or can be viewed as, [images, n, dim]."""
        return self.lengths is None or min(self.lengths, default=0) == self.width

    @cached_property
    def valid(self) -> Tensor | None:
        """Which entries of the padded view [images, width] are tokens that count; None: all."""
        if self.uniform:
            return self.alive
        assert self.positions is not None
        lengths = torch.tensor(self.lengths, device=self.positions.device)
        return torch.arange(self.width, device=lengths.device) < lengths[:, None]

    def padded(self, values: Tensor) -> Tensor:
        """Numbers of the rows, [images, n] or [1, sum(lengths)], in the padded view [images, width], 0 elsewhere."""
        if self.uniform:
            return values.reshape(self.images, self.width)
        assert self.valid is not None
        return values.new_zeros(self.valid.shape).masked_scatter_(self.valid, values)

    def keep(self, mask: Tensor) -> Plan:
        """The plan that keeps what ``mask`` [images, width], of the padded view, holds; lengths may differ.

        Prefix tokens stay whatever it says.
        """
        mask = torch.cat([torch.ones_like(mask[:, : self.prefix]), mask[:, self.prefix :]], 1)
        if self.layout == "masked":
            alive = mask if self.alive is None else mask & self.alive
            return Plan(replace(self, alive=alive), None)
        kept = mask if self.valid is None else mask & self.valid
        return self.only((mask.flatten() if self.valid is None else mask[self.valid]), kept)

    def only(self, rows: Tensor, kept: Tensor) -> Plan:
        """The plan that goes on packed with those of all rows, bool, that ``kept`` [images, ...] tells by image."""
        chosen = rows.nonzero().squeeze(1)
        return self.pick(chosen, (len(chosen),) if self.images == 1 else tuple(kept.sum(1).tolist()))

    def pick(self, rows: Tensor, lengths: tuple[int, ...]) -> Plan:
        """The plan that goes on packed, with these of all rows."""
        positions = self._positions(rows.device).flatten().index_select(0, rows)
        width = max(lengths, default=0)
        after = replace(self, layout="packed", width=width, lengths=lengths, positions=positions)
        return Plan(after, rows)

    def choose(self, index: Tensor) -> Plan:
        """The plan that goes on with rows ``index`` [images, k] of each image, all of one number: the dense layout."""
        positions = index if self.positions is None else self.positions.gather(1, index)
        return Plan(replace(self, positions=positions, width=index.shape[1]), flat(index, self.width))

    def where(self, device: torch.device) -> Tensor:
        """Places of the tokens that count, as flat indices into [images * tokens]."""
        if not self._where:
            self._where.append(self._places(device))
        return self._where[0]

    def _places(self, device: torch.device) -> Tensor:
        if self.alive is not None:
            return self.alive.flatten().nonzero().squeeze(1)
        positions = self._positions(device)
        if self.lengths is None:
            return flat(positions, self.tokens)
        if self.images == 1:
            return positions
        lengths = torch.tensor(self.lengths, device=device)
        return positions + torch.repeat_interleave(torch.arange(self.images, device=device), lengths) * self.tokens

    def _positions(self, device: torch.device) -> Tensor:
        if self.positions is not None:
            return self.positions
        return torch.arange(self.tokens, device=device).expand(self.images, -1)

    def rope(self, table: Tensor) -> Tensor:
        """Rotary embeddings [patches, 2 d], [heads, patches, 2 d] or with images before, for the rows after the prefix.

        Rows of other images' prefix tokens, which only the packed layout has there, get the rotation by nothing.
        """
        if self.positions is None or self.layout == "masked":
            return table
        if not self._rope or self._rope[0][0] is not table:
            self._rope[:] = [(table, self._rope_packed(table) if self.layout == "packed" else self._rope_dense(table))]
        return self._rope[0][1]

    def _rope_packed(self, table: Tensor) -> Tensor:
        assert self.positions is not None
        if table.ndim == 4:
            raise InputError(
                "rotary embeddings shared by all images", f"shape {list(table.shape)}", "use form='masked'"
            )
        still = table.new_zeros(*table.shape[:-2], self.prefix, table.shape[-1])
        still[..., table.shape[-1] // 2 :] = 1  # sines, then cosines
        return torch.cat([still, table], -2).index_select(-2, self.positions[self.prefix :])

    def _rope_dense(self, table: Tensor) -> Tensor:
        assert self.positions is not None
        patches = self.positions[:, self.prefix :] - self.prefix
        if table.ndim == 2:
            return table[patches][:, None]
        if table.ndim == 3:
            return table[:, patches].transpose(0, 1)
        index = patches[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
        return table.expand(self.images, -1, -1, -1).gather(2, index)

    def restore(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """All rows in their old places, [images, tokens, dim], and which hold nothing real (None: all do).

        Merged tokens come back at every place they stand for.
        """
        if self.source is not None:
            rows = flat(self.source, x.shape[1])
            return x.flatten(0, 1).index_select(0, rows).view(self.images, self.tokens, x.shape[-1]), None
        if self.layout == "masked":
            return x, None if self.alive is None else ~self.alive
        if self.positions is None:
            return x, None
        where = self.where(x.device)
        full = x.new_zeros(self.images * self.tokens, x.shape[-1]).index_copy(0, where, x.flatten(0, 1))
        dead = torch.ones(self.images * self.tokens, dtype=torch.bool, device=x.device).index_fill(0, where, False)
        return full.view(self.images, self.tokens, x.shape[-1]), dead.view(self.images, self.tokens)


class Plan(NamedTuple):
    """What goes on: the stream afterwards, and its rows among those of before, flat; None where no row moves."""

    stream: Stream
    rows: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [images or 1, n, dim] that go on."""
        if self.rows is None:
            return x
        rows = x.flatten(0, 1).index_select(0, self.rows)
        return (
            rows[None]
            if self.stream.layout == "packed"
            else rows.view(self.stream.images, self.stream.width, x.shape[-1])
        )

    def by_image(self, before: Stream) -> list[Tensor]:
        """The rows of each image, counted from its first."""
        assert self.rows is not None
        starts = before.starts if before.lengths is not None else [i * before.width for i in range(before.images)]
        parts = self.rows.split(list(self.stream.lengths or ()))
        return [part - start for part, start in zip(parts, starts, strict=True)]


def flat(index: Tensor, width: int) -> Tensor:
    """Rows ``index`` [images, k] of images of ``width`` rows, counted through all images."""
    images = index.shape[0]
    if isinstance(images, int) and images == 1:  # at one image every small operation tells
        return index[0]
    return (index + torch.arange(images, device=index.device)[:, None] * width).flatten()


def falling(scores: Tensor) -> Tensor:
    """Indices into each row by falling score, of equals the foremost first.

    ONNX has no stable sort; its TopK, which torch's becomes there, is stable, which torch's is not.
    """
    if torch.compiler.is_exporting():
        return scores.topk(scores.shape[-1]).indices
    return scores.argsort(dim=-1, descending=True, stable=True)


def all_of(x: Tensor, prefix: int, layout: Layout) -> Stream:
    """The stream before the first block, of tokens [images, tokens, dim]."""
    images, tokens = x.shape[:2]
    return Stream(layout, images, tokens, prefix, tokens)
