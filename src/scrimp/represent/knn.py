"""How good features are, asked of their nearest neighbours: exact cosine kNN classification.

Source of the weighted vote: Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018 (arXiv 1805.01978), section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import nearest
from scrimp.represent.checks import check_rows, compute_type

_QUERIES = 1024  # test rows searched for at a time


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float | None = None,
) -> float:
    """Share of test rows whose class their ``k`` nearest training rows by cosine similarity vote for.

    Without a temperature every neighbour has one vote; with one, neighbour i votes with ``exp(similarity_i / T)``
    (``k=200, temperature=0.1`` is what lightly and MoCo report). Among classes with equally many votes the one of the
    smallest number wins, as in scikit-learn's ``KNeighborsClassifier``.

    Args:
        train, test: features [n, dim] and [m, dim], normalised to unit length inside.
        train_labels, test_labels: class numbers from 0, [n] and [m].
        k: neighbours, 1 to n.
        temperature: above 0, or ``None``.

    Returns:
        Accuracy, 0 to 1.

    Raises:
        InputError: no rows, shapes or labels that do not fit, features that are not finite, ``k`` or temperature out of
            range.
    """
    temperatures = {} if temperature is None else {k: temperature}
    return knn_accuracies(train, train_labels, test, test_labels, ks=(k,), temperatures=temperatures)[k]


@torch.no_grad()
def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (1, 20, 200),
    temperatures: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """`knn_accuracy` for several ``k`` at the price of one search, that for the largest.

    Args:
        ks: numbers of neighbours, each 1 to n.
        temperatures: of the ``k`` whose votes are weighted; the others' votes count one each.

    Returns:
        Accuracy for each of ``ks``.

    Raises:
        InputError: as `knn_accuracy`.
    """
    weighted = dict(temperatures or {})
    check_labelled(train, train_labels)
    check_labelled(test, test_labels)
    _check_search(train, test, ks, weighted)
    classes = int(train_labels.max()) + 1
    keys, voters = unit_rows(train), train_labels.to(train.device, torch.int64)
    right = dict.fromkeys(ks, 0)
    for rows, answers in zip(test.split(_QUERIES), test_labels.to(test.device).split(_QUERIES), strict=True):
        similar, found = nearest(unit_rows(rows), keys, max(ks))
        for k in right:
            votes = _votes(similar[:, :k], voters[found[:, :k]], classes, weighted.get(k))
            right[k] += int((votes.argmax(1) == answers).sum())  # argmax takes the first of equals
    return {k: count / len(test) for k, count in right.items()}


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1, float32 or wider; a row of zeros stays one."""
    return functional.normalize(features.to(compute_type(features)), dim=1)


def check_labelled(features: Tensor, labels: Tensor) -> None:
    """Refuse what is no features [n, dim] with a class number each, n and dim at least 1.

    Raises:
        InputError: says which.
    """
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        got = f"{str(features.dtype).removeprefix('torch.')} {list(features.shape)}"
        raise InputError("floating-point features [n, dim], n and dim at least 1", got, "pass one row an image")
    check_rows("labels", labels, len(features))
    if int(labels.min()) < 0:
        raise InputError("class numbers from 0", f"{int(labels.min())}", "leave rows without a label out")
    if not bool(torch.isfinite(features).all()):
        raise InputError("finite features", "an infinite or NaN one", "check the encoder's weights")


def _check_search(train: Tensor, test: Tensor, ks: Sequence[int], temperatures: Mapping[int, float]) -> None:
    if train.shape[1] != test.shape[1]:
        got = f"{train.shape[1]} and {test.shape[1]}"
        raise InputError("training and test features of one width", got, "take both from the same encoder")
    wrong = [k for k in ks if not 1 <= k <= len(train)]
    if wrong or not ks:
        got = f"{wrong[0]}" if wrong else "none"
        raise InputError(f"1 to {len(train)} neighbours, as many as training rows", got, "choose another k")
    if not all(value > 0 for value in temperatures.values()):
        raise InputError("a temperature above 0", f"{min(temperatures.values())}", "0.1 is usual; None counts heads")
    strangers = set(temperatures) - set(ks)
    if strangers:
        raise InputError(f"temperatures of k in {list(ks)}", f"one of {min(strangers)}", "correct ks or temperatures")


def _votes(similar: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Tensor:
    """[n, k] neighbours, the nearest first -> votes [n, classes], float64.

    Relative to the nearest neighbour's weight, which changes no winner and cannot overflow.
    """
    wide = similar.double()
    weights = torch.ones_like(wide) if temperature is None else ((wide - wide[:, :1]) / temperature).exp()
    votes = torch.zeros(len(wide), classes, dtype=torch.float64, device=wide.device)
    return votes.scatter_add_(1, labels, weights)
