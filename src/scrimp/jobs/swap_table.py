"""What `scrimp swap` found, for people: which setting to take, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from scrimp.receipts import Receipt
from scrimp.report import Section, units

if TYPE_CHECKING:
    from rich.table import Table

_QUALITIES = ("accuracy", "loss", "agreement", "output_error", "kl")
_COSTS = (("CPU time", "cpu_seconds"), ("wall time", "seconds"), ("FLOPs", "flops"), ("peak memory", "peak_bytes"))


def recommend(receipts: Sequence[Receipt], tolerance: float) -> dict[str, str | None]:
    """For each study (one size) the way that is cheapest among those within the tolerance; ``None`` if there is none.

    Within: predictions agree with the original's on at least ``1 - tolerance``. Cheapest: by CPU time beside the
    original's (wall time on an accelerator), which must be less in three pairs of four. Softmax is a control and never
    chosen.
    """
    best: dict[str, tuple[float, str] | None] = {}
    for receipt in receipts:
        found = best.setdefault(receipt.name, None)
        price, agreement = _price(receipt), receipt.quality.get("agreement")
        if receipt.baseline or receipt.way == "softmax" or price is None or agreement is None:
            continue
        if agreement >= 1 - tolerance and price["high"] < 1 and (found is None or price["median"] < found[0]):
            best[receipt.name] = (price["median"], receipt.way)
    return {name: None if found is None else found[1] for name, found in best.items()}


def sentences(receipts: Sequence[Receipt], tolerance: float) -> list[str]:
    """The recommendations in words, one a size."""
    said = []
    for name, way in recommend(receipts, tolerance).items():
        if way is None:
            said.append(
                f"{name}: no setting is quicker than the original and agrees on {units.percent(1 - tolerance)} "
                "of the predictions; none is recommended."
            )
            continue
        chosen = next(item for item in receipts if (item.name, item.way) == (name, way))
        agreement, price = units.percent(chosen.quality["agreement"]), (_price(chosen) or {}).get("median")
        flops = _times(_share(chosen, "flops", receipts))
        said.append(f"{name}: take {way}: {agreement} agreement at {_times(price)} the time and {flops} the FLOPs.")
    return said


def swap_table(receipts: Sequence[Receipt], tolerance: float) -> Table:
    """A `rich` table: the original in absolute figures, every setting's costs as multiples of it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    headings, rows = _grid(receipts)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        caption="costs of one pass: the original's, and multiples of them (times: medians of alternating pairs)\n"
        + "\n".join(sentences(receipts, tolerance)),
        caption_justify="left",
    )
    for place, heading in enumerate(headings):
        table.add_column(Text(heading.replace(" ", "\n", 1)), justify="right" if place else "left", overflow="fold")
    chosen = recommend(receipts, tolerance)
    for receipt, cells in zip(receipts, rows, strict=True):
        if receipt.baseline:
            table.add_section()
            table.add_row(Text(receipt.name, style="bold"))
        style = "green" if chosen[receipt.name] == receipt.way else ""
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def swap_section(receipts: Sequence[Receipt], tolerance: float) -> Section:
    """The same for the HTML report."""
    from scrimp.report.parts import facts_table

    headings, rows = _grid(receipts)
    named = [[f"{receipt.name}: {row[0]}", *row[1:]] for receipt, row in zip(receipts, rows, strict=True)]
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(receipts, tolerance))
    table = facts_table("Each setting beside the original", headings, named)
    about = f"Tolerated loss of agreement: {units.percent(tolerance)}."
    return Section("Which setting to take", text + table, about, first=True)


def _grid(receipts: Sequence[Receipt]) -> tuple[list[str], list[list[str]]]:
    qualities = [name for name in _QUALITIES if any(item.quality.get(name) is not None for item in receipts)]
    headings = ["attention", *(name.replace("_", " ") for name in qualities), *(title for title, _ in _COSTS)]
    rows = []
    for receipt in receipts:
        row = [receipt.way, *(units.quality(name, receipt.quality.get(name)) for name in qualities)]
        row += [_cost_cell(receipt, field, receipts) for _, field in _COSTS]
        row.append(_attention_cell(receipt))
        rows.append(row)
    return [*headings, "attention FLOPs"], rows


def _cost_cell(receipt: Receipt, field: str, receipts: Sequence[Receipt]) -> str:
    value = getattr(receipt.cost, field).value
    return units.COSTS[field][1](value) if receipt.baseline else _times(_share(receipt, field, receipts))


def _attention_cell(receipt: Receipt) -> str:
    ours, theirs = (receipt.notes.get(f"attention_flops{side}") for side in ("", "_of_original"))
    if receipt.baseline:
        return units.flops(ours)
    return _times(ours / theirs if ours is not None and theirs else None)


def _share(receipt: Receipt, field: str, receipts: Sequence[Receipt]) -> float | None:
    """A cost as a multiple of the original's: by pairs where they were timed so."""
    pairs = receipt.notes.get("ratios", {}).get(field)
    if pairs is not None:
        return pairs["median"]
    base = next((item for item in receipts if item.name == receipt.name and item.baseline), None)
    ours = getattr(receipt.cost, field).value
    theirs = None if base is None else getattr(base.cost, field).value
    return ours / theirs if ours is not None and theirs else None


def _price(receipt: Receipt) -> dict[str, float] | None:
    """Median and quartiles of the time beside the original's, where they could be taken."""
    field = "cpu_seconds" if receipt.notes.get("device", "cpu") == "cpu" else "seconds"
    ratio = receipt.notes.get("ratios", {}).get(field)
    return None if ratio is None or ratio["median"] is None else ratio


def _times(ratio: float | None) -> str:
    return units.UNKNOWN if ratio is None else f"{ratio:.3g}x"
