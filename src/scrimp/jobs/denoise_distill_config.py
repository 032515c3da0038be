"""What a person can ask of `scrimp denoise distill`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Method = Literal["flow-map", "consistency", "reflow"]


@dataclass(frozen=True, kw_only=True)
class DenoiseDistillConfig(JobConfig):
    """A student that makes in one or a few steps the images that a trained model makes in many."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder of scrimp denoise train, or a model folder of diffusers (UNet2DModel or DiTTransformer2DModel)."""
    method: Method = "flow-map"
    """reflow: straight paths between noise and the teacher's image, which bring most of the gain; the others go on
    from there. flow-map: learns the few jumps themselves, on the student's own path; for a single step slightly the
    better one. consistency: one estimate all along a path."""
    straight: float = 0.5
    """Share of the steps that go to reflow before flow-map or consistency."""
    pairs: int = 4096
    """Noises that the teacher makes images of, to learn from."""
    teacher_steps: int = 16
    """Steps of the teacher to make one."""
    pairs_folder: Path | None = None
    """Keep pairs here, or take those that another run of the same teacher and seed left; by default in the run
    folder."""
    solver: str = "auto"
    """Of the teacher: a solver of scrimp denoise sample; auto: dpm++."""
    guidance: float = 1.0
    """Classifier-free guidance of the teacher, which the student then has built in. 1: none."""
    jumps: tuple[int, ...] = (1, 2, 4)
    """Numbers of steps that the student is measured at, and that flow-map learns."""
    held_out: int = 64
    """Further noises, never learnt from, to measure on."""
    reference_steps: int = 100
    """Steps of the teacher's own images that errors are measured against."""
    batch_size: int = 64
    """Pairs a step, over all processes together."""
    minutes: float | None = None
    """Budget in minutes, pairs included, turned into steps by timing a few first. With no budget at all: 5 minutes."""
    epochs: float | None = None
    """Budget in passes over the pairs."""
    steps: int | None = None
    """Budget in steps of training. Of several budgets the smallest holds."""
    optimizer: Literal["adamw", "radam"] = "adamw"
    """AdamW or RAdam."""
    lr: float = 1e-3
    """Peak learning rate; warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float | None = 0.999
    """Decay of the moving average of the weights that is measured and saved, less at first; None: the weights as they
    are."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    evaluations: int = 5
    """Measurements over the budget, the last one at its end."""
    samples: int = 8
    """Held-out noises in samples.png: the student's images of them, and the teacher's."""
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
        for name in ("pairs", "teacher_steps", "held_out", "reference_steps", "batch_size", "steps", "evaluations"):
            self._need(name, lambda value: value >= 1, "of at least 1")
        for name in ("weight_decay", "samples"):
            self._need(name, lambda value: value >= 0, "of at least 0")
        for name in ("minutes", "epochs", "lr", "clip", "checkpoint_seconds", "guidance"):
            self._need(name, lambda value: value > 0, "above 0")
        self._need("straight", lambda value: 0 <= value < 1, "in [0, 1)")
        self._need("warmup", lambda value: 0 <= value < 1, "in [0, 1)")
        self._need("ema", lambda value: 0 < value < 1, "between 0 and 1")
        self._need("jumps", lambda value: bool(value) and min(value) >= 1 and len(set(value)) == len(value),
                   "with different numbers of at least 1")  # fmt: skip

    def _need(self, name: str, holds: object, wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):  # type: ignore[operator]
            raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{value}", "correct it")
