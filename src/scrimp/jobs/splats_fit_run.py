"""The loop of `scrimp splats fit`: steps, checkpoints, looks at held-out photographs, a preview, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import load
from torch import Tensor

from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_fit_plan import measured_views
from scrimp.jobs.splats_pictures import png
from scrimp.meter import EnergyWindow, Reading, ResidentPeak
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.splats.fit import Fitting
from scrimp.splats.quality import evaluate, photograph
from scrimp.splats.render import render

if TYPE_CHECKING:
    from accelerate import Accelerator

PREVIEW = "preview.png"
_PREVIEW_SECONDS, _PREVIEW_SIDE = 5.0, 480
_AGREE_EVERY = 10
_POINT = ("seconds", "cpu_seconds", "samples", "train_loss", "psnr", "ssim", "gaussians")


@dataclass
class Spent:
    """Of one line of training, from its first step on.

    Attributes:
        seconds, cpu_seconds: in steps, on this process.
        looks: comparisons with held-out photographs so far.
        resumes: interruptions so far.
        curve: what they found, see `_POINT`.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    looks: int = 0
    resumes: int = 0
    curve: list[dict[str, float | None]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        rows = [[_nan(point[name]) for name in _POINT] for point in self.curve]
        numbers = [self.seconds, self.cpu_seconds, self.looks, self.resumes]
        return {
            "spent": torch.tensor(numbers, dtype=torch.float64),
            "curve": torch.tensor(rows, dtype=torch.float64).reshape(-1, len(_POINT)),
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Spent:
        seconds, cpu, looks, resumes = tensors["spent"].tolist()
        rows = tensors["curve"].tolist()
        curve = [dict(zip(_POINT, map(_known, row), strict=True)) for row in rows]
        return cls(seconds, cpu, int(looks), int(resumes), curve)


@dataclass(frozen=True, eq=False)
class Trained:
    """A stage that is done: the training, what it took, and the highest memory and the energy since its first step."""

    fitting: Fitting
    spent: Spent
    peak: Reading
    joules: Reading

    def after(self, before: Trained) -> Trained:
        """With the memory and the energy of the stage that it goes on from."""
        peaks, joules = (before.peak, self.peak), (before.joules, self.joules)
        return replace(self, peak=_joined(peaks, max), joules=_joined(joules, sum))


class Stage:
    """A part of the training, with a checkpoint of its own that is kept when it is done.

    Args:
        config: of the job.
        fitting: as the stage begins.
        until: the step that it ends with.
        path: of its checkpoint.
        accelerator: of the processes that train.
        show: takes the training, and the latest PSNR if there is one.
    """

    def __init__(
        self,
        config: SplatsFitConfig,
        fitting: Fitting,
        until: int,
        *,
        path: Path,
        accelerator: Accelerator,
        show: Callable[[Fitting, float | None], None],
    ) -> None:
        self.config, self.fitting, self.until, self.path = config, fitting, until, path
        self.accelerator, self.show, self.spent = accelerator, show, Spent()
        self._saved_at = self._shown_at = time.perf_counter()

    def run(self, before: Path | None) -> Trained:
        """Train to the stage's end, from its own checkpoint or the end of the stage before.

        Raises:
            Interrupted: a stop was asked for; the checkpoint is written.
            InputError: a damaged checkpoint.
        """
        resumed = self.config.resume and self.path.is_file()
        if resumed or before is not None:
            self._load(self.path if resumed else cast(Path, before))
        part = resumed and self.fitting.done < self.until
        self.spent.resumes += part
        with ResidentPeak() as peak, EnergyWindow() as energy, stop_requests() as stop:
            while self.fitting.done < self.until:
                self._step()
                self._between(stop)
        self.save()
        unknown = Reading(None, "not measured: the run was interrupted")
        readings = (unknown, unknown) if resumed else (peak.reading, energy.reading)
        return Trained(self.fitting, self.spent, *readings)

    def save(self) -> None:
        """Write the checkpoint, from the first process."""
        if self.accelerator.is_main_process:
            state = self.fitting.state_dict() | {f"job.{name}": each for name, each in self.spent.tensors().items()}
            write_atomic(self.path, pack_weights({name: each.cpu() for name, each in state.items()}, {"format": "pt"}))
        self.accelerator.wait_for_everyone()
        self._saved_at = time.perf_counter()

    def _load(self, path: Path) -> None:
        remedy = "restore it from a copy, or delete the run folder and start again"
        try:
            state = load(path.read_bytes())
            self.fitting.load_state_dict({name: each for name, each in state.items() if not name.startswith("job.")})
            self.spent = Spent.of({name: state[f"job.{name}"] for name in ("spent", "curve")})
        except InputError:
            raise
        except Exception as error:  # the library's own has no public name
            raise InputError("a whole checkpoint", f"{path}, damaged ({type(error).__name__})", remedy) from error

    def _step(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.fitting.step()
        synchronise()
        self.spent.seconds += time.perf_counter() - wall
        self.spent.cpu_seconds += time.process_time() - cpu

    def _between(self, stop: Callable[[], bool]) -> None:
        fitting = self.fitting
        if fitting.done >= (self.spent.looks + 1) * fitting.steps / self.config.evaluations:
            self._look()
        self.show(fitting, cast(float, self.spent.curve[-1]["psnr"]) if self.spent.curve else None)
        if self.accelerator.is_main_process and time.perf_counter() - self._shown_at > _PREVIEW_SECONDS:
            save_preview(fitting, self.path.parent / PREVIEW)
            self._shown_at = time.perf_counter()
        save, halt = self._agreed(stop)
        if halt or (save and fitting.done < self.until):
            self.save()
        if halt:
            raise Interrupted

    def _look(self) -> None:
        """Compare with held-out photographs; on the first process, and counted on all."""
        self.spent.looks += 1
        if not self.accelerator.is_main_process:
            return
        fitting = self.fitting
        found = evaluate(fitting.splats(), fitting.dataset, views=measured_views(fitting.dataset))
        recent = [item.loss for item in fitting.history[-len(fitting.dataset.train) :]]
        numbers = (
            *(self.spent.seconds, self.spent.cpu_seconds, float(fitting.done * fitting.views)),
            *(math.fsum(recent) / len(recent), found.psnr, found.ssim, float(len(fitting.model))),
        )
        point: dict[str, float | None] = dict(zip(_POINT, numbers, strict=True))
        self.spent.curve.append(point)
        self.accelerator.log(point, step=fitting.done)

    def _agreed(self, stop: Callable[[], bool]) -> tuple[bool, bool]:
        """Whether to save and whether to halt; on several processes all must do so at one step."""
        world = self.accelerator.num_processes
        if world > 1 and self.fitting.done % _AGREE_EVERY and self.fitting.done < self.until:
            return False, False
        wish = (time.perf_counter() - self._saved_at > self.config.checkpoint_seconds, stop())
        if world == 1:
            return wish
        flags = torch.tensor([float(item) for item in wish], device=self.accelerator.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])


def save_preview(fitting: Fitting, path: Path) -> None:
    """A photograph beside what the scene shows of it so far."""
    view = measured_views(fitting.dataset)[0]
    camera = view.camera
    factor = min(1.0, _PREVIEW_SIDE / max(camera.width, camera.height))
    camera = camera.scaled(max(1, round(camera.width * factor)), max(1, round(camera.height * factor)))
    planes = photograph(fitting.dataset, view).permute(2, 0, 1)[None]
    size = (camera.height, camera.width)
    small = torch.nn.functional.interpolate(planes, size, mode="area")[0].permute(1, 2, 0)
    with torch.no_grad():
        shown = render(fitting.splats(), camera, background=fitting.dataset.background).clamp(0, 1).cpu()
    write_atomic(path, png(torch.cat([small, shown], 1)))


def _joined(readings: tuple[Reading, Reading], join: Callable[[list[float]], float]) -> Reading:
    """Unknown where one is."""
    unknown = next((reading for reading in readings if reading.value is None), None)
    values = [reading.value for reading in readings if reading.value is not None]
    return unknown or replace(readings[1], value=join(values))


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
