"""What a person can ask of `scrimp pixels train` and `scrimp pixels sample`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Attention = Literal["linear", "softmax"]
Output = Literal["logistics", "categorical"]


@dataclass(frozen=True, kw_only=True)
class PixelsTrainConfig(JobConfig):
    """Train a transformer that writes images pixel by pixel, with linear or with softmax attention."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    attention: Attention = "linear"
    """linear: constant cost a pixel. softmax: the ordinary one, whose cost grows with each pixel."""
    output: Output = "logistics"
    """logistics: a mixture of 10 discretised logistics. categorical: a probability for each of 256 values."""
    layers: int = 3
    """Blocks (the paper: 8 for MNIST, 16 for CIFAR-10)."""
    heads: int = 4
    """Attention heads (the paper: 8)."""
    head_dim: int = 32
    """Width of a head (the paper: 32); the model is heads x head_dim wide."""
    size: int | None = None
    """Side of the images in pixels; by default that of the images."""
    batch_size: int = 8
    """Images a step, over all processes together."""
    minutes: float | None = None
    """Budget in minutes, turned into steps by timing a few first. With no budget at all: 5 minutes."""
    epochs: float | None = None
    """Budget in passes over the training images."""
    steps: int | None = None
    """Budget in steps. Of several budgets the smallest holds."""
    optimizer: Literal["adamw", "radam"] = "adamw"
    """AdamW, or RAdam as in the paper."""
    lr: float = 2e-3
    """Peak learning rate; warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.01
    """Weight decay."""
    warmup: float = 0.1
    """Share of the budget over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is tested and saved."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 5
    """Measurements of bits per dimension over the budget, the last one at its end."""
    probe: int = 100
    """Images, always the same, for measurements along the way, of the training and of the test part."""
    test_images: int | None = 1000
    """Test images, always the same, for the last measurement; None: all."""
    samples: int = 16
    """Images to generate at the end, into samples.png."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    # What the training loop asks of every configuration and what is no choice here.
    augment: ClassVar[str] = "none"
    compile: ClassVar[bool] = False
    parallel: ClassVar[str] = "ddp"
    workers: ClassVar[int] = 0

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        _refuse_below(
            self, 1, "layers", "heads", "head_dim", "size", "batch_size", "steps", "evaluations", "probe", "test_images"
        )
        _refuse_below(self, 0, "weight_decay", "samples")
        _refuse_not_above_0(self, "minutes", "epochs", "lr", "clip", "checkpoint_seconds")
        if not 0 <= self.warmup < 1:
            raise InputError("--warmup in [0, 1)", f"{self.warmup}", "correct it")
        if self.ema is not None and not 0 < self.ema < 1:
            raise InputError("--ema between 0 and 1", f"{self.ema}", "correct it")


@dataclass(frozen=True, kw_only=True)
class PixelsSampleConfig(JobConfig):
    """Generate images with a model that `scrimp pixels train` made, or complete the upper halves of real ones."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of scrimp pixels train."""
    count: int = 16
    """Images to generate."""
    batch: int = 64
    """Images generated side by side."""
    temperature: float = 1.0
    """Below 1: likelier, less varied pixels."""
    complete: str | None = None
    """Give the upper half of test images of this data set and generate the rest."""
    cache: Literal["auto", "none"] = "auto"
    """auto: keep a state between pixels (linear) or keys and values (softmax). none: compute all anew each pixel."""
    weights: Literal["float", "int8"] = "float"
    """int8 rounds the weights to 8 bits: quicker on CPUs, images differ slightly."""

    # What starting a job asks of every configuration and what is no choice here.
    precision: ClassVar[str] = "fp32"
    trackers: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        _refuse_below(self, 1, "count", "batch")
        _refuse_not_above_0(self, "temperature")
        if self.weights == "int8" and self.cache == "none":
            raise InputError("--cache auto with --weights int8", self.cache, "drop one of the two")


def _refuse_below(config: JobConfig, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} of at least {least}", f"{value}", "correct it")


def _refuse_not_above_0(config: JobConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} above 0", f"{value}", "correct it")
