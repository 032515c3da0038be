"""`scrimp splats fit`: photographs with poses in; a small scene, a page that shows it, and receipts out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scrimp.jobs.engine import accelerated, shared, tracked
from scrimp.jobs.folder import RECEIPT, REPORT, choose_folder, plain, record_config
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.splats_commands import PAGE
from scrimp.jobs.splats_compress import stem
from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_fit_file import Stored, decoded, quantiser_for, stored_within
from scrimp.jobs.splats_fit_plan import first_scene, fork_of, most_gaussians, photographs, resolved, settings_of
from scrimp.jobs.splats_fit_report import Judge, Way, fit_sections, page_of, receipt_of
from scrimp.jobs.splats_fit_run import PREVIEW, Stage, Trained, save_preview
from scrimp.jobs.splats_pictures import choose_device
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import units, write_report
from scrimp.splats.dataset import Dataset
from scrimp.splats.fit import Fitting
from scrimp.splats.fit_together import Together
from scrimp.splats.optimise import scene_of
from scrimp.splats.ply import write_ply
from scrimp.splats.quantised import Quantiser
from scrimp.splats.scene import Splats

if TYPE_CHECKING:
    from accelerate import Accelerator

_OTHERS = {"rounded afterwards": "baseline", "not rounded": "unrounded"}
"""Folders of the receipts that the file's own stands beside, by what ends the way's name."""


@dataclass(frozen=True, eq=False)
class FittedScene:
    """What the job leaves.

    Attributes:
        path: the scene's file.
        receipts: of what one would have used instead, of the scene without rounding, and of the file.
    """

    path: Path
    receipts: list[Receipt]


def splats_fit(
    config: SplatsFitConfig, *, dataset: Dataset | None = None, accelerator: Accelerator | None = None
) -> FittedScene:
    """Train; writes scene, page, receipts, configuration and report to the run folder.

    Args:
        config: see `SplatsFitConfig`.
        dataset: instead of the one in ``config.images``, whose name is still used.
        accelerator: an existing one; started as ``config`` says where omitted.

    Raises:
        InputError: something in the configuration or the photographs cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config, accelerator) as started:
        return _fit(config, dataset, started)


def _fit(config: SplatsFitConfig, dataset: Dataset | None, accelerator: Accelerator) -> FittedScene:
    name = stem(config.images)
    folder = shared(accelerator, lambda: choose_folder(config.out, f"splats-{name}", resume=config.resume))
    path = folder / f"scene.{config.format}"
    if config.resume and (folder / RECEIPT).is_file():
        shared(accelerator, lambda: record_config(folder, config, {}))
        return FittedScene(path, _written(folder))
    views = photographs(config) if dataset is None else dataset
    most = most_gaussians(config, views)
    # Its tensors alone: a scene cannot be sent to other processes.
    tensors, dimmed = shared(accelerator, lambda: _sent(first_scene(config, views, most)))
    start = scene_of(tensors, antialiased=dimmed)
    world = accelerator.num_processes
    fresh = not config.resume
    wanted = shared(accelerator, lambda: resolved(config, views, start, most, world) if fresh else {})
    kept = shared(accelerator, lambda: record_config(folder, config, wanted))
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:
        bar = add_bar(progress, f"splats {name}")

        def show(share: float, said: str) -> None:
            progress.update(bar, completed=share, figures=said)

        run = _Run(config, name, folder, views, start, kept, accelerator, show)
        with tracked(accelerator, config.trackers, folder, plain(config)):
            run.train()
        receipts = run.finish() if accelerator.is_main_process else []
    accelerator.wait_for_everyone()
    return FittedScene(path, receipts or _written(folder))


def _sent(splats: Splats) -> tuple[dict[str, Tensor], bool]:
    return splats.tensors(), splats.antialiased


def _written(folder: Path) -> list[Receipt]:
    paths = [*(folder / other / RECEIPT for other in _OTHERS.values()), folder / RECEIPT]
    return [load_receipt(path) for path in paths if path.is_file()]


