"""Which labels a run may use: one draw for every job, so that ways of one seed know the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.data import ImageData
from scrimp.primitives.draw import generator_for
from scrimp.represent import NO_LABEL, few_label_rows

_LABELLED = 3  # key of the draw's random stream


def labelled_rows(data: ImageData, share: float, *, seed: int) -> Tensor:
    """A stratified share of the training images, drawn by ``seed``, at least one a class: rows, int64, ascending."""
    if share == 1:
        return torch.arange(len(data.train))
    return few_label_rows(data.train.labels, fraction=share, generator=generator_for(seed, _LABELLED))


def usable_labels(data: ImageData, share: float, *, seed: int) -> Tensor:
    """The labels of all training images, int64, `NO_LABEL` but for the `labelled_rows`; of none for a share of 0."""
    found = torch.full_like(data.train.labels, NO_LABEL)
    if share > 0:
        rows = labelled_rows(data, share, seed=seed)
        found[rows] = data.train.labels[rows]
    return found
