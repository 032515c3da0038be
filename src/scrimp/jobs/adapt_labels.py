"""Few-shot data: so many labelled examples of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

_SHOTS = 5  # key of the draw's random stream


def shot_rows(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """``shots`` rows of each class, drawn by ``seed``: int64, ascending. More shots of one seed contain the fewer.

    Args:
        labels: class numbers [N].

    Raises:
        InputError: a class with fewer rows.
    """
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < shots:
            raise InputError(
                f"at least {shots} examples of each class", f"{len(members)} of class {label}", "lower --shots"
            )
        generator = generator_for(seed, _SHOTS, label)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen).sort().values
