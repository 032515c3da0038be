"""How good features are, asked of a linear classifier on them: solved to its optimum, so nothing has to be tuned.

Features are brought to unit length and then standardised in each dimension, as in SimReg's linear evaluation (Navaneet,
Koohpayegani, Tejankar and Pirsiavash, BMVC 2021, arXiv 2201.05131); the classifier is scikit-learn's logistic
regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError
from scrimp.represent.knn import check_labelled, unit_rows

_FLAT = 3e-6  # largest entry of the gradient of the mean loss at which the optimum counts as reached
_STEPS, _INNER = 100, 200  # most Newton steps, and most conjugate gradients in each
_CURVATURE = 0.1  # p (1 - p) of a typical row
_NEVER = -1e4
_ENOUGH, _SHORTEST = 1e-4, 1e-4  # share of the promised descent a step must bring, and where halving it ends


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier on standardised features.

    Attributes:
        mean, std: [dim], of the training features at unit length.
        weight: [classes, dim].
        bias: [classes].
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Features [n, dim] as the encoder gives them -> [n, classes].

        Raises:
            InputError: another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise InputError(
                f"features [n, {len(self.mean)}]", f"{list(features.shape)}", "take them from the same encoder"
            )
        ready = ((unit_rows(features) - self.mean) / self.std).to(self.weight.dtype)
        return functional.linear(ready, self.weight, self.bias)


@torch.no_grad()
def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    l2: float = 1.0,
    unlabelled: Tensor | None = None,
) -> LinearProbe:
    """The minimum of ``sum_i cross_entropy_i + l2 / 2 * ||weight||^2``; the bias is not penalised.

    That is scikit-learn's ``LogisticRegression(C=1 / l2)``. Found by Newton's method with preconditioned conjugate
    gradients from zero, in the features' type (at least float32), without any random number.

    Args:
        features: [n, dim].
        labels: class numbers from 0, [n].
        classes: how many there are; those without a row get a logit of -10,000.
        l2: above 0.
        unlabelled: [m, dim], features that mean and deviation are taken from instead, where few are labelled.

    Returns:
        The probe, on the device of ``features``.

    Raises:
        InputError: shapes or labels that do not fit, features that are not finite, ``l2`` not above 0.
    """
    check_labelled(features, labels)
    if int(labels.max()) >= classes:
        raise InputError(f"class numbers below {classes}", f"{int(labels.max())}", "pass classes=highest + 1")
    if not l2 > 0:
        raise InputError("l2 above 0", f"{l2}", "1 is usual; without any there may be no optimum")
    if unlabelled is not None and (unlabelled.ndim != 2 or unlabelled.shape[1] != features.shape[1]):
        got = f"{list(features.shape)} and {list(unlabelled.shape)}"
        raise InputError("labelled and unlabelled features of one width", got, "take both from the same encoder")
    rows = unit_rows(features)
    mean, std = _statistics(rows if unlabelled is None else unit_rows(unlabelled))
    # A class without a row would push its bias down without end.
    seen, places = labels.to(rows.device, torch.int64).unique(return_inverse=True)
    found = _minimise((rows - mean) / std, places, len(seen), l2=l2)
    weight, bias = rows.new_zeros(classes, rows.shape[1]), rows.new_full((classes,), _NEVER)
    weight[seen], bias[seen] = found
    return LinearProbe(mean, std, weight, bias)


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    l2: float = 1.0,
    unlabelled: Tensor | None = None,
) -> float:
    """Share of test rows a linear probe fitted on the training rows gets right, 0 to 1.

    Args:
        train, test: features [n, dim] and [m, dim].
        train_labels, test_labels: class numbers from 0, [n] and [m].
        l2, unlabelled: see `fit_linear_probe`.

    Raises:
        InputError: as `fit_linear_probe`.
    """
    check_labelled(test, test_labels)
    check_labelled(train, train_labels)
    classes = int(train_labels.max()) + 1
    probe = fit_linear_probe(train, train_labels, classes=classes, l2=l2, unlabelled=unlabelled)
    return int((probe.logits(test).argmax(1) == test_labels.to(test.device)).sum()) / len(test)


def few_label_rows(labels: Tensor, *, fraction: float, generator: torch.Generator) -> Tensor:
    """Rows whose labels may be used: the same share of every class, rounded, at least one of each.

    Args:
        labels: class numbers [n].
        fraction: above 0, at most 1.
        generator: on the CPU.

    Returns:
        Rows, int64, ascending, on the CPU.

    Raises:
        InputError: a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise InputError("a fraction above 0 and at most 1", f"{fraction}", "0.01 and 0.1 are usual")
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten().cpu()
        count = max(1, round(len(members) * fraction))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values if chosen else torch.zeros(0, dtype=torch.int64)


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each dimension, [dim]; 1 where all that varies is rounding."""
    wide = rows.double() if rows.device.type != "mps" else rows
    std, mean = torch.std_mean(wide, dim=0, correction=0)
    noise = 10 * torch.finfo(rows.dtype).eps * mean.abs()
    return mean.to(rows.dtype), torch.where(std <= noise, 1.0, std).to(rows.dtype)


def _minimise(rows: Tensor, labels: Tensor, classes: int, *, l2: float) -> tuple[Tensor, Tensor]:
    """Weight [classes, dim] and bias [classes] of the optimum: Newton's method, each step by conjugate gradients.

    Everything is per row: the size of the gradient then says the same for few rows and for many.
    """
    problem = _Problem(rows, labels, classes, l2=l2)
    weight = rows.new_zeros(classes, rows.shape[1] + 1)
    logits = rows.new_zeros(len(rows), classes)
    value = problem.value(logits, weight)
    for _ in range(_STEPS):
        shares = logits.softmax(1)
        gradient = problem.gradient(shares, weight)
        if float(gradient.abs().max()) <= _FLAT:
            break
        step, moved = problem.newton_step(shares, gradient)
        length, slope = 1.0, float((gradient * step).sum())
        while (reached := problem.value(logits + length * moved, weight + length * step)) > value + _ENOUGH * (
            length * slope
        ) and length > _SHORTEST:
            length /= 2
        if reached >= value:  # rounding hides what is left to gain
            break
        weight, logits, value = weight + length * step, logits + length * moved, reached
    return weight[:, :-1].contiguous(), weight[:, -1].contiguous()


class _Problem:
    """Regularised multinomial logistic regression; the bias is the weight of a last dimension that is always 1."""

    def __init__(self, rows: Tensor, labels: Tensor, classes: int, *, l2: float) -> None:
        self.labels = labels
        self.rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        self.targets = functional.one_hot(labels, classes).to(rows.dtype)
        self.penalty = self.rows.new_full((self.rows.shape[1],), l2 / len(rows))
        self.penalty[-1] = 0
        # The Hessian, were all rows of one curvature: what the conjugate gradients are preconditioned by.
        curvature = _CURVATURE * (self.rows.T @ self.rows) / len(rows)
        curvature.diagonal().add_(self.penalty).add_(torch.finfo(rows.dtype).eps)
        self.factor = torch.linalg.cholesky(curvature)

    def value(self, logits: Tensor, weight: Tensor) -> float:
        fit = -(self.targets * logits.log_softmax(1)).sum(1)
        penalty = (self.penalty * weight.square()).sum(1)
        return sum(fit.tolist()) / len(fit) + sum(penalty.tolist()) / 2

    def gradient(self, shares: Tensor, weight: Tensor) -> Tensor:
        return (shares - self.targets).T @ self.rows / len(self.rows) + self.penalty * weight

    def newton_step(self, shares: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the inverse Hessian times the gradient, as exactly as it pays, and the change of the logits."""
        step, moved = torch.zeros_like(gradient), torch.zeros_like(shares)
        left = -gradient
        ready = self._precondition(left)
        direction, size = ready, float((left * ready).sum())
        wanted = min(0.25, size**0.25) ** 2 * size
        for _ in range(_INNER):
            change = self.rows @ direction.T
            weighted = shares * change
            bent = weighted - shares * weighted.sum(1, keepdim=True)
            curved = bent.T @ self.rows / len(self.rows) + self.penalty * direction
            length = size / float((direction * curved).sum())
            step, moved, left = step + length * direction, moved + length * change, left - length * curved
            ready = self._precondition(left)
            before, size = size, float((left * ready).sum())
            if size <= wanted:
                break
            direction = ready + size / before * direction
        return step, moved

    def _precondition(self, gradient: Tensor) -> Tensor:
        return torch.cholesky_solve(gradient.T, self.factor).T