@dataclass
class _Run:
    """One training: in one stage up to where rounding begins, then one with it and one without."""

    config: SplatsFitConfig
    name: str
    folder: Path
    dataset: Dataset
    start: Splats
    resolved: dict[str, Any]
    accelerator: Accelerator
    show: Callable[[float, str], None]

    def train(self) -> None:
        """All stages; what they give is kept for `finish`."""
        steps, fork = self.resolved["steps"], fork_of(self.config, self.resolved["steps"])
        device = choose_device(self.config.device) if self.accelerator.num_processes == 1 else self.accelerator.device
        self._device = torch.device(device)
        self._total = steps + (steps - fork) * (self.config.quantise and self.config.baseline)
        self._passed = 0
        self._paths = [self.folder / f"{name}.safetensors" for name in ("shared", "trained", "plain")]
        self._first = self._stage(None, fork, 0)
        self._last = self._first
        self._plain: Trained | None = None if self.config.quantise else self._first
        if self.config.quantise:
            scene = self._first.fitting.splats().to("cpu")
            quantiser, self._told = quantiser_for(scene, self.config)
            self._last = self._stage(quantiser, steps, 1)
            if self.config.baseline:
                self._passed = steps - fork
                self._plain = self._stage(None, steps, 2)
        self.totals = [self._everyone(each) for each in (self._last, self._plain)]

    def finish(self) -> list[Receipt]:
        """Write everything; on the first process."""
        config, judge = self.config, Judge(self.config, self.dataset, self._device)
        began = time.process_time(), time.perf_counter()
        stored, lost = self._stored(judge)
        spent = time.process_time() - began[0], time.perf_counter() - began[1]
        scene = decoded(stored.data, config.format)
        way = f".{config.format}, " + ("trained for it" if config.quantise else "rounded afterwards")
        notes = {"rounding": stored.told, "Gaussians left out to fit": stored.dropped, "lost to fit, dB": lost}
        own = Way(way, scene, len(stored.data), self._last, self.totals[0], notes, spent=spent)
        ways = [*self._others(len(stored.data)), own]
        receipts = [receipt_of(each, judge, self.facts()) for each in ways]
        return self._write(stored, scene, ways, receipts, judge)

    def facts(self) -> dict[str, Any]:
        """What receipts say of every way."""
        train, test = self.dataset.train, self.dataset.test
        return {
            "name": self.name,
            "photographs": str(self.config.images),
            "trained on": len(train),
            "held out": len(test),
            "measured on": "photographs held out" if test else "photographs trained on: none were held out",
            "pixels": f"{train[0].camera.width} x {train[0].camera.height}",
            "processes": self.accelerator.num_processes,
            "device": str(self._device),
            **self.resolved,
        }

    def _stage(self, quantiser: Quantiser | None, until: int, place: int) -> Trained:
        stage = Stage(
            self.config,
            self._fitting(quantiser),
            until,
            path=self._paths[place],
            accelerator=self.accelerator,
            show=self._show,
        )
        return stage.run(self._paths[0]).after(self._first) if place else stage.run(None)

    def _fitting(self, quantiser: Quantiser | None) -> Fitting:
        config, steps = self.config, self.resolved["steps"]
        settings = settings_of(config, first=len(self.start), most=self.resolved["gaussians"], steps=steps)
        world = self.accelerator.num_processes
        together = Together(self.accelerator.process_index, world, torch.distributed.all_reduce) if world > 1 else None
        return Fitting(
            self.dataset,
            steps=steps,
            start=self.start,
            settings=settings,
            seed=config.seed,
            quantiser=quantiser,
            device=self._device,
            views=self.resolved["views"],
            together=together,
        )

    def _show(self, fitting: Fitting, psnr: float | None) -> None:
        loss = f"loss {fitting.history[-1].loss:.3f}  {units.count(len(fitting.model))} Gaussians"
        self.show((fitting.done + self._passed) / self._total, loss + (f"  {psnr:.2f} dB" if psnr else ""))

    def _everyone(self, trained: Trained | None) -> float:
        """CPU seconds of all processes."""
        if trained is None:
            return 0.0
        seconds = torch.tensor(trained.spent.cpu_seconds, dtype=torch.float64, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(seconds)
        return float(seconds)

    def _stored(self, judge: Judge) -> tuple[Stored, float | None]:
        """The file, and how many dB it took to make it fit."""
        fitting, most = self._last.fitting, self.config.most_bytes()
        latent = fitting.model.detached().to("cpu")
        cameras = [view.camera for view in self.dataset.train]
        data = fitting.encode()
        if data is None:
            return stored_within(latent, self.config.format, most, cameras=cameras, seed=self.config.seed), None
        if most is None or len(data) <= most:
            return Stored(data, f"{self._told}, as trained"), None
        found = stored_within(latent, self.config.format, most, cameras=cameras, seed=self.config.seed)
        told = f"{found.told}, in the place of {self._told}, which took {len(data)} bytes"
        before, after = fitting.splats(), decoded(found.data, self.config.format)
        return Stored(found.data, told, found.dropped), judge.quality(before).psnr - judge.quality(after).psnr

    def _others(self, size: int) -> list[Way]:
        """What stands beside the file: the same training without rounding, and that rounded afterwards to its size."""
        if self._plain is None:
            return []
        config, scene = self.config, self._plain.fitting.model.detached().to("cpu")
        ply = len(write_ply(scene))
        unrounded = Way(".ply, not rounded", scene, ply, self._plain, self.totals[1], {}, baseline=not config.quantise)
        if not config.quantise:
            return [unrounded]
        began = time.process_time(), time.perf_counter()
        cameras = [view.camera for view in self.dataset.train]
        found = stored_within(scene, config.format, size, cameras=cameras, seed=config.seed)
        spent = time.process_time() - began[0], time.perf_counter() - began[1]
        notes = {"rounding": found.told, "Gaussians left out to fit": found.dropped}
        back = decoded(found.data, config.format)
        name = f".{config.format}, rounded afterwards"
        after = Way(name, back, len(found.data), self._plain, self.totals[1], notes, baseline=True, spent=spent)
        return [after, unrounded]

    def _write(
        self, stored: Stored, scene: Splats, ways: list[Way], receipts: list[Receipt], judge: Judge
    ) -> list[Receipt]:
        folder, format = self.folder, self.config.format
        write_atomic(folder / f"scene.{format}", stored.data)
        if self.config.ply:
            write_atomic(folder / "scene.ply", write_ply(self._last.fitting.model.detached().to("cpu")))
        write_atomic(folder / PAGE, page_of(stored, scene, self.config, judge))
        save_preview(self._last.fitting, folder / PREVIEW)
        write_report(receipts, folder / REPORT, sections=fit_sections(scene, judge))
        for way, receipt in zip(ways[:-1], receipts[:-1], strict=True):
            ending = next(ending for ending in _OTHERS if way.name.endswith(ending))
            save_receipt(receipt, folder / _OTHERS[ending] / RECEIPT)
        save_receipt(receipts[-1], folder / RECEIPT)
        for path in self._paths:
            path.unlink(missing_ok=True)
        return receipts
