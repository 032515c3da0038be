"""Receipts as a table in the terminal, as figures, and as one static HTML report."""

from scrimp.report.collect import find_receipts
from scrimp.report.html import write_report
from scrimp.report.section import Section, picture
from scrimp.report.summary import Spread, Verdict, WayRow, summarise, verdict
from scrimp.report.table import markdown_table, render_table

__all__ = [
    "Section",
    "Spread",
    "Verdict",
    "WayRow",
    "find_receipts",
    "markdown_table",
    "picture",
    "render_table",
    "summarise",
    "verdict",
    "write_report",
]
