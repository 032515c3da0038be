"""Energy from a meter or not at all: RAPL for processor packages, NVML for GPUs. No estimate passes for a reading."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from scrimp.meter.cost import Reading
from scrimp.meter.device import cuda_in_use, synchronise
from scrimp.primitives.errors import InputError, MissingExtraError, require

POWERCAP = Path("/sys/class/powercap")
_NO_METER = "not measured: no meter"
_POLL_SECONDS = 60.0  # the smallest counters wrap after 65 kJ: twice unseen only above 1 kW a package
_SHORT_SECONDS = 10.0


@dataclass(frozen=True)
class _Counter:
    """A counter of energy that only grows, but for wrapping round."""

    name: str
    resolution: str
    joules_per_step: float
    read: Callable[[], int]
    steps_to_wrap: int | None


class EnergyWindow:
    """Joules drawn during a ``with`` block, by every meter this machine lets us read.

    The processor packages are metered whole, so that whatever else runs on the machine is in the figure; of GPUs, the
    current CUDA device if CUDA is in use when the block begins. ``reading`` is the result after the block: without a
    meter its value is ``None`` and its ``how`` begins "not measured: no meter"; a part in use that has no meter stands
    in ``missed``. ``how`` names the counters, their resolution, and windows too short to trust.

    Args:
        idle_watts: power of the machine at rest (see `idle_power`), subtracted over the window; else it is included.
        root: the folder of the kernel's powercap tree.
    """

    def __init__(self, *, idle_watts: float | None = None, root: str | os.PathLike[str] = POWERCAP) -> None:
        self._idle_watts, self._root = idle_watts, Path(root)
        self._counters: list[_Counter] = []
        self._missed: tuple[str, ...] = ()
        self._last: list[int] = []
        self._steps: list[int] = []
        self._failure: str | None = None
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None
        self._begin = 0.0
        self.reading = Reading(how=_NO_METER)

    def __enter__(self) -> EnergyWindow:
        self._counters, self._missed, self._failure = _find_counters(self._root)
        self._steps = [0] * len(self._counters)
        self._stop.clear()
        synchronise()
        try:
            self._last = [counter.read() for counter in self._counters]
        except (OSError, ValueError) as error:
            self._failure, self._counters = f"a counter failed ({error})", []
        if any(counter.steps_to_wrap for counter in self._counters):
            self._poller = threading.Thread(target=self._poll, daemon=True, name="scrimp-energy")
            self._poller.start()
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        synchronise()
        seconds = time.perf_counter() - self._begin
        self._stop.set()
        if self._poller is not None:
            self._poller.join()
        self._advance()
        self.reading = self._result(seconds)

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._advance()

    def _advance(self) -> None:
        try:
            for index, counter in enumerate(self._counters):
                now = counter.read()
                steps = now - self._last[index]
                if steps < 0:
                    if counter.steps_to_wrap is None:
                        raise ValueError(f"{counter.name} ran backwards")
                    steps += counter.steps_to_wrap
                self._last[index] = now
                self._steps[index] += steps
        except (OSError, ValueError) as error:
            self._failure, self._counters = f"a counter failed ({error})", []

    def _result(self, seconds: float) -> Reading:
        if not self._counters:
            return Reading(None, f"{_NO_METER}: {self._failure}" if self._failure else _NO_METER)
        joules = sum(n * counter.joules_per_step for n, counter in zip(self._steps, self._counters, strict=True))
        how = [f"{counter.name} ({counter.resolution})" for counter in self._counters]
        if seconds < _SHORT_SECONDS:
            how.append(f"window under {_SHORT_SECONDS:g} s: indicative only")
        if self._idle_watts is None:
            how.append("idle power included")
        else:
            joules -= self._idle_watts * seconds
            how.append(f"idle power {self._idle_watts:.3g} W subtracted")
        return Reading(joules, "; ".join(how), self._missed)


def idle_power(seconds: float = 10.0, *, root: str | os.PathLike[str] = POWERCAP) -> Reading:
    """Watts drawn while this process sleeps for ``seconds``: ask on a machine at rest. ``None`` without a meter."""
    if not seconds > 0:
        raise InputError("a positive number of seconds", str(seconds), "give the meter 10 s or more")
    with EnergyWindow(root=root) as window:
        time.sleep(seconds)
    joules = window.reading
    return joules if joules.value is None else replace(joules, value=joules.value / seconds)


def modelled(watts: float, cpu_seconds: float) -> Reading:
    """An estimate for `Cost.energy_modelled`, never for ``joules``: declared power times busy CPU seconds."""
    if not (watts > 0 and cpu_seconds >= 0 and math.isfinite(watts * cpu_seconds)):
        raise InputError("positive watts and CPU seconds", f"{watts} W, {cpu_seconds} s", "give the processor's power")
    return Reading(watts * cpu_seconds, f"modelled: {watts:g} W x {cpu_seconds:.4g} CPU s; relative use only")


def carbon(joules: Reading, grams_per_kwh: float, source: str) -> Reading:
    """Grams of CO2 equivalent of measured energy; ``None`` where there is no measured energy.

    Args:
        joules: what an `EnergyWindow` read. A modelled figure gives none.
        grams_per_kwh: intensity of the grid.
        source: where the intensity comes from, and of which year.

    Raises:
        InputError: the intensity is negative or not finite, or has no source.
    """
    if not (grams_per_kwh >= 0 and math.isfinite(grams_per_kwh)) or not source.strip():
        raise InputError(
            "a grid intensity in g/kWh with its source and year",
            f"{grams_per_kwh} from {source!r}",
            "look it up for your grid",
        )
    if joules.value is None or joules.how.startswith("modelled"):
        return Reading(None, "not measured: no measured energy")
    grams = joules.value / 3.6e6 * grams_per_kwh
    return Reading(grams, f"{grams_per_kwh:g} g/kWh ({source}) x energy by {joules.how}", joules.missed)


def _find_counters(root: Path) -> tuple[list[_Counter], tuple[str, ...], str | None]:
    """The counters that can be read, the parts in use that have none, and why there is none."""
    packages, failure = _packages(root)
    gpus, gpu_in_use = _gpus()
    counters = packages + gpus
    missed = (() if packages else ("cpu",)) + (("gpu",) if gpu_in_use and not gpus else ())
    return counters, missed, failure


def _packages(root: Path) -> tuple[list[_Counter], str | None]:
    counters = []
    for domain in sorted(root.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
            if not name.startswith("package"):  # its parts are in it, and "psys" holds it
                continue
            counter = _package(domain, name)
            counter.read()
        except (OSError, ValueError) as error:
            # A sum over some of the packages would be no reading of the machine.
            return [], f"{domain.name} cannot be read ({getattr(error, 'strerror', None) or error})"
        counters.append(counter)
    return counters, None


def _package(domain: Path, name: str) -> _Counter:
    wrap = int((domain / "max_energy_range_uj").read_text())
    return _Counter(
        name=f"RAPL {name}",
        resolution="1 uJ steps, renewed about every ms",
        joules_per_step=1e-6,
        read=lambda: int((domain / "energy_uj").read_text()),
        steps_to_wrap=wrap,
    )


def _gpus() -> tuple[list[_Counter], bool]:
    cuda = cuda_in_use()
    if cuda is None:
        return [], False
    try:
        nvml = require("pynvml", "gpu")
    except MissingExtraError:
        return [], True
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{cuda.get_device_properties(cuda.current_device()).uuid}"
        counter = _gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), uuid)
        counter.read()
    except (nvml.NVMLError, OSError, AttributeError):  # older than Volta, or a torch that gives no uuid
        return [], True
    return [counter], True


def _gpu(nvml: Any, handle: Any, uuid: str) -> _Counter:
    def read() -> int:
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error

    return _Counter(f"NVML {uuid}", "1 mJ steps, renewed about every 100 ms", 1e-3, read, None)
