"""Receipts as one static HTML file that opens offline: verdicts, table, figures, and how everything was measured."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt
from scrimp.report.caveats import caveats
from scrimp.report.parts import everyone, facts_table, figures_table, measured_rows, setting_rows
from scrimp.report.section import Section
from scrimp.report.summary import Study, quality_names, studies, summarise, verdict
from scrimp.report.words import capital, headline, quality_title, sentence

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from scrimp.report.drawing import Looks

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""Nothing may be loaded from anywhere: what the page needs is inside it."""

_CHANCE = (
    "Each interval stands alone: of twenty ways that differ from the baseline in nothing, "
    "one is expected to miss a tie by chance."
)


def write_report(
    receipts: Sequence[Receipt], path: str | os.PathLike[str], *, sections: Iterable[Section] = ()
) -> Path:
    """Write the report of all receipts, one part a study, and return its path.

    The file is written whole or not at all, loads nothing from the network, and is the same for the same receipts.
    ``sections`` are put after the studies, those marked ``first`` before them.

    Raises:
        InputError: there are no receipts.
        OSError: the folder cannot be written.
    """
    if not receipts:
        raise InputError("one receipt or more", "none", "run a job first, or pass its run folder")
    return write_atomic(path, _page(receipts, list(sections)))


def head(title: str, policy: str, sheets: Iterable[str]) -> str:
    """A page from its first line to the end of its head.

    Args:
        title: plain text, escaped.
        policy: what the page may load; see `POLICY`.
        sheets: names of style sheets, as `resource` takes them, which become part of the page.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{"".join(map(resource, sheets))}</style>
</head>"""


def resource(*names: str) -> str:
    """The text of a file that lies with this module, by its path below the folder."""
    return resources.files("scrimp.report").joinpath(*names).read_text(encoding="utf-8")


class _Layout:
    """What the parts of one page share: the looks of the ways, the level of headings, the number of figures."""

    def __init__(self, drawn: Looks, level: int) -> None:
        self.drawn, self.level, self.figures = drawn, level, 0

    def section(self, title: str, content: str, *, kind: str = "") -> str:
        mark = f' class="{kind}"' if kind else ""
        return f"<section{mark}>{self.heading(title)}{content}</section>"

    def heading(self, title: str, *, below: int = 0) -> str:
        level = self.level + below
        return f"<h{level}>{escape(title)}</h{level}>"


def _page(receipts: Sequence[Receipt], sections: Sequence[Section]) -> str:
    from scrimp.report.drawing import looks

    every = studies(receipts)
    several = len(every) > 1
    layout = _Layout(looks(receipts), 3 if several else 2)
    title = f"{len(every)} studies" if several else next(iter(every))
    parts = [_header(receipts, title)]
    layout.level, below = 2, layout.level
    parts += [_section(section, layout) for section in sections if section.first]
    layout.level = below
    for name, study in every.items():
        runs = [run for found in study.values() for run in found]
        heading = f'<h2 class="study">{escape(name)}</h2>' if several else ""
        parts.append(f'<article aria-label="{escape(name)}">{heading}\n{_study(runs, layout)}</article>')
    layout.level = 2
    parts += [_section(section, layout) for section in sections if not section.first]
    parts.append(_provenance(everyone(receipts), layout))
    return _document(f"{title}: scrimp report", "\n".join(parts), with_plotly=layout.figures > 0)


def _study(runs: Sequence[Receipt], layout: _Layout) -> str:
    from scrimp.report.plots import figures

    study = next(iter(studies(runs).values()))
    table = figures_table(runs, title="Quality and cost of each way") + _every_verdict(runs, layout)
    parts = [_headlines(runs, layout), _caveats(runs), layout.section("Quality and cost", table)]
    parts += [_section(section, layout) for section in figures(runs, drawn=layout.drawn)]
    measured = facts_table("Costs and their sources", ("figure", "how", "missed"), measured_rows(study))
    parts.append(layout.section("How each figure was measured", measured))
    notes = facts_table("Facts of the runs", ("fact", "value"), setting_rows(study, lambda run: run.notes))
    settings = facts_table("Resolved settings", ("setting", "value"), setting_rows(study, lambda run: run.config))
    if notes or settings:
        parts.append(layout.section("Configuration", notes + settings))
    return "\n".join(part for part in parts if part)


