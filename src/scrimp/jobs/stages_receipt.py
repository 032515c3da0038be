"""One receipt and one model of all stages of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scrimp.jobs.engine import shared
from scrimp.jobs.folder import RECEIPT, WEIGHTS, plain
from scrimp.jobs.once import HOW
from scrimp.jobs.stages import Context
from scrimp.jobs.stages_probe import PROBE
from scrimp.meter import Cost, Reading
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, save_receipt
from scrimp.report.collect import STAGES

_SUMMED = ("flops", "seconds", "cpu_seconds", "samples")


def join_stages(context: Context, receipts: dict[str, Receipt]) -> Receipt:
    """Write the run's receipt and its model to ``context.folder``, from those of its stages, in order.

    Costs are sums; the peak is the highest, labels are the labelled images, stored is the final model:
    ``weights.safetensors`` of the last stage that trained a network, and where a probe came after it,
    ``probe.safetensors`` (see `scrimp.jobs.stages_probe.PROBE`).
    """
    return shared(context.setup.accelerator, lambda: _joined(context, receipts))


def _joined(context: Context, receipts: dict[str, Receipt]) -> Receipt:
    *_, last = receipts.values()
    stages = {
        name: {"way": receipt.way, "flops": receipt.cost.flops.value, "seconds": receipt.cost.seconds.value}
        for name, receipt in receipts.items()
    }
    receipt = Receipt(
        kind="run",
        name=context.study,
        way=context.way,
        seed=context.seed,
        baseline=context.baseline,
        quality=dict(last.quality),
        cost=_sum([item.cost for item in receipts.values()], stored=_keep(context, receipts)),
        curve=_curve(receipts),
        config={**plain(context.config), "budget_flops": context.budget},
        notes={**_facts(context), **last.notes, "resumed": _resumed(receipts), "stages": stages},
    )
    save_receipt(receipt, context.folder / RECEIPT)
    return receipt


def _keep(context: Context, names: Iterable[str]) -> int:
    """Copy the final model from the stages' folders; returns its bytes."""
    size = 0
    for file in (WEIGHTS, PROBE):
        found = [context.folder / STAGES / name / file for name in names]
        last = next((path for path in reversed(found) if path.is_file()), None)
        if last is not None:
            content = last.read_bytes()
            write_atomic(context.folder / file, content)
            size += len(content)
    return size


def _sum(costs: list[Cost], *, stored: int) -> Cost:
    return Cost(
        **{name: _summed([getattr(cost, name) for cost in costs], HOW[name]) for name in _SUMMED},
        joules=_summed([cost.joules for cost in costs], None),
        peak_bytes=_highest([cost.peak_bytes for cost in costs]),
        stored_bytes=Reading(float(stored), HOW["stored_bytes"]),
        labels=costs[-1].labels,
    )


def _summed(readings: list[Reading], how: str | None) -> Reading:
    """``how``: in the words of the study's other runs; the readings' own where ``None``."""
    known = [reading.value for reading in readings if reading.value is not None]
    missed = tuple(dict.fromkeys(name for reading in readings for name in reading.missed))
    if len(known) < len(readings):
        return next(reading for reading in readings if reading.value is None)
    return Reading(sum(known), how or "; ".join(dict.fromkeys(reading.how for reading in readings)), missed)


def _highest(readings: list[Reading]) -> Reading:
    unknown = [reading for reading in readings if reading.value is None]
    return unknown[0] if unknown else max(readings, key=lambda reading: reading.value or 0.0)


def _curve(receipts: dict[str, Receipt]) -> list[dict[str, float | None]]:
    """The stages' curves end to end. Losses of an encoder are of another kind than a classifier's, and left out."""
    before = dict.fromkeys(_SUMMED, 0.0)
    *_, last = receipts.values()
    points: list[dict[str, float | None]] = []
    for receipt in receipts.values():
        for point in receipt.curve:
            here = {name: _plus(point.get(name), before[name]) for name in _SUMMED}
            kept = {name: value for name, value in point.items() if receipt is last or not name.endswith("loss")}
            points.append({**kept, **here})
        before = {name: before[name] + (getattr(receipt.cost, name).value or 0.0) for name in _SUMMED}
    return points


def _plus(value: float | None, more: float) -> float | None:
    return None if value is None else value + more


def _facts(context: Context) -> dict[str, Any]:
    data, accelerator = context.setup.data, context.setup.accelerator
    return {
        "data": data.name,
        "training images": len(context.labelled),
        "unlabelled images": len(data.train),
        "test images": len(data.test),
        "classes": len(data.classes),
        "skipped images": len(data.skipped),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
    }


def _resumed(receipts: dict[str, Receipt]) -> int:
    return sum(int(receipt.notes.get("resumed", 0)) for receipt in receipts.values())
