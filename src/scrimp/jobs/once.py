"""One run: train under a budget, save the weights, write the receipt. Shared by `scrimp train` and `scrimp study`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scrimp.jobs.checkpoint import gather_training_state
from scrimp.jobs.engine import total, tracked
from scrimp.jobs.fit import Fitting, Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, WEIGHTS, plain
from scrimp.jobs.sampling import SAMPLINGS
from scrimp.jobs.setup import Setup
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import Receipt, load_receipt, save_receipt

HOW = {
    "seconds": "wall clock: training and scoring, evaluation left out",
    "cpu_seconds": "process CPU time, all processes: training and scoring, evaluation left out",
    "flops": "counted once for a step of each kind, times the steps",
    "stored_bytes": "size of the weights file",
    "samples": "images through forward and backward",
    "labels": "training images with a label",
}
"""How a run's costs are obtained, the same words for every way of a study."""


@dataclass(frozen=True)
class Task:
    """What one run is to do.

    Attributes:
        name, way, baseline, seed: as in `scrimp.receipts.Receipt`.
        sampling: name of the policy.
        budget: FLOPs.
        folder: where weights, checkpoint and receipt go.
        target_accuracy: early stop.
    """

    name: str
    way: str
    sampling: str
    budget: float
    folder: Path
    seed: int = 0
    baseline: bool = False
    target_accuracy: float | None = None


def run_task(setup: Setup, task: Task, report: Callable[[Spent], None], *, resume: bool) -> Receipt:
    """Train as ``task`` says and return its receipt; a finished run is read back, an interrupted one goes on.

    Raises:
        Interrupted: a stop was asked for; the checkpoint is written.
    """
    done = task.folder / RECEIPT
    if resume and done.is_file():
        return load_receipt(done)
    devices = [setup.accelerator.device.index or 0] if setup.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), ResidentPeak() as peak, EnergyWindow() as energy:
        # Dropout and the like: restored afterwards, and not alike on every process.
        torch.manual_seed(task.seed + 7919 * setup.accelerator.process_index)
        fitting = _fitting(setup, task)
        if resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(setup.accelerator, setup.config.trackers, task.folder, plain(setup.config)):
            fitting.run(report)
        names = {"model": setup.config.model, "classes": "\n".join(setup.data.classes), "format": "pt"}
        size = save_weights(fitting, task.folder / WEIGHTS, names)
    cost = cost_of(setup, fitting.spent, peak.reading, energy.reading, size)
    receipt = _receipt(setup, task, fitting.spent, cost)
    if setup.accelerator.is_main_process:
        save_receipt(receipt, done)
        fitting.checkpoint.unlink(missing_ok=True)
    setup.accelerator.wait_for_everyone()
    return receipt


def _fitting(setup: Setup, task: Task) -> Fitting:
    return Fitting(
        setup.config,
        setup.build_model(task.seed),
        setup.data,
        accelerator=setup.accelerator,
        sampling=SAMPLINGS[task.sampling](setup.config),
        cost=setup.cost,
        budget=task.budget,
        seed=task.seed,
        checkpoint=task.folder / CHECKPOINT,
        target_accuracy=task.target_accuracy,
    )


def save_weights(fitting: Fitting, path: Path, names: dict[str, str], *, part: str = "") -> int:
    """Write the weights (the average's, where there is one) as safetensors; returns the bytes of the file.

    ``part``: only those of this submodule, under its own names.
    """
    if fitting.ema is not None:
        state = {key: value.cpu() for key, value in fitting.ema.module.state_dict().items()}
    else:
        state, _ = gather_training_state(fitting.model, fitting.raw_optimizer)
    if part:
        head = f"{part}."
        state = {key.removeprefix(head): value for key, value in state.items() if key.startswith(head)}
    content = pack_weights(state, names)
    if fitting.accelerator.is_main_process:
        write_atomic(path, content)
    return len(content)


def cost_of(setup: Any, spent: Spent, peak: Reading, energy: Reading, stored: int) -> Cost:
    """What a run took; its setup has an ``accelerator``, the counted ``cost`` of an image, and ``data.train``."""
    return Cost(
        seconds=Reading(spent.seconds, HOW["seconds"]),
        cpu_seconds=Reading(total(setup.accelerator, spent.cpu_seconds), HOW["cpu_seconds"]),
        flops=Reading(spent.flops, HOW["flops"], setup.cost.missed),
        peak_bytes=peak,
        joules=energy,
        stored_bytes=Reading(float(stored), HOW["stored_bytes"]),
        samples=Reading(float(spent.images), HOW["samples"]),
        labels=Reading(float(len(setup.data.train)), HOW["labels"]),
    )


def _receipt(setup: Setup, task: Task, spent: Spent, cost: Cost) -> Receipt:
    last = spent.curve[-1]
    return Receipt(
        kind="run",
        name=task.name,
        way=task.way,
        seed=task.seed,
        baseline=task.baseline,
        quality={key: last[key] for key in ("test_accuracy", "train_loss", "test_loss")},
        cost=cost,
        curve=spent.curve,
        config={**plain(setup.config), "sampling": task.sampling, "budget_flops": task.budget},
        notes={
            "data": setup.data.name,
            "training images": len(setup.data.train),
            "test images": len(setup.data.test),
            "classes": len(setup.data.classes),
            "skipped images": len(setup.data.skipped),
            "processes": setup.accelerator.num_processes,
            "device": str(setup.accelerator.device),
            "resumed": spent.resumes,
            "train_loss measured on": f"{min(setup.config.probe, len(setup.data.train))} fixed training images",
        },
    )
