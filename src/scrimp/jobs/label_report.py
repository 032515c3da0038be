"""What labelling found, for people: accuracy against labels, beside random, and what is in the classes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from scrimp.receipts import Receipt
from scrimp.report import Section, units
from scrimp.report.parts import facts_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHARE = 0.9
"""Of the accuracy that all labels give; how many labels reach it is what strategies are compared by."""
_COLUMNS = 8  # numbers of labels in the table


def labels_to(curve: Sequence[dict[str, float | None]], accuracy: float) -> float | None:
    """The fewest labels, of those fitted on, that reached an accuracy on the test images."""
    reached = [point["labels"] for point in curve if (point.get("test_accuracy") or 0.0) >= accuracy]
    return min((labels for labels in reached if labels is not None), default=None)


def sections(receipts: Sequence[Receipt]) -> list[Section]:
    """The parts of the report that are this job's own."""
    found = []
    kind = _kind(receipts)
    if any(point.get(kind) is not None for run in receipts for point in run.curve):
        found.append(Section("Accuracy against labels", curve_figure(receipts), _about(receipts), first=True))
        headings, rows = grid(receipts)
        if len(headings) > 1:
            table = facts_table(f"{kind.replace('_', ' ').capitalize()}, mean over the seeds", headings, rows)
            found.append(Section("Accuracy by the number of labels", table, _reached(receipts), first=True))
    counts = _counts(receipts)
    if counts:
        ways = (run.way for run in _first_seed(receipts))
        table = facts_table("Labels given, each way's first seed", ("class", *ways), counts)
        found.append(Section("Labels a class", table, first=True))
    return found


def grid(receipts: Sequence[Receipt]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: for each way the mean accuracy over seeds at some numbers of labels."""
    kind = _kind(receipts)
    points = [point for run in receipts for point in run.curve if point.get(kind) is not None]
    shown = every = sorted({int(point["labels"] or 0) for point in points})
    if len(every) > _COLUMNS:
        shown = [every[place * (len(every) - 1) // (_COLUMNS - 1)] for place in range(_COLUMNS)]
    rows = []
    for way in dict.fromkeys(run.way for run in receipts):
        row = [way]
        for labels in shown:
            found = [
                value
                for run in receipts
                if run.way == way
                for point in run.curve
                if point["labels"] == labels and (value := point.get(kind)) is not None
            ]
            spread = statistics.stdev(found) if len(found) > 1 else None
            row.append(units.percent(statistics.fmean(found), spread) if found else "-")
        rows.append(row)
    return ["way", *(f"{labels} labels" for labels in shown)], rows


def curve_figure(receipts: Sequence[Receipt]) -> Figure:
    """The mean over seeds, each seed pale behind it; for an estimate its 95 % interval."""
    import plotly.graph_objects as go

    from scrimp.report.curves import mean_line, seed_line
    from scrimp.report.drawing import drawn_ways, empty_figure, mean_line_trace, seed_line_trace

    figure, kind = empty_figure(), _kind(receipts)
    for (_, way), label, look in drawn_ways(receipts, None):
        runs = [run for run in receipts if run.way == way]
        lines = [seed_line(run, "labels", kind) for run in runs]
        for line in lines if len(lines) > 1 else []:
            figure.add_trace(seed_line_trace(label, look).update(x=[x for x, _ in line], y=[y for _, y in line]))
        mean = mean_line(lines)
        text = [f"{units.percent(y)} with {x:.0f} labels" for x, y in zip(mean.x, mean.y, strict=True)]
        figure.add_trace(mean_line_trace(label, look).update(x=mean.x, y=mean.y, text=text, mode="lines+markers"))
        for bound in ("low", "high"):
            ends = seed_line(runs[0], "labels", bound)
            if ends and len(runs) == 1:
                trace = seed_line_trace(label, look).update(x=[x for x, _ in ends], y=[y for _, y in ends])
                figure.add_trace(trace)
    ceiling = _ceiling(receipts)
    for share, words in ((1.0, "all labels"), (SHARE, f"{SHARE:.0%} of it")) if ceiling is not None else ():
        assert ceiling is not None
        figure.add_hline(y=share * ceiling, line={"dash": "dot", "width": 1}, annotation_text=escape(words))
    figure.update_xaxes(title_text="labels")
    figure.update_yaxes(title_text=kind.replace("_", " "), tickformat=".0%")
    figure.update_layout(hovermode="closest", showlegend=True)
    assert isinstance(figure, go.Figure)
    return figure


def _kind(receipts: Sequence[Receipt]) -> str:
    tested = any(point.get("test_accuracy") is not None for run in receipts for point in run.curve)
    return "test_accuracy" if tested else "estimated_accuracy"


def _about(receipts: Sequence[Receipt]) -> str:
    if _kind(receipts) == "test_accuracy":
        return f"Accuracy of the linear classifier on {receipts[0].notes.get('test images', '-')} images kept apart."
    found = receipts[0].notes.get("estimate") or {}
    return f"An estimate with its 95 % interval (Wilson): {found.get('how', 'unknown')}."


def _reached(receipts: Sequence[Receipt]) -> str:
    ceiling = _ceiling(receipts)
    if ceiling is None:
        return ""
    parts = []
    for way in dict.fromkeys(run.way for run in receipts):
        found = [run.notes.get("labels to 90 % of it") for run in receipts if run.way == way]
        known = [labels for labels in found if labels is not None]
        missed = len(found) - len(known)
        text = f"{statistics.median(known):.0f} labels with {way}" if known else f"none of {way}"
        parts.append(text + (f" ({missed} of {len(found)} runs never)" if missed and known else ""))
    listed = ", ".join(parts)
    return f"All labels give {units.percent(ceiling)}. {SHARE:.0%} of that take {listed} (median of the runs)."


def _ceiling(receipts: Sequence[Receipt]) -> float | None:
    found = [run.notes.get("accuracy with all labels") for run in receipts]
    return next((value for value in found if value is not None), None)


def _counts(receipts: Sequence[Receipt]) -> list[list[str]]:
    runs = _first_seed(receipts)
    counts = [run.notes.get("labels a class") or {} for run in runs]
    return [[name, *(str(count.get(name, 0)) for count in counts)] for name in (counts[0] if counts else {})]


def _first_seed(receipts: Sequence[Receipt]) -> list[Receipt]:
    return list({run.way: run for run in reversed(receipts)}.values())[::-1]
