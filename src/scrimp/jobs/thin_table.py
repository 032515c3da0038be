"""What `scrimp thin` found, for people: the table, accuracy against FLOPs, and images a second."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from scrimp.receipts import Receipt
from scrimp.report import Section, units
from scrimp.report.parts import facts_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

_COLUMNS = ("mean", "p50", "p95", "p99", "worst")


def thin_table(receipts: Sequence[Receipt]) -> Table:
    """A `rich` table: accuracy, FLOPs an image, and how much quicker each way is."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headings, rows = grid(receipts)
    caption = "FLOPs an image; quicker: time of dense over thinned (ragged), medians of alternating pairs"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption=caption, caption_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(Text(heading.replace(" ", "\n", 1)), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def sections(receipts: Sequence[Receipt]) -> list[Section]:
    """The parts of the report that are this job's own."""
    headings, rows = grid(receipts)
    table = facts_table("Accuracy, FLOPs of an image, and how much quicker", headings, rows)
    found = [Section("What thinning costs and gives", table + _remarks(receipts), _about(receipts), first=True)]
    if any(units.is_known(item.quality.get("test_accuracy")) for item in receipts):
        text = "Mean over the test images; bars from the median to the dearest one in a hundred. Better: left and up."
        found.append(Section("Accuracy against FLOPs of an image", accuracy_figure(receipts), text, first=True))
    if lines := _speed_rows(receipts):
        wide = ("images a call", "form", "fewer FLOPs", "images a second", "dense", "quicker", "quartiles")
        speed = facts_table("Images a second, in turn with dense", ("way", *wide), lines)
        text = f"{_clock(receipts)[1]}; medians of alternating pairs. Quicker: dense over thinned, pair by pair."
        found.append(Section("Images a second", speed, text, first=True))
    return found


def grid(receipts: Sequence[Receipt]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, dense first."""
    timed = list(dict.fromkeys(item["batch"] for run in receipts for item in _ragged(run)))
    headings = ["way", "test accuracy", *(f"FLOPs {name}" for name in _COLUMNS), "FLOPs of dense"]
    headings += [f"quicker batch {batch}" for batch in timed]
    dense = next((item for item in receipts if item.baseline), None)
    rows = []
    for item in receipts:
        spent = item.notes.get("flops_an_image", {})
        row = [item.way, units.percent(item.quality.get("test_accuracy"))]
        row += [units.si(spent.get(name), "") for name in _COLUMNS]
        row.append(_times(_over(spent.get("mean"), _mean(dense))))
        found = {one["batch"]: one for one in _ragged(item)}
        row += [_times(_quicker(found[batch], receipts) if batch in found else None) for batch in timed]
        rows.append(row)
    return headings, rows


def accuracy_figure(receipts: Sequence[Receipt]) -> Figure:
    """Accuracy of each way against its FLOPs an image; settings of a method are joined in their order."""
    import plotly.graph_objects as go

    from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

    figure = empty_figure()
    thinned = sorted((item for item in receipts if not item.baseline), key=lambda item: _mean(item) or 0.0)
    for colour, symbol, name, runs in (
        (BASELINE_COLOUR, "square", "dense", [item for item in receipts if item.baseline]),
        (COLOURS[0], "circle", "thinned", thinned),
    ):
        spent = [item.notes.get("flops_an_image", {}) for item in runs]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, item.get("p99", 0.0) - item.get("mean", 0.0)) for item in spent],
            "arrayminus": [max(0.0, item.get("mean", 0.0) - item.get("p50", 0.0)) for item in spent],
            "thickness": 1.2,
        }
        labels = [escape(item.way, quote=False) for item in runs]
        figure.add_trace(
            go.Scatter(
                x=[item.get("mean") for item in spent],
                y=[item.quality.get("test_accuracy") for item in runs],
                error_x=bars,
                mode="lines+markers+text",
                text=labels,
                textposition="bottom center",
                line={"color": colour, "width": 2},
                marker={"color": colour, "symbol": symbol, "size": 11},
                name=name,
                hovertemplate="%{text}: %{y:.1%} at %{x:.3s}FLOP<extra></extra>",
                cliponaxis=False,
            )
        )
    figure.update_xaxes(title_text="FLOPs an image (mean)")
    figure.update_yaxes(title_text="test accuracy", tickformat=".1%")
    figure.update_layout(hovermode="closest")
    return figure


def _about(receipts: Sequence[Receipt]) -> str:
    budgets = [item.config["max_flops"] for item in receipts if item.config.get("max_flops")]
    limit = f" No image may cost more than {units.flops(min(budgets))}." if budgets else ""
    return f"FLOPs of single test images: 1 multiply-add = 2 FLOPs, whole model. {_clock(receipts)[1]}.{limit}"


def _remarks(receipts: Sequence[Receipt]) -> str:
    """Which way is quickest; then of single ways whether the forms agree, and what became of the export."""
    said = [
        _verdict(batch, receipts) for batch in dict.fromkeys(one["batch"] for run in receipts for one in _ragged(run))
    ]
    for item in receipts:
        apart = item.notes.get("masked and ragged differ by")
        if apart is not None:
            said.append(f"{item.way}: masked and ragged outputs differ by at most {apart:.1e}.")
        exported = item.notes.get("export", {})
        if "why not" in exported:
            said.append(f"{item.way} is not exported: {exported['why not']}.")
        elif exported:
            said.append(f"{item.way} is exported as {exported['file']}, {units.size(exported['bytes'])}.")
    return "".join(f"<p>{escape(text)}</p>" for text in said)


def _verdict(batch: int, receipts: Sequence[Receipt]) -> str:
    """Which way is the quickest for so many images a call, if any beats dense in three pairs of four."""
    ratio = "cpu_ratio" if _clock(receipts)[0] == "cpu_seconds" else "ratio"
    timed = [(one[ratio], run.way) for run in receipts for one in _ragged(run) if one["batch"] == batch]
    ahead = [(found["median"], way) for found, way in timed if found["high"] is not None and found["high"] < 1]
    if not ahead:
        return f"At batch {batch} no way is quicker than dense, whatever FLOPs it saves."
    best, way = min(ahead)
    return f"At batch {batch} the quickest is {way}, {_times(1 / best)} as quick as dense."


def _speed_rows(receipts: Sequence[Receipt]) -> list[list[str]]:
    field, dense = _clock(receipts)[0], next((item for item in receipts if item.baseline), None)
    rows = []
    for item in receipts:
        for one in _speeds(item):
            ratio = one["cpu_ratio" if field == "cpu_seconds" else "ratio"]
            quartiles = [_times(_over(1.0, ratio[name])) for name in ("high", "low")]
            rows.append([
                item.way,
                str(one["batch"]),
                one["form"] if item.notes.get("forms") == 2 else "-",
                _times(_over(_mean(dense), one["flops"])),
                units.three_digits(one["batch"] / one[field]) if one[field] else units.UNKNOWN,
                units.three_digits(one["batch"] / one[f"dense_{field}"]) if one[f"dense_{field}"] else units.UNKNOWN,
                _times(_quicker(one, receipts)),
                " to ".join(quartiles),
            ])  # fmt: skip
    return rows


def _quicker(one: dict[str, Any], receipts: Sequence[Receipt]) -> float | None:
    return _over(1.0, one["cpu_ratio" if _clock(receipts)[0] == "cpu_seconds" else "ratio"]["median"])


def _clock(receipts: Sequence[Receipt]) -> tuple[str, str]:
    """What times are read from: a CPU's own, where that does the work."""
    if all(item.notes.get("device", "cpu") == "cpu" for item in receipts):
        return "cpu_seconds", "Times are CPU time of the process"
    return "seconds", "Times are wall time"


def _speeds(receipt: Receipt) -> list[dict[str, Any]]:
    return [] if receipt.baseline else receipt.notes.get("speed", [])


def _ragged(receipt: Receipt) -> list[dict[str, Any]]:
    return [item for item in _speeds(receipt) if item["form"] == "ragged"]


def _mean(receipt: Receipt | None) -> float | None:
    return None if receipt is None else receipt.notes.get("flops_an_image", {}).get("mean")


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _times(ratio: float | None) -> str:
    return units.UNKNOWN if ratio is None else f"{ratio:.3g}x"
