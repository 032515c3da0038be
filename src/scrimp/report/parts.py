"""The tables of the HTML report: the figures, how each was measured, the configuration, the machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from scrimp.meter.cost import Reading
from scrimp.receipts import Receipt
from scrimp.report import units
from scrimp.report.summary import Study, readings, studies
from scrimp.report.table import Cell, grid

_ALWAYS = ("flops", "cpu_seconds", "seconds", "peak_bytes", "joules", "samples", "labels", "stored_bytes")


def figures_table(receipts: Sequence[Receipt], *, title: str) -> str:
    """One row a way, the way's name as the row's header, the explanation as the table's caption."""
    laid = grid(receipts)
    first = laid.headings.index("way")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in laid.headings[first:])
    body = "\n".join(_row(row[first:]) for row in laid.rows)
    caption = " ".join(escape(line) for line in laid.caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">\n'
        f'<table class="figures"><caption><span>{caption}</span></caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def facts_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table of texts, its first column as row headers; empty rows make no table."""
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    ]
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
        f'<table class="facts"><caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def measured_rows(study: Study) -> list[list[str]]:
    """Each cost field: how it was obtained, and what that is known to have missed."""
    rows = []
    for field, (title, _) in units.COSTS.items():
        found = readings((run for runs in study.values() for run in runs), field)
        if field in _ALWAYS or any(units.is_known(reading.value) for reading in found):
            rows.append([title, _by_way(study, field, _how), _by_way(study, field, _missed)])
    return rows


def setting_rows(study: Study, get: Callable[[Receipt], Mapping[str, Any]]) -> list[list[str]]:
    """Each key of a nested mapping with its value; where ways differ, the value of each way."""
    flat = {way: [_flatten(get(run)) for run in runs] for way, runs in study.items()}
    keys = dict.fromkeys(key for runs in flat.values() for run in runs for key in run)
    return [
        [key, _shared({way: _distinct(_text(run.get(key)) for run in runs) for way, runs in flat.items()})]
        for key in keys
    ]


def everyone(receipts: Sequence[Receipt]) -> Study:
    """The receipts of all studies as one, a way's name carrying its study's where there are several."""
    every = studies(receipts)
    return {
        (way if len(every) == 1 else f"{name}: {way}"): runs
        for name, study in every.items()
        for way, runs in study.items()
    }


def _row(cells: Sequence[Cell]) -> str:
    figures = "".join(f"<td>{_content(cell)}</td>" for cell in cells[1:])
    return f'<tr><th scope="row">{_content(cells[0])}</th>{figures}</tr>'


def _content(cell: Cell) -> str:
    mark = f' class="{escape(cell.outcome)}"' if cell.outcome else ""
    note = f"<small{mark}>{escape(cell.note)}</small>" if cell.note else ""
    return escape(cell.text) + note


def _how(reading: Reading) -> str:
    return reading.how


def _missed(reading: Reading) -> str:
    return ", ".join(reading.missed) or units.UNKNOWN


def _by_way(study: Study, field: str, text: Callable[[Reading], str]) -> str:
    return _shared({way: _distinct(map(text, readings(runs, field))) for way, runs in study.items()})


def _shared(by_way: Mapping[str, list[str]]) -> str:
    """The values once when all ways have the same, else grouped: "a, b: 64; c: 128"."""
    grouped: dict[str, list[str]] = {}
    for way, values in by_way.items():
        grouped.setdefault(", ".join(values), []).append(way)
    if len(grouped) == 1:
        return next(iter(grouped))
    return "; ".join(f"{', '.join(ways)}: {values}" for values, ways in grouped.items())


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    if value is None:
        return units.UNKNOWN
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
