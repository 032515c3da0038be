"""Telling attacked images by what they do to the policy: a threshold that clean images pass at a stated rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class Detector:
    """How unlike clean images an image's statistics are, and from where on that is an alarm.

    Attributes:
        mean: of the statistics of clean images, [k], float64.
        whiten: [k, k]: the score is the length of (statistics - mean) @ whiten (Mahalanobis' distance).
        threshold: scores above it are alarms.
        false_alarms: share of clean images that may be, at most, in expectation.
    """

    mean: Tensor
    whiten: Tensor
    threshold: float
    false_alarms: float

    def scores(self, statistics: Tensor) -> Tensor:
        """Distances of ``statistics`` [n, k] from clean ones, [n], float64; what is not a number is infinitely far."""
        _check(statistics, len(self.mean))
        far = (statistics.double().cpu() - self.mean) @ self.whiten
        return far.square().sum(1).sqrt().nan_to_num(nan=torch.inf)

    def alarms(self, statistics: Tensor) -> Tensor:
        """Which images are taken for attacked, [n], bool."""
        return self.scores(statistics) > self.threshold


def fit_detector(statistics: Tensor, *, generator: torch.Generator, false_alarms: float = 0.05) -> Detector:
    """Learn what clean images are like, and set the threshold on others of them.

    A random half of the images gives mean and covariance, the other half the threshold: the ceil((m + 1)(1 -
    false_alarms))-th of its m scores. For further images of the same kind the expected share of alarms is then no more
    than asked for (split conformal prediction), whatever the statistics' distribution.

    Args:
        statistics: of clean images, [n, k], finite: such as tokens left after each block. With k = 1, the cost.
        generator: on the CPU; deals the halves.
        false_alarms: above 0 and below 1.

    Raises:
        InputError: statistics of another shape, a rate out of range, or too few images for it.
    """
    _check(statistics, None)
    if not 0 < false_alarms < 1 or not bool(statistics.isfinite().all()):
        saw = f"false_alarms={false_alarms}"
        raise InputError("finite statistics, and false_alarms above 0 and below 1", saw, "correct them")
    order = torch.randperm(len(statistics), generator=generator)
    whole = statistics.double().cpu()[order]
    known, held = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    rank = math.ceil((len(held) + 1) * (1 - false_alarms) - 1e-9)
    if rank > len(held) or len(known) < 2:
        least = max(4, 2 * math.ceil(1 / false_alarms - 1 - 1e-9) - 1)
        raise InputError(f"at least {least} clean images for this rate", str(len(whole)), "allow more false alarms")
    mean = known.mean(0)
    spread = (known - mean).T @ (known - mean) / (len(known) - 1)
    bare = Detector(mean, _whiten(spread), math.inf, false_alarms)
    return Detector(mean, bare.whiten, float(bare.scores(held).sort().values[rank - 1]), false_alarms)


def _whiten(spread: Tensor) -> Tensor:
    """A square root of the inverse covariance; directions that clean images hardly vary in count by a floor."""
    values, vectors = torch.linalg.eigh(spread)
    floor = max(1e-3 * float(values.clamp_min(0).mean()), 1e-12)
    return vectors * values.clamp_min(floor).rsqrt()


def _check(statistics: Tensor, width: int | None) -> None:
    if statistics.ndim != 2 or not statistics.shape[1] or width not in (None, statistics.shape[1]):
        wanted = "k" if width is None else width
        raise InputError(f"statistics [images, {wanted}]", str(list(statistics.shape)), "pass one row an image")
