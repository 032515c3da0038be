"""Curves of one way as lines to draw: each seed's points, and their mean on a common grid."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scrimp.receipts import Receipt
from scrimp.report import units

_MOST_POINTS = 300  # more than a screen can tell apart; keeps the report small

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Mean:
    """The mean over seeds at each ``x``, with the sample standard deviation (``None`` for one seed)."""

    x: list[float]
    y: list[float]
    deviation: list[float | None]


def seed_line(run: Receipt, x: str, y: str) -> Line:
    """The (x, y) points of a run's curve where both are known, by x, thinned evenly; the last one is kept."""
    found = [(point.get(x), point.get(y)) for point in run.curve]
    known = sorted((a, b) for a, b in found if units.is_known(a) and units.is_known(b))
    return _thin(known)


def mean_line(lines: Iterable[Line]) -> Mean:
    """Mean over lines, read by straight interpolation where all of them have points; empty where they share none."""
    lines = [line for line in lines if line]
    grid = _shared_grid(lines)
    values = [[_at(line, x) for line in lines] for x in grid]
    deviations = [statistics.stdev(at) if len(at) > 1 else None for at in values]
    return Mean(grid, [statistics.fmean(at) for at in values], deviations)


def has(runs: Iterable[Receipt], *keys: str) -> bool:
    """Whether any curve point knows all of ``keys``."""
    return any(all(units.is_known(point.get(key)) for key in keys) for run in runs for point in run.curve)


def _shared_grid(lines: Sequence[Line]) -> list[float]:
    if not lines:
        return []
    low, high = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
    inner = sorted({x for line in lines for x, _ in line if low <= x <= high})
    # Seeds that were followed at almost the same places need one point for all, not one for each.
    return [inner[index] for index in _spread_indices(len(inner), max(map(len, lines)))]


def _at(line: Line, x: float) -> float:
    right = bisect.bisect_left(line, (x,))
    if right == 0 or (right < len(line) and line[right][0] == x):
        return line[right][1]
    (x0, y0), (x1, y1) = line[right - 1], line[min(right, len(line) - 1)]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _thin(line: Line) -> Line:
    return [line[index] for index in _spread_indices(len(line), _MOST_POINTS)]


def _spread_indices(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` positions, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)] if most > 1 else [count - 1]
