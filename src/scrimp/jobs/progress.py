"""Progress on the terminal, on standard error and from the first process only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def progress_bar(*, shown: bool = True) -> Iterator[Progress]:
    """A live bar; ``shown=False`` for the other processes and for machine-readable output."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        yield progress


def add_bar(progress: Progress, description: str, *, total: float = 1.0) -> TaskID:
    """A new bar with an empty column of figures."""
    return progress.add_task(description, total=total, figures="")


def figures(point: dict[str, float | None]) -> str:
    """The latest figures of a curve point, short: ``loss 0.31  accuracy 88.2 %  tau 2.1``."""
    parts = []
    if (loss := point.get("train_loss")) is not None:
        parts.append(f"loss {loss:.3g}")
    if (accuracy := point.get("test_accuracy")) is not None:
        parts.append(f"accuracy {100 * accuracy:.1f} %")
    if (tau := point.get("tau")) is not None:
        parts.append(f"tau {tau:.2f}")
    return "  ".join(parts)
