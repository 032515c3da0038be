"""`scrimp denoise distill`: a student that makes in one to four steps what its teacher makes in many."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.denoise.flow_map import straight_loss
from scrimp.jobs.budget import StepCost, flops_in, seconds_a_step
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_distill_fit import DenoiseDistillFitting, student_of, velocity_of
from scrimp.jobs.denoise_distill_pairs import PAIRS, TEACHER_AT, HeldOut, PairFiles, Pairs, Teacher
from scrimp.jobs.denoise_distill_plan import Plan, plan_of
from scrimp.jobs.denoise_distill_receipt import Finished, receipt_of, save_picture, table_of
from scrimp.jobs.denoise_models import Denoiser, save_denoiser
from scrimp.jobs.engine import accelerated, shared, slowest, tracked
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, choose_folder, plain, record_config
from scrimp.jobs.pixels_generate import SAMPLES
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.meter import EnergyWindow, ResidentPeak, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

MODEL = "model"
_USUAL_MINUTES = 5.0
_WARM = 14  # key of this random stream among those of one seed


def denoise_distill(config: DenoiseDistillConfig, *, accelerator: Accelerator | None = None) -> Receipt:
    """Make pairs with a trained model and train a few-step student on them.

    Leaves model/ (a folder that diffusers and `scrimp denoise sample` open), pairs/, samples.png, configuration and
    receipt in the run folder.

    Args:
        config: see `DenoiseDistillConfig`.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the model cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config, accelerator) as started:
        return _distill(config, started)


def _distill(config: DenoiseDistillConfig, accelerator: Accelerator) -> Receipt:
    _check_batch(config, accelerator)
    name = f"denoise-distill-{config.method}"
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    if config.resume and (folder / RECEIPT).is_file():
        shared(accelerator, lambda: record_config(folder, config, {}))  # only to see that it is the same run
        return load_receipt(folder / RECEIPT)
    devices = [accelerator.device.index or 0] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # Dropout, where a model of somebody else's has any: restored afterwards, and not alike on every process.
        torch.manual_seed(config.seed + 7919 * accelerator.process_index)
        teacher = Teacher(config, accelerator.device, accelerator.autocast)
        student = student_of(teacher.denoiser)
        cost = _count(student)
        wanted = {} if config.resume else {"steps": _steps(config, teacher, student, cost, accelerator)}
        resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
        plan = plan_of(config, resolved["steps"], cost)
        return _Run(config, name, folder, plan, accelerator).receipt_of(teacher, student)


def _check_batch(config: DenoiseDistillConfig, accelerator: Accelerator) -> None:
    if config.batch_size % accelerator.num_processes or config.batch_size > config.pairs:
        raise InputError(
            f"a batch size up to {config.pairs}, the pairs, that {accelerator.num_processes} process(es) share evenly",
            f"{config.batch_size}",
            "pass another --batch-size",
        )


