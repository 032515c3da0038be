"""Pseudo-labels: a classifier on the embeddings of the few labelled images, asked about all the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scrimp.represent import NO_LABEL, EmbeddingCache, confident_labels
from scrimp.represent.linear import LinearProbe, fit_linear_probe

_REFITS = 2  # a pass, as the paper


class Labeller:
    """Knows the labels it was given, and guesses others once it has seen embeddings of labelled images.

    A linear classifier where the paper trains a two-layer one: it is found exactly, in a fraction of a second, and the
    same on every process.

    Args:
        labels: int64 [images], `NO_LABEL` where unknown.
        confidence: probability from which a guess counts.
    """

    def __init__(self, labels: Tensor, confidence: float) -> None:
        self.labels, self.confidence = labels, confidence
        self.labelled = (labels != NO_LABEL).nonzero().flatten()
        self.seen = 0
        self.probe: LinearProbe | None = None

    def look_(self, cache: EmbeddingCache, images: int) -> None:
        """Count the images gone by, and twice a pass find the classifier anew from the labelled ones' embeddings."""
        before, self.seen = self.seen, self.seen + images
        every = max(1, len(self.labels) // _REFITS)
        if before // every != self.seen // every:
            self._fit(cache)

    def labels_of(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """The label given, else a confident guess, else `NO_LABEL`; int64 [n], on the embeddings' device."""
        given = self.labels[rows].to(embeddings.device)
        if self.probe is None:
            return given
        guessed = confident_labels(self.probe.logits(embeddings.float().cpu()), threshold=self.confidence)
        return torch.where(given == NO_LABEL, guessed.to(embeddings.device), given)

    def state_dict(self) -> dict[str, Any]:
        probe = None if self.probe is None else dict(vars(self.probe))
        return {"seen": self.seen, "probe": probe}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.probe = None if state["probe"] is None else LinearProbe(**state["probe"])

    def _fit(self, cache: EmbeddingCache) -> None:
        embeddings = cache.read(self.labelled)
        known = embeddings.ne(0).any(1)
        labels = self.labels[self.labelled][known]
        if len(labels.unique()) < len(self.labels[self.labelled].unique()):
            return  # not every class has been seen yet
        self.probe = fit_linear_probe(embeddings[known], labels, classes=int(self.labels.max()) + 1)
