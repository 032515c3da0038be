"""One run of `scrimp adapt`: from the untouched model to the adapter's file and its receipt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scrimp.adapt import load_adapter_
from scrimp.adapt.file import adapter_bytes
from scrimp.jobs.adapt_fit import AdaptFitting
from scrimp.jobs.adapt_models import bare
from scrimp.jobs.adapt_setup import Adaptation
from scrimp.jobs.engine import total, tracked
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, plain
from scrimp.jobs.once import HOW as USUAL
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt, save_receipt

HOW = {
    "seconds": "wall clock: training or fitting, evaluation left out",
    "cpu_seconds": "process CPU time, all processes: training or fitting, evaluation left out",
    "flops": "counted once for a step or a pass of each kind, times their number",
    "stored_bytes": "size of the file of what was trained, classifier included, model left out",
    "samples": "examples through forward and backward",
}
"""How the costs are obtained, the same words for the adapter and its baseline."""

ADAPTER = "adapter.safetensors"
"""File of the trained numbers and the classifier, see `scrimp.adapt.save_adapter`."""


@dataclass(frozen=True)
class AdaptRun:
    """What one run is to do.

    Attributes:
        name, way, baseline: as in `scrimp.receipts.Receipt`.
        folder: where the adapter, the checkpoint and the receipt go.
        budget: FLOPs.
    """

    name: str
    way: str
    folder: Path
    budget: float
    baseline: bool = False


def run_adaptation(
    setup: Adaptation, run: AdaptRun, report: Callable[[Spent], None], *, resume: bool
) -> tuple[Receipt, AdaptFitting | None]:
    """Train, save the adapter, write the receipt; a finished run is read back, an interrupted one goes on.

    Returns:
        The receipt, and what was trained unless it was read back.

    Raises:
        Interrupted: a stop was asked for; the checkpoint is written.
    """
    done = run.folder / RECEIPT
    if resume and done.is_file():
        return load_receipt(done), None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), ResidentPeak() as peak, EnergyWindow() as energy:
        # Dropout and the like: restored afterwards, and not alike on every process.
        torch.manual_seed(setup.config.seed + 7919 * setup.accelerator.process_index)
        fitting = setup.fitting(run.folder, run.budget)
        if resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(setup.accelerator, setup.config.trackers, run.folder, plain(setup.config)):
            fitting.run(report)
        size = _save(setup, fitting, run.folder / ADAPTER)
    quality = _quality(setup, fitting, run.folder / ADAPTER)
    receipt = _receipt(setup, run, fitting, quality, _cost(setup, fitting, peak.reading, energy.reading, size))
    if setup.accelerator.is_main_process:
        save_receipt(receipt, done)
        fitting.checkpoint.unlink(missing_ok=True)
    setup.accelerator.wait_for_everyone()
    return receipt, fitting


def _save(setup: Adaptation, fitting: AdaptFitting, path: Path) -> int:
    content = adapter_bytes(bare(fitting.plain), bits=setup.config.stored_bits)
    if setup.accelerator.is_main_process:
        write_atomic(path, content)
    setup.accelerator.wait_for_everyone()
    return len(content)


def _quality(setup: Adaptation, fitting: AdaptFitting, path: Path) -> dict[str, float | None]:
    """The last figures of the run; where storing rounds the numbers, test figures of what is in the file."""
    curve = fitting.spent.curve
    found = {name: value for name, value in curve[-1].items() if name.startswith(("test_", "train_"))}
    if setup.config.stored_bits is not None:
        model = setup.subject.build(setup.config.seed).to(setup.accelerator.device)
        load_adapter_(bare(model), path)
        measured = fitting.measure(model, train=False)
        found = {**found, **{f"test_{name}": value for name, value in measured.items()}}
    if setup.subject.continues:
        found["untouched_perplexity"] = curve[0]["test_perplexity"]
    return dict(sorted(found.items()))


def _cost(setup: Adaptation, fitting: AdaptFitting, peak: Reading, energy: Reading, stored: int) -> Cost:
    spent = fitting.spent
    return Cost(
        seconds=Reading(spent.seconds, HOW["seconds"]),
        cpu_seconds=Reading(total(setup.accelerator, spent.cpu_seconds), HOW["cpu_seconds"]),
        flops=Reading(spent.flops, HOW["flops"], setup.cost.missed),
        peak_bytes=peak,
        joules=energy,
        stored_bytes=Reading(float(stored), HOW["stored_bytes"]),
        samples=Reading(float(spent.images), HOW["samples"]),
        labels=labels_used(setup),
    )


def labels_used(setup: Adaptation) -> Reading:
    """How many labels training is given; in the words of all jobs where they are images'."""
    return Reading(float(setup.labels), "training examples with a label" if setup.on_text else USUAL["labels"])


def _receipt(
    setup: Adaptation, run: AdaptRun, fitting: AdaptFitting, quality: dict[str, float | None], cost: Cost
) -> Receipt:
    return Receipt(
        kind="run",
        name=run.name,
        way=run.way,
        seed=setup.config.seed,
        baseline=run.baseline,
        quality=quality,
        cost=cost,
        curve=fitting.spent.curve,
        config={**plain(setup.config), "budget_flops": run.budget},
        notes={
            **facts(setup),
            "trained numbers": setup.numbers,
            "trained numbers of the classifier": setup.head,
            "bytes of the classifier": 4 * setup.head,
            "method": setup.method.settings(),
            "precision": setup.accelerator.mixed_precision,
            "resumed": fitting.spent.resumes,
            "train_loss measured on": f"{min(setup.config.probe, len(setup.data.train))} fixed training examples",
        },
    )


def facts(setup: Adaptation) -> dict[str, Any]:
    """What every receipt of one job says of model and data."""
    return {
        "model": setup.subject.name,
        "data": setup.data.name,
        "training examples": len(setup.data.train),
        "test examples": len(setup.data.test),
        "classes": len(setup.data.classes),
        "skipped images": len(setup.data.skipped),
        "processes": setup.accelerator.num_processes,
        "device": str(setup.accelerator.device),
    }
