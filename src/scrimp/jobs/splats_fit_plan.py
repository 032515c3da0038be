"""What a training of splats is to be: its photographs, its start, how many Gaussians and steps, and in what stages."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.meter.device import synchronise
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.dataset import Dataset, View, open_dataset
from scrimp.splats.files import read
from scrimp.splats.fit import Fitting
from scrimp.splats.fit_settings import FitSettings
from scrimp.splats.quality import evaluate
from scrimp.splats.quantised import ContainerQuantiser, Quantiser
from scrimp.splats.quantised_sog import SogQuantiser
from scrimp.splats.scene import Splats
from scrimp.splats.start import first_splats
from scrimp.splats.strategy import Classic, Mcmc
from scrimp.splats.thinning import view_weights

_USUAL_MINUTES = 10.0
_HEAD, _EACH = {"sog": 9_500, "sgs": 500}, {"sog": 15, "sgs": 9}  # bytes of a file, and of each trained Gaussian
_A_PIXEL, _LEAST, _MOST = 0.4, 2_000, 1_000_000  # Gaussians that a pixel of a photograph asks for
_QUANTISED_FROM = 0.8
_GROWN = 0.57  # part of the training after which the number of Gaussians shall be reached
_SLACK = 0.85  # of the time: Gaussians grow while they are trained, and what is timed has not grown
_TIMED = 4  # steps of each kind


@dataclass(frozen=True, eq=False)
class Kept(Dataset):
    """Photographs that were decoded once, in the memory in 8 bits.

    Attributes:
        pictures, masks: by file.
    """

    pictures: dict[Path, Tensor]
    masks: dict[Path, Tensor | None]

    def load(self, view: View) -> Tensor:
        return self.pictures[view.image]

    def load_mask(self, view: View) -> Tensor | None:
        return self.masks[view.image]


def photographs(config: SplatsFitConfig) -> Dataset:
    """The set with all its photographs read, so that a damaged one is known before anything is begun.

    Raises:
        InputError: no such set, photographs that are absent or cannot be decoded, or none to train on.
    """
    found = open_dataset(config.images, longest=config.longest, test_every=config.holdout, on_missing=config.on_missing)
    pictures = {view.image: found.load(view) for view in found.views}
    masks = {view.image: None if view.mask is None else found.load_mask(view) for view in found.views}
    return Kept(found.train, found.test, found.points, found.colors, found.background, pictures, masks)


def measured_views(dataset: Dataset) -> Sequence[View]:
    """Those held out, or where none are some that were trained on."""
    return dataset.test or dataset.train[:: max(1, len(dataset.train) // 8)]


def most_gaussians(config: SplatsFitConfig, dataset: Dataset) -> int:
    """As many as fit the size, and as the photographs can tell apart."""
    if config.gaussians is not None:
        return config.gaussians
    pixels = max(view.camera.width * view.camera.height for view in dataset.train)
    most, wanted = config.most_bytes(), min(_MOST, max(_LEAST, round(_A_PIXEL * pixels)))
    return wanted if most is None else max(10, min(wanted, (most - _HEAD[config.format]) // _EACH[config.format]))


def first_scene(config: SplatsFitConfig, dataset: Dataset, most: int) -> Splats:
    """What training begins with, float32 on the CPU, of no more Gaussians than there may be.

    Raises:
        InputError: ``config.init`` is no scene, or one without Gaussians.
    """
    cameras = tuple(view.camera for view in dataset.train)
    if config.init is not None:
        given = read(config.init).to("cpu", torch.float32)
        return _most_seen(replace(given, extra={}), cameras, most)
    found = first_splats(dataset, count=max(10, most // 2), degree=config.degree, seed=config.seed)
    if len(found) <= most:
        return found
    return found.take(torch.randperm(len(found), generator=generator_for(config.seed, 7))[:most].sort().values)


def _most_seen(splats: Splats, cameras: tuple[Camera, ...], most: int) -> Splats:
    if len(splats) <= most:
        return splats
    return splats.take(view_weights(splats, cameras).argsort(descending=True, stable=True)[:most].sort().values)


def settings_of(config: SplatsFitConfig, *, first: int, most: int, steps: int) -> FitSettings:
    """How to train from so many Gaussians to so many, in so many steps."""
    every = max(5, min(100, steps // 15))
    if config.strategy == "classic":
        strategy: Mcmc | Classic = Classic(cap=most, every=every)
    else:
        times = max(1.0, _GROWN * steps / every)
        strategy = Mcmc(cap=most, every=every, growth=min(1.5, max(1.05, (most / max(1, first)) ** (1 / times))))
    return FitSettings(
        degree=config.degree,
        strategy=strategy,
        quantised_from=_QUANTISED_FROM,
        requantise=max(5, min(100, steps // 15)),
    )


def fork_of(config: SplatsFitConfig, steps: int) -> int:
    """Steps after which the format's rounding comes in; all of them where it never does."""
    return math.ceil(_QUANTISED_FROM * steps) if config.quantise else steps


