"""Sampling a `Denoiser`: its own noise for each image, labels, guidance, and all that makes a step cheaper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scrimp.denoise.calibration import Calibration
from scrimp.denoise.reuse import Reuse
from scrimp.denoise.solvers import SOLVERS, integrate, prepare_, solver_for
from scrimp.jobs.denoise_models import Denoiser
from scrimp.jobs.denoise_sample_attach import attached, check_merge, counted, why_not_reusable
from scrimp.jobs.denoise_sample_config import NONE, DenoiseSampleConfig
from scrimp.jobs.denoise_sample_ways import CallCost, Drawn, Way, fitting_solvers
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

_NOISE, _ON_THE_WAY = 11, 12  # keys of these random streams among those of one seed


class DenoiserSubject:
    """A denoiser of images as `scrimp denoise train` makes it."""

    kind = "denoiser"

    def __init__(self, name: str, denoiser: Denoiser, config: DenoiseSampleConfig, classes: Sequence[str]) -> None:
        # Its own attention is put in place for whole trajectories: a step that reuses may not attend at all.
        self.name, self.config, self.attention = name, config, denoiser.attention
        self.denoiser = replace(denoiser, attention="softmax")
        self.network = denoiser.model
        self.prediction: str = denoiser.process.prediction
        self.scale: Calibration | None = None
        self.labels = chosen_classes(config.classes, denoiser.classes, classes)
        self._check()
        self.why = why_not_reusable(denoiser.model, config.depth)
        self.reusable = self.why is None

    def sample(self, way: Way, numbers: range, each: Callable[[], None] = lambda: None) -> Drawn:
        generator = generator_for(self.config.seed, _ON_THE_WAY, numbers.start)
        scheduler = solver_for(way.solver, self.denoiser.scheduler)
        with torch.no_grad(), self._attached(way) as handle:
            images = integrate(
                self._denoise(numbers),
                scheduler,
                self._noise(numbers),
                steps=way.steps,
                generator=generator if SOLVERS[way.solver].random else None,
                each=lambda call, images: each(),
            )
        full, reused = counted(handle, way.nfe)
        return Drawn(images.clamp(-1, 1).cpu(), full, reused)

    def call_cost(self, way: Way) -> CallCost:
        scheduler = solver_for(way.solver, self.denoiser.scheduler)
        numbers = range(1)
        times = prepare_(scheduler, max(way.steps, 2), device=self.denoiser.device)
        noise, denoise = self._noise(numbers), self._denoise(numbers)
        # Two calls under "every second": the first is computed whole, the other reuses.
        twice = way.with_cache(NONE if way.cache == NONE else "every:2")
        with torch.no_grad(), self._attached(twice):
            full = count_flops(lambda: denoise(noise, times[0]))
            reused = count_flops(lambda: denoise(noise, times[1])) if way.cache != NONE else Reading()
        return CallCost(full, reused)

    def solvers(self) -> tuple[str, ...]:
        return fitting_solvers(self.prediction)

    def notes(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "shape": list(self.denoiser.shape),
            "prediction": self.prediction,
            "device": str(self.denoiser.device),
        }
        return said if self.reusable else {**said, "reuse": self.why}

    def _attached(self, way: Way) -> AbstractContextManager[Reuse | None]:
        return attached(self.denoiser.model, way, way.attention or self.attention, self.scale)

    def _noise(self, numbers: range) -> Tensor:
        drawn = [
            torch.randn(self.denoiser.shape, generator=generator_for(self.config.seed, _NOISE, number))
            for number in numbers
        ]
        return torch.stack(drawn).to(self.denoiser.device)

    def _denoise(self, numbers: range) -> Callable[[Tensor, Tensor], Tensor]:
        denoiser, guidance = self.denoiser, self.config.guidance
        if self.labels is None:
            return lambda x, time: denoiser.predict(x, time)
        labels = torch.tensor([self.labels[number % len(self.labels)] for number in numbers], device=denoiser.device)
        if guidance is None or guidance == 1:
            return lambda x, time: denoiser.predict(x, time, labels)
        both = torch.cat([labels, torch.full_like(labels, denoiser.null_label or 0)])

        def guided(x: Tensor, time: Tensor) -> Tensor:
            given, none = denoiser.predict(torch.cat([x, x]), time, both).chunk(2)
            return none + guidance * (given - none)  # Ho and Salimans 2022, equation 6, with w + 1 as the strength

        return guided

    def _check(self) -> None:
        config, denoiser = self.config, self.denoiser
        check_merge(denoiser.model, config.merge)
        if config.prompt is not None:
            raise InputError("--prompt for a pipeline that takes text", f"one for {self.name}", "use --class instead")
        if config.guidance is not None and denoiser.classes is None:
            raise InputError("--guidance for a model with classes", "a model without", "drop --guidance")
        if config.guidance is not None and denoiser.null_label is None:
            raise InputError(
                "--guidance for a model that knows a label for none", "one without", "train it with --label-dropout"
            )


def chosen_classes(asked: Sequence[str], count: int | None, names: Sequence[str]) -> list[int] | None:
    """Numbers of the classes asked for, by name or number; all where none are; None for a model without.

    Raises:
        InputError: classes for a model without, or one that it does not know.
    """
    if count is None:
        if asked:
            raise InputError("--class for a model with classes", "a model without", "drop --class")
        return None
    known = [*names] if len(names) == count else [str(number) for number in range(count)]
    found = []
    for word in asked:
        if word in known:
            found.append(known.index(word))
        elif word.isdecimal() and int(word) < count:
            found.append(int(word))
        else:
            shown = ", ".join(known[:12]) + (", ..." if count > 12 else "")
            raise InputError(f"--class out of: {shown}", repr(word), "name classes of the model")
    return found or list(range(count))
