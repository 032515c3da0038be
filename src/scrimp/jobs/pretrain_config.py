"""What a person can ask of `scrimp pretrain`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Method = Literal["mean-shift", "constrained", "byol"]
Constraint = Literal["views", "labels", "pseudo-labels"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(JobConfig):
    """What pretraining and distilling share: the network that is made, the loop, and how both run."""

    model: Annotated[str | None, tyro.conf.arg(aliases=("--arch",))] = None
    """`small-resnet18[-WIDTH]` or `small-vit[-WIDTH]` (for images of 28 to 64 pixels), `convnet[-WIDTH]` or any timm
    model name; by default small-resnet18-16, or resnet18 for images above 64 pixels."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    weights: Path | None = None
    """Start from these weights (.safetensors)."""
    size: int | None = None
    """Side of the images in pixels; by default that of the images, or 224."""
    unlabelled: bool = False
    """DATA is any folder of images: no classes, so no accuracy is measured."""
    batch_size: int = 128
    """Images a step, over all processes together."""
    accumulate: int = 1
    """Parts a step's batch is processed in, one after another: less memory; batch statistics are those of a part."""
    epochs: float | None = None
    """Budget in passes over the images. With no budget at all: 20."""
    flops: float | None = None
    """Budget in FLOPs, the target's or teacher's forward passes and the neighbour search included."""
    minutes: float | None = None
    """Budget in minutes, turned into FLOPs by timing a few steps first. Of several budgets the smallest holds."""
    optimizer: Literal["sgd", "adamw", "radam"] = "adamw"
    """SGD with Nesterov momentum 0.9, AdamW, or RAdam."""
    lr: float | None = None
    """Peak learning rate; by default 0.05 (sgd) or 0.001. Warm-up and cosine decay follow the budget."""
    weight_decay: float = 1e-4
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 where the GPU or the CPU multiplies it natively, else fp32."""
    compile: bool = False
    """Use torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the model: replicas, or FSDP2 shards."""
    workers: int = 0
    """Processes that decode images ahead."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 5
    """Looks at the neighbours of test images over the budget, the last one at its end."""
    probe: int = 5000
    """Training images, always the same, among which the neighbours of test images are sought."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    ema: ClassVar[None] = None
    augment: ClassVar[str] = "none"

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        for name, (holds, wanted) in self.ranges().items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")

    def ranges(self) -> dict[str, tuple[bool, str]]:
        """For each setting with limits: whether it keeps them, and what they are."""
        divides = self.accumulate >= 1 and self.batch_size % self.accumulate == 0
        return {
            "batch_size": (self.batch_size >= 2, "at least 2"),
            "accumulate": (divides, f"at least 1 and a divisor of the batch size, {self.batch_size}"),
            "lr": (self.lr is None or self.lr > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "workers": (self.workers >= 0, "at least 0"),
            "evaluations": (self.evaluations >= 1, "at least 1"),
            "probe": (self.probe >= 1, "at least 1"),
            "checkpoint_seconds": (self.checkpoint_seconds > 0, "above 0"),
        }


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(EncoderConfig):
    """Learn features from images without labels (or with few): an encoder's weights, the receipt, a report."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders (any folder with --unlabelled), or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    method: Method = "constrained"
    """mean-shift: towards the nearest neighbours in a memory. constrained: only those that a constraint vouches for.
    byol: towards the other view alone, both ways round, at twice the cost."""
    constraint: Constraint = "views"
    """constrained: neighbours found through the epoch before's view (no labels), of the same label, or of the same
    pseudo-label."""
    labelled: float = 1.0
    """labels, pseudo-labels: share of the training images whose label may be used."""
    k: int = 5
    """Nearest neighbours."""
    memory: int | None = None
    """Embeddings remembered; by default 131,072 or a quarter of the images, whichever is less."""
    mix: float | None = None
    """constrained: share of the unconstrained loss; by default 0.5 for views, 0 for labels."""
    momentum: float = 0.99
    """How slowly the target network follows."""
    confidence: float = 0.85
    """pseudo-labels: probability from which one is believed."""
    hidden: int | None = None
    """Width of the hidden layers of projector and predictor; by default twice the features."""
    dim: int | None = None
    """Width of the embedding; by default a quarter of the features, at least 64."""
    query: Literal["strong", "weak"] = "strong"
    """View the learning network sees: crop and mirror, for strong also colour, grey and blur."""
    target: Literal["strong", "weak"] = "weak"
    """View the target network sees (byol shows both networks both)."""
    local_crops: int = 0
    """Further, small crops for the learning network (multi-crop)."""
    local_share: float = 0.43
    """Side of the small crops as a share of the image's."""
    cache: Literal["ram", "disk"] = "ram"
    """constrained by views: where the last embedding of every image is kept."""

    def ranges(self) -> dict[str, tuple[bool, str]]:
        return super().ranges() | {
            "labelled": (0 < self.labelled <= 1, "in (0, 1]"),
            "k": (self.k >= 1, "at least 1"),
            "memory": (self.memory is None or self.memory >= self.k, f"at least k, {self.k}"),
            "mix": (self.mix is None or 0 <= self.mix <= 1, "in [0, 1]"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "confidence": (0 <= self.confidence < 1, "in [0, 1)"),
            "hidden": (self.hidden is None or self.hidden >= 1, "at least 1"),
            "dim": (self.dim is None or self.dim >= 1, "at least 1"),
            "local_crops": (self.local_crops >= 0, "at least 0"),
            "local_share": (0 < self.local_share <= 1, "in (0, 1]"),
            "unlabelled": (not self.unlabelled or not self.uses_labels, "without --constraint labels or pseudo-labels"),
        }

    @property
    def uses_labels(self) -> bool:
        """Whether any label goes into the loss."""
        return self.method == "constrained" and self.constraint != "views"
