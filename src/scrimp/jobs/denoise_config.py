"""What a person can ask of `scrimp denoise train`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Prediction = Literal["epsilon", "v", "sample", "flow"]
Weighting = Literal["constant", "min-snr", "p2"]
Timesteps = Literal["uniform", "even", "logit-normal", "importance"]

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"prediction": "epsilon", "weighting": "constant", "timesteps": "uniform", "keep": 1.0, "whole": 0.0},
    "thrifty": {"prediction": "v", "weighting": "min-snr", "timesteps": "importance", "keep": 0.5, "whole": 0.25},
}
"""What each recipe stands for where no flag says otherwise."""


@dataclass(frozen=True, kw_only=True)
class DenoiseTrainConfig(JobConfig):
    """Train a diffusion model of images, or teach one that is trained a new class or style by a few numbers.

    Leaves model/, a folder that diffusers opens; with --adapter only adapter.safetensors.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    model: str = "dit-64"
    """dit-WIDTH or dit-WIDTH/PATCH: a transformer of 6 blocks; unet-WIDTH: a UNet of 3 levels."""
    recipe: Literal["thrifty", "plain"] = "thrifty"
    """plain: predict the noise, uniform timesteps, constant weights, whole images, as is usual. thrifty: v, min-SNR
    weights, timesteps by importance, half of each image for the first 75 % of the budget. Flags override single
    parts."""
    prediction: Prediction | None = None
    """What the network predicts: noise, v, the clean image, or the velocity of flow matching."""
    weighting: Weighting | None = None
    """How much a noise level counts: all alike, min-SNR (gamma 5) or P2."""
    timesteps: Timesteps | None = None
    """How noise levels are drawn: at random, evenly spread over a batch, centred (another objective), or by the size
    of their gradients, weighted so that the mean stays the same."""
    keep: float | None = None
    """Share of each image that a step trains on: of a transformer's tokens, or a random square for a UNet; 1: all."""
    whole: float | None = None
    """Last share of the budget that is trained on whole images where --keep is below 1."""
    classes: bool = True
    """Tell the network each image's class."""
    label_dropout: float = 0.1
    """Share of labels replaced by the one for none, so that sampling can be guided."""
    attention: Literal["softmax", "linear", "clustered"] = "softmax"
    """Attention inside the network; linear and clustered pay for thousands of tokens only."""
    start: Path | None = None
    """Go on from this trained model (folder, or run folder) instead of a new one; model and prediction are its own."""
    adapter: Literal["none", "nola", "lora"] = "none"
    """With --start: leave the model as it is and train a few numbers beside it. The images are then of no class."""
    adapter_bytes: int = 8192
    """nola: the most bytes its file may have, at 8 bits a number, which are trained at that."""
    rank: int = 4
    """Rank of the adapter."""
    size: int | None = None
    """Side of the images in pixels; by default that of the images."""
    batch_size: int = 64
    """Images a step, over all processes together."""
    minutes: float | None = None
    """Budget in minutes, turned into steps by timing a few first. With no budget at all: 5 minutes."""
    epochs: float | None = None
    """Budget in passes over the training images."""
    steps: int | None = None
    """Budget in steps."""
    flops: float | None = None
    """Budget in FLOPs. Of several budgets the smallest holds."""
    optimizer: Literal["adamw", "radam"] = "adamw"
    """AdamW, or RAdam."""
    lr: float | None = None
    """Peak learning rate; by default 0.001, or 0.02 for adapters. Warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float | None = 0.999
    """Decay of the moving average of the weights that is measured and saved, lower in the first steps; None: none.
    Adapters have none."""
    augment: Literal["none", "flip"] = "none"
    """Random mirror images."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 5
    """Measurements of the error over the budget, the last one at its end."""
    probe: int = 256
    """Images, always the same, that it is measured on, of the training and of the test part."""
    samples: int = 16
    """Images to generate at the end, into samples.png."""
    sample_steps: int = 20
    """Steps of DPM-Solver++ for these."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    # What the training loop asks of every configuration and what is no choice here.
    compile: ClassVar[bool] = False
    parallel: ClassVar[str] = "ddp"
    workers: ClassVar[int] = 0

    def check(self) -> None:
        """Refuse numbers and pairs that no run can mean.

        Raises:
            InputError: a number out of its range, or settings that exclude one another.
        """
        ranges: dict[str, tuple[bool, str]] = {
            name: (getattr(self, name) >= 1, "of at least 1")
            for name in ("batch_size", "evaluations", "probe", "rank", "adapter_bytes", "sample_steps")
        }
        for name in ("size", "steps"):
            ranges[name] = (getattr(self, name) is None or getattr(self, name) >= 1, "of at least 1")
        for name in ("minutes", "epochs", "flops", "lr", "clip", "checkpoint_seconds"):
            ranges[name] = (getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        ranges |= {
            "samples": (self.samples >= 0, "of at least 0"),
            "weight_decay": (self.weight_decay >= 0, "of at least 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "label_dropout": (0 <= self.label_dropout < 1, "in [0, 1)"),
            "keep": (self.keep is None or 0 < self.keep <= 1, "above 0 and at most 1"),
            "whole": (self.whole is None or 0 <= self.whole <= 1, "in [0, 1]"),
            "ema": (self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        self._check_pairs()

    def part(self, name: str) -> Any:
        """What the recipe, or the flag that overrides it, says of ``prediction``, ``keep`` and so on."""
        given = getattr(self, name)
        return RECIPES[self.recipe][name] if given is None else given

    def resolved_lr(self) -> float:
        """The learning rate asked for, or the usual one."""
        return self.lr if self.lr is not None else 1e-3 if self.adapter == "none" else 2e-2

    def _check_pairs(self) -> None:
        if self.adapter != "none" and self.start is None:
            raise InputError(f"--start MODEL for --adapter {self.adapter}", "none", "pass the model to adapt")
        if self.start is not None and self.prediction is not None:
            raise InputError("--start without --prediction", self.prediction, "the model has its own: drop the flag")
