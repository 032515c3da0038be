"""What images cost, clean and attacked: the chart of an audit's page, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from scrimp.jobs.audit_page_tables import CAN, Audit, attacks, hardest, percent
from scrimp.report import units

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.console import Group


def drawn(report: Audit) -> dict[str, Mapping[str, Any]]:
    """Clean images, and of the controls and of each threat the trial that went furthest; by name, eight at most."""
    tried = [trial for trial in report["trials"] if trial["kind"] == "control"]
    chosen = [hardest(tried)]
    chosen += [hardest(attacks(report, threat)) for threat in CAN]
    return {"clean": report["clean"], **{trial["name"]: trial for trial in chosen if trial is not None}}


def costs_figure(report: Audit) -> Figure:
    """Share of the images that cost no more than so many FLOPs, with the costs that nothing exceeds."""
    import plotly.graph_objects as go

    from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

    figure = empty_figure()
    colours = iter((COLOURS[1], COLOURS[3], COLOURS[4], COLOURS[5], COLOURS[2], COLOURS[1]))
    for name, trial in drawn(report).items():
        control = trial.get("kind") == "control"
        colour = COLOURS[0] if name == "clean" else BASELINE_COLOUR if control else next(colours)
        costs = sorted(trial["costs"])
        figure.add_trace(
            go.Scatter(
                x=[costs[0], *costs],
                y=[rank / len(costs) for rank in range(len(costs) + 1)],
                mode="lines",
                line={"shape": "hv", "color": colour, "width": 2.5, "dash": "dot" if control else "solid"},
                name=escape(name, quote=False),
                hovertemplate="%{y:.0%} cost at most %{x:.3s}FLOP<extra>%{fullData.name}</extra>",
            )
        )
    for name, flops, dash, colour in _limits(report):
        line = {"color": colour, "width": 2, "dash": dash}
        label = f"{name}, {units.flops(flops)}"
        figure.add_trace(go.Scatter(x=[flops, flops], y=[0, 1], mode="lines", line=line, name=label, hoverinfo="skip"))
    highest = max([report["full"], report["ceiling"] or 0, report["verdict"]["worst"]])
    figure.update_xaxes(title_text="FLOPs of an image", range=[0, 1.04 * highest])
    figure.update_yaxes(title_text="share of the images", tickformat=".0%", range=[0, 1.02])
    figure.update_layout(hovermode="closest")
    return figure


def audit_table(report: Audit) -> Group:
    """For the terminal: the trials that went furthest, the defences' best, and the verdict under them; `rich`."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, heading in enumerate(("trial", "", "FLOPs mean", "worst", "accuracy", "AS")):
        table.add_column(heading, justify="right" if place > 1 else "left", no_wrap=True)
    shown = list(drawn(report).values())[:7]
    for trial in shown:
        flops = [units.si(trial["flops"][name], "") for name in ("mean", "worst")]
        reached = percent(trial["success"]) if "success" in trial else units.UNKNOWN
        cells = (trial.get("name", "clean"), trial.get("threat", ""), *flops, units.percent(trial["accuracy"]), reached)
        table.add_row(*(Text(cell) for cell in cells))
    return Group(table, Text(report["verdict"]["text"], style="bold"))


def headline(report: Audit) -> str:
    """The verdict in a line."""
    kind, worst = report["verdict"]["kind"], units.flops(report["verdict"]["worst"])
    if kind == "static":
        return f"Static cost: {worst} for every image"
    if kind == "bounded":
        return f"Bounded: no image costs more than {units.flops(report['ceiling'])}"
    return f"Unbounded within dense: {worst} of {units.flops(report['full'])} reached"


def _limits(report: Audit) -> list[tuple[str, int, str, str]]:
    from scrimp.report.drawing import BASELINE_COLOUR, COLOURS

    found = [
        ("dense", report["full"], "solid", BASELINE_COLOUR),
        ("ceiling", report["ceiling"], "dash", BASELINE_COLOUR),
        ("recommended budget", report["verdict"]["recommended_budget"], "dashdot", COLOURS[2]),
    ]
    return [(name, flops, dash, colour) for name, flops, dash, colour in found if flops is not None]
