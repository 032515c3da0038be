"""How figures look: colours, marks and lines of each way, the empty figure, the buttons that change its axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from scrimp.receipts import Receipt
from scrimp.report.summary import Spread, studies

AXES = {
    "flops": "compute (FLOP)",
    "cpu_seconds": "CPU time (s)",
    "seconds": "wall time (s)",
    "samples": "training samples",
    "joules": "energy (J)",
}
BASELINE_COLOUR = "#8b9097"
COLOURS = ("#1769b5", "#d55e00", "#00855f", "#c865c0", "#9a7400", "#7a5cd0")
"""At least 3 to 1 against a white and a near-black page, and told apart with any of the three colour blindnesses as
far as four ways go; marks and dashes differ too. After Okabe and Ito's palette (Color Universal Design, 2008)."""
_MARKS = ("circle", "diamond", "triangle-up", "star", "cross", "pentagon")
_DASHES = ("solid", "solid", "solid", "solid", "dash", "dashdot")
_BASELINE_MARK, _BASELINE_DASH = "square", "dot"
_HOVER = "%{text}<extra>%{fullData.name}</extra>"
_INK, GRID = "#33383f", "rgba(127,132,140,0.25)"
_BUTTONS = {
    "flops": "FLOPs",
    "cpu_seconds": "CPU time",
    "seconds": "wall time",
    "samples": "samples",
    "joules": "energy",
}


@dataclass(frozen=True)
class Look:
    """How a way is drawn; the baseline is grey, square and dotted everywhere."""

    colour: str
    mark: str
    dash: str


Looks = Mapping[str, Look]


def looks(receipts: Sequence[Receipt]) -> Looks:
    """The look of each way that is no baseline, by order of appearance: give it to figures that stand together."""
    ways = dict.fromkeys(way for study in studies(receipts).values() for way, runs in study.items() if not _base(runs))
    return {
        way: Look(*look) for way, look in zip(ways, cycle(zip(COLOURS, _MARKS, _DASHES, strict=True)), strict=False)
    }


def drawn_ways(receipts: Sequence[Receipt], drawn: Looks | None) -> Iterator[tuple[tuple[str, str], str, Look]]:
    """Each way as (study, way), its label, and its look."""
    drawn, every = drawn or looks(receipts), studies(receipts)
    for name, study in every.items():
        for way, runs in study.items():
            look = Look(BASELINE_COLOUR, _BASELINE_MARK, _BASELINE_DASH) if _base(runs) else drawn[way]
            yield (name, way), _plain(way if len(every) == 1 else f"{name}: {way}"), look


def add_axes(figure: go.Figure, states: Mapping[str, list[dict[str, Any]]]) -> None:
    """Draw the first axis, and let buttons put every trace's points of another axis in their place."""
    buttons = []
    for axis, points in states.items():
        change = {key: [one[key] for one in points] for key in (points[0] if points else {})}
        title = {"xaxis.title.text": AXES[axis], "xaxis.autorange": True, "yaxis.autorange": True}
        buttons.append({"label": _BUTTONS[axis], "method": "update", "args": [change, title]})
    if not buttons:
        return
    first = next(iter(states))
    for trace, point in zip(figure.data, states[first], strict=True):
        trace.update({key.replace(".", "_"): value for key, value in point.items()})
    figure.update_xaxes(title_text=AXES[first])
    if len(buttons) > 1:
        place = {"direction": "right", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "showactive": True}
        figure.update_layout(updatemenus=[{"type": "buttons", "buttons": buttons, **place}])


def empty_figure() -> go.Figure:
    """An empty figure in the report's style, legible by itself on white; the page recolours its ink for dark."""
    lines = {"gridcolor": GRID, "linecolor": GRID, "showline": True, "zeroline": False}
    axis = {**lines, "automargin": True, "title": {"font": {"size": 13}, "standoff": 10}, "tickfont": {"size": 12}}
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": _INK},
            "colorway": COLOURS,
            "hovermode": "x unified",
            "hoverlabel": {"namelength": -1, "bgcolor": "white", "bordercolor": BASELINE_COLOUR},
            "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
            "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
            "xaxis": {**axis, "rangemode": "tozero", "tickformat": "~s", "hoverformat": ".3s"},
            "yaxis": axis,
        }
    )


def seed_line_trace(label: str, look: Look) -> go.Scatter:
    line = {"color": look.colour, "width": 1}
    return go.Scatter(mode="lines", line=line, opacity=0.4, hoverinfo="skip", name=label, **_under(label))


def mean_line_trace(label: str, look: Look) -> go.Scatter:
    line = {"color": look.colour, "width": 2.5, "dash": look.dash}
    return go.Scatter(mode="lines", line=line, name=label, legendgroup=label, hovertemplate=_HOVER)


def seed_marks(label: str, look: Look) -> go.Scatter:
    marker = {"color": look.colour, "symbol": look.mark, "size": 5}
    return go.Scatter(mode="markers", marker=marker, opacity=0.45, hoverinfo="skip", name=label, **_under(label))


def mean_mark(label: str, look: Look, spread: Spread) -> go.Scatter:
    bar = {"color": look.colour, "thickness": 1.5, "width": 5}
    marker = {"color": look.colour, "symbol": look.mark, "size": 12}
    bars = {"error_x": bar, "error_y": {**bar, "array": [spread.deviation or 0]}}
    return go.Scatter(mode="markers", marker=marker, name=label, legendgroup=label, hovertemplate=_HOVER, **bars)


def _under(label: str) -> dict[str, Any]:
    """A trace that comes and goes with its way's entry in the legend, without one of its own."""
    return {"legendgroup": label, "showlegend": False}


def _base(runs: Iterable[Receipt]) -> bool:
    return any(run.baseline for run in runs)


def _plain(text: str) -> str:
    """Plotly reads a small HTML in its labels; a way's name is only text."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
