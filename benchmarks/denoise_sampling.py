"""Samples of a trained model by solver, steps and reuse: their cost, how far they are from the exact ones, their FD.

All settings start from the same noise and labels. FD is known of those whose features were kept, in ``folder``.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from denoise_judge import Judge, features_of
from scrimp.denoise.quality import frechet_distance, paired_error
from scrimp.denoise.reuse import reuse
from scrimp.denoise.reuse_rules import below, every
from scrimp.denoise.solvers import calls, integrate, solver_for
from scrimp.jobs.denoise_models import Denoiser
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for

BATCH, RESAMPLED = 100, 50


@dataclass(frozen=True)
class Setting:
    """A way to sample; ``cache``: "none", "every N" or "below TOLERANCE"; ``depth``: how much always runs;
    ``order``: 1 follows the line through the last two refreshes, 0 keeps features as they were."""

    solver: str
    steps: int
    cache: str = "none"
    depth: int = 1
    order: int = 1

    @property
    def name(self) -> str:
        parts = [f"{self.solver} {self.steps}"] + ([] if self.cache == "none" else [self.cache])
        parts += ["as it was"] if self.cache != "none" and self.order == 0 else []
        return ", ".join([*parts, f"depth {self.depth}"] if self.depth > 1 else parts)

    def rule(self) -> Any:
        kind, _, number = self.cache.partition(" ")
        return every(int(number)) if kind == "every" else below(float(number))


@dataclass
class Draws:
    """Images of one model from noise and labels that are the same for every setting.

    Attributes:
        seed: of the noise.
        count: images of which FD is taken.
        folder: where features of such images are kept.
        classes: sample the classes in turn, not without any.
    """

    denoiser: Denoiser
    judge: Judge
    seed: int
    count: int
    folder: Path
    classes: bool = True
    _costs: dict[int, float] = field(default_factory=dict)

    def images(self, setting: Setting, count: int) -> tuple[Tensor, float]:
        """The first ``count`` images [count, C, side, side], and the share of network calls that computed all."""
        noise, labels = self.given(count)
        model, made, full, called = self.denoiser.model, [], 0, 0
        cache = (
            nullcontext()
            if setting.cache == "none"
            else reuse(model, setting.rule(), depth=setting.depth, order=setting.order)
        )
        with torch.no_grad(), cache as attached:
            for first in range(0, count, BATCH):
                rows = slice(first, first + BATCH)
                if attached is not None:
                    attached.reset()
                made.append(self._integrated(setting, noise[rows], labels if labels is None else labels[rows]))
                steps = [] if attached is None else attached.steps
                full, called = full + sum(step.refreshed for step in steps), called + len(steps)
        return torch.cat(made).clamp(-1, 1), full / called if called else 1.0

    def fresh(self, setting: Setting, count: int, *, number: int) -> Tensor:
        """Images from noise of their own, by the solver and steps of a setting; reuse is whoever's that calls."""
        noise = torch.randn(count, *self.denoiser.shape, generator=generator_for(self.seed, 74, number))
        classes = self.denoiser.classes
        labels = None if classes is None else (torch.arange(count) + number) % classes
        return self._integrated(setting, noise, labels)

    def given(self, count: int) -> tuple[Tensor, Tensor | None]:
        noise = torch.randn(max(count, self.count), *self.denoiser.shape, generator=generator_for(self.seed, 71))
        classes = self.denoiser.classes if self.classes else None
        return noise[:count], None if classes is None else torch.arange(count) % classes

    def _integrated(self, setting: Setting, noise: Tensor, labels: Tensor | None) -> Tensor:
        scheduler = solver_for(setting.solver, self.denoiser.scheduler)

        def denoise(images: Tensor, timestep: Tensor) -> Tensor:
            return self.denoiser.predict(images, timestep, labels)

        return integrate(denoise, scheduler, noise, steps=setting.steps, generator=generator_for(self.seed, 72))

    def paired(self, setting: Setting, reference: Tensor) -> dict[str, Any]:
        """Cost, and mean distance from ``reference``, the same images by the exact setting."""
        images, share = self.images(setting, len(reference))
        network = calls(setting.solver, setting.steps)
        mean = share * self.flops(0) + ((1 - share) * self.flops(setting.depth) if share < 1 else 0)
        away = float(paired_error(images, reference).mean())
        cost = {"calls": network, "refreshed": share, "flops": network * mean}
        return {"name": setting.name, **asdict(setting), **cost, "paired_error": away}

    def flops(self, depth: int) -> float:
        """Counted, of one image through all of the network (depth 0), or reusing what the last call computed."""
        if depth not in self._costs:
            noise, labels = self.given(4)
            levels = self.denoiser.process.levels
            before, now = self.denoiser.process.timestep(torch.tensor([levels // 2, levels // 4]))

            def call(timestep: Tensor = now) -> Tensor:
                return self.denoiser.predict(noise, timestep, labels)

            with torch.no_grad(), reuse(self.denoiser.model, every(2), depth=depth) if depth else nullcontext():
                if depth:
                    call(before)
                total = count_flops(call).value
            assert total is not None
            self._costs[depth] = total / 4
        return self._costs[depth]

    def features(self, setting: Setting) -> Tensor:
        """float64 [count, 64] of its images; kept in a file once they were made."""
        file = self.folder / f"{setting.name.replace(', ', '_').replace(' ', '-')}.safetensors"
        if not file.is_file():
            made = features_of(self.judge, self.images(setting, self.count)[0])
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"features": made}, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
        return load_file(file)["features"]

    def seconds(self, setting: Setting, baseline: Setting, *, rounds: int, count: int) -> dict[str, float]:
        """CPU and wall time over the baseline's: medians over rounds in which the two take turns."""
        times: dict[str, list[tuple[float, float]]] = {"own": [], "base": []}
        for turn in range(rounds):
            sides = (("own", setting), ("base", baseline))
            for side, one in sides[:: 1 if turn % 2 else -1]:
                wall, cpu = time.perf_counter(), time.process_time()
                self.images(one, count)
                times[side].append((time.process_time() - cpu, time.perf_counter() - wall))
        pairs = list(zip(times["own"], times["base"], strict=True))
        names = ("cpu_ratio", "wall_ratio")
        return {name: statistics.median(own[k] / base[k] for own, base in pairs) for k, name in enumerate(names)}


def fd_and_error(features: Tensor, real: Tensor) -> tuple[float, float]:
    """Frechet distance of drawn to real features, and its standard error by drawing the drawn ones anew."""
    values = [frechet_distance(features[rows], real) for rows in resamples(len(features))]
    return frechet_distance(features, real), statistics.stdev(values)


def resamples(count: int) -> list[Tensor]:
    return [torch.randint(count, (count,), generator=generator_for(73, turn)) for turn in range(RESAMPLED)]
