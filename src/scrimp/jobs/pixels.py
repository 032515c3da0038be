"""`scrimp pixels train`: a model that writes images pixel by pixel, and some of its images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp.data import ImageData, load_images
from scrimp.jobs.budget import StepCost, checked_budget, flops_in, seconds_a_step
from scrimp.jobs.engine import accelerated, shared, total, tracked
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, WEIGHTS, choose_folder, plain, record_config
from scrimp.jobs.once import save_weights
from scrimp.jobs.pixels_config import PixelsTrainConfig
from scrimp.jobs.pixels_fit import MEASURED_AT_ONCE, PixelFitting
from scrimp.jobs.pixels_generate import SAMPLES, new_images, save_grid
from scrimp.jobs.pixels_model import PixelTransformer, as_sequence
from scrimp.jobs.pixels_sample import build_model
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak, count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

_USUAL_MINUTES = 5.0


def pixels_train(config: PixelsTrainConfig, *, data: Any = None, accelerator: Accelerator | None = None) -> Receipt:
    """Train a pixel transformer under a budget; writes weights, samples.png, configuration and receipt.

    Args:
        config: see `PixelsTrainConfig`.
        data: anything `scrimp.data.load_images` takes; instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config, accelerator) as started:
        return _train(config, config.data if data is None else data, started)


