"""What settings of sampling cost against how far their images are from the exact ones, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure, Scatter

from denoise_tables import GATED, NAME, TASKS, Setting, base_of, front, sound
from scrimp.receipts import Receipt
from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

_MARKS = {"none": "circle", "every": "diamond", "below": "triangle-up"}
_REUSE = {"none": "no reuse", "every": "reuse by a fixed interval", "below": "reuse by the error estimate"}

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_LOGARITHMIC = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:g}" for tick in _TICKS]}


def scatter(receipt: Receipt) -> Figure:
    """A mark for each setting, the best ones joined, and lines through the baseline: what is left of and under it wins.

    Args:
        receipt: of the part ``sample``; one whose curve may not be published gives a figure without marks.
    """
    figure = empty_figure()
    title = TASKS[receipt.name.removeprefix(f"{NAME}/")]
    if not sound(receipt):
        return figure.update_layout(title={"text": f"{title}: {GATED}"})
    settings = [one for one in receipt.notes["settings"] if one["paired_error"] > 0]
    base = base_of(receipt)
    for number, (kind, label) in enumerate(_REUSE.items()):
        chosen = [one for one in settings if one["cache"].partition(" ")[0] == kind]
        marker = {"color": COLOURS[number], "symbol": _MARKS[kind], "size": 7, "opacity": 0.75}
        figure.add_trace(Scatter(**_points(chosen, base), mode="markers", marker=marker, name=label))
    line = {"color": COLOURS[3], "width": 1.5}
    figure.add_trace(Scatter(**_points(front(settings), base), mode="lines", line=line, name="best at its cost"))
    marker = {"color": BASELINE_COLOUR, "symbol": "square", "size": 13}
    figure.add_trace(Scatter(**_points([base], base), mode="markers", marker=marker, name=f"baseline: {base['name']}"))
    for add, value in ((figure.add_hline, base["paired_error"]), (figure.add_vline, 1.0)):
        add(value, line={"color": BASELINE_COLOUR, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text=f"{title}: FLOPs over the baseline's", rangemode="normal", **_LOGARITHMIC)
    figure.update_yaxes(title_text="paired error to 100 steps", **_LOGARITHMIC)
    figure.update_layout(hovermode="closest", legend={"font": {"size": 11}}, margin={"t": 70})
    return figure


def _points(settings: Sequence[Setting], base: Setting) -> dict[str, Any]:
    return {
        "x": [one["flops"] / base["flops"] for one in settings],
        "y": [one["paired_error"] for one in settings],
        "text": [one["name"] for one in settings],
    }
