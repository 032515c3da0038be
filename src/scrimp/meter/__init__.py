"""The meter: what a call costs in time, FLOPs, memory and energy, each figure with how it was obtained.

`measure` gives all of it; the rest are its parts. Parts that need torch load it when first asked for, so that
receipts can be read without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scrimp.meter.cost import Cost, Reading
from scrimp.meter.measure import measure  # eager: the function must hide the module of its name

if TYPE_CHECKING:
    from scrimp.meter.clock import paired
    from scrimp.meter.energy import EnergyWindow, carbon
    from scrimp.meter.flops import count_flops, counting, register_flops
    from scrimp.meter.memory import saved_bytes
    from scrimp.meter.resident import ResidentPeak, peak_resident

__all__ = [
    "Cost",
    "EnergyWindow",
    "Reading",
    "ResidentPeak",
    "carbon",
    "count_flops",
    "counting",
    "measure",
    "paired",
    "peak_resident",
    "register_flops",
    "saved_bytes",
]

_HOMES = {
    "EnergyWindow": "energy",
    "ResidentPeak": "resident",
    "carbon": "energy",
    "count_flops": "flops",
    "counting": "flops",
    "paired": "clock",
    "peak_resident": "resident",
    "register_flops": "flops",
    "saved_bytes": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
