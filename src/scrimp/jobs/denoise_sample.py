"""`scrimp denoise sample`: images from a diffusion model at the least cost that keeps them what they were."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scrimp.jobs.checkpoint import load_checkpoint, save_checkpoint
from scrimp.jobs.denoise_sample_calibrate import calibrated, restored, said, tested
from scrimp.jobs.denoise_sample_config import AUTO, DenoiseSampleConfig, parse_cache
from scrimp.jobs.denoise_sample_open import open_subject
from scrimp.jobs.denoise_sample_pictures import GRID, SAMPLES, as_bytes, save_each
from scrimp.jobs.denoise_sample_pilot import Pilot, Trial, bound_of, choose
from scrimp.jobs.denoise_sample_receipt import earlier, sample_receipt
from scrimp.jobs.denoise_sample_table import pilot_table, sentence
from scrimp.jobs.denoise_sample_ways import Subject, Way, asked_way, check_solver
from scrimp.jobs.engine import accelerated
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, choose_folder, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.pixels_generate import save_grid
from scrimp.jobs.progress import add_bar, console, progress_bar
from scrimp.meter import EnergyWindow, ResidentPeak
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

if TYPE_CHECKING:
    from accelerate import Accelerator


def denoise_sample(config: DenoiseSampleConfig) -> Receipt:
    """Generate images; writes samples.png, configuration and receipt to the run folder.

    Args:
        config: see `DenoiseSampleConfig`.

    Returns:
        The receipt, also written to the run folder: its ``notes`` hold what was tried out, the baseline and the way
        taken.

    Raises:
        InputError: no such model, or a setting that does not fit it.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config) as accelerator:
        return _sample(config, accelerator)


def _sample(config: DenoiseSampleConfig, accelerator: Accelerator) -> Receipt:
    if accelerator.num_processes > 1:
        raise InputError("one process", f"{accelerator.num_processes}", "start it without torchrun")
    subject = open_subject(config, accelerator.device)
    if config.solver != AUTO:
        check_solver(config.solver, subject.prediction)
    folder = choose_folder(config.out, f"denoise-sample-{subject.name}", resume=config.resume)
    record_config(folder, config, {})
    if config.resume and (folder / RECEIPT).is_file():
        return load_receipt(folder / RECEIPT)
    sampling = Sampling(config, subject, folder)
    with ResidentPeak() as peak, EnergyWindow() as energy:
        images = sampling.run()
    save_grid(images[:GRID], folder / SAMPLES)
    if config.save:
        save_each(images, 0, folder)
    receipt = sample_receipt(sampling, peak.reading, energy.reading)
    save_receipt(receipt, folder / RECEIPT)
    sampling.checkpoint.unlink(missing_ok=True)
    if not config.json:
        console.print(f"samples: {folder / SAMPLES}", soft_wrap=True)
    return receipt


@dataclass
class Done:
    """How far the job is, as the checkpoint holds it.

    Attributes:
        pilot: what was tried out, see `Pilot`.
        way: the one taken; None: not chosen yet.
        calibration: of its error estimate; empty: not made, or nothing to make.
        images: finished ones, uint8, a tensor a batch.
        full, reused: the network's calls of each kind, times images.
        pilot_seconds: spent on trying out and calibrating.
    """

    pilot: dict[str, Any] = field(default_factory=dict)
    way: dict[str, Any] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    full: int = 0
    reused: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pilot_seconds: float = 0.0
    resumes: int = 0


