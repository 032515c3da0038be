"""The table of a study: one row a way, for the terminal (rich), for documents (markdown) and for the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.receipts import Receipt
from scrimp.report import units
from scrimp.report.caveats import caveats, energy_unmeasured, partial
from scrimp.report.summary import (
    Spread,
    Verdict,
    WayRow,
    quality_names,
    readings,
    studies,
    summarise,
    verdict,
)
from scrimp.report.words import quality_title

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

EXPLANATION = "±: standard deviation over n seeds; tie: the 95 % interval of the paired difference covers zero."
_COLUMNS = ("flops", "cpu_seconds", "seconds", "peak_bytes", "joules", "samples", "labels", "stored_bytes")
_STYLES = {"better": "green", "worse": "red"}


@dataclass(frozen=True)
class Cell:
    """A figure and the small print under it; ``outcome`` is set where the small print is a verdict."""

    text: str
    note: str = ""
    outcome: str = ""


@dataclass(frozen=True)
class Grid:
    """The table before it is drawn: headings, rows of cells, the lines of the caption, and what to beware of."""

    headings: list[str]
    rows: list[list[Cell]]
    caption: list[str]
    caveats: list[str]


def grid(receipts: Sequence[Receipt], *, qualities: Sequence[str] | None = None) -> Grid:
    """Lay the receipts out. ``qualities`` are the quality columns: all that the receipts have when ``None``."""
    names = quality_names(receipts) if qualities is None else list(qualities)
    fields = _cost_columns(receipts)
    rows, verdicts = summarise(receipts), _verdicts(receipts, names)
    several = len({row.name for row in rows}) > 1
    headings = ["study"] if several else []
    headings += ["way", *map(quality_title, names), *(_heading(receipts, field) for field in fields)]
    runs = {(name, way): found for name, study in studies(receipts).items() for way, found in study.items()}
    cells = []
    for row in rows:
        line = [Cell(row.name)] if several else []
        line.append(Cell(row.way, f"baseline, n={row.runs}" if row.baseline else f"n={row.runs}"))
        line += [_quality_cell(row, name, verdicts.get((row.name, row.way, name))) for name in names]
        line += [_cost_cell(row, field, runs[row.name, row.way]) for field in fields]
        cells.append(line)
    return Grid(headings, cells, _caption(receipts, list(verdicts.values())), caveats(receipts))


def render_table(receipts: Sequence[Receipt], *, width: int | None = None) -> Table:
    """A `rich` table for the terminal, with at most two quality columns so that it fits 100 columns.

    On a terminal of fewer than 100 columns (``width``) the last three columns give way; the report has them.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    laid = grid(receipts, qualities=quality_names(receipts)[:2])
    shown = len(laid.headings) - (3 if width is not None and width < 100 else 0)
    names = list(studies(receipts))
    table = Table(
        title=Text(names[0] if len(names) == 1 else f"{len(names)} studies"),
        caption=Text("\n".join(laid.caption + laid.caveats)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_edge=False,
    )
    first = laid.headings.index("way")
    for position, heading in enumerate(laid.headings[first:shown]):
        # Two-line headings let the figures, not the titles, set the widths.
        table.add_column(Text(heading.replace(" ", "\n", 1)), justify="right" if position else "left", overflow="fold")
    for previous, row in zip([None, *laid.rows], laid.rows, strict=False):
        if first and (previous is None or previous[0] != row[0]):
            table.add_section()
            table.add_row(Text(row[0].text, style="bold"))
        table.add_row(*map(_rich_cell, row[first:shown]))
    return table


def markdown_table(receipts: Sequence[Receipt]) -> str:
    """The table in GitHub's markdown, its caption below; ends in a newline."""
    laid = grid(receipts)
    texts = 1 + (laid.headings[0] == "study")
    rule = ["---"] * texts + ["--:"] * (len(laid.headings) - texts)
    lines = [_line([_escaped(heading) for heading in laid.headings]), _line(rule)]
    for row in laid.rows:
        lines.append(_line([_escaped(f"{cell.text} ({cell.note})" if cell.note else cell.text) for cell in row]))
    return "\n".join([*lines, "", *map(_escaped, laid.caption + laid.caveats)]) + "\n"


def _cost_columns(receipts: Sequence[Receipt]) -> list[str]:
    """The usual columns; energy only where a meter was read (the caption says so otherwise), a model only if used."""
    fields = [field for field in _COLUMNS if field != "joules" or not energy_unmeasured(receipts)]
    if any(units.is_known(reading.value) for reading in readings(receipts, "energy_modelled")):
        fields.append("energy_modelled")
    return fields


def _heading(receipts: Sequence[Receipt], field: str) -> str:
    """The column's title; processor time says GPU where a GPU's clock was read."""
    if field == "cpu_seconds":
        known = [reading.how.lower() for reading in readings(receipts, field) if units.is_known(reading.value)]
        if known and all("gpu" in how or "cuda" in how for how in known):
            return "GPU time"
    return units.COSTS[field][0]


def _verdicts(receipts: Sequence[Receipt], names: Sequence[str]) -> dict[tuple[str, str, str], Verdict]:
    return {(item.name, item.way, name): item for name in names for item in verdict(receipts, name)}


def _quality_cell(row: WayRow, name: str, judged: Verdict | None) -> Cell:
    spread = row.quality.get(name, Spread())
    text = units.quality(name, spread.mean, spread.deviation)
    if 0 < spread.count < row.runs:
        text += f" (n={spread.count})"
    if judged is None or not spread.count:
        return Cell(text)
    if not judged.decided:
        return Cell(text, "no verdict")
    if judged.outcome == "tie":
        return Cell(text, "tie", "tie")
    return Cell(text, f"{judged.outcome} {units.difference(name, judged.difference)}", judged.outcome)


def _cost_cell(row: WayRow, field: str, runs: Sequence[Receipt]) -> Cell:
    spread = row.cost[field]
    # The heading says what FLOPs are; the cell need not.
    text = units.si(spread.mean, "") if field == "flops" else units.COSTS[field][1](spread.mean)
    if 0 < spread.count < row.runs:
        text += f" (n={spread.count})"
    return Cell(text, "partial" if partial(runs, field) else "")


def _caption(receipts: Sequence[Receipt], verdicts: Sequence[Verdict]) -> list[str]:
    reasons = dict.fromkeys(item.outcome for item in verdicts if not item.decided)
    energy = energy_unmeasured(receipts)
    lines = [EXPLANATION]
    if reasons:
        lines.append(f"{'; '.join(reasons)} (a verdict takes two shared seeds or more).")
    if energy:
        lines.append(f"Energy {energy}.")
    return lines


def _rich_cell(cell: Cell) -> Text:
    from rich.text import Text

    text = Text(cell.text)
    if cell.note:
        text.append("\n" + cell.note, style=_STYLES.get(cell.outcome, "dim"))
    return text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that markdown shows as it is: a way may be called anything."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")