def rough_quantiser(config: SplatsFitConfig) -> Quantiser:
    """Of the usual measure, for timing."""
    return ContainerQuantiser() if config.format == "sgs" else SogQuantiser(seed=config.seed)


def steps_in(minutes: float, config: SplatsFitConfig, dataset: Dataset, start: Splats, most: int) -> int:
    """Steps that fit into the time, with everything else that a run does; found by timing a few.

    Raises:
        InputError: not even ten do.
    """
    timed = _Timed.of(config, dataset, start, most)
    step, rest = timed.mean_step(config), timed.look * config.evaluations * len(measured_views(dataset))
    steps = math.floor((_SLACK * 60 * minutes - rest) / step)
    if steps < 10:
        least = (10 * step + rest) / _SLACK / 60
        raise InputError(
            f"--minutes of at least {least:.2g} for these photographs", f"{minutes:g}", "or lower --longest"
        )
    return steps


@dataclass(frozen=True)
class _Timed:
    """Wall seconds: of a step at the start and with all Gaussians, on reduced and whole photographs; of what rounding
    adds to a step, of assigning anew, and of drawing a view."""

    reduced: tuple[float, float]
    whole: tuple[float, float]
    rounding: float
    anew: float
    look: float

    @classmethod
    def of(cls, config: SplatsFitConfig, dataset: Dataset, start: Splats, most: int) -> _Timed:
        one = replace(dataset, train=dataset.train[:1])
        full = _repeated(start, most)
        plain = FitSettings(degree=config.degree, degree_share=0.0, strategy=None, unseen=None, quantised_from=0.0)
        coarse = replace(plain, coarse=tuple((1.0, factor) for _, factor in FitSettings().coarse))
        plain = replace(plain, coarse=())
        times = [
            statistics.median(_seconds(one, scene, settings)[1:])
            for settings in (coarse, plain)
            for scene in (start, full)
        ]
        anew, rounding = 0.0, 0.0
        if config.quantise:
            first, *others = _seconds(one, full, plain, rough_quantiser(config))
            rounding = max(0.0, statistics.median(others) - times[3])
            anew = max(0.0, first - statistics.median(others))
        began = time.perf_counter()
        evaluate(full, dataset, views=dataset.train[:1])
        return cls((times[0], times[1]), (times[2], times[3]), rounding, anew, time.perf_counter() - began)

    def mean_step(self, config: SplatsFitConfig) -> float:
        """Over the whole training, what only a part of its steps do included."""
        coarse = max((until for until, _ in FitSettings().coarse), default=0.0)
        shares = [(place + 0.5) / 50 for place in range(50)]
        steps = [_between(self.reduced if share < coarse else self.whole, share / _GROWN) for share in shares]
        late = 1 - _QUANTISED_FROM if config.quantise else 0.0
        again = self.whole[1] if config.baseline else 0.0
        return statistics.fmean(steps) + late * (self.rounding + self.anew / 50 + again)


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * min(1.0, share)


def _seconds(dataset: Dataset, start: Splats, settings: FitSettings, quantiser: Quantiser | None = None) -> list[float]:
    """Of each of a few steps."""
    fitting = Fitting(dataset, steps=10**6, start=start, settings=settings, quantiser=quantiser)
    times = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        fitting.step()
        synchronise()
        times.append(time.perf_counter() - began)
    return times


def _repeated(splats: Splats, count: int) -> Splats:
    """So many Gaussians that cover what these do."""
    found = splats.take(torch.arange(max(count, len(splats))) % len(splats))
    return replace(found, scales=found.scales - math.log(len(found) / len(splats)) / 3)


def resolved(config: SplatsFitConfig, dataset: Dataset, start: Splats, most: int, views: int) -> dict[str, Any]:
    """What a run keeps to, resumed or not."""
    wanted = [] if config.steps is None else [config.steps]
    minutes = config.minutes if config.minutes is not None or wanted else _USUAL_MINUTES
    if minutes is not None:
        wanted.append(steps_in(minutes, config, dataset, start, most))
    return {"steps": min(wanted), "gaussians": most, "views": views}
