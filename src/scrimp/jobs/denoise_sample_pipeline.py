"""Sampling any pipeline of diffusers: its solver exchanged, reuse and merging attached to its network."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scrimp.denoise.calibration import Calibration
from scrimp.denoise.solvers import prediction_of, solver_for
from scrimp.jobs.denoise_sample_attach import attached, check_merge, why_not_reusable
from scrimp.jobs.denoise_sample_config import NONE, DenoiseSampleConfig
from scrimp.jobs.denoise_sample_ways import CallCost, Drawn, Way, fitting_solvers
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError, require

_NOISE = 11  # key of this random stream among those of one seed


def load_pipeline(name: str, adapter: Path | None, *, local: bool) -> Any:
    """A pipeline from a folder or the hub, its weights from safetensors files only.

    Raises:
        InputError: it cannot be opened, or the adapter is of another model.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = cast(Any, require("diffusers", "diffusers"))
    try:
        with quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(name, local_files_only=local, use_safetensors=True)
    except Exception as error:  # diffusers, transformers and the hub raise classes of many kinds
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        wanted = "a pipeline folder of diffusers" if local else "a folder that exists, or (online) a hub id"
        raise InputError(wanted, f"{name} ({said})", "check the path") from error
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        from scrimp.adapt import load_adapter_

        load_adapter_(network_of(pipeline), adapter)
    return pipeline


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' own bars, and without numpy 2's warning of how diffusers' schedulers hand it tensors."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*__array__.*")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def network_of(pipeline: Any) -> Any:
    """The network that denoises.

    Raises:
        InputError: the pipeline has none, or several.
    """
    found = [getattr(pipeline, part, None) for part in ("transformer", "unet")]
    networks = [network for network in found if network is not None]
    if len(networks) != 1:
        raise InputError(
            "a pipeline with one transformer or unet", f"{len(networks)} in {type(pipeline).__name__}", "pass another"
        )
    return networks[0]


class PipelineSubject:
    """A pipeline behind its own call, which keeps its own text, decoder and guidance."""

    kind = "pipeline"

    def __init__(self, name: str, pipeline: Any, config: DenoiseSampleConfig, device: torch.device) -> None:
        self.name, self.config = name, config
        self.pipeline = pipeline.to(device)
        self.network = network_of(pipeline)
        self.scheduler = pipeline.scheduler
        self.prediction = prediction_of(self.scheduler)
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.why = why_not_reusable(self.network, config.depth)
        self.reusable = self.why is None
        self._asked: tuple[int, tuple[Any, ...], dict[str, Any]] | None = None
        self.scale: Calibration | None = None
        self._check()

    def sample(self, way: Way, numbers: range, each: Callable[[], None] = lambda: None) -> Drawn:
        calls = [0]

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._asked is None:
                self._asked = (len(numbers), args, kwargs)
            calls[0] += 1
            each()

        hook = self.network.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with (
                quiet(),
                self._solver(way),
                torch.no_grad(),
                attached(self.network, way, way.attention or "softmax", self.scale) as handle,
            ):
                made = self.pipeline(**self._arguments(way, numbers))
                reused = 0 if handle is None else sum(not step.refreshed for step in handle.steps)
        finally:
            hook.remove()
        return Drawn(_images(made), calls[0] - reused, reused)

    def call_cost(self, way: Way) -> CallCost:
        if self._asked is None:
            self.sample(Way(way.solver, 2), range(1))
        asked = self._asked
        if asked is None:
            return CallCost(Reading(how="not counted: the pipeline did not call its network"), Reading())
        rows, args, kwargs = asked
        twice = way.with_cache(NONE if way.cache == NONE else "every:2")
        with torch.no_grad(), attached(self.network, twice, way.attention or "softmax", None):
            full = count_flops(lambda: self.network(*args, **kwargs))
            reused = count_flops(lambda: self.network(*args, **kwargs)) if way.cache != NONE else Reading()
        return CallCost(_share(full, rows), _share(reused, rows))

    def solvers(self) -> tuple[str, ...]:
        return fitting_solvers(self.prediction)

    def notes(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "pipeline": type(self.pipeline).__name__,
            "network": type(self.network).__name__,
            "prediction": self.prediction,
            "device": str(self.pipeline.device),
        }
        return said if self.reusable else {**said, "reuse": self.why}

    @contextmanager
    def _solver(self, way: Way) -> Iterator[None]:
        self.pipeline.scheduler = solver_for(way.solver, self.scheduler)
        try:
            yield
        finally:
            self.pipeline.scheduler = self.scheduler

    def _arguments(self, way: Way, numbers: range) -> dict[str, Any]:
        config, rows = self.config, len(numbers)
        found: dict[str, Any] = {
            "num_inference_steps": way.steps,
            "generator": [generator_for(config.seed, _NOISE, number) for number in numbers],
            "output_type": "np",
        }
        if config.prompt is not None:
            found["prompt"] = [config.prompt] * rows
        elif "class_labels" in self.parameters:
            labels = self._labels()
            found["class_labels"] = [labels[number % len(labels)] for number in numbers]
        elif "batch_size" in self.parameters:
            found["batch_size"] = rows
        if "use_clipped_model_output" in self.parameters:
            found["use_clipped_model_output"] = True  # as integrate does; else more steps lead further away
        if config.guidance is not None:
            found["guidance_scale"] = config.guidance
        return found

    def _labels(self) -> list[int]:
        known: dict[str, int] = getattr(self.pipeline, "labels", None) or {}
        count = self.network.config.get("num_embeds_ada_norm") or self.network.config.get("num_class_embeds") or 1
        found = []
        for word in self.config.classes:
            if word not in known and not (word.isdecimal() and int(word) < count):
                raise InputError(f"--class a name of the pipeline or a number below {count}", repr(word), "correct it")
            found.append(known[word] if word in known else int(word))
        return found or list(range(count))

    def _check(self) -> None:
        config, name = self.config, type(self.pipeline).__name__
        check_merge(self.network, config.merge)
        if config.prompt is None and "prompt" in self.parameters:
            raise InputError("--prompt for a pipeline that takes text", f"none for {name}", "pass --prompt TEXT")
        if config.prompt is not None and "prompt" not in self.parameters:
            raise InputError("--prompt for a pipeline that takes text", f"one for {name}", "drop --prompt")
        if config.classes and "class_labels" not in self.parameters:
            raise InputError("--class for a model with classes", name, "drop --class")
        if config.guidance is not None and "guidance_scale" not in self.parameters:
            raise InputError("--guidance for a pipeline that has it", name, "drop --guidance")
        if "class_labels" in self.parameters:
            self._labels()


def _images(made: Any) -> Tensor:
    """[batch, channels, height, width] in [-1, 1] of a pipeline's answer."""
    pixels = np.asarray(made.images)
    if pixels.ndim != 4:
        raise InputError("a pipeline of images", f"one that gives shape {list(pixels.shape)}", "pass another")
    if not np.isfinite(pixels).all():
        raise InputError("finite images", "NaN or infinity from the pipeline", "check its weights and the solver")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().mul(2).sub(1).contiguous()


def _share(reading: Reading, rows: int) -> Reading:
    value = None if reading.value is None else reading.value / rows
    return Reading(value, reading.how, reading.missed)
