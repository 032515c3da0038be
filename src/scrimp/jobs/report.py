"""`scrimp report`: rebuild or merge reports from receipts."""

from __future__ import annotations

from pathlib import Path

from scrimp.jobs.config import ReportConfig
from scrimp.jobs.folder import REPORT
from scrimp.receipts import Receipt
from scrimp.report import find_receipts, write_report


def report(config: ReportConfig) -> tuple[Path, list[Receipt]]:
    """Write one report of all receipts found in the run folders; returns its path and the receipts.

    Raises:
        InputError: no receipts there, or a damaged one.
    """
    receipts = find_receipts(config.runs)
    first = config.runs[0]
    place = config.out or (first if first.is_dir() else first.parent)
    return write_report(receipts, place if place.suffix == ".html" else place / REPORT), receipts
