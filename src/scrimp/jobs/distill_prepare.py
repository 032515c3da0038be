"""Teachers at work before the first step: on the views that are kept, and on the labelled images as they are."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from scrimp.data import ImageData
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_fit import KEPT
from scrimp.jobs.distill_teachers import Teacher, data_fingerprint, put_together, shared_out
from scrimp.jobs.distill_views import FixedViews, view_named
from scrimp.jobs.engine import shared, total
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from accelerate import Accelerator

_BLOCK = 128  # images of a forward pass of the teachers, a process

Told = Callable[[float], None]
"""Called with the share of a teacher's features that is finished."""


@dataclass(frozen=True, eq=False)
class Keeping:
    """Where features are kept, and of what making they are.

    Args:
        config: what is kept, how and where.
        data: the images.
        accelerator: its precision is part of what made them.
    """

    config: DistillConfig
    data: ImageData
    accelerator: Accelerator

    @property
    def views(self) -> FixedViews:
        """The views of the images that are kept."""
        images = self.data.train
        return FixedViews(images, view_named(self.config.view, images.shape[1]), seed=self.config.seed)

    def shape(self, teacher: Teacher) -> tuple[int, int, int]:
        """Views, images, numbers of the features."""
        return self.config.cache_views, len(self.data.train), teacher.encoder.dim

    def path(self, teacher: Teacher, folder: Path) -> Path:
        """A file of its own for every teacher and seed, so that runs may share a folder."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(teacher.encoder.name).name).strip("-") or "teacher"
        home = self.config.cache_folder or folder / KEPT
        return home / f"{name}-{teacher.fingerprint[:8]}-seed{self.config.seed}.npy"

    def about(self, teacher: Teacher) -> dict[str, Any]:
        """Everything the features depend on."""
        views, images, dim = self.shape(teacher)
        return {
            "teacher": teacher.fingerprint,
            "data": self._data_fingerprint,
            "view": repr(view_named(self.config.view, self.data.train.shape[1])),
            "seed": self.config.seed,
            "views": views,
            "images": images,
            "dim": dim,
            "dtype": self.config.cache_dtype,
            "precision": self.accelerator.mixed_precision,
        }

    @functools.cached_property
    def _data_fingerprint(self) -> str:
        return data_fingerprint(self.data.train)


class Preparation:
    """The work, shared out over the processes; it stops at a signal, and what is finished stays.

    Args:
        keeping: see `Keeping`.
        told: see `Told`.
    """

    def __init__(self, keeping: Keeping, *, told: Told) -> None:
        self.keeping, self.told = keeping, told
        self.data, self.accelerator = keeping.data, keeping.accelerator
        self.every = keeping.config.checkpoint_seconds
        self.seconds, self.cpu_seconds = 0.0, 0.0

    def kept(self, teacher: Teacher, folder: Path, *, views: int, started: dict[str, float] | None) -> TeacherCache:
        """The features of the first ``views`` views of every image, the missing ones made; on every rank.

        Args:
            started: what the file held when the run began, to tell this run's time from that of others.

        Raises:
            InputError: the file is damaged or of another making.
            Interrupted: a stop was asked for; what is finished is written.
        """
        config, shape = self.keeping.config, self.keeping.shape(teacher)
        end = views * shape[1]
        if config.cache == "ram":
            cache = TeacherCache(shape, config.cache_dtype)
            self._fill(cache, teacher, 0, end)
        else:
            cache = self._on_disk(teacher, folder, end)
        before = started or {}
        self.seconds += max(0.0, cache.seconds - before.get("seconds", 0.0))
        self.cpu_seconds += max(0.0, cache.cpu_seconds - before.get("cpu_seconds", 0.0))
        return cache

    def plain(self, teacher: Teacher, rows: Tensor) -> Tensor:
        """Features of these training images as they are, float32 [n, dim], on the device; on every rank."""
        clock = _Clock(self.accelerator)
        found = []
        with stop_requests() as stop:
            for block in rows.split(_BLOCK * self.accelerator.num_processes):
                mine = self.data.train.batch(shared_out(block, self.accelerator)).to(self.accelerator.device)
                made = teacher(mine.float() / 255, autocast=self.accelerator.autocast)
                found.append(put_together(made, len(block), self.accelerator))
                if any(self._agreed(stop())):
                    raise Interrupted
        seconds, cpu_seconds = clock.lap()
        self.seconds, self.cpu_seconds = self.seconds + seconds, self.cpu_seconds + cpu_seconds
        return torch.cat(found)

    def _on_disk(self, teacher: Teacher, folder: Path, end: int) -> TeacherCache:
        """The first process writes; the others open the file once it is finished."""
        about, path = self.keeping.about(teacher), self.keeping.path(teacher, folder)
        shape, dtype = self.keeping.shape(teacher), self.keeping.config.cache_dtype
        opened: list[TeacherCache] = []

        def finished() -> int:
            opened.append(TeacherCache(shape, dtype, path=path, about=about))
            return opened[0].finished

        start = shared(self.accelerator, finished)
        self._fill(opened[0] if opened else None, teacher, start, end)
        self.accelerator.wait_for_everyone()
        return opened[0] if opened else TeacherCache(shape, dtype, path=path, about=about, writes=False)

    def _fill(self, cache: TeacherCache | None, teacher: Teacher, start: int, end: int) -> None:
        """Make rows ``start`` to ``end``; ``cache`` takes them, on the processes that have one."""
        if start >= end:
            return
        clock, views, saved = _Clock(self.accelerator), self.keeping.views, time.perf_counter()
        with stop_requests() as stop:
            for view, rows, images in self._blocks(start, end):
                mine = shared_out(rows, self.accelerator)
                made = views.made(images.to(self.accelerator.device), mine, view)
                features = teacher(made, autocast=self.accelerator.autocast)
                every = put_together(features, len(rows), self.accelerator)
                start += len(rows)
                if cache is not None:
                    cache.append_(every)
                self.told(start / end)
                save, halt = self._agreed(time.perf_counter() - saved > self.every, stop())
                if save or halt or start >= end:
                    saved = time.perf_counter()
                    _save(cache, clock.lap())
                if halt:
                    raise Interrupted

    def _blocks(self, start: int, end: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(view, rows, this process's share of their images), none across the border of two views."""
        count, size = len(self.data.train), _BLOCK * self.accelerator.num_processes

        def rows() -> Iterator[tuple[int, Tensor]]:
            at = start
            while at < end:
                view, first = divmod(at, count)
                last = min(first + size, count)
                yield view, torch.arange(first, last)
                at += last - first

        loader: DataLoader[Any] = DataLoader(
            self.data.train,  # type: ignore[arg-type]  # a map-style set by protocol
            batch_sampler=(shared_out(block, self.accelerator).tolist() for _, block in rows()),  # type: ignore[arg-type]
            collate_fn=_whole,
            num_workers=self.keeping.config.workers,
            generator=torch.Generator(),
        )
        for (view, block), (images, _, _) in zip(rows(), loader, strict=True):
            yield view, block, images

    def _agreed(self, *wishes: bool) -> list[bool]:
        """What any process wishes, all do, at one block."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        flags = torch.tensor([float(item) for item in wishes], device=self.accelerator.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in flags]


class _Clock:
    """Wall seconds of this process, and CPU seconds of all of them, which the first one answers for."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._since = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Since the last lap; on every rank."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = now[0] - self._since[0], now[1] - self._since[1]
        self._since = now
        every = total(self.accelerator, cpu)
        return wall, every if self.accelerator.is_main_process else 0.0


def _save(cache: TeacherCache | None, spent: tuple[float, float]) -> None:
    if cache is not None:
        cache.seconds, cache.cpu_seconds = cache.seconds + spent[0], cache.cpu_seconds + spent[1]
        cache.save_()


def _whole(batch: Any) -> Any:
    """The data set hands over whole batches; a named function, since loader workers pickle it."""
    return batch
