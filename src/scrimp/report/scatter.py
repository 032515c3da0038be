"""Points of classes in a plane whose axes mean nothing: a map of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from scrimp.report.drawing import COLOURS, empty_figure

POINT_COLOURS = (*COLOURS[:4], "#1ec35a", "#b4002d", "#6900ff", "#d296a5", "#4b5a69", "#8769ff")
"""Four of the ways' colours, and six chosen to be far from them and from one another in Lab as seen by the normal eye
and with each of the three colour blindnesses (Machado et al. 2009); all at least 2.3 to 1 against a white and a
near-black page. Ten colours cannot all be far apart to every eye: marks differ too."""
MARKS = ("circle", "diamond", "triangle-up", "star", "cross", "pentagon", "square")
"""As many as share no factor with the colours: the pairs repeat after 70 classes."""
_CROWD = 600  # points from which on they are drawn small


def class_scatter(
    names: Sequence[str], groups: Sequence[Sequence[tuple[float, float]]], *, legend: bool = True
) -> go.Figure:
    """A scatter of points (x, y), one colour, mark and legend entry a group; pointing at one tells its group.

    Both axes have the same scale and no figures. A group's look follows from its place among all, empty ones included
    (those have no entry): two maps of the same classes look alike.

    Args:
        names: of the groups, as plain text.
        groups: the points of each.
        legend: show names, in the legend and where one points.
    """
    figure = empty_figure()
    size = 6 if sum(map(len, groups)) > _CROWD else 8
    for place, (name, points) in enumerate(zip(names, groups, strict=True)):
        if points:
            figure.add_trace(_marks(escape(name, quote=False), points, look=_look(place), size=size))
    figure.update_traces(
        hovertemplate="%{fullData.name}<extra></extra>" if legend else None, hoverinfo=None if legend else "skip"
    )
    figure.update_xaxes(rangemode="normal", showticklabels=False, showgrid=False, ticks="", mirror=True)
    figure.update_yaxes(showticklabels=False, showgrid=False, ticks="", mirror=True, scaleanchor="x", constrain="range")
    beside = {"orientation": "v", "x": 1.01, "y": 0.96, "yanchor": "top", "itemsizing": "constant"}
    figure.update_layout(
        hovermode="closest", showlegend=legend, legend=beside, margin={"l": 12, "r": 12, "t": 12, "b": 12}
    )
    return figure


def _marks(name: str, points: Sequence[tuple[float, float]], *, look: tuple[str, str], size: int) -> go.Scatter:
    marker = {"color": look[0], "symbol": look[1], "size": size, "opacity": 0.9, "line": {"width": 0}}
    return go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="markers", marker=marker, name=name)


def _look(place: int) -> tuple[str, str]:
    """Ten neighbouring classes differ in colour and mostly in mark; the next ten have other marks."""
    return POINT_COLOURS[place % len(POINT_COLOURS)], MARKS[(place + place // len(POINT_COLOURS)) % len(MARKS)]
