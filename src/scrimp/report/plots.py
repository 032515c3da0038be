"""Plotly figures from receipts: quality against cost, training curves, where each way ended, and tau."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from scrimp.receipts import Receipt
from scrimp.report import units
from scrimp.report.curves import has, mean_line, seed_line
from scrimp.report.drawing import (
    GRID,
    Looks,
    add_axes,
    drawn_ways,
    empty_figure,
    mean_line_trace,
    mean_mark,
    seed_line_trace,
    seed_marks,
)
from scrimp.report.section import Section
from scrimp.report.summary import Spread, WayRow, quality_names, studies, summarise
from scrimp.report.words import capital, quality_title

_SAME, _STEP = 1.02, 0.02  # ways within 2 % of each other's cost are drawn 2 % of it apart
_SPENT = ("flops", "cpu_seconds", "seconds")


def quality_against_cost(
    receipts: Sequence[Receipt], *, quality: str = "test_accuracy", drawn: Looks | None = None
) -> go.Figure:
    """The quality along the runs against what had been spent by then; buttons choose FLOPs, CPU or wall seconds."""
    figure = _curves(receipts, quality, _SPENT, drawn)
    figure.update_yaxes(title_text=quality_title(quality), tickformat=_tickformat(quality))
    return figure


def training_curves(receipts: Sequence[Receipt], *, drawn: Looks | None = None) -> go.Figure:
    """Training loss (log axis) against samples or FLOPs."""
    figure = _curves(receipts, "train_loss", ("samples", "flops"), drawn)
    known = [y for trace in figure.data for y in trace.y if y > 0]
    narrow = bool(known) and max(known) < 20 * min(known)
    units_of_loss = {str(run.notes.get("unit of train_loss", "nats")) for run in receipts} or {"nats"}
    figure.update_yaxes(
        title_text=f"train loss ({', '.join(sorted(units_of_loss))}, log)", type="log", tickformat=".3~g"
    )
    # Every digit is labelled over little more than a decade; over more, 1, 2 and 5, the others as bare lines.
    figure.update_yaxes(
        dtick="D1" if narrow else "D2", minor={"dtick": "D1", "showgrid": not narrow, "gridcolor": GRID}
    )
    return figure


def tau_trace(receipts: Sequence[Receipt], *, drawn: Looks | None = None) -> go.Figure:
    """The variance-reduction measure tau along the runs that followed it."""
    figure = _curves(receipts, "tau", ("samples", "flops"), drawn)
    figure.update_yaxes(title_text="tau")
    return figure


def final_points(
    receipts: Sequence[Receipt], *, quality: str = "test_accuracy", drawn: Looks | None = None
) -> go.Figure:
    """Where each way ended: mean quality against mean cost, bars of one standard deviation, small marks for seeds."""
    rows = {(row.name, row.way): row for row in summarise(receipts)}
    axes = [axis for axis in (*_SPENT, "joules") if _spent(rows.values(), axis)]
    figure = empty_figure()
    states: dict[str, list[dict[str, Any]]] = {axis: [] for axis in axes}
    for way, label, look in drawn_ways(receipts, drawn):
        row, runs = rows[way], studies(receipts)[way[0]][way[1]]
        figure.add_trace(seed_marks(label, look))
        figure.add_trace(mean_mark(label, look, row.quality.get(quality, Spread())))
        for axis in axes:
            states[axis] += [_seed_points(runs, axis, quality), _mean_point(row, axis, quality)]
    for points in states.values():
        _side_by_side(points)
    add_axes(figure, states)
    figure.update_yaxes(title_text=quality_title(quality), tickformat=_tickformat(quality))
    figure.update_layout(hovermode="closest")
    return figure


def figures(receipts: Sequence[Receipt], *, drawn: Looks | None = None) -> list[Section]:
    """The figures that the receipts have points for, each with its title and how to read it."""
    qualities = [
        name for name in quality_names(receipts) if any(units.is_known(run.quality.get(name)) for run in receipts)
    ]
    leading = "test_accuracy" if "test_accuracy" in qualities or not qualities else qualities[0]
    lines = "Bold: mean over seeds; faint: each seed. Drag to zoom, double-click to go back."
    found = []
    if any(has(receipts, leading, axis) for axis in _SPENT):
        figure = quality_against_cost(receipts, quality=leading, drawn=drawn)
        found.append(Section(f"{capital(quality_title(leading))} against cost", figure, lines))
    if any(has(receipts, "train_loss", axis) for axis in ("samples", "flops")):
        found.append(Section("Training curves", training_curves(receipts, drawn=drawn), lines))
    if leading in qualities and any(_spent(summarise(receipts), axis) for axis in _SPENT):
        text = "Large: mean over seeds, one standard deviation; small: each seed. Equal costs stand side by side."
        found.append(Section("Where each way ended", final_points(receipts, quality=leading, drawn=drawn), text))
    if any(has(receipts, "tau", axis) for axis in ("samples", "flops")):
        text = "By what factor choosing by the scores shrinks the standard deviation of the gradient; 1: not at all."
        found.append(Section("Variance reduction along the run", tau_trace(receipts, drawn=drawn), text))
    return found


def _curves(receipts: Sequence[Receipt], quality: str, axes: Sequence[str], drawn: Looks | None) -> go.Figure:
    """One faint line a seed and one bold mean line a way, for each axis that the curves know."""
    axes = [axis for axis in axes if has(receipts, axis, quality)]
    figure = empty_figure()
    states: dict[str, list[dict[str, Any]]] = {axis: [] for axis in axes}
    for (name, way), label, look in drawn_ways(receipts, drawn):
        runs = studies(receipts)[name][way]
        if not has(runs, quality):
            continue
        figure.add_traces([seed_line_trace(label, look) for _ in runs] if len(runs) > 1 else [])
        figure.add_trace(mean_line_trace(label, look))
        for axis in axes:
            states[axis] += _curve_points(runs, axis, quality)
    add_axes(figure, states)
    return figure


def _spent(rows: Iterable[WayRow], axis: str) -> bool:
    return any(row.cost[axis].count for row in rows)


def _curve_points(runs: Sequence[Receipt], axis: str, quality: str) -> list[dict[str, Any]]:
    lines = [seed_line(run, axis, quality) for run in runs]
    mean = mean_line(lines)
    text = [units.quality(quality, y, spread) for y, spread in zip(mean.y, mean.deviation, strict=True)]
    seeds = [{"x": [x for x, _ in line], "y": [y for _, y in line], "text": []} for line in lines]
    return [*(seeds if len(runs) > 1 else []), {"x": mean.x, "y": mean.y, "text": text}]


def _seed_points(runs: Sequence[Receipt], axis: str, quality: str) -> dict[str, Any]:
    pairs = [(getattr(run.cost, axis).value, run.quality.get(quality)) for run in runs]
    known = [(x, y) for x, y in pairs if units.is_known(x) and units.is_known(y)]
    return {"x": [x for x, _ in known], "y": [y for _, y in known], "text": [], "error_x.array": []}


def _mean_point(row: WayRow, axis: str, quality: str) -> dict[str, Any]:
    x, y = row.cost[axis], row.quality.get(quality, Spread())
    if x.mean is None or y.mean is None:
        return {"x": [], "y": [], "text": [], "error_x.array": []}
    text = f"{units.quality(quality, y.mean, y.deviation)} for {units.COSTS[axis][1](x.mean)}"
    return {"x": [x.mean], "y": [y.mean], "text": [text], "error_x.array": [x.deviation or 0]}


def _side_by_side(points: Sequence[dict[str, Any]]) -> None:
    """Move apart what would lie on top of one another: ways that spent the same, two traces (seeds, mean) each."""
    means = [one["x"][0] for one in points[1::2] if one["x"]]
    if len(means) < 2 or max(means) > _SAME * min(means):
        return
    for place, pair in enumerate(zip(points[::2], points[1::2], strict=True)):
        shift = (place - (len(points) / 2 - 1) / 2) * _STEP * max(means)
        for one in pair:
            one["x"] = [x + shift for x in one["x"]]


def _tickformat(quality: str) -> str:
    return ".1~%" if units.is_share(quality) else ".4~g"
