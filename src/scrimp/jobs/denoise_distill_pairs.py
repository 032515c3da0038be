"""Pairs of a noise and what a teacher makes of it, in files that are whole or absent and say what made them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scrimp.denoise.solvers import SOLVERS, calls, integrate, solver_for
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_models import Denoiser, find_model, load_denoiser
from scrimp.jobs.engine import shared
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

PAIRS = "pairs"
"""Folder of the pairs in a run folder, unless another is asked for."""
HELD_OUT = "held-out.safetensors"
TEACHER_AT = (1, 2, 4, 8, 16)
"""Steps at which the teacher is measured beside its student."""
_BLOCK = 256  # pairs a file
_LEARNT, _HELD_OUT = 11, 12  # keys of these random streams among those of one seed


class Teacher:
    """A trained model with the solver and the guidance that its pairs are made with.

    Args:
        config: see `DenoiseDistillConfig`.
        device: where to run it.
        autocast: context of its calls, such as an accelerator's.

    Raises:
        InputError: no such model, a solver that does not fit it or draws noise, or guidance that it does not know.
    """

    def __init__(self, config: DenoiseDistillConfig, device: torch.device, autocast: Callable[[], Any]) -> None:
        self.config, self.autocast = config, autocast
        self.denoiser: Denoiser = load_denoiser(config.model)
        self.denoiser.model.to(device).requires_grad_(False)
        self.solver = "dpm++" if config.solver == "auto" else config.solver
        solver_for(self.solver, self.denoiser.scheduler)
        if SOLVERS[self.solver].random:
            raise InputError("a solver that draws no noise on the way", self.solver, "pass --solver dpm++")
        if self.guided and self.denoiser.null_label is None:
            raise InputError("a model trained with labels dropped, for guidance", f"{config.model}", "drop --guidance")

    @property
    def guided(self) -> bool:
        """Whether each call is made twice, with the label and without."""
        return self.config.guidance != 1

    def calls(self, steps: int) -> int:
        """Network calls an image."""
        return calls(self.solver, steps) * (2 if self.guided else 1)

    def images(self, noise: Tensor, labels: Tensor | None, steps: int, *, each: Callable[[], None]) -> Tensor:
        """What the teacher makes of noises [batch, C, H, W], on the CPU; ``each`` is called after every call."""
        device = self.denoiser.device
        labels = None if labels is None else labels.to(device)

        def denoise(x: Tensor, timestep: Tensor) -> Tensor:
            each()
            with self.autocast():
                wanted = self.denoiser.predict(x, timestep, labels).float()
                if not self.guided:
                    return wanted
                plain = self.denoiser.predict(x, timestep).float()
            return plain + self.config.guidance * (wanted - plain)

        with torch.no_grad():
            scheduler = solver_for(self.solver, self.denoiser.scheduler)
            return integrate(denoise, scheduler, noise.to(device), steps=steps).cpu()

    def about(self) -> dict[str, str]:
        """What made the images, as the files say it."""
        root, digest = find_model(self.config.model), hashlib.sha256()
        for path in sorted(root.rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        settings = {"solver": self.solver, "guidance": self.config.guidance, "seed": self.config.seed}
        return {"teacher": digest.hexdigest(), **{key: str(value) for key, value in settings.items()}}


class Pairs:
    """All pairs in memory, as a map-style set of [2, C, H, W]: the teacher's image and the noise.

    Attributes:
        labels: int64 [n], 0 where the model has no classes.
        seconds, cpu_seconds: that making them took, wall and CPU, added up over the files.
        stored_bytes: of the files.
    """

    def __init__(self, both: Tensor, labels: Tensor, *, seconds: float, cpu_seconds: float, stored_bytes: int) -> None:
        self.both, self.labels = both, labels
        self.seconds, self.cpu_seconds, self.stored_bytes = seconds, cpu_seconds, stored_bytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, _, channels, height, width = self.both.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.both[rows], self.labels[rows], rows


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Noises that nothing is learnt from, and the teacher's images of them.

    Attributes:
        noise, reference: [n, C, H, W].
        labels: int64 [n] or None.
        teacher: its images by number of steps.
    """

    noise: Tensor
    labels: Tensor | None
    reference: Tensor
    teacher: dict[int, Tensor]


