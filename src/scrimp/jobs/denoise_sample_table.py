"""What `scrimp denoise sample` tried out, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scrimp.jobs.denoise_sample_pilot import Trial
from scrimp.report import units

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("calls", "reused", "FLOPs", "share", "CPU", "error")


def pilot_table(trials: Sequence[Trial], base: Trial, chosen: Trial, *, images: int, bound: float | None) -> Table:
    """A `rich` table of the trials, cheap to dear, the chosen one marked.

    Args:
        trials: all that were made.
        base: the baseline's.
        chosen: the one taken.
        images: in the pilot.
        bound: largest paired error let pass; None: time decided.
    """
    from rich import box
    from rich.table import Table

    limit = "the time given decides" if bound is None else f"at most {bound:.3g} passes"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        caption=f"FLOPs an image, and their share of the baseline's; CPU time of {images} images\n"
        f"error: paired, to the reference samples of the same noise; {limit}",
        caption_justify="left",
    )
    table.add_column("way", min_width=20)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sorted(trials, key=lambda trial: (trial.price, trial.error or 0.0)):
        mark = " <- taken" if trial.way == chosen.way else (" (baseline)" if trial.way == base.way else "")
        style = "green" if trial.way == chosen.way else ""
        table.add_row(trial.way.name + mark, *_cells(trial, base), style=style)
    return table


def sentence(chosen: Trial, base: Trial) -> str:
    """What the chosen way saves, in words."""
    if chosen.error is None or base.error is None:
        return f"{chosen.way.name}: no paired error to compare"
    worse = "" if chosen.error <= base.error else ": worse"
    return (
        f"{chosen.way.name}: {_ratio(base.flops, chosen.flops)} fewer FLOPs and "
        f"{_ratio(base.cpu_seconds, chosen.cpu_seconds)} less CPU time than {base.way.name}; "
        f"paired error {chosen.error:.3g} against {base.error:.3g}{worse}"
    )


def _cells(trial: Trial, base: Trial) -> list[str]:
    if trial.error is None:
        return ["-"] * (len(_HEADINGS) - 1) + ["no images"]
    share = None if trial.flops is None or not base.flops else trial.flops / base.flops
    return [
        str(trial.full + trial.reused),
        str(trial.reused),
        units.si(trial.flops, ""),
        units.percent(share),
        units.seconds(trial.cpu_seconds),
        f"{trial.error:.4f}",
    ]


def _ratio(base: float | None, other: float | None) -> str:
    return "-" if not base or not other else f"{base / other:.3g}x"
