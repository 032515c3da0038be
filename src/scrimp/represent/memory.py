"""The memory of past embeddings: a ring of unit vectors, the oldest overwritten first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import nearest
from scrimp.represent.byol import unit
from scrimp.represent.checks import check_neighbours, check_rows

NO_LABEL = -1
"""The label of an embedding whose class is unknown; it equals no label, not even itself."""


class Memory:
    """The last ``size`` embeddings that were pushed, as unit vectors, each with an optional label.

    A plain object, not a module: it belongs to the training loop and is no part of a network's weights. It takes
    ``size * dim`` numbers: 64 MB for 131,072 vectors of 128 float32.

    Args:
        size: embeddings kept.
        dim: numbers in each.
        device: where they are kept; the targets that are pushed and searched for must be there too.
        dtype: in which they are kept; half types halve the memory, similarities are then off by up to 5e-4 (float16)
            or 4e-3 (bfloat16).

    Attributes:
        vectors: [size, dim]; rows from `known` on are not yet filled.
        labels: int64 [size], `NO_LABEL` where none was given.
        present: bool [size]; rows that hold an embedding. Zeros or non-finite numbers are none.
        place: the row that is overwritten next.

    Raises:
        InputError: a size or width below 1.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if size < 1 or dim < 1:
            raise InputError("a memory of at least 1 x 1", f"{size} x {dim}", "pass Memory(4096, 128), say")
        self.vectors = torch.zeros(size, dim, device=device, dtype=dtype)
        self.labels = torch.full((size,), NO_LABEL, device=device, dtype=torch.int64)
        self.present = torch.zeros(size, device=device, dtype=torch.bool)
        self.place = 0

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def known(self) -> int:
        """Rows that hold an embedding."""
        return int(self.present.sum())

    def push_(self, target: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """Write embeddings over the oldest ones, in order; the last ``size`` of them where there are more.

        Push a batch before its loss is computed: each target then is its own nearest neighbour, as in the papers.

        Args:
            target: [batch, dim]; normalised here, kept without gradient. A row of zeros marks "none".
            labels: int64 [batch].

        Returns:
            The rows written, int64 [batch] (the last ``size`` of the batch where it is larger).

        Raises:
            InputError: another width, or labels of another shape.
        """
        if target.ndim != 2 or target.shape[1] != self.vectors.shape[1] or not target.is_floating_point():
            got = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
            expected = f"floating embeddings [batch, {self.vectors.shape[1]}]"
            raise InputError(expected, got, "make the memory as wide as the projector")
        if labels is not None:
            check_rows("labels", labels, len(target))
        kept = unit(target.detach()[-len(self) :])
        rows = (self.place + torch.arange(len(target), device=self.vectors.device)[-len(self) :]) % len(self)
        self.vectors[rows] = kept.to(self.vectors.dtype)
        self.present[rows] = kept.ne(0).any(1) & kept.isfinite().all(1)  # one bad step must not spoil all later ones
        self.labels[rows] = NO_LABEL if labels is None else labels.to(self.labels)[-len(self) :]
        self.place = (self.place + len(target)) % len(self)
        return rows

    def search(self, target: Tensor, k: int) -> Tensor:
        """Rows of the ``k`` nearest embeddings of each target, the nearest first, int64 [batch, k].

        Raises:
            InputError: fewer than ``k`` embeddings are known.
        """
        check_neighbours(k, self.known)
        return nearest(unit(target.detach()).to(self.vectors.dtype), self.vectors, k, allowed=self._mask())[1]

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, as tensors and numbers."""
        return {"vectors": self.vectors, "labels": self.labels, "present": self.present, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            InputError: a memory of another size.
        """
        if state["vectors"].shape != self.vectors.shape:
            got = f"{list(state['vectors'].shape)}"
            raise InputError(f"a memory of {list(self.vectors.shape)}", got, "make it as large as the saved one")
        for name in ("vectors", "labels", "present"):
            getattr(self, name).copy_(state[name])
        self.place = int(state["place"])

    def _mask(self) -> Tensor | None:
        return None if bool(self.present.all()) else self.present