def _header(receipts: Sequence[Receipt], title: str) -> str:
    runs = [run for study in studies(receipts).values() for found in study.values() for run in found]
    seeds = {run.seed for run in runs if run.seed is not None}
    days = sorted({run.created[:10] for run in runs})
    facts = [_plural(len({run.way for run in runs}), "way")]
    facts += [_plural(len(seeds), "seed")] if seeds else []
    facts += [_plural(len(runs), "run"), " to ".join(dict.fromkeys((days[0], days[-1])))]
    text = escape(", ".join(facts))
    return f'<header><p class="brand">scrimp report</p><h1>{escape(title)}</h1><p>{text}</p></header>'


def _headlines(runs: Sequence[Receipt], layout: _Layout) -> str:
    rows = summarise(runs)
    base = next((row for row in rows if row.baseline), None)
    if base is None or len(rows) < 2:
        return ""
    found = [headline(verdict(runs, quality), base.way) for quality in quality_names(runs)]
    return layout.section(f"Against {base.way}", "\n".join(f"<p>{escape(text)}</p>" for text in found), kind="verdicts")


def _every_verdict(runs: Sequence[Receipt], layout: _Layout) -> str:
    rows = {row.way: row for row in summarise(runs)}
    base = next((row for row in rows.values() if row.baseline), None)
    if base is None or len(rows) < 2:
        return ""
    groups = []
    for quality in quality_names(runs):
        found = (escape(sentence(item, rows[item.way], base)) for item in verdict(runs, quality))
        items = "\n".join(f"<li>{text}</li>" for text in found)
        groups.append(f"{layout.heading(capital(quality_title(quality)), below=1)}<ul>{items}</ul>")
    groups.append(f"<p>{escape(_CHANCE)}</p>")
    return f"<details open><summary>Every verdict in full</summary>{''.join(groups)}</details>"


def _caveats(runs: Sequence[Receipt]) -> str:
    found = "".join(f"<li>{escape(text)}</li>" for text in caveats(runs))
    return f'<aside class="caveats" aria-label="Before comparing"><ul>{found}</ul></aside>' if found else ""


def _provenance(study: Study, layout: _Layout) -> str:
    machine = facts_table("Machine", ("part", "value"), setting_rows(study, lambda run: run.machine))
    versions = facts_table("Versions", ("package", "version"), setting_rows(study, lambda run: run.versions))
    return layout.section("Machine and versions", f'<div class="pair"><div>{machine}</div><div>{versions}</div></div>')


def _section(section: Section, layout: _Layout) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    content = section.content if isinstance(section.content, str) else _figure(section, section.content, layout)
    return layout.section(section.title, text + content)


def _figure(section: Section, figure: Figure, layout: _Layout) -> str:
    """A holder that the page's script fills, with the figure beside it as data, out of reach of the HTML parser."""
    layout.figures += 1
    identity = f"figure-{layout.figures}"
    data = figure.to_json(validate=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    label = escape(f"{section.title}. {section.text}".strip())
    return (
        f'<div class="axes"></div><div class="plot" id="{identity}" role="img" aria-label="{label}"></div>\n'
        f'<script type="application/json" id="{identity}-data">{data}</script>'
    )


def _document(title: str, body: str, *, with_plotly: bool) -> str:
    script = ""
    if with_plotly:
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>\n<script>{resource('page.js')}</script>\n"
    return f"""{head(title, POLICY, ["page.css"])}
<body>
<main>
{body}
<noscript><p>The figures need JavaScript; the tables hold the same runs.</p></noscript>
</main>
{script}</body>
</html>
"""


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
