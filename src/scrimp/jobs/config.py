"""What a person can ask of each job: plain dataclasses, the one source of the command line and of the Python calls.

Nothing here loads torch, so that `scrimp --help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scrimp.primitives.errors import InputError

Sampling = Literal["uniform", "history", "presample", "prune"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job takes."""

    out: Path | None = None
    """Run folder to write; by default a new one under runs/."""
    seed: int = 0
    """Fixes initial weights, draws and augmentation (a study counts up from it)."""
    json: bool = False
    """Print the receipts as JSON on standard output, nothing else."""
    device: Device = "auto"
    """Where to compute."""
    resume: bool = False
    """Go on with the interrupted run in the folder."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model, optimiser and how they run: shared by every way of a study."""

    model: str = "convnet"
    """`convnet` (built in, for 28 to 32 pixel images), `small-resnet18` or `small-vit`, a transformer (both for images
    of 28 to 64 pixels), each also with -WIDTH; or any timm model name."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    weights: Path | None = None
    """Start from these weights (.safetensors); a classifier of another shape is left at its start."""
    size: int | None = None
    """Side of the images in pixels; by default that of the images, or 224."""
    batch_size: int = 64
    """Images a step, over all processes together."""
    optimizer: Literal["sgd", "adamw", "radam"] = "sgd"
    """SGD with Nesterov momentum 0.9, AdamW, or RAdam."""
    lr: float | None = None
    """Peak learning rate; by default 0.05 (sgd) or 0.001. Warm-up and cosine decay follow the budget."""
    weight_decay: float = 5e-4
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    augment: Literal["none", "flip", "crop"] = "none"
    """Random mirror images, or padded random crops as well."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is validated and saved."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    compile: bool = False
    """Use torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the model: replicas, or FSDP2 shards."""
    workers: int = 0
    """Processes that decode images ahead."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 5
    """Validations over the budget, the last one at its end."""
    probe: int = 2000
    """Training images, always the same, on which the training loss is measured."""
    pool: int = 3
    """presample: batches scored for one batch trained."""
    mix: float = 0.2
    """history: share of uniform sampling."""
    gate: float = 1.3
    """history: variance reduction tau from which it acts."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (self.lr is None or self.lr > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "ema": (self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
            "workers": (self.workers >= 0, "at least 0"),
            "evaluations": (self.evaluations >= 1, "at least 1"),
            "probe": (self.probe >= 1, "at least 1"),
            "pool": (self.pool >= 2, "at least 2"),
            "mix": (0 < self.mix <= 1, "in (0, 1]"),
            "gate": (self.gate >= 1, "at least 1"),
            "checkpoint_seconds": (self.checkpoint_seconds > 0, "above 0"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JobConfig, ModelConfig):
    """Train one classifier with one sampling policy under a budget."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    sampling: Sampling = "uniform"
    """How training images are chosen."""
    epochs: float | None = None
    """Budget in passes: the FLOPs of that many passes of plain training."""
    flops: float | None = None
    """Budget in FLOPs, scoring included."""
    minutes: float | None = None
    """Budget in minutes, turned into FLOPs by timing a few steps first. With no budget at all: 5 epochs."""
    target_accuracy: float | None = None
    """Stop early once validation reaches this accuracy (0 to 1)."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(JobConfig, ModelConfig):
    """The conventional way beside the thrifty ways, under the same budget: table, receipts and report."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "builtin"
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    ways: tuple[str, ...] = ("uniform", "history", "prune", "presample")
    """Which ways to compare; the first is the conventional one. Each is a sampling way (uniform, history, prune,
    presample) or stages joined by "+": pretrain (an encoder from all images, no labels), distill (from it into the
    model), and at the end probe (a linear classifier on its features), label (the same on as many labels, but of images
    chosen by these), adapt (a classifier and a few numbers, the rest frozen) or a sampling way (training it all), as in
    pretrain+probe, pretrain+label, pretrain+adapt, pretrain+distill+probe, pretrain+uniform. The optimiser's settings
    and augmentation are of the sampling ways; the other stages keep their jobs' own."""
    labelled: float = 1.0
    """Share of the training images whose label may be used: the same of every class, at least one each. Pretraining and
    distilling see all images, without labels; everything else only the labelled ones, at the same budget (a step takes
    no more images than are labelled)."""
    encoder: str | None = None
    """The network that is pretrained where distill follows: `small-resnet18[-WIDTH]`, `small-vit[-WIDTH]`,
    `convnet[-WIDTH]` or any timm name; by default small-resnet18-16, or resnet18 for images above 64 pixels. Elsewhere
    the model itself is."""
    pretrain_method: Literal["constrained", "mean-shift", "byol"] = "constrained"
    """What pretrain learns by, see `scrimp pretrain`."""
    seeds: int = 3
    """Runs of each way; runs with one seed form a pair."""
    minutes: float | None = None
    """Budget of the whole study in minutes, shared evenly by all its runs. With no budget at all: 3."""
    flops: float | None = None
    """Budget of each single run in FLOPs. With minutes as well, the smaller of the two holds."""

    def check(self) -> None:
        super().check()
        if not 0 < self.labelled <= 1:
            raise InputError("--labelled in (0, 1]", f"{self.labelled}", "correct it")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(JobConfig):
    """Rebuild the report of one run folder, or merge several into one.

    Nothing here is random or computed on a device: ``seed``, ``device`` and ``resume`` are taken and change nothing.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders or receipt files."""
    out: Path | None = None
    """Folder to write report.html to, or an .html file; by default the first run folder."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(JobConfig):
    """Check a method against its reference and measure it beside its baseline."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = "all"
    """Name of a comparison, or all."""
    list: bool = False
    """Name the comparisons and what each holds against what."""
    check: bool = False
    """Only check against the references: no measuring."""
