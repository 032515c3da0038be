"""One run that makes an encoder, from its fresh model to its receipt, weights and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp.data import ImageData, load_images
from scrimp.jobs.budget import StepCost, checked_budget, flops_in
from scrimp.jobs.encoder_fit import EncoderFitting
from scrimp.jobs.encoders import encoder_metadata
from scrimp.jobs.engine import total, tracked
from scrimp.jobs.evaluate import EVALUATION_BATCH
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.models import create_model, load_weights_
from scrimp.jobs.once import save_weights
from scrimp.jobs.pretrain_config import EncoderConfig
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

_SMALL = 64  # pixels up to which the small network is taken by default
_USUAL_EPOCHS = 20.0


@dataclass(frozen=True)
class EncoderRun:
    """What one run is to do, and what its receipt says beside figures.

    Attributes:
        name, way, seed, baseline: as in `scrimp.receipts.Receipt`.
        folder: where everything goes.
        budget: FLOPs.
        config: resolved, for the receipt.
        labels: how many labels the run used.
        notes: further facts.
        drawn: with pictures and a report.
    """

    name: str
    way: str
    folder: Path
    seed: int
    budget: float
    baseline: bool
    config: dict[str, Any]
    labels: int
    notes: dict[str, Any] = field(default_factory=dict)
    drawn: bool = True


def load_data(config: EncoderConfig, source: Any, accelerator: Accelerator) -> ImageData:
    """The images, once on the first process and then on the others.

    Raises:
        InputError: data or a batch size that cannot be used.
    """
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        data = load_images(source, size=config.size, on_corrupt=config.on_corrupt, unlabelled=config.unlabelled)
    share = config.batch_size // config.accumulate
    if share % accelerator.num_processes or not 2 <= config.batch_size <= len(data.train):
        raise InputError(
            f"a batch of 2 to {len(data.train)} whose parts {accelerator.num_processes} process(es) share evenly",
            f"{config.batch_size}, in {config.accumulate} part(s)",
            "pass another --batch-size",
        )
    return data


def model_name(config: EncoderConfig, data: ImageData) -> str:
    """The architecture asked for, or the usual one for images of this size."""
    return config.model or ("small-resnet18-16" if data.train.shape[1] <= _SMALL else "resnet18")


def new_encoder(config: EncoderConfig, data: ImageData) -> tuple[nn.Module, int]:
    """A fresh encoder, its initial weights fixed by the seed, and the width of its features."""
    channels, size, _ = data.train.shape
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        model = create_model(
            model_name(config, data), classes=0, channels=channels, size=size, pretrained=config.pretrained
        )
    if config.weights is not None:
        load_weights_(model, config.weights)
    with torch.no_grad():
        shape = model.eval()(torch.zeros(2, channels, size, size)).shape
    model.train()
    if len(shape) != 2:
        raise InputError("a model that gives features [batch, dim]", f"{list(shape)}", "choose another --model")
    return model, shape[1]


def resolve_budget(
    config: EncoderConfig, data: ImageData, cost: StepCost, seconds: Callable[[], tuple[float, float]]
) -> float:
    """FLOPs of a run: the smallest of the budgets given, 20 passes with none.

    Args:
        cost: of an image.
        seconds: wall seconds of a training step and of a forward pass of a look, measured when asked.
    """
    step = cost.train * config.batch_size
    budgets = [config.flops] if config.flops is not None else []
    if config.minutes is not None:
        train, look = seconds()
        looks = config.evaluations * (len(data.test) + min(config.probe, len(data.train))) / EVALUATION_BATCH
        extra = 1.0 + look * looks * EVALUATION_BATCH / config.batch_size
        budgets.append(flops_in(config.minutes * 60, step, train_seconds=train, extra_seconds=extra))
    if config.epochs is not None or not budgets:
        budgets.append(cost.train * len(data.train) * (_USUAL_EPOCHS if config.epochs is None else config.epochs))
    # A little more than whole steps, lest the last one is lost to rounding.
    return checked_budget(min(budgets) * (1 + 1e-9), step)


def run_encoder(
    run: EncoderRun, make: Callable[[], EncoderFitting], report: Callable[[Spent], None], *, resume: bool
) -> Receipt:
    """Train, save the backbone, draw, write the receipt; a finished run is read back, an interrupted one goes on.

    Raises:
        Interrupted: a stop was asked for; the checkpoint is written.
    """
    done = run.folder / RECEIPT
    if resume and done.is_file():
        return load_receipt(done)
    with torch.random.fork_rng(_gpus()), ResidentPeak() as peak, EnergyWindow() as energy:
        torch.manual_seed(run.seed)
        fitting = make()
        torch.manual_seed(run.seed + 7919 * fitting.accelerator.process_index)  # dropout differs between processes
        if resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(fitting.accelerator, fitting.config.trackers, run.folder, run.config):
            fitting.run(report)
        size = save_weights(fitting, run.folder / WEIGHTS, _metadata(fitting), part="backbone")
    receipt = _receipt(run, fitting, _cost(run, fitting, peak.reading, energy.reading, size))
    sections = fitting.sections(run.folder) if run.drawn else []
    if fitting.accelerator.is_main_process:
        if run.drawn:
            write_report([receipt], run.folder / REPORT, sections=sections)
        save_receipt(receipt, done)
        fitting.clean()
    fitting.accelerator.wait_for_everyone()
    return receipt


def _metadata(fitting: EncoderFitting) -> dict[str, str]:
    data, config = fitting.data, fitting.encoder_config
    channels, size, _ = data.train.shape
    return encoder_metadata(
        model_name(config, data), dim=fitting.width(), channels=channels, size=size, mean=data.mean, std=data.std
    )


def _cost(run: EncoderRun, fitting: EncoderFitting, peak: Reading, energy: Reading, stored: int) -> Cost:
    how, spent = "training, measuring left out", fitting.spent
    return Cost(
        seconds=Reading(spent.seconds, f"wall clock: {how}"),
        cpu_seconds=Reading(total(fitting.accelerator, spent.cpu_seconds), f"process CPU time, all processes: {how}"),
        flops=Reading(spent.flops, "counted once for a step, times the steps", fitting.cost.missed),
        peak_bytes=peak,
        joules=energy,
        stored_bytes=Reading(float(stored), "size of the encoder's weights file"),
        samples=Reading(float(spent.images), "images through forward and backward"),
        labels=Reading(float(run.labels), "training images whose label was used"),
    )


def _receipt(run: EncoderRun, fitting: EncoderFitting, cost: Cost) -> Receipt:
    last, data = fitting.spent.curve[-1], fitting.data
    names = [name for name in last if name.endswith(("accuracy", "loss"))]
    return Receipt(
        kind="run",
        name=run.name,
        way=run.way,
        seed=run.seed,
        baseline=run.baseline,
        quality={name: last[name] for name in names},
        cost=cost,
        curve=fitting.spent.curve,
        config=run.config,
        notes={
            "data": data.name,
            "model": model_name(fitting.encoder_config, data),
            "training images": len(data.train),
            "test images": len(data.test),
            "skipped images": len(data.skipped),
            "neighbours sought among": min(fitting.encoder_config.probe, len(data.train)),
            "precision": fitting.accelerator.mixed_precision,
            "processes": fitting.accelerator.num_processes,
            "device": str(fitting.accelerator.device),
            "resumed": fitting.spent.resumes,
            **run.notes,
        },
    )


def _gpus() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
