"""One run of `scrimp denoise train`, from its fresh model to its receipt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp.adapt.file import adapter_bytes
from scrimp.data import ImageData
from scrimp.denoise import integrate, solver_for
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.denoise_fit import DenoiseFitting
from scrimp.jobs.denoise_models import Denoiser, load_denoiser, save_denoiser
from scrimp.jobs.denoise_train_error import GAMMA, LOG10_SNR
from scrimp.jobs.denoise_train_plan import Costs, Plan
from scrimp.jobs.engine import total, tracked
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, plain
from scrimp.jobs.pixels_generate import SAMPLES, save_grid
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.primitives.draw import generator_for
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

MODEL = "model"
"""Folder, in a run's own, of the trained model."""
ADAPTER = "adapter.safetensors"
"""File of the trained numbers, see `scrimp.adapt.save_adapter`."""
STORED_BITS = {"nola": 8, "lora": 16}
"""Bits of a number in an adapter's file; those of nola are trained at 8."""
_SHOW = 24  # key of the samples' noise


@dataclass(frozen=True, eq=False)
class DenoiseSetup:
    """What a run is made of, counted and planned."""

    config: DenoiseTrainConfig
    name: str
    folder: Path
    images: ImageData
    accelerator: Accelerator
    costs: Costs
    plan: Plan
    labelled: bool


class DenoiseRun:
    """Trains and writes everything."""

    def __init__(self, setup: DenoiseSetup) -> None:
        self.setup, self.config = setup, setup.config

    def receipt_of(self, denoiser: Denoiser) -> Receipt:
        """Train the denoiser and write all files; a finished run is read back."""
        setup, done = self.setup, self.setup.folder / RECEIPT
        if self.config.resume and done.is_file():
            return load_receipt(done)
        main = setup.accelerator.is_main_process
        with progress_bar(shown=main and not self.config.json) as progress:
            with ResidentPeak() as peak, EnergyWindow() as energy:
                fitting = self._fit(denoiser, progress)
            stored = self._save(fitting)
            cost = self._cost(fitting.spent, peak.reading, energy.reading, stored)
            receipt = self._receipt(fitting, cost)
            if main:
                self._say(fitting)
                self._show(fitting, progress)
                save_receipt(receipt, done)
                fitting.checkpoint.unlink(missing_ok=True)
        setup.accelerator.wait_for_everyone()
        return receipt

    def _fit(self, denoiser: Denoiser, progress: Progress) -> DenoiseFitting:
        setup = self.setup
        bar = add_bar(progress, way_of(self.config))
        fitting = DenoiseFitting(
            self.config,
            denoiser,
            setup.images,
            accelerator=setup.accelerator,
            plan=setup.plan,
            labelled=setup.labelled,
            checkpoint=setup.folder / CHECKPOINT,
        )

        def report(spent: Spent) -> None:
            figures = "" if fitting.loss is None else f"loss {fitting.loss:.3g}"
            if spent.curve and spent.curve[-1]["test_loss"] is not None:
                figures += f"  test {spent.curve[-1]['test_loss']:.3g}"
            progress.update(bar, completed=spent.flops / fitting.budget, figures=figures)

        if self.config.resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(setup.accelerator, self.config.trackers, setup.folder, plain(self.config)):
            fitting.run(report)
        return fitting

    def _save(self, fitting: DenoiseFitting) -> int:
        """Write the model, or the adapter alone; returns the bytes of the weights' file."""
        main, size = self.setup.accelerator.is_main_process, 0
        if self.config.adapter != "none":
            content = adapter_bytes(fitting.plain, bits=STORED_BITS[self.config.adapter])
            if main:
                write_atomic(self.setup.folder / ADAPTER, content)
            return len(content)
        if main:
            size = save_denoiser(fitting.trained(), self.setup.folder / MODEL)
        return int(total(self.setup.accelerator, float(size)))

    def _say(self, fitting: DenoiseFitting) -> None:
        if not self.config.json:
            console.print(gain_of(fitting), soft_wrap=True)

    def _show(self, fitting: DenoiseFitting, progress: Progress) -> None:
        """Write some images of what is in the file."""
        config = self.config
        if not config.samples:
            return
        denoiser = fitting.trained()
        if config.adapter != "none":
            assert config.start is not None
            stored = load_denoiser(config.start, adapter=self.setup.folder / ADAPTER)
            stored.model.to(denoiser.device)
            denoiser = replace(stored, attention=denoiser.attention)
        bar = add_bar(progress, "samples", total=config.sample_steps)
        images = draw_samples(
            denoiser, config, labelled=self.setup.labelled, each=lambda call, images: progress.advance(bar)
        )
        save_grid(images, self.setup.folder / SAMPLES)
        if not config.json:
            console.print(f"samples: {self.setup.folder / SAMPLES}", soft_wrap=True)

    def _cost(self, spent: Spent, peak: Reading, energy: Reading, stored: int) -> Cost:
        how, accelerator = "training and scoring, measuring left out", self.setup.accelerator
        file = "adapter's file, model left out" if self.config.adapter != "none" else "weights file"
        return Cost(
            seconds=Reading(spent.seconds, f"wall clock: {how}"),
            cpu_seconds=Reading(total(accelerator, spent.cpu_seconds), f"process CPU time, all processes: {how}"),
            flops=Reading(
                spent.flops, "counted once for a step of each kind, times the steps", self.setup.costs.missed
            ),
            peak_bytes=peak,
            joules=energy,
            stored_bytes=Reading(float(stored), f"size of the {file}"),
            samples=Reading(float(spent.images), "images through forward and backward, parts of images as one"),
            labels=Reading(float(len(self.setup.images.train)) if self.setup.labelled else 0.0, "labels told"),
        )

    def _receipt(self, fitting: DenoiseFitting, cost: Cost) -> Receipt:
        config, last = self.config, fitting.spent.curve[-1]
        return Receipt(
            kind="run",
            name=self.setup.name,
            way=way_of(config),
            seed=config.seed,
            baseline=way_of(config) == "plain",
            quality={key: last[key] for key in ("test_loss", "train_loss")},
            cost=cost,
            curve=fitting.spent.curve,
            config={**plain(config), "budget_flops": fitting.budget},
            notes=self._notes(fitting),
        )

    def _notes(self, fitting: DenoiseFitting) -> dict[str, Any]:
        config, setup, plan = self.config, self.setup, self.setup.plan
        trained = sum(item.numel() for item in fitting.plain.parameters() if item.requires_grad)
        every = sum(item.numel() for item in fitting.plain.parameters())
        return {
            "data": setup.images.name,
            "shape": list(setup.images.train.shape),
            "classes": len(setup.images.classes) if setup.labelled else None,
            "training images": len(setup.images.train),
            "test images": len(setup.images.test),
            "skipped images": len(setup.images.skipped),
            "numbers of the model": every - trained if config.adapter != "none" else every,
            "trained numbers": trained,
            "prediction": fitting.denoiser.process.prediction,
            "weighting": config.part("weighting"),
            "timesteps": config.part("timesteps"),
            "steps on parts of images": plan.partial_steps,
            "steps on whole images": plan.whole_steps,
            "share of an image in a part": fitting.objective.parts.share,
            "flops an image": {"part": plan.partial_flops, "whole": plan.whole_flops, "forward": setup.costs.forward},
            "flops of scoring timesteps": 0,  # the scores are the losses of training itself
            "variance_ratio": fitting.ratio(),
            "importance timesteps": gain_of(fitting),
            "test_loss is": f"min(snr, {GAMMA:g}) x squared error of the clean image, mean over log10 snr {LOG10_SNR}",
            "test error by snr": fitting.by_snr,
            "processes": setup.accelerator.num_processes,
            "device": str(setup.accelerator.device),
            "precision": setup.accelerator.mixed_precision,
            "resumed": fitting.spent.resumes,
        }


