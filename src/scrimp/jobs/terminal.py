"""What commands say: tables and JSON on standard output, remarks on standard error; loads no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def guard(job: Callable[[], Any], name: str) -> Any:
    """The job's result; an interrupted one is told how to go on, and raises `KeyboardInterrupt`."""
    from scrimp.jobs.interrupt import Interrupted

    try:
        return job()
    except Interrupted as error:
        say("stopped; the checkpoint is written. Go on with the same command and --resume", False)
        raise KeyboardInterrupt from error


def show(receipts: list[Any], as_json: bool) -> None:
    """The table, or the receipts as JSON; from the first process only."""
    if int(os.environ.get("RANK", "0")):
        return
    if as_json:
        print(json.dumps([receipt.to_dict() for receipt in receipts], indent=2))
        return
    from scrimp.report import render_table

    terminal = console()
    terminal.print(render_table(receipts, width=terminal.width))


def console() -> Any:
    """Of the width of the terminal, or of a wide one."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)  # a pipe or a file has no width to fit


def say(line: str, quiet: bool) -> None:
    """A line on standard error, from the first process only."""
    if not quiet and not int(os.environ.get("RANK", "0")):
        print(line, file=sys.stderr)
