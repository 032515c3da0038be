"""When to stop labelling: an estimate of the accuracy that all remaining labels together would still add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from scrimp.primitives.errors import InputError

_RATES = [step / 20 for step in range(1, 41)]  # learning curves of classifiers fall between these powers
_ROUNDS = 4  # one more than the curve has unknowns, so that leaving one out leaves a fit


@dataclass(frozen=True)
class Gain:
    """Accuracy to be had from labelling everything that is left, as shares of 1.

    Attributes:
        expected: by the fit to all rounds.
        low, high: the least and the most of the fits that leave one round out, and of that to all. No confidence
            interval: rounds share their labels, and the curve may not be a power law.
    """

    expected: float
    low: float
    high: float


def gain_left(labels: Sequence[int], accuracies: Sequence[float], total: int) -> Gain | None:
    """The gain left by the learning curve of accuracies measured on images kept apart.

    ``error(m) = floor + scale * m^-rate`` is fitted by least squares, with floor and scale from 0 up and the rate from
    a grid of 0.05 to 2; the gain is ``error(now) - error(total)`` on the fitted curve, now being the most labels.
    Accuracies on the chosen images themselves would mislead: hard ones were chosen.

    Args:
        labels: how many the model had after each round, each > 0.
        accuracies: as measured then, in [0, 1].
        total: labels were everything labelled; at least the most of ``labels``.

    Returns:
        The estimate, or ``None`` with fewer than 4 different numbers of labels.

    Raises:
        InputError: lists of different lengths, or numbers out of their range.
    """
    _check(labels, len(accuracies), total)
    if not all(0 <= value <= 1 for value in accuracies):
        raise InputError("accuracies in [0, 1]", f"{list(accuracies)}", "pass shares, not percent")

    def gain(kept: list[int]) -> float:
        return _curve_gain([(labels[i], 1 - accuracies[i]) for i in kept], max(labels), total)

    return _left_one_out(labels, gain)


def changes_left(labels: Sequence[int], predictions: Sequence[Tensor], total: int) -> Gain | None:
    """A ceiling of the gain left that needs no label: the share of predictions that would still change.

    Two models' accuracies differ by at most the share of images they disagree on. Between rounds s and t that share is
    fitted, over all pairs, by ``scale * (m_s^-rate - m_t^-rate)``, as if predictions settled along a power law; the
    estimate is its value from now to the total. Changes for the worse count as gain, so that it errs towards labelling
    on.

    Args:
        labels: how many the model had after each round, each > 0.
        predictions: classes [n] predicted for the same images after each round.
        total: labels were everything labelled; at least the most of ``labels``.

    Returns:
        The estimate, or ``None`` with fewer than 4 different numbers of labels.

    Raises:
        InputError: lists of different lengths, predictions of different shapes, or numbers out of their range.
    """
    _check(labels, len(predictions), total)
    if any(item.ndim != 1 or item.shape != predictions[0].shape or len(item) == 0 for item in predictions):
        got = ", ".join(str(list(item.shape)) for item in predictions)
        raise InputError("predictions [n] of the same images each round", got, "pass one class an image")
    changed = {
        (s, t): float((predictions[s] != predictions[t]).double().mean())
        for s in range(len(labels))
        for t in range(len(labels))
        if labels[s] < labels[t]
    }

    def gain(kept: list[int]) -> float:
        pairs = [(labels[s], labels[t], share) for (s, t), share in changed.items() if s in kept and t in kept]
        return _change_gain(pairs, max(labels), total)

    return _left_one_out(labels, gain)


def enough(gain: Gain | None, least: float) -> bool:
    """Whether to stop: even the highest estimate of the gain left is below ``least``; never where it is unknown."""
    return gain is not None and gain.high < least


def _check(labels: Sequence[int], count: int, total: int) -> None:
    if len(labels) != count:
        raise InputError("one result a number of labels", f"{len(labels)} and {count}", "pass lists of one length")
    if any(number < 1 for number in labels) or (len(labels) and total < max(labels)):
        raise InputError("labels from 1 to the total", f"{list(labels)}, total {total}", "count all labels each round")


def _left_one_out(labels: Sequence[int], gain: Callable[[list[int]], float]) -> Gain | None:
    if len(set(labels)) < _ROUNDS:
        return None
    rounds = range(len(labels))
    expected = gain(list(rounds))
    fits = [expected, *(gain([i for i in rounds if i != out]) for out in rounds)]
    return Gain(expected, min(fits), max(fits))


def _curve_gain(points: list[tuple[int, float]], now: int, total: int) -> float:
    """``points`` are (labels, error)."""
    best, found = float("inf"), 0.0
    for rate in _RATES:
        xs, ys = [m**-rate for m, _ in points], [error for _, error in points]
        floor, scale = _line(xs, ys)
        off = sum((floor + scale * x - y) ** 2 for x, y in zip(xs, ys, strict=True))
        if off < best:
            best, found = off, scale * (now**-rate - total**-rate)
    return found


def _line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Intercept and slope of least squares among those from 0 up."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    spread = sum((a - x) ** 2 for a in xs)
    slope = across / spread if spread > 0 else 0.0
    if slope < 0:
        return y, 0.0
    if y - slope * x < 0:
        return 0.0, sum(a * b for a, b in zip(xs, ys, strict=True)) / sum(a * a for a in xs)
    return y - slope * x, slope


def _change_gain(pairs: list[tuple[int, int, float]], now: int, total: int) -> float:
    """``pairs`` are (labels before, labels after, share changed)."""
    best, found = float("inf"), 0.0
    for rate in _RATES:
        steps = [before**-rate - after**-rate for before, after, _ in pairs]
        shares = [share for _, _, share in pairs]
        scale = sum(a * b for a, b in zip(steps, shares, strict=True)) / sum(a * a for a in steps)
        off = sum((scale * a - b) ** 2 for a, b in zip(steps, shares, strict=True))
        if off < best:
            best, found = off, min(1.0, scale * (now**-rate - total**-rate))
    return found
