"""What a person can ask of `scrimp probe`. Loads no torch, as all configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(JobConfig):
    """What an encoder's features are worth, without training it: nearest neighbours and linear classifiers on them.

    Reports the accuracy of 1, 20 and 200 nearest neighbours, of a linear classifier on all labels, and of linear
    classifiers on 1 % and 10 % of them.
    """

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """Weights (.safetensors) or run folder of an encoder or a classifier, a timm model name (with --pretrained), or the
    folder of a transformers vision model."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    model: str | None = None
    """Architecture of weights that do not name it."""
    pretrained: bool = False
    """Load timm's pretrained weights."""
    size: int | None = None
    """Side of the images in pixels; by default what the encoder was made for."""
    batch_size: int = 256
    """Images a forward pass."""
    draws: int = 3
    """Draws of the few labels, each probed."""
    l2: float = 1.0
    """Penalty of the linear classifiers (scikit-learn's 1 / C)."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "size": (self.size is None or self.size >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "draws": (self.draws >= 1, "at least 1"),
            "l2": (self.l2 > 0, "above 0"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
