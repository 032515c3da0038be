"""What a person can ask of `scrimp swap`. Loads no torch, as all configurations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Attention = Literal["improved-clustered", "clustered", "linear", "softmax"]


@dataclass(frozen=True, kw_only=True)
class SwapConfig(JobConfig):
    """Another attention in a pretrained model, without fine-tuning, beside the original: what is lost, what is saved.

    Reports task metric, agreement of predictions, output error, time, FLOPs and memory for every setting and size, and
    recommends the cheapest setting within the tolerance.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A timm model name (with --pretrained or --weights), or the folder of a transformers model."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Images: a folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100. Text: a .txt file, or a
    .csv file with a column `text` and perhaps `label`."""
    attention: tuple[Attention, ...] = ("improved-clustered",)
    """What takes softmax's place; several are measured side by side."""
    clusters: tuple[int, ...] = (25, 50, 100)
    """Numbers of clusters to try (clustered, improved-clustered)."""
    topk: tuple[int, ...] = (32,)
    """Numbers of keys a cluster attends to exactly (improved-clustered)."""
    layers: str | None = None
    """Swap only layers whose module name this regular expression is found in."""
    tolerance: float = 0.01
    """Share of predictions that may differ from the original's in a recommended setting."""
    sizes: tuple[int, ...] = ()
    """Sides of the images in pixels, or lengths of the texts in tokens; by default what the model was made for."""
    samples: int = 200
    """Images or texts to compare the predictions on."""
    batch_size: int | None = None
    """Images or texts a pass; by default 8, or 1 for a language model."""
    repeats: int = 5
    """Alternating pairs of passes that are timed."""
    pretrained: bool = False
    """Load timm's pretrained weights."""
    weights: Path | None = None
    """Load these weights into the timm model (.safetensors)."""
    normalize: Literal["auto", "data", "model"] = "auto"
    """Mean and deviation of the pixels: the data's own (as `scrimp train`), or the model's; auto: the data's for
    --weights, else the model's."""

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range, or a setting twice.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "attention": (0 < len(self.attention) == len(set(self.attention)), "with one or more different names"),
            "clusters": (_counts(self.clusters), "with different numbers from 1 up"),
            "topk": (_counts(self.topk), "with different numbers from 1 up"),
            "sizes": (not self.sizes or _counts(self.sizes), "with different numbers from 1 up"),
            "tolerance": (0 <= self.tolerance <= 1, "in [0, 1]"),
            "samples": (self.samples >= 1, "at least 1"),
            "batch_size": (self.batch_size is None or self.batch_size >= 1, "at least 1"),
            "repeats": (self.repeats >= 1, "at least 1"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        if self.pretrained and self.weights is not None:
            raise InputError("--pretrained or --weights", "both", "leave one out")


def _counts(numbers: tuple[int, ...]) -> bool:
    return 0 < len(numbers) == len(set(numbers)) and min(numbers) >= 1