class PairFiles:
    """Makes what is missing in a folder of pairs, a file a turn; a kill loses one file at most.

    Args:
        config: see `DenoiseDistillConfig`.
        teacher: see `Teacher`.
        folder: where the files are.
        accelerator: its processes share the files out.
        told: called with the share that is done, 0 to 1.
    """

    def __init__(
        self,
        config: DenoiseDistillConfig,
        teacher: Teacher,
        folder: Path,
        *,
        accelerator: Accelerator,
        told: Callable[[float], None],
    ) -> None:
        self.config, self.teacher, self.folder = config, teacher, folder
        self.accelerator, self.told = accelerator, told
        self._about = teacher.about()

    def made(self) -> Pairs:
        """All pairs, the missing ones made; on every rank.

        Raises:
            InputError: a file is damaged or of another making.
            Interrupted: a stop was asked for; finished files stay.
        """
        starts = range(0, self.config.pairs, _BLOCK)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        with stop_requests() as stop:
            for turn in range(0, len(starts), world):
                halted = turn + rank < len(starts) and not self._block(turn + rank, stop)
                if self._any(halted):
                    raise Interrupted
                self.told(min(1.0, (turn + world) / len(starts)))
        self.accelerator.wait_for_everyone()
        return self._read([self._path(number) for number in range(len(starts))])

    def held_out(self) -> HeldOut:
        """Noises to measure on, made by the first process; on every rank. Raises as `made` does."""
        with stop_requests() as stop:
            finished = shared(self.accelerator, lambda: self._hold_out(stop))
        if not finished:
            raise Interrupted
        found, _ = _opened(self.folder / HELD_OUT, self._held_about())
        at = {int(name.removeprefix("teacher_")): value for name, value in found.items() if name.startswith("teacher_")}
        return HeldOut(found["noise"], found.get("labels"), found["reference"], at)

    def _block(self, number: int, stop: Callable[[], bool]) -> bool:
        """Make a file unless it is there; False where a stop came first."""
        path, count = self._path(number), min(_BLOCK, self.config.pairs - number * _BLOCK)
        about = self._block_about(number)
        if path.is_file():
            _opened(path, about)
            return True
        began = time.perf_counter(), time.process_time()
        noise, labels = self._drawn(count, _LEARNT, number)
        images = self._images(noise, labels, self.config.teacher_steps, stop)
        if images is None:
            return False
        spent = time.perf_counter() - began[0], time.process_time() - began[1]
        times = {"seconds": repr(spent[0]), "cpu_seconds": repr(spent[1])}
        _write(path, {"noise": noise, "clean": images}, labels, about | times)
        return True

    def _hold_out(self, stop: Callable[[], bool]) -> bool:
        path, about = self.folder / HELD_OUT, self._held_about()
        if path.is_file():
            _opened(path, about)
            return True
        noise, labels = self._drawn(self.config.held_out, _HELD_OUT, 0)
        kept = {"noise": noise}
        wanted = {f"teacher_{steps}": steps for steps in TEACHER_AT} | {"reference": self.config.reference_steps}
        for name, steps in wanted.items():
            images = self._images(noise, labels, steps, stop)
            if images is None:
                return False
            kept[name] = images
        _write(path, kept, labels, about)
        return True

    def _images(self, noise: Tensor, labels: Tensor | None, steps: int, stop: Callable[[], bool]) -> Tensor | None:
        def each() -> None:
            if stop():
                raise Interrupted

        try:
            found = []
            for rows in torch.arange(len(noise)).split(self.config.batch_size):
                given = None if labels is None else labels[rows]
                found.append(self.teacher.images(noise[rows], given, steps, each=each))
            return torch.cat(found)
        except Interrupted:  # told to the other processes first, who would wait for this one
            return None

    def _drawn(self, count: int, stream: int, number: int) -> tuple[Tensor, Tensor | None]:
        generator, classes = generator_for(self.config.seed, stream, number), self.teacher.denoiser.classes
        noise = torch.randn(count, *self.teacher.denoiser.shape, generator=generator)
        return noise, None if classes is None else torch.randint(classes, (count,), generator=generator)

    def _read(self, paths: list[Path]) -> Pairs:
        parts, seconds, cpu_seconds = [], 0.0, 0.0
        for number, path in enumerate(paths):
            tensors, noted = _opened(path, self._block_about(number))
            parts.append(tensors)
            seconds, cpu_seconds = seconds + float(noted["seconds"]), cpu_seconds + float(noted["cpu_seconds"])
        both = torch.cat([torch.stack([part["clean"], part["noise"]], 1) for part in parts])
        none = torch.zeros(len(both), dtype=torch.int64)
        labels = torch.cat([part["labels"] for part in parts]) if "labels" in parts[0] else none
        size = sum(path.stat().st_size for path in paths)
        return Pairs(both, labels, seconds=seconds, cpu_seconds=cpu_seconds, stored_bytes=size)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _block_about(self, number: int) -> dict[str, str]:
        count = min(_BLOCK, self.config.pairs - number * _BLOCK)
        return self._about | {"steps": str(self.config.teacher_steps), "block": str(number), "pairs": str(count)}

    def _held_about(self) -> dict[str, str]:
        return self._about | {"steps": str(self.config.reference_steps), "pairs": str(self.config.held_out)}

    def _any(self, wish: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.accelerator.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def _write(path: Path, tensors: dict[str, Tensor], labels: Tensor | None, about: dict[str, str]) -> None:
    kept = tensors if labels is None else tensors | {"labels": labels}
    write_atomic(path, pack_weights(kept, about | {"format": "pt"}))


def _opened(path: Path, about: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and what it notes.

    Raises:
        InputError: it is damaged, or of another making than ``about``.
    """
    try:
        with safe_open(path, "pt") as file:
            noted = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it has no iterator
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError("a whole file of pairs", f"{path} ({reason})", "delete it and pass --resume") from error
    for key, value in about.items():
        if noted.get(key) != value:
            got = f"{noted.get(key)} in {path}"
            raise InputError(f"pairs made with {key} {value}", got, "pass another --pairs-folder")
    return tensors, noted
