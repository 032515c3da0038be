"""The whole cost of a call: time, FLOPs, memory, energy and size, each taken in a pass of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scrimp.meter.cost import Cost, Reading
from scrimp.primitives.errors import InputError

StoredPath = str | os.PathLike[str]


def measure(
    fn: Callable[[], Any],
    *,
    warmup: int = 1,
    repeats: int = 5,
    stored: StoredPath | Iterable[StoredPath] | None = None,
) -> Cost:
    """Measure ``fn()``: seconds and CPU seconds (medians), FLOPs, peak and saved bytes, joules; all per call.

    ``fn`` is called about ``warmup + repeats + 3`` times: unmeasured, timed (with the energy meter around the timed
    calls), then once to count FLOPs and twice to follow memory, for counting slows a call down. A training step
    therefore trains that often. Whatever could not be measured is ``None`` and says why in its ``how``.

    Args:
        fn: a call without arguments.
        warmup: calls before the clock starts.
        repeats: calls timed.
        stored: files or folders whose bytes on disk ``stored_bytes`` sums, after the last call.

    Raises:
        InputError: ``fn`` cannot be called, a count is out of range, or a stored file is missing.
        Whatever ``fn`` raises.
    """
    if not callable(fn):
        raise InputError("a function without arguments", type(fn).__name__, "wrap the work: measure(lambda: work(x))")
    from scrimp.meter.clock import check_counts, timed  # late, as all that may load torch
    from scrimp.meter.energy import EnergyWindow
    from scrimp.meter.flops import count_flops
    from scrimp.meter.memory import peak_and_saved

    check_counts(warmup, repeats)
    for _ in range(warmup):
        fn()
    with EnergyWindow() as window:
        seconds, cpu_seconds = timed(fn, warmup=0, repeats=repeats).readings()
    flops = count_flops(fn)
    peak, saved = peak_and_saved(fn)
    return Cost(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        flops=flops,
        peak_bytes=peak,
        saved_bytes=saved,
        joules=_per_call(window.reading, repeats),
        stored_bytes=Reading() if stored is None else bytes_on_disk(stored),
    )


def bytes_on_disk(stored: StoredPath | Iterable[StoredPath]) -> Reading:
    """Sum the sizes of files, and of all files under folders, each counted once.

    Raises:
        InputError: one of them does not exist.
    """
    paths = [stored] if isinstance(stored, (str, os.PathLike)) else list(stored)
    files: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise InputError("a stored file or folder", f"{path}: no such file", "write it before its size is asked")
        files.update(each.resolve() for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())
    return Reading(sum(file.stat().st_size for file in files), f"bytes on disk of {len(files)} files")


def _per_call(joules: Reading, calls: int) -> Reading:
    if joules.value is None:
        return joules
    return replace(joules, value=joules.value / calls, how=f"{joules.how}; per call over {calls}")
