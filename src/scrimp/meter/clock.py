"""Wall time and process CPU time of a call. Never shares a pass with a counter, which slows a small model 19 times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from scrimp.meter.cost import Reading
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of ``count`` figures; ``None`` where there were none."""

    median: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        if len(figures) < 2:
            only = figures[0] if figures else None
            return cls(only, only, only, len(figures))
        low, median, high = quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high, len(figures))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: on the wall, and of this process's CPU, all its threads together."""

    seconds: Spread
    cpu_seconds: Spread

    def readings(self) -> tuple[Reading, Reading]:
        """``(seconds, cpu_seconds)`` as readings whose ``how`` carries the quartiles."""
        return _reading(self.seconds, "wall"), _reading(
            self.cpu_seconds, "process CPU, all threads, no child processes"
        )


@dataclass(frozen=True)
class Paired:
    """Two calls timed in turn. The ratios are a over b, pair by pair: under 1 where ``a`` is the quicker."""

    a: Timing
    b: Timing
    ratio: Spread
    cpu_ratio: Spread


def timed(fn: Call, *, warmup: int = 1, repeats: int = 5) -> Timing:
    """Time ``fn()``, called ``warmup`` times unmeasured and then ``repeats`` times, each on its own.

    CUDA, where in use, is waited for before and after each call.

    Raises:
        InputError: ``warmup`` is negative or ``repeats`` under 1.
    """
    check_counts(warmup, repeats)
    for _ in range(warmup):
        fn()
    return _timing([lap(fn) for _ in range(repeats)])


def paired(a: Call, b: Call, repeats: int = 5, *, warmup: int = 1) -> Paired:
    """Time two calls in turn (A B A B ...) in this process, so that what slows the machine slows both.

    Args:
        a: the call under test.
        b: what it is judged against; a pair in which its time does not register is left out of the ratio.
        repeats: pairs to time, after ``warmup`` pairs unmeasured.

    Raises:
        InputError: ``warmup`` is negative or ``repeats`` under 1.
    """
    check_counts(warmup, repeats)
    for _ in range(warmup):
        a()
        b()
    pairs = [(lap(a), lap(b)) for _ in range(repeats)]
    wall, cpu = (Spread.of([left[i] / right[i] for left, right in pairs if right[i] > 0]) for i in (0, 1))
    return Paired(_timing([left for left, _ in pairs]), _timing([right for _, right in pairs]), wall, cpu)


def check_counts(warmup: int, repeats: int) -> None:
    """Refuse counts of calls that measure nothing, with an `InputError`."""
    if warmup < 0 or repeats < 1:
        raise InputError(
            "warmup of at least 0 and repeats of at least 1",
            f"warmup {warmup} and repeats {repeats}",
            "ask for one timed call or more",
        )


def lap(fn: Call) -> tuple[float, float]:
    """Wall seconds and CPU seconds of one call."""
    synchronise()
    cpu, wall = time.process_time(), time.perf_counter()
    fn()
    synchronise()
    return time.perf_counter() - wall, time.process_time() - cpu


def _timing(laps: Sequence[tuple[float, float]]) -> Timing:
    return Timing(Spread.of([wall for wall, _ in laps]), Spread.of([cpu for _, cpu in laps]))


def _reading(spread: Spread, clock: str) -> Reading:
    if spread.count == 1:
        return Reading(spread.median, f"{clock}, one call")
    return Reading(
        spread.median, f"{clock}, median of {spread.count} calls, quartiles {spread.low:.4g} to {spread.high:.4g} s"
    )
