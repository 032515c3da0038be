"""Figures as people read them: SI prefixes, three digits, a spread where there is one, "-" where nothing is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard

UNKNOWN = "-"
_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E"}
_MINUTES_FROM, _HOURS_FROM = 999.5, 7200.0


def si(value: float | None, unit: str) -> str:
    """Three significant digits with an SI prefix: ``si(1.234e12, "FLOP") == "1.23 TFLOP"``."""
    if not is_known(value):
        return UNKNOWN
    if value == 0:
        return f"0 {unit}".rstrip()
    # Rounding first: 999.9 is 1.00 k, not "1000".
    rounded = float(f"{value:.2e}")
    step = min(max(math.floor(math.log10(abs(rounded)) / 3), min(_PREFIXES)), max(_PREFIXES))
    return f"{three_digits(rounded / 1000.0**step)} {_PREFIXES[step]}{unit}".rstrip()


def three_digits(value: float) -> str:
    """``value`` with three significant digits and no exponent where that stays short."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent <= 5:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - exponent)}f}"


def flops(value: float | None) -> str:
    return si(value, "FLOP")


def size(value: float | None) -> str:
    """Bytes in SI steps of 1000: ``size(12_300_000) == "12.3 MB"``; below 1000 they are counted exactly."""
    if is_known(value) and abs(value) < 999.5:
        return f"{value:.0f} B"
    return si(value, "B")


def joules(value: float | None) -> str:
    return si(value, "J")


def seconds(value: float | None) -> str:
    """Seconds up to 1000 s, then minutes, then hours: nobody reads 0.9 ks."""
    if not is_known(value):
        return UNKNOWN
    if abs(value) >= _HOURS_FROM:
        return f"{three_digits(value / 3600)} h"
    if abs(value) >= _MINUTES_FROM:
        return f"{three_digits(value / 60)} min"
    return si(value, "s")


def count(value: float | None) -> str:
    """A count, exact below a million: ``count(384000) == "384,000"``, ``count(1.28e7) == "12.8 M"``."""
    if not is_known(value):
        return UNKNOWN
    if abs(value) >= 1e6:
        return si(value, "")
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def percent(mean: float | None, deviation: float | None = None) -> str:
    """A share (0 to 1) in percent: ``percent(0.873, 0.004) == "87.3 ± 0.4 %"``."""
    if not is_known(mean):
        return UNKNOWN
    if not is_known(deviation):
        return f"{100 * mean:.1f} %"
    decimals = _decimals(100 * deviation, first=0, least=1, most=3)
    return f"{100 * mean:.{decimals}f} ± {100 * deviation:.{decimals}f} %"


def number(mean: float | None, deviation: float | None = None) -> str:
    """A plain figure, as precise as its spread allows: ``number(0.31234, 0.0101) == "0.31 ± 0.01"``."""
    if not is_known(mean):
        return UNKNOWN
    if not is_known(deviation):
        return three_digits(mean)
    if max(abs(mean), deviation) < 1e-3 or abs(mean) >= 1e6:
        return f"{mean:.2e} ± {deviation:.0e}"
    if deviation == 0:
        return f"{three_digits(mean)} ± 0"
    decimals = _decimals(deviation, first=0, least=0 if abs(mean) >= 100 else 2, most=5)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def quality(name: str, mean: float | None, deviation: float | None = None) -> str:
    """A quality by its name: accuracies and agreements are shares and print in percent, a PSNR in decibels, the rest as
    it is."""
    if name.rpartition("_")[2] == "psnr":
        return decibels(mean, deviation)
    return percent(mean, deviation) if is_share(name) else number(mean, deviation)


def decibels(mean: float | None, deviation: float | None = None) -> str:
    """``decibels(28.681, 0.052) == "28.68 ± 0.05 dB"``."""
    if not is_known(mean):
        return UNKNOWN
    return f"{mean:.2f} dB" if not is_known(deviation) else f"{mean:.2f} ± {deviation:.2f} dB"


def difference(name: str, value: float | None, *, signed: bool = True) -> str:
    """A difference of two qualities: accuracies in percentage points (no unit printed), the rest as they are."""
    return differences(name, value, signed=signed)[0]


def differences(name: str, *values: float | None, signed: bool = True) -> list[str]:
    """Differences of one quality with the same number of decimals, so that an interval reads as one."""
    scaled = [100 * value if is_share(name) else value for value in values if is_known(value)]
    largest = max(map(abs, scaled), default=0.0)
    form = f".{_decimals(largest, first=1, least=1 if is_share(name) else 2, most=2 if largest >= 1 else 5)}f"
    if 0 < largest < 1e-4:
        form = ".1e"
    sign = "+" if signed else ""
    rest = iter(scaled)
    return [format(next(rest) + 0.0, sign + form) if is_known(value) else UNKNOWN for value in values]


def is_share(name: str) -> bool:
    """Whether the quality called ``name`` is a share of 1, printed in percent."""
    return name.rpartition("_")[2] in {"accuracy", "agreement"}


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is a figure at all; a NaN is none."""
    return value is not None and math.isfinite(value)


COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "flops": ("FLOPs", flops),
    "cpu_seconds": ("CPU time", seconds),
    "seconds": ("wall time", seconds),
    "peak_bytes": ("peak memory", size),
    "joules": ("energy", joules),
    "samples": ("samples", count),
    "labels": ("labels", count),
    "stored_bytes": ("stored", size),
    "saved_bytes": ("saved activations", size),
    "energy_modelled": ("energy, modelled", joules),
}
"""Each field of `scrimp.meter.cost.Cost`: what a reader calls it, and how it prints."""


def _decimals(value: float, *, first: int, least: int, most: int) -> int:
    """Decimals that show ``first`` digits after the leading one of ``value``, within ``least`` and ``most``."""
    if value == 0:
        return least
    return min(max(first - math.floor(math.log10(abs(value))), least), most)