class Sampling:
    """The choice of a way, then batch by batch; interrupted, it goes on with the batch that was not finished."""

    def __init__(self, config: DenoiseSampleConfig, subject: Subject, folder: Path) -> None:
        self.config, self.subject = config, subject
        self.folder, self.checkpoint = folder, folder / CHECKPOINT
        self.done = Done()
        self.pilot = Pilot(subject, config, self.done.pilot)

    @property
    def way(self) -> Way:
        """The one taken."""
        if self.done.way is None:
            raise RuntimeError("no way is chosen before run()")
        return Way(**self.done.way)

    @property
    def compared(self) -> tuple[Trial, Trial] | None:
        """The trials of the way taken and of the baseline; None where nothing was compared."""
        return (self.pilot.try_out(self.way), self.pilot.baseline()) if self.pilot.numbers else None

    def run(self) -> Tensor:
        """All images, uint8 [count, channels, height, width]."""
        if self.config.resume and self.checkpoint.is_file():
            self.done = Done(**load_checkpoint(self.checkpoint))
            self.done.resumes += 1
        with progress_bar(shown=not self.config.json) as progress, stop_requests() as stop:

            def each() -> None:
                if stop():
                    self._keep()
                    raise Interrupted

            self._prepare(progress, each)
            self._draw(progress, each)
        return torch.cat(self.done.images)

    def _prepare(self, progress: Any, each: Callable[[], None]) -> None:
        """Choose, compare and calibrate, as far as an interrupted job had not."""
        bar = add_bar(progress, "trying settings" if self.config.searches else "comparing")

        def after() -> None:
            made = self.done.pilot.get("trials", [])
            progress.update(bar, figures=Way(**made[-1]["way"]).name if made else "reference samples")
            self._keep()

        self.pilot = Pilot(self.subject, self.config, self.done.pilot, each=each, after=after)
        begin = time.perf_counter()
        if self.config.like and not self.done.calibration:
            self.done.calibration = earlier(self.config.like)[1]
        if self._estimates and not self.done.calibration:
            progress.update(bar, figures="calibrating the error estimate")
            self.done.calibration = calibrated(self.subject, self.config, each)
            self._keep()
        self.subject.scale = restored(self.done.calibration)
        if self.done.way is None:
            self.done.way = asdict(self._chosen())
            self._keep()
            self._report(progress)
        if self.way.tolerance and self.subject.scale is not None and "tested" not in self.done.calibration:
            progress.update(bar, figures="testing the error estimate")
            self.done.calibration["tested"] = tested(self.subject, self.way, self.config, each)
            self._keep()
            if not self.config.json:
                progress.console.print(said(self.done.calibration, self.way), soft_wrap=True)
        self.done.pilot_seconds += time.perf_counter() - begin
        progress.remove_task(bar)

    @property
    def _estimates(self) -> bool:
        """Whether errors may have to be estimated, and are to be calibrated."""
        kind = parse_cache(self.config.cache)
        return (
            self.config.like is None
            and bool(self.config.calibrate)
            and self.subject.reusable
            and (kind == AUTO or isinstance(kind, float))
        )

    def _chosen(self) -> Way:
        config = self.config
        if self.pilot.numbers:
            self.pilot.baseline()
        if config.searches:
            return choose(self.pilot, config).way
        way = (
            earlier(config.like)[0]
            if config.like
            else asked_way(config, config.solver, config.steps or 1, config.cache)
        )
        if self.pilot.numbers:
            self.pilot.try_out(way)
        return way

    def _report(self, progress: Any) -> None:
        if self.config.json or self.compared is None:
            return
        chosen, base = self.compared
        if self.config.searches:
            bound = None if self.config.seconds is not None else bound_of(self.pilot, self.config)
            table = pilot_table(self.pilot.trials, base, chosen, images=len(self.pilot.numbers), bound=bound)
            # A pipe or a file has no width to fit.
            progress.console.print(table, width=None if progress.console.is_terminal else 120)
        progress.console.print(sentence(chosen, base), soft_wrap=True)

    def _draw(self, progress: Any, each: Callable[[], None]) -> None:
        config, way = self.config, self.way
        finished = sum(map(len, self.done.images))
        bar = add_bar(progress, "images", total=config.count * way.nfe)
        for first in range(finished, config.count, config.batch):
            numbers = range(first, min(first + config.batch, config.count))
            progress.update(bar, completed=first * way.nfe, figures=self._figures())
            self._batch(numbers, partial(self._after_call, progress, bar, len(numbers), each))
            self._keep()

    @staticmethod
    def _after_call(progress: Any, bar: Any, rows: int, each: Callable[[], None]) -> None:
        progress.advance(bar, rows)
        each()

    def _batch(self, numbers: range, each: Callable[[], None]) -> None:
        begin, cpu = time.perf_counter(), time.process_time()
        drawn = self.subject.sample(self.way, numbers, each)
        synchronise()
        self.done.seconds += time.perf_counter() - begin
        self.done.cpu_seconds += time.process_time() - cpu
        self.done.full += drawn.full * len(numbers)
        self.done.reused += drawn.reused * len(numbers)
        images = as_bytes(drawn.images)
        self.done.images.append(images)
        if self.config.save:
            save_each(images, numbers.start, self.folder)

    def _figures(self) -> str:
        finished = sum(map(len, self.done.images))
        return f"{finished / self.done.seconds:.3g} images/s" if finished else self.way.name

    def _keep(self) -> None:
        save_checkpoint(self.checkpoint, vars(self.done))
