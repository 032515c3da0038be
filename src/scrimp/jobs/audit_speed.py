"""What an attack does to the clock and the meter: latencies of four executions, poisoned batches, energy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scrimp.attack import AdaptiveVictim, frozen
from scrimp.jobs.audit_padded import padded
from scrimp.jobs.interrupt import Interrupted
from scrimp.meter import EnergyWindow
from scrimp.meter.clock import Spread, lap
from scrimp.meter.energy import modelled
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

Execution = Literal["ragged", "masked", "padded", "dense"]
CLEAN = "clean"
"""Name of the inputs that nobody attacked."""
_PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_WINDOW = 10.0  # seconds of a reading of energy that is more than indicative


def speeds(
    victim: AdaptiveVictim,
    dense: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    batches: Sequence[int] = (1, 16),
    calls: int = 40,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Latencies of a call in every execution and on all inputs, in turn with the dense model in one run.

    Every round of calls shows other images, the same ones to all executions: so percentiles are of images too, not only
    of the machine. ``ragged``: rows that are gone are not computed; ``masked``: all are; ``padded``: those up to the
    longest image of the batch, block by block (`scrimp.jobs.audit_padded`); ``dense``: the model without the method.
    Methods that leave out as much of every image have one form, ragged. Batches above 1 are also timed with one
    attacked image among clean ones, ragged and padded.

    Args:
        victim: left as it was.
        dense: the model with nothing attached; takes the victim's images, from 0 to 1.
        inputs: by name, "clean" first, then of each trial: [n, channels, height, width], n the same for all.
        batches: images a call; those above n are left out.
        calls: of each execution on each of the inputs, after one that is not timed.
        stop: asked before each round.

    Returns:
        Rows with ``execution``, ``batch``, ``inputs`` (a name, or "1 of 16 NAME" with the rest clean), ``seconds`` of a
        call (``p50``, ``p95``, ``p99``, nearest rank), ``clock`` ("process CPU", on a GPU "wall"), ``ratio`` (median
        over that of dense), ``calls``, and ``factor``: of batches with one attacked image, ``median``, ``low`` and
        ``high`` (quartiles) of pairs, over the same batch without it in the same execution; else None.

    Raises:
        InputError: no calls, no clean images, or inputs of several lengths.
        Interrupted: a stop was asked for.
    """
    _check(inputs, calls)
    clean = inputs[CLEAN]
    order = torch.randperm(len(clean), generator=generator_for(len(clean)))
    clock = "wall" if clean.device.type == "cuda" else "process CPU"
    found = []
    with frozen(victim.model, dense), torch.no_grad():
        for batch in dict.fromkeys(size for size in batches if 1 <= size <= len(clean)):
            lanes = _lanes(victim, list(inputs), batch)
            laps: dict[_Lane, list[float]] = {lane: [] for lane in lanes}
            for call in range(calls + 1):
                if stop():
                    raise Interrupted
                rows = order[(torch.arange(batch) + call * batch) % len(order)].to(clean.device)
                for lane in lanes[:: 1 if call % 2 else -1]:  # whoever comes second is quicker: in turn both do
                    seconds = _timed(victim, dense, lane, lane.images(inputs, rows), clock)
                    laps[lane] += [seconds] if call else []
            found += [_row(lane, laps, batch, clock) for lane in lanes]
    return found