def _train(config: PixelsTrainConfig, source: Any, accelerator: Accelerator) -> Receipt:
    name = default_name(f"pixels-{config.attention}", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    images = _load(config, source, accelerator)
    model = build_model(plain(config), images.train.shape, seed=config.seed).to(accelerator.device)
    cost = _count(model, images)
    wanted = {} if config.resume else _resolved(config, images, model, cost, accelerator)
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    run = _Run(config, name, folder, images, cost, resolved["budget_flops"], accelerator)
    return run.receipt_of(model)


def _load(config: PixelsTrainConfig, data: Any, accelerator: Accelerator) -> ImageData:
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        images = load_images(data, size=config.size, on_corrupt=config.on_corrupt)
    if config.batch_size % accelerator.num_processes or config.batch_size > len(images.train):
        raise InputError(
            f"a batch size up to {len(images.train)} that {accelerator.num_processes} process(es) share evenly",
            f"{config.batch_size}",
            "pass another --batch-size",
        )
    return images


def _count(model: PixelTransformer, images: ImageData) -> StepCost:
    """FLOPs of one image, forward and backward and forward alone, counted on a copy.

    Softmax attention is counted as plain products, whose N x N matrices may not fit the memory: without any numbers.
    """
    device = torch.device("meta") if model.attention == "softmax" else model.head.weight.device
    twin, sample = copy.deepcopy(model).to(device), images.train.batch(torch.arange(1)).to(device)
    trained = count_flops(lambda: twin.output.nats(twin(sample), as_sequence(sample)).mean().backward())
    with torch.no_grad():
        scored = count_flops(lambda: twin(sample))
    if trained.value is None or scored.value is None:
        raise InputError("a model whose FLOPs can be counted", type(model).__name__, "report this")
    return StepCost(trained.value, scored.value, trained.missed)


def _resolved(
    config: PixelsTrainConfig, images: ImageData, model: PixelTransformer, cost: StepCost, accelerator: Accelerator
) -> dict[str, Any]:
    """What a run keeps to, resumed or not: its FLOPs, the least of the budgets given, and the images' shape."""
    step = cost.train * config.batch_size
    budgets = []
    if config.steps is not None:
        budgets.append(config.steps * step)
    if config.epochs is not None:
        budgets.append(config.epochs * len(images.train) * cost.train)
    minutes = config.minutes if config.minutes is not None or budgets else _USUAL_MINUTES
    if minutes is not None:
        seconds = _seconds(config, images, model, accelerator)
        budgets.append(flops_in(minutes * 60, step, train_seconds=seconds[0], extra_seconds=seconds[1]))
    # A little more than whole steps, lest the last one is lost to rounding.
    return {"budget_flops": checked_budget(min(budgets) * (1 + 1e-9), step), "shape": list(images.train.shape)}


def _seconds(
    config: PixelsTrainConfig, images: ImageData, model: PixelTransformer, accelerator: Accelerator
) -> tuple[float, float]:
    """Wall seconds of a training step, and of all measuring and sampling of a run; the slowest process's."""
    twin, device = copy.deepcopy(model), accelerator.device
    rows, shown = config.batch_size // accelerator.num_processes, max(1, MEASURED_AT_ONCE // model.tokens)
    sample = images.train.batch(torch.arange(max(rows, shown)) % len(images.train)).to(device)

    def train() -> None:
        twin.zero_grad()
        with accelerator.autocast():
            outputs = twin(sample[:rows])
        twin.output.nats(outputs.float(), as_sequence(sample[:rows])).mean().backward()

    def look() -> None:
        with torch.no_grad(), accelerator.autocast():
            twin.output.nats(twin(sample[:shown]), as_sequence(sample[:shown]))

    times = torch.tensor([seconds_a_step(train, repeats=5), seconds_a_step(look, repeats=3)], device=device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    step, measured = times.tolist()
    last = len(images.test) if config.test_images is None else min(config.test_images, len(images.test))
    looked_at = 2 * config.probe * config.evaluations - config.probe + last
    return step, looked_at / accelerator.num_processes / shown * measured + 0.5


class _Run:
    """One run from its fresh model to its receipt."""

    def __init__(
        self,
        config: PixelsTrainConfig,
        name: str,
        folder: Path,
        images: ImageData,
        cost: StepCost,
        budget: float,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.name, self.folder, self.images = config, name, folder, images
        self.cost, self.budget, self.accelerator = cost, budget, accelerator

    def receipt_of(self, model: PixelTransformer) -> Receipt:
        """Train and write everything; a finished run is read back."""
        if self.config.resume and (self.folder / RECEIPT).is_file():
            return load_receipt(self.folder / RECEIPT)
        main = self.accelerator.is_main_process
        with progress_bar(shown=main and not self.config.json) as progress:
            with ResidentPeak() as peak, EnergyWindow() as energy:
                fitting = self._fit(model, progress)
            stored = save_weights(fitting, self.folder / WEIGHTS, {"model": "pixel transformer", "format": "pt"})
            cost = self._cost(fitting.spent, peak.reading, energy.reading, stored)
            receipt = self._receipt(fitting.spent, cost)
            if main:
                self._show(fitting, progress)
                save_receipt(receipt, self.folder / RECEIPT)
                fitting.checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return receipt

    def _fit(self, model: PixelTransformer, progress: Progress) -> PixelFitting:
        bar = add_bar(progress, self.config.attention)

        def report(spent: Spent) -> None:
            latest = f"{spent.curve[-1]['test_bits']:.3f} bits/dim" if spent.curve else ""
            progress.update(bar, completed=spent.flops / self.budget, figures=latest)

        fitting = PixelFitting(
            self.config,
            model,
            self.images,
            accelerator=self.accelerator,
            cost=self.cost,
            budget=self.budget,
            checkpoint=self.folder / CHECKPOINT,
        )
        if self.config.resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(self.accelerator, self.config.trackers, self.folder, plain(self.config)):
            fitting.run(report)
        return fitting

    def _show(self, fitting: PixelFitting, progress: Progress) -> None:
        """Write some images of the trained model."""
        if not self.config.samples:
            return
        model = fitting.trained()
        bar = add_bar(progress, "samples", total=model.tokens)
        images = new_images(model, self.config.samples, seed=self.config.seed, each=lambda: progress.advance(bar))
        save_grid(images, self.folder / SAMPLES)
        if not self.config.json:
            console.print(f"samples: {self.folder / SAMPLES}", soft_wrap=True)

    def _cost(self, spent: Spent, peak: Reading, energy: Reading, stored: int) -> Cost:
        how = "training, measuring left out"
        return Cost(
            seconds=Reading(spent.seconds, f"wall clock: {how}"),
            cpu_seconds=Reading(total(self.accelerator, spent.cpu_seconds), f"process CPU time, all processes: {how}"),
            flops=Reading(spent.flops, "counted once for a step, times the steps", self.cost.missed),
            peak_bytes=peak,
            joules=energy,
            stored_bytes=Reading(float(stored), "size of the weights file"),
            samples=Reading(float(spent.images), "images through forward and backward"),
            labels=Reading(0.0, "none is used"),
        )

    def _receipt(self, spent: Spent, cost: Cost) -> Receipt:
        last, config = spent.curve[-1], self.config
        measured = len(self.images.test) if config.test_images is None else config.test_images
        return Receipt(
            kind="run",
            name=self.name,
            way=config.attention,
            seed=config.seed,
            baseline=config.attention == "softmax",
            quality={key: last[key] for key in ("test_bits", "train_bits", "test_loss", "train_loss")},
            cost=cost,
            curve=spent.curve,
            config={**plain(config), "budget_flops": self.budget},
            notes={
                "data": self.images.name,
                "shape": list(self.images.train.shape),
                "training images": len(self.images.train),
                "test images measured": min(measured, len(self.images.test)),
                "train_bits measured on": f"{min(config.probe, len(self.images.train))} fixed training images",
                "skipped images": len(self.images.skipped),
                "processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device),
                "resumed": spent.resumes,
                "unit of bits": "bits per dimension (loss: nats per dimension)",
            },
        )
