"""What every run of a job shares: data, model, accelerator and the counted cost of a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from scrimp.data import ImageData, load_images
from scrimp.jobs import budget
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.engine import slowest
from scrimp.jobs.evaluate import EVALUATION_BATCH, ready
from scrimp.jobs.models import create_model, load_weights_
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Setup:
    """Loaded once, used by every run.

    Attributes:
        encoder: weights file of an encoder of the model's architecture, which every model starts from.
    """

    config: ModelConfig
    data: ImageData
    accelerator: Accelerator
    cost: budget.StepCost
    encoder: Path | None = None

    def build_model(self, seed: int) -> nn.Module:
        """A fresh model, its initial weights fixed by ``seed``; with an encoder only its classifier is fresh."""
        model = _build(self.config, self.data, seed)
        if self.encoder is not None:
            load_backbone_(model, self.encoder)
        return model

    def run_extra_seconds(self, eval_seconds: float) -> float:
        """Wall seconds a run spends outside training: evaluations, given the seconds of one batch's forward."""
        images = len(self.data.test) + min(self.config.probe, len(self.data.train))
        batches = images / EVALUATION_BATCH / self.accelerator.num_processes
        return 0.5 + self.config.evaluations * eval_seconds * batches

    def timed(self) -> tuple[float, float]:
        """Wall seconds of one training step and of one evaluation step, the slowest process's."""
        images, labels = self._sample(self._rows())
        shown, _ = self._sample(EVALUATION_BATCH)
        model = self.build_model(0).to(images.device).to(memory_format=torch.channels_last)
        train, evaluate = slowest(self.accelerator, *budget.time_step(model, images, labels, shown=shown))
        return train, evaluate

    def _rows(self) -> int:
        return self.config.batch_size // self.accelerator.num_processes

    def _sample(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _sample(self.data, rows, self.accelerator.device)


def prepare(config: ModelConfig, data: Any, accelerator: Accelerator) -> Setup:
    """Load images, build the model once to count its cost.

    Raises:
        InputError: data, model or batch size that cannot be used.
    """
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        images = load_images(data, size=config.size, on_corrupt=config.on_corrupt)
    if config.batch_size % accelerator.num_processes or not 1 <= config.batch_size <= len(images.train):
        raise InputError(
            f"a batch size up to {len(images.train)} that {accelerator.num_processes} process(es) share evenly",
            f"{config.batch_size}",
            "pass another --batch-size",
        )
    model = _build(config, images, 0).to(accelerator.device)
    sample = _sample(images, min(8, config.batch_size), accelerator.device)
    return Setup(config, images, accelerator, budget.count_step(model, *sample))


def _build(config: ModelConfig, data: ImageData, seed: int) -> nn.Module:
    channels, size, _ = data.train.shape
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = create_model(
            config.model, classes=len(data.classes), channels=channels, size=size, pretrained=config.pretrained
        )
    if config.weights is not None:
        load_weights_(model, config.weights)
    return model


def load_backbone_(model: nn.Module, path: Path) -> None:
    """Load an encoder's weights (.safetensors) into a classifier, in place; what the encoder lacks stays as it is.

    Raises:
        InputError: weights of another architecture.
    """
    state, own = load_file(path), model.state_dict()
    strangers = [key for key, value in state.items() if key not in own or own[key].shape != value.shape]
    if strangers:
        got = f"{path} with {strangers[0]} and {len(strangers) - 1} more differing"
        raise InputError("weights of the same architecture without its classifier", got, "pass the --model they are of")
    model.load_state_dict(state, strict=False)


def _sample(data: ImageData, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.arange(rows) % len(data.train)
    return ready(data.train.batch(chosen), data, device), data.train.labels[chosen].to(device)


def default_name(job: str, data: Any) -> str:
    """A run folder's name from the data it is about."""
    label = Path(data).name if isinstance(data, str) else "dataset"
    return f"{job}-{label or 'data'}"