def energies(
    victim: AdaptiveVictim,
    inputs: Mapping[str, Tensor],
    *,
    batch: int = 16,
    seconds: float = _WINDOW,
    watts: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Joules an image of the ragged form, clean and attacked, by the machine's meter; None where there is none.

    Args:
        victim: left as it was.
        inputs: by name, "clean" first, then of one trial; see `speeds`.
        batch: images a call.
        seconds: of each reading.
        watts: power of the processor, declared: then there are modelled figures too, from process CPU time.
        stop: asked before each call.

    Returns:
        ``clean_joules``, ``attacked_joules``, ``how``; with ``watts`` also ``clean_modelled``, ``attacked_modelled``,
        ``how_modelled``: for relative use only.

    Raises:
        InputError: no clean or no attacked images, or watts that are not above 0.
        Interrupted: a stop was asked for.
    """
    _check(inputs, 1)
    attacked = next((name for name in inputs if name != CLEAN), None)
    if attacked is None:
        raise InputError("clean and attacked images", "clean ones alone", "pass a trial's images too")
    found: dict[str, Any] = {"clean_joules": None, "attacked_joules": None}
    with EnergyWindow() as window:
        pass
    found["how"] = window.reading.how
    if window.reading.value is None and watts is None:
        return found
    length = seconds if window.reading.value is not None else seconds / 10
    with frozen(victim.model), torch.no_grad(), _as(victim, "ragged"):
        for key, name in (("clean", CLEAN), ("attacked", attacked)):
            joules, cpu, found["how"], images = _window(victim, inputs[name], batch, length, stop)
            found[f"{key}_joules"] = None if joules is None else joules / images
            if watts is not None:
                reading = modelled(watts, cpu / images)
                found |= {f"{key}_modelled": reading.value, "how_modelled": reading.how}
    return found


@dataclass(frozen=True)
class _Lane:
    """What is timed in every round; ``only_one``: the last image of a clean batch is attacked, and no other."""

    execution: Execution
    name: str
    only_one: bool = False

    def images(self, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        if not self.only_one:
            return inputs[self.name][rows]
        return torch.cat([inputs[CLEAN][rows[:-1]], inputs[self.name][rows[-1:]]])


def _lanes(victim: AdaptiveVictim, names: list[str], batch: int) -> list[_Lane]:
    adaptive = victim.controller.method.adaptive
    forms: list[Execution] = ["ragged", "masked", "padded"] if adaptive else ["ragged"]
    found = [_Lane("dense", CLEAN)] + [_Lane(form, name) for name in names for form in forms]
    if batch > 1:
        poisoned = (form for form in forms if form != "masked")
        found += [_Lane(form, name, True) for form in poisoned for name in names if name != CLEAN]
    return found


def _timed(victim: AdaptiveVictim, dense: nn.Module, lane: _Lane, images: Tensor, clock: str) -> float:
    if lane.execution == "dense":
        wall, cpu = lap(lambda: dense(images))
    else:
        with _as(victim, lane.execution):
            wall, cpu = lap(lambda: victim.ready(images))
    return wall if clock == "wall" else cpu


@contextmanager
def _as(victim: AdaptiveVictim, execution: Execution) -> Iterator[None]:
    controller = victim.controller
    before = controller.form
    if controller.method.adaptive and execution in ("ragged", "masked"):
        controller.form = execution  # type: ignore[assignment]
    try:
        with padded(controller) if execution == "padded" else nullcontext():
            yield
    finally:
        controller.form = before


def _row(lane: _Lane, laps: Mapping[_Lane, list[float]], batch: int, clock: str) -> dict[str, Any]:
    own, dense = sorted(laps[lane]), sorted(laps[_Lane("dense", CLEAN)])
    factor = None
    if lane.only_one:
        without = laps[_Lane(lane.execution, CLEAN)]
        spread = asdict(Spread.of([a / b for a, b in zip(laps[lane], without, strict=True) if b > 0]))
        factor = {key: spread[key] for key in ("median", "low", "high")}
    below = _rank(dense, 0.5)
    return {
        "execution": lane.execution,
        "batch": batch,
        "inputs": f"1 of {batch} {lane.name}" if lane.only_one else lane.name,
        "seconds": {name: _rank(own, share) for name, share in _PERCENTILES.items()},
        "clock": clock,
        "ratio": _rank(own, 0.5) / below if below else None,
        "calls": len(own),
        "factor": factor,
    }


def _rank(ranked: list[float], share: float) -> float:
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def _window(
    victim: AdaptiveVictim, images: Tensor, batch: int, seconds: float, stop: Callable[[], bool]
) -> tuple[float | None, float, str, int]:
    """Joules, CPU seconds, how, and images of calls that fill so many seconds of wall time."""
    parts, done = images.split(batch), 0
    victim.ready(parts[0])
    start, cpu = time.perf_counter(), time.process_time()
    with EnergyWindow() as window:
        while not done or time.perf_counter() - start < seconds:
            if stop():
                raise Interrupted
            part = parts[done % len(parts)]
            victim.ready(part)
            done += 1
    spent = time.process_time() - cpu
    count = sum(len(parts[call % len(parts)]) for call in range(done))
    return window.reading.value, spent, window.reading.how, count


def _check(inputs: Mapping[str, Tensor], calls: int) -> None:
    lengths = {name: len(images) for name, images in inputs.items()}
    if next(iter(inputs), None) != CLEAN or not lengths[CLEAN] or len(set(lengths.values())) > 1 or calls < 1:
        raise InputError(
            "clean images first, as many of each trial, and 1 call or more", f"{lengths}, calls={calls}", "correct them"
        )
