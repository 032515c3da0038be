"""What is learnt from the labels so far: a linear classifier, how good it is, and which images to ask about next."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scrimp.jobs.label_config import LabelConfig
from scrimp.jobs.label_session import Round, Snapshot
from scrimp.primitives.draw import generator_for
from scrimp.represent.linear import LinearProbe, fit_linear_probe
from scrimp.select import (
    Gain,
    Selection,
    Strategy,
    badge,
    balanced,
    changes_left,
    coefficient_determinants,
    coefficient_gradients,
    cold_start,
    coverage,
    enough,
    gain_left,
    head_gradients,
    herding,
    k_centre,
    margin,
    multi_round,
    nearest_to_centres,
    predicted_residuals,
    predictive_entropy,
    random_labels,
    typicality,
)

_Z = 1.959963984540054  # 95 %
_FOLDS = 5
_MEASURED = 4096  # images that mean and deviation of the features are taken from
_WATCHED = 5000  # images whose predictions tell when to stop
_CURVE = 10  # latest rounds that tell it
UNTIL = 10
"""Labels a class from which a classifier is asked: below, clusters choose better (benchmarks/label_accuracy.py)."""
_RANK, _BASES = 4, 64  # of the NOLA head whose gradients are chosen by


@dataclass(frozen=True)
class Estimate:
    """An accuracy with a 95 % interval (Wilson's).

    Attributes:
        accuracy, low, high: shares.
        count: images it was measured on.
        how: in words.
    """

    accuracy: float
    low: float
    high: float
    count: int
    how: str


def wilson(right: int, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson 1927); ``count`` above 0."""
    share, spread = right / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # Rounding may leave the ends of 0 and of 1 a little inside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


@dataclass
class Learner:
    """Chooses round after round.

    Args:
        features: of the images, [n, dim], of unit length.
        classes: how many.
        seed: of every draw.
        strategy: its name; ``config.strategy`` or ``"random"``.
        audit: share of the labels drawn at random.
        test: features and class numbers of images kept apart, or ``None``.
        earlier: class numbers by image in the order they were given, where an earlier run left ``curve``.

    Attributes:
        curve: a point a fit: ``labels``, ``seconds`` and ``cpu_seconds`` so far, ``test_accuracy`` or
            ``estimated_accuracy``, with ``low`` and ``high`` for the latter.
        estimate, gain: the latest; ``None`` while unknown.
        probe: the latest classifier.
    """

    config: LabelConfig
    features: Tensor
    classes: int
    seed: int
    strategy: str
    audit: float = 0.0
    test: tuple[Tensor, Tensor] | None = None
    earlier: Mapping[int, int] = field(default_factory=dict)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    estimate: Estimate | None = None
    gain: Gain | None = None
    probe: LinearProbe | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _predictions: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.curve:
            self.seconds, self.cpu_seconds = (self.curve[-1][key] or 0.0 for key in ("seconds", "cpu_seconds"))
        self._sample = self.features[_spread(len(self.features), _MEASURED)]
        self._watched = _spread(len(self.features), _WATCHED)
        self._strategy = strategy_named(self.config, self.strategy, self.classes)
        if self.test is None:
            self._predict_again()

    def _predict_again(self) -> None:
        """What was predicted before an interruption, so that a resumed run stops where the whole one would have."""
        said = list(self.earlier.items())
        for point in self.curve[-_CURVE:] if said else ():
            known = dict(said[: int(point["labels"] or 0)])
            probe = self._fit(*_as_tensors(known))
            self._predictions.append(probe.logits(self.features[self._watched]).argmax(1))

    def choose(self, now: Snapshot) -> tuple[Round, str]:
        """The next images, and why to stop where that is better; then there are none."""
        probabilities = self.learn(now)
        if self.config.stop is not None and enough(self.gain, self.config.stop):
            return Round((), frozenset()), f"labelling all would add less than {self.config.stop:.3g} of accuracy"
        return self._timed(partial(self._choose, now, probabilities)), ""

    def learn(self, now: Snapshot) -> Tensor | None:
        """Fit, estimate, and tell the probabilities of all images, [n, classes]; ``None`` without labels."""
        if not now.labels:
            return None
        rows, numbers = _as_tensors(now.labels)
        self.probe = self._timed(lambda: self._fit(rows, numbers))
        probabilities = self._timed(lambda: self._probabilities(rows))
        if not self.curve or self.curve[-1]["labels"] != len(rows):
            self._measure(now, rows, numbers, probabilities)
        return probabilities

    def _choose(self, now: Snapshot, probabilities: Tensor | None) -> Round:
        size = min(self.config.batch or max(1, self.config.budget // 10), now.wanted)
        key = (self.seed, now.rounds)
        taken = torch.tensor(sorted(now.taken), dtype=torch.int64)
        # Rounded so that the share holds over rounds of a few labels too.
        before = now.rounds * size
        drawn = round((before + size) * self.audit) - round(before * self.audit)
        audit = random_labels(self.features, None, taken, drawn, generator=generator_for(*key, 0)).indices
        taken = torch.cat([taken, audit])
        left, generator = size - len(audit), generator_for(*key, 1)
        picked = self._strategy(self.features, probabilities, taken, left, generator=generator)
        rows = torch.cat([audit, picked.indices])
        # Nobody can tell from the order which are which.
        rows = rows[torch.randperm(len(rows), generator=generator_for(*key, 2))] if len(audit) else rows
        return Round(tuple(rows.tolist()), frozenset(audit.tolist()))

    def _fit(self, rows: Tensor, numbers: Tensor) -> LinearProbe:
        return fit_linear_probe(
            self.features[rows], numbers, classes=self.classes, l2=self.config.l2, unlabelled=self._sample
        )

    def _probabilities(self, rows: Tensor) -> Tensor:
        assert self.probe is not None
        found = torch.empty(len(self.features), self.classes)
        for start in range(0, len(found), 8192):
            found[start : start + 8192] = self.probe.logits(self.features[start : start + 8192]).softmax(1)
        return found

    def _measure(self, now: Snapshot, rows: Tensor, numbers: Tensor, probabilities: Tensor) -> None:
        """Left out of the time: it is what a report costs, not what labelling does."""
        assert self.probe is not None
        self._predictions.append(probabilities[self._watched].argmax(1))
        point: dict[str, float | None] = {"labels": float(len(rows)), "seconds": self.seconds}
        point["cpu_seconds"] = self.cpu_seconds
        if self.test is not None:
            right = int((self.probe.logits(self.test[0]).argmax(1) == self.test[1]).sum())
            self.estimate = _estimate(right, len(self.test[1]), "test images")
            point["test_accuracy"] = self.estimate.accuracy
        else:
            self.estimate = self._crossed(now, rows, numbers)
            if self.estimate is not None:
                point["estimated_accuracy"] = self.estimate.accuracy
                point |= {"low": self.estimate.low, "high": self.estimate.high}
        self.curve.append(point)
        self.gain = self._gain()

    def _crossed(self, now: Snapshot, rows: Tensor, numbers: Tensor) -> Estimate | None:
        """Every image judged by a classifier that has not seen it: those drawn at random alone, where there are any."""
        asked = torch.tensor([not now.audit or row in now.audit for row in rows.tolist()])
        if int(asked.sum()) < 2 or len(numbers.unique()) < 2:
            return None
        fold = torch.randperm(len(rows), generator=generator_for(self.seed, 3)) % min(_FOLDS, len(rows))
        right = 0
        for part in fold.unique():
            held = asked & (fold == part)
            if bool(held.any()):
                probe = self._fit(rows[fold != part], numbers[fold != part])
                right += int((probe.logits(self.features[rows[held]]).argmax(1) == numbers[held]).sum())
        how = "labels drawn at random" if now.audit else "labels of chosen images, which are not typical"
        return _estimate(right, int(asked.sum()), f"{how}; cross-validated, {int(fold.max()) + 1} folds")

    def _gain(self) -> Gain | None:
        self._predictions = self._predictions[-_CURVE:]
        latest = self.curve[-_CURVE if self.test is not None else -len(self._predictions) :]
        labels = [int(point["labels"] or 0) for point in latest]
        total = len(self.features)
        if self.test is not None:
            return gain_left(labels, [point["test_accuracy"] or 0.0 for point in latest], total)
        return changes_left(labels, self._predictions, total)

    def _timed(self, work: Callable[[], Any]) -> Any:
        clock, cpu = time.perf_counter(), time.process_time()
        done = work()
        self.seconds += time.perf_counter() - clock
        self.cpu_seconds += time.process_time() - cpu
        return done


def strategy_named(config: LabelConfig, name: str, classes: int) -> Strategy:
    """The strategy of that name, with a cold start where it asks a classifier."""
    if name in _WITHOUT_MODEL:
        found = _WITHOUT_MODEL[name]
    else:
        until = UNTIL * classes if config.until is None else config.until
        found = cold_start(_WITHOUT_MODEL[config.first], _WITH_MODEL[name], until=until)
    if not config.balance or name == "random":
        return found
    return cold_start(_WITHOUT_MODEL[config.first], balanced(found))


def _in_coefficients(strategy: Strategy) -> Strategy:
    """Asked about the gradients of a NOLA head's coefficients, fresh ones (alphas drawn, betas 0), round by round."""

    def asked(
        features: Tensor, probabilities: Tensor | None, labelled: Tensor, budget: int, /, *, generator: torch.Generator
    ) -> Selection:
        assert probabilities is not None  # the cold start sees to it
        residuals = predicted_residuals(probabilities)
        width, classes = features.shape[1], probabilities.shape[1]
        gradients = head_gradients(
            features,
            residuals,
            outer=features.new_zeros(classes, _RANK),
            inner=torch.randn(_RANK, width, generator=generator) / math.sqrt(width),
            outer_bases=torch.randn(_BASES, classes, _RANK, generator=generator) / math.sqrt(_BASES),
            inner_bases=features.new_zeros(0, _RANK, width),
        )
        return strategy(gradients, probabilities, labelled, budget, generator=generator)

    return asked


_WITHOUT_MODEL: dict[str, Strategy] = {
    "random": random_labels,
    "centres": nearest_to_centres,
    "multi-round": multi_round,
    "k-centre": k_centre,
    "typicality": typicality,
    "coverage": coverage,
    "herding": herding,
}
_WITH_MODEL: dict[str, Strategy] = {
    "margin": margin,
    "entropy": predictive_entropy,
    "badge": badge,
    "coefficients": _in_coefficients(coefficient_gradients),
    "determinants": _in_coefficients(coefficient_determinants),
}


def _estimate(right: int, count: int, how: str) -> Estimate:
    return Estimate(right / count, *wilson(right, count), count, how)


def _as_tensors(labels: dict[int, int]) -> tuple[Tensor, Tensor]:
    rows = sorted(labels)
    return torch.tensor(rows), torch.tensor([labels[row] for row in rows])


def _spread(count: int, most: int) -> Tensor:
    """So many of the rows, evenly."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most
