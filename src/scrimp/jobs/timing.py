"""A cost whose times come from calls timed in turn with another side's, the rest from passes of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scrimp.meter import Cost, Reading, measure
from scrimp.meter.clock import Timing


def timed_cost(call: Callable[[], Any], timing: Timing, *, passes: int) -> Cost:
    """The cost of one call: medians of ``timing``, FLOPs and bytes from ``passes`` further calls."""
    how = f"median of {timing.seconds.count} calls, in turn with the other side"
    return replace(
        measure(call, warmup=0, repeats=passes),
        seconds=Reading(timing.seconds.median, f"wall, {how}"),
        cpu_seconds=Reading(timing.cpu_seconds.median, f"process CPU, all threads, {how}"),
    )
