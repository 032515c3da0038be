"""Heads that training needs and use does not: projector, predictor, and the regression onto a teacher."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from scrimp.primitives.errors import InputError


def projector(features: int, *, hidden: int | None = None, dim: int | None = None) -> nn.Sequential:
    """``Linear - BatchNorm - ReLU - Linear``: features -> embedding; hidden twice, dim a quarter of the features.

    Raises:
        InputError: a width below 1.
    """
    return mlp(features, 2 * features if hidden is None else hidden, max(1, features // 4) if dim is None else dim)


def predictor(dim: int, *, hidden: int | None = None) -> nn.Sequential:
    """``Linear - BatchNorm - ReLU - Linear``: online embedding -> prediction of the target's; hidden 8 times as wide.

    With the projector's defaults its hidden layer is as wide as the projector's.
    """
    return mlp(dim, 8 * dim if hidden is None else hidden, dim)


def regression_head(features: int, dim: int, *, layers: int = 4) -> nn.Sequential:
    """The throw-away head that maps a student's features to a teacher's (widths m, 2m, m, 2m, ..., d).

    Every layer but the last is followed by batch normalisation and ReLU, so that each adds a non-linearity.

    Args:
        features: m, of the student.
        dim: d, of the teacher.
        layers: linear layers: 4 (the paper's), 2, 1 (a linear map), 0 (none: student and teacher equally wide).

    Raises:
        InputError: widths below 1, a negative number of layers, or none between different widths.
    """
    if layers < 0:
        raise InputError("0 layers or more", f"{layers}", "pass 4")
    if layers == 0:
        if features != dim:
            got = f"{features} and {dim}"
            raise InputError("equally wide student and teacher for a head of 0 layers", got, "use 1 layer or more")
        return nn.Sequential(nn.Identity())
    inner = [2 * features if number % 2 == 0 else features for number in range(layers - 1)]
    return mlp(features, *inner, dim)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, batch normalisation and ReLU between them."""
    if len(widths) < 2 or min(widths) < 1:
        raise InputError("two widths or more, each at least 1", f"{widths}", "check the model's features")
    layers: list[nn.Module] = []
    for number, (wide, out) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        layers.append(nn.Linear(wide, out, bias=last))
        layers += [] if last else [BatchNorm(out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that refuses a batch of one in so many words.

    Raises:
        InputError: one row, in training: its deviation is unknown.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) < 2:
            raise InputError("a batch of 2 images or more in training", "1", "raise the batch size or drop the last")
        return super().forward(input)
