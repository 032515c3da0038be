"""What the last forward spent: FLOPs, tokens and places, image by image."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Number, flops
from scrimp.adaptive.method import Run


class _Now(threading.local):
    """The forward that this thread is in, and its last."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.last: Run | None = None
        self.mode: Any = None
        self.dead: Tensor | None = None
        self.shape: tuple[int, ...] | None = None
        self.off = False


class Report:
    """The read-outs of a `Controller`; None before the first forward. Each thread reads its own."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._now = _Now()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=_Now())

    def outside(self, tokens: int) -> int | None:
        """FLOPs an image outside the blocks."""
        return self.host.outside.get(tokens)

    @property
    def run(self) -> Run | None:
        """The last forward as the method left it, with what it put into ``memory``."""
        return self._now.last

    @property
    def costs(self) -> Tensor | None:
        """FLOPs by image, [images], int64; None also where images of another size came past the model's own call."""
        run = self._now.last
        if run is None:
            return None
        outside = self.outside(run.stream.tokens)
        return None if outside is None else flops(self.host.blocks, run.counts, run.stream.images) + outside

    @property
    def tokens(self) -> Tensor | None:
        """Tokens that went through the last layers of each block, prefix included, [images, blocks], int64."""
        run = self._now.last
        if run is None:
            return None
        return torch.stack([_column(count.leaving, run.stream.images) for count in run.counts], 1)

    @property
    def depth(self) -> Tensor | None:
        """Blocks that computed something for a patch token of the image, [images], int64."""
        run = self._now.last
        if run is None:
            return None
        images, prefix = run.stream.images, self.host.prefix
        parts = [(_column(count.entering, images), _column(count.leaving, images)) for count in run.counts]
        return torch.stack([(first > prefix) | (last > prefix) for first, last in parts], 1).sum(1)

    @property
    def kept(self) -> Tensor | None:
        """Which original tokens were there at the end of each block, [images, blocks, tokens], bool.

        A merged token is there at the place that took the other in.
        """
        run = self._now.last
        if run is None:
            return None
        kept = torch.zeros(len(run.streams), run.stream.images * run.stream.tokens, dtype=torch.bool)
        for row, stream in zip(kept, run.streams, strict=True):
            row[stream.where(run.device).cpu()] = True
        return kept.view(len(run.streams), run.stream.images, run.stream.tokens).transpose(0, 1)

    @property
    def source(self) -> Tensor | None:
        """For merging: which final token each original one went to, [images, tokens]; else None."""
        run = self._now.last
        return None if run is None else run.stream.source


def _column(number: Number, images: int) -> Tensor:
    column = torch.as_tensor(number, dtype=torch.int64).cpu()
    return column.expand(images) if column.ndim == 0 else column
