"""What a person can ask of `scrimp zoom train` and `scrimp zoom predict`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Method = Literal["zoom", "abmil", "whole"]
Task = Literal["auto", "classes", "labels", "regression"]


@dataclass(frozen=True, kw_only=True)
class ZoomTrainConfig(JobConfig):
    """Train on images too large to process whole: look at a small view, then at a few patches of full resolution.

    Leaves weights.safetensors, which `scrimp zoom predict` reads, and a report with what was looked at.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders, with train and test folders or without; or a .csv with the columns image (or path) and
    label, or a folder with train.csv and test.csv. Several labels of an image are separated by ";"."""
    test: Path | None = None
    """Folder or .csv to test on; by default what stands beside the training data, else a share held out."""
    task: Task = "auto"
    """classes: one of them an image. labels: any number of them. regression: a number. auto: labels if any image has
    several, else classes."""
    held_out: float = 0.1
    """Share of the images to test on where the data do not say."""
    method: Method = "zoom"
    """zoom: patches sampled by attention. abmil: attention pooling over all patches. whole: the feature network on the
    whole image, the ordinary way."""
    patches: int = 10
    """Patches to look at, an image and an attention map."""
    patch_size: tuple[int, ...] = (50,)
    """Sides of the patches in pixels of the full image; further ones are read around the same place and reduced to the
    first one's size."""
    maps: int = 1
    """Attention maps, each with patches of its own."""
    view: int = 180
    """Longer side in pixels of the view that attention looks at."""
    attention: str = "contrast"
    """Attention network: contrast[-STRIDE] (begins where the view varies, a location every 4 pixels of the view), small
    and pooled (those of the paper, every pixel and every 8), or a timm name whose last map of features is taken."""
    attention_level: int = -1
    """timm attention network: which of its maps, 0 the finest, -1 the last."""
    features: str = "convnet"
    """Feature network: convnet[-WIDTH][-mean], plain[-WIDTH][-mean] and preact[-WIDTH] (those of the paper),
    small-resnet18[-WIDTH], small-vit[-WIDTH], or a timm name. -mean: the mean over the patch in place of the largest
    values."""
    pretrained: bool = False
    """Start timm networks from timm's pretrained weights."""
    whole_size: int | None = None
    """whole: longer side in pixels the images are reduced to; by default their own."""
    entropy: float = 1e-4
    """Weight of the attention's entropy: above 0 it stays spread out for longer."""
    spread: float = 0.3
    """Weight of what the attention's entropy lacks to that of as many even places as --patches; 0 as in the paper."""
    smooth: float = 1e-5
    """Share of the draws that is uniform over all places."""
    replacement: bool = False
    """Draw patches with replacement."""
    control: bool = True
    """Subtract a control variate from the attention's gradient: less noise, the same mean."""
    batch_size: int = 32
    """Images a step, over all processes together; fewer where there are not so many."""
    epochs: float | None = None
    """Budget in passes. With no budget at all: 20."""
    flops: float | None = None
    """Budget in FLOPs."""
    minutes: float | None = None
    """Budget in minutes, turned into FLOPs by timing a few steps first. Of several budgets the smallest holds."""
    optimizer: Literal["adamw", "radam", "sgd"] = "adamw"
    """Adam (without weight decay AdamW is just that), RAdam, or SGD with Nesterov momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate; warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is tested and saved."""
    augment: Literal["none", "flip"] = "none"
    """Random mirror images, of view and patches alike."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    workers: int = 0
    """Processes that fetch views ahead; patches are read once it is known where."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    open_images: int = 64
    """Images kept open at a time."""
    cache: Path | None = Path("runs/.views")
    """Folder where views are kept between runs; None: nothing is kept."""
    evaluations: int = 5
    """Validations over the budget, the last one at its end."""
    probe: int = 200
    """Training images, always the same, on which the training loss is measured."""
    pictures: int = 12
    """Test images shown in the report."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    # What the training loop asks of every configuration and what is no choice here.
    compile: ClassVar[bool] = False
    parallel: ClassVar[str] = "ddp"

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        for name, (holds, wanted) in self._ranges().items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        whole = ("patches", "maps", "view", "whole_size", "batch_size", "open_images", "evaluations", "probe")
        above = ("lr", "clip", "epochs", "flops", "minutes", "checkpoint_seconds")
        least = ("entropy", "spread", "weight_decay", "workers", "pictures")
        values = {name: getattr(self, name) for name in (*whole, *above, *least)}
        return (
            {name: (values[name] is None or values[name] >= 1, "of at least 1") for name in whole}
            | {name: (values[name] is None or values[name] > 0, "above 0") for name in above}
            | {name: (values[name] >= 0, "of at least 0") for name in least}
            | {
                "patch_size": (bool(self.patch_size) and min(self.patch_size) >= 1, "of at least 1 pixel"),
                "smooth": (0 <= self.smooth < 1, "in [0, 1)"),
                "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
                "held_out": (0 < self.held_out < 1, "between 0 and 1"),
                "ema": (self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ZoomPredictConfig(JobConfig):
    """Label images with a model that `scrimp zoom train` made, and show the patches it looked at."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder of scrimp zoom train, or its weights (.safetensors)."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """An image, a folder of images at any depth, class folders of the model's classes, or a .csv as for training."""
    batch_size: int = 16
    """Images at a time."""
    overlays: int | None = None
    """How many images to draw with attention and boxes; by default all."""
    pictures: int = 12
    """Images shown in the report."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    open_images: int = 64
    """Images kept open at a time."""

    # What starting a job asks of every configuration and what is no choice here.
    precision: ClassVar[str] = "fp32"
    trackers: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        for name, least in (("batch_size", 1), ("open_images", 1), ("pictures", 0), ("overlays", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} of at least {least}", f"{value}", "correct it")
