"""How far a model with another attention departs from the original, row by row of their outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


class Scores:
    """Sums over batches of rows: logits [rows, classes] of classifiers and language models, or features [rows, dim].

    Args:
        features: the rows are embeddings: a prediction is then the nearest other row, by cosine.
    """

    def __init__(self, *, features: bool) -> None:
        self._features = features
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._count = self._labelled = 0
        self._same = self._kl = self._error = self._norm = 0.0
        self._sides = {"": [0.0, 0.0], "original_": [0.0, 0.0]}  # right answers, cross-entropy

    def add(self, original: Tensor, swapped: Tensor, labels: Tensor | None) -> None:
        """Take in one batch; ``labels`` [rows], below 0 where there is none. Labels of other classes are left out."""
        work = torch.promote_types(original.dtype, torch.float32)
        before, after = original.to(work), swapped.to(work)
        if labels is not None and int(labels.max()) >= before.shape[1]:
            labels = None
        if labels is not None and bool((labels < 0).any()):  # padding: nothing is predicted there
            before, after, labels = (item[labels >= 0] for item in (before, after, labels))
        self._count += len(before)
        self._error += float((after - before).square().sum())
        self._norm += float(before.square().sum())
        if self._features:
            self._rows.append((before.cpu(), after.cpu()))
            return
        self._same += int((before.argmax(1) == after.argmax(1)).sum())
        known, found = before.log_softmax(1), after.log_softmax(1)
        self._kl += float(functional.kl_div(found, known, reduction="sum", log_target=True))
        if labels is None:
            return
        self._labelled += len(labels)
        for side, rows in (("", found), ("original_", known)):
            self._sides[side][0] += int((rows.argmax(1) == labels).sum())
            self._sides[side][1] += float(functional.nll_loss(rows, labels, reduction="sum"))

    def quality(self) -> dict[str, float | None]:
        """Of the swapped model: ``accuracy`` and ``loss`` (nats) where labels are, ``agreement`` (share of equal
        predictions), ``output_error`` (relative L2), ``kl`` (nats, original against swapped)."""
        agreement = self._neighbours() if self._features else self._same / self._count
        found = {"agreement": agreement, "output_error": self._relative_error()}
        return self._task("") | found | ({} if self._features else {"kl": self._kl / self._count})

    def quality_of_original(self) -> dict[str, float | None]:
        """The same names for the model as it came."""
        found = {"agreement": 1.0, "output_error": 0.0}
        return self._task("original_") | found | ({} if self._features else {"kl": 0.0})

    def _task(self, side: str) -> dict[str, float | None]:
        if not self._labelled:
            return {}
        right, loss = self._sides[side]
        return {"accuracy": right / self._labelled, "loss": loss / self._labelled}

    def _relative_error(self) -> float | None:
        return math.sqrt(self._error / self._norm) if self._norm > 0 else None

    def _neighbours(self) -> float | None:
        """Share of rows whose nearest other row is the same one for both models."""
        if self._count < 3:  # two rows can only have each other
            return None
        nearest = []
        for side in (0, 1):
            rows = functional.normalize(torch.cat([pair[side] for pair in self._rows]), dim=1)
            nearest.append((rows @ rows.T).fill_diagonal_(-2).argmax(1))
        return float((nearest[0] == nearest[1]).double().mean())