def _sample(student: Denoiser, rows: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Noise twice, labels and levels, to count and to time steps on."""
    noise = torch.randn(2 * rows, *student.shape, generator=generator_for(_WARM)).to(student.device)
    labels = None if student.classes is None else torch.zeros(rows, dtype=torch.int64, device=student.device)
    return noise[:rows], noise[rows:], labels, torch.full((rows,), 0.5, device=student.device)


def _count(student: Denoiser) -> StepCost:
    """FLOPs of one pair, forward and backward and forward alone, counted on a copy."""
    model = copy.deepcopy(student.model)
    clean, noise, labels, sigma = _sample(student, 1)
    velocity = velocity_of(student, labels, model, nullcontext)
    trained = count_flops(lambda: straight_loss(velocity, clean, noise, sigma).mean().backward())
    with torch.no_grad():
        scored = count_flops(lambda: velocity(clean, sigma))
    if trained.value is None or scored.value is None:
        raise InputError("a model whose FLOPs can be counted", type(model).__name__, "report this")
    return StepCost(trained.value, scored.value, trained.missed)


def _steps(
    config: DenoiseDistillConfig, teacher: Teacher, student: Denoiser, cost: StepCost, accelerator: Accelerator
) -> int:
    """Steps of training, the least of the budgets given."""
    budgets = []
    if config.steps is not None:
        budgets.append(config.steps)
    if config.epochs is not None:
        budgets.append(int(config.epochs * config.pairs / config.batch_size))
    minutes = config.minutes if config.minutes is not None or budgets else _USUAL_MINUTES
    if minutes is not None:
        train, forward = _seconds(config, student, accelerator)
        one = plan_of(config, 1, cost).extra_calls(1) if config.method != "reflow" else 0.0
        step = train + (1 - config.straight) * one * forward
        before = _other_calls(config, teacher) / config.batch_size * forward + 0.5
        budgets.append(int(flops_in(minutes * 60, 1.0, train_seconds=step, extra_seconds=before)))
    if min(budgets) < 1:
        raise InputError("a budget of at least one step", f"{config.epochs} passes", "raise the budget")
    return min(budgets)


def _other_calls(config: DenoiseDistillConfig, teacher: Teacher) -> float:
    """Network calls on single images, a process's share: for pairs, and to measure."""
    made = config.pairs * teacher.calls(config.teacher_steps)
    measured = config.evaluations * sum(config.jumps)
    once = sum(teacher.calls(steps) for steps in (*TEACHER_AT, config.reference_steps))
    return made + config.held_out * (measured + once)


def _seconds(config: DenoiseDistillConfig, student: Denoiser, accelerator: Accelerator) -> tuple[float, float]:
    """Wall seconds of a training step on straight paths and of a forward pass of as many pairs; the slowest process's.

    Of a batch shared out over the processes, so that the time of other work is that of its own share as well.
    """
    model, rows = copy.deepcopy(student.model), config.batch_size // accelerator.num_processes
    clean, noise, labels, sigma = _sample(student, rows)
    velocity = velocity_of(student, labels, model, accelerator.autocast)

    def train() -> None:
        model.zero_grad()
        straight_loss(velocity, clean, noise, sigma).mean().backward()

    def look() -> None:
        with torch.no_grad():
            velocity(clean, sigma)

    found = slowest(accelerator, seconds_a_step(train, repeats=5), seconds_a_step(look, repeats=5))
    return found[0], found[1]


class _Run:
    """One run from its pairs to its receipt."""

    def __init__(
        self, config: DenoiseDistillConfig, name: str, folder: Path, plan: Plan, accelerator: Accelerator
    ) -> None:
        self.config, self.name, self.folder = config, name, folder
        self.plan, self.accelerator = plan, accelerator

    def receipt_of(self, teacher: Teacher, student: Denoiser) -> Receipt:
        """Make pairs, train and write everything."""
        main = self.accelerator.is_main_process
        with progress_bar(shown=main and not self.config.json) as progress:
            with ResidentPeak() as peak, EnergyWindow() as energy:
                pairs, held_out = self._pairs(teacher, progress)
                fitting = self._fit(student, pairs, held_out, progress)
            shown = torch.cat([fitting.images(steps) for steps in self.config.jumps])
            stored = save_denoiser(fitting.trained(), self.folder / MODEL) if main else 0
            done = Finished(self.config, self.name, fitting, pairs, teacher, peak.reading, energy.reading, stored)
            receipt = receipt_of(done)
            if main:
                self._show(shown, held_out, receipt)
                save_receipt(receipt, self.folder / RECEIPT)
                fitting.checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return receipt

    def _pairs(self, teacher: Teacher, progress: Progress) -> tuple[Pairs, HeldOut]:
        bar = add_bar(progress, "pairs")
        files = PairFiles(
            self.config,
            teacher,
            self.config.pairs_folder or self.folder / PAIRS,
            accelerator=self.accelerator,
            told=lambda share: progress.update(bar, completed=share),
        )
        return files.made(), files.held_out()

    def _fit(self, student: Denoiser, pairs: Pairs, held_out: HeldOut, progress: Progress) -> DenoiseDistillFitting:
        bar, least = add_bar(progress, self.config.method), min(self.config.jumps)

        def report(spent: Spent) -> None:
            latest = f"error {spent.curve[-1][f'paired_error_{least}']:.3f} at {least} step(s)" if spent.curve else ""
            progress.update(bar, completed=spent.flops / self.plan.budget, figures=latest)

        fitting = DenoiseDistillFitting(
            self.config,
            student,
            pairs,
            held_out,
            accelerator=self.accelerator,
            plan=self.plan,
            checkpoint=self.folder / CHECKPOINT,
        )
        if self.config.resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(self.accelerator, self.config.trackers, self.folder, plain(self.config)):
            fitting.run(report)
        return fitting

    def _show(self, images: Tensor, held_out: HeldOut, receipt: Receipt) -> None:
        if self.config.samples:
            save_picture(images, held_out, self.folder / SAMPLES, count=self.config.samples)
        if not self.config.json:
            console.print(table_of(receipt), soft_wrap=True, highlight=False)
            if self.config.samples:
                console.print(f"samples: {self.folder / SAMPLES}", soft_wrap=True)