def way_of(config: DenoiseTrainConfig) -> str:
    """The recipe and what flags changed of it."""
    parts = ("prediction", "weighting", "timesteps", "keep", "whole")
    changed = [f"{name} {getattr(config, name)}" for name in parts if getattr(config, name) is not None]
    if config.attention != "softmax":
        changed.append(f"{config.attention} attention")
    first = config.recipe if config.adapter == "none" else f"{config.adapter}, {config.recipe}"
    return ", ".join([first, *changed])


def gain_of(fitting: DenoiseFitting) -> str:
    """The bound on what importance timesteps can gain, in words, before anyone promises any."""
    ratio = fitting.ratio()
    if ratio is None:
        return "importance timesteps: what they can gain is not known, not every noise level was seen"
    return f"importance timesteps can gain at most {ratio:.2f}x here"


def draw_samples(denoiser: Denoiser, config: DenoiseTrainConfig, *, labelled: bool, each: Any) -> torch.Tensor:
    """Images by DPM-Solver++, classes in turn; uint8 [samples, channels, height, width] on the CPU."""
    device, count = denoiser.device, config.samples
    noise = torch.randn(count, *denoiser.shape, generator=generator_for(config.seed, _SHOW)).to(device)
    labels = torch.arange(count, device=device) % denoiser.classes if labelled and denoiser.classes else None
    with torch.inference_mode():
        images = integrate(
            lambda x, timestep: denoiser.predict(x, timestep, labels),
            solver_for("dpm++", denoiser.scheduler),
            noise,
            steps=config.sample_steps,
            each=each,
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
