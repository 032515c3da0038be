"""What a person can ask of `scrimp audit`; loads no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.jobs.thin_config import VALUES, Method, ThinConfig
from scrimp.primitives.errors import InputError

DEFAULT_BUDGET = 40_000
LEAST_BUDGET = 100


@dataclass(frozen=True, kw_only=True)
class AuditConfig(JobConfig):
    """Attack what an adaptive model saves, as a security team would, and say how dear an image can get.

    Writes audit.json, audit.html, the attacks, and a receipt for each trial. In one process, in full precision.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """As for `scrimp thin`: weights (.safetensors) or run folder (of `scrimp thin`: that of one way), or a timm model
    name (with --pretrained or --weights). With --victim: what its factory is called with."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    method: Method | None = None
    """How tokens are left out, see `scrimp thin`; by default as the weights were fine-tuned."""
    r: int | None = None
    """tome: pairs of tokens merged in every block."""
    ratio: float | None = None
    """keep: share of the tokens that stays in each of --blocks."""
    samples: int | None = None
    """ats: points of the grid, the most tokens that stay; by default as many as there are patches."""
    blocks: tuple[int, ...] = ()
    """keep, ats: blocks that leave tokens out, counted from 0; by default as for `scrimp thin`."""
    max_flops: int | None = None
    """Most FLOPs that any image may cost: audit the model with this hard budget."""
    max_tokens: int | None = None
    """Most tokens of any image that may leave the last block."""
    victim: str | None = None
    """Any other model: package.module:factory; called with MODEL it gives a scrimp.attack.Victim."""
    transfer_to: tuple[str, ...] = ()
    """Other weights or run folders, as MODEL, that the attacks are tried on too."""
    images: int = 256
    """Test images to audit on; attacks for all images are made on as many training images. Fewer if there are."""
    unlabelled: bool = False
    """DATA is a folder of pictures without classes; accuracies stay unknown."""
    budget: int | None = None
    """Images through forward and backward, all attacks together; by default 40000."""
    minutes: float | None = None
    """Minutes instead, turned into a budget by timing a step first; measuring is allowed for."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    weights: Path | None = None
    """Weights (.safetensors) of the timm model named."""
    size: int | None = None
    """Side of the images in pixels; by default what the model was made for."""
    batch_size: int = 64
    """Images at a time where nothing is learnt."""
    batches: tuple[int, ...] = (1, 16)
    """Images a call that are timed."""
    calls: int = 20
    """Calls that are timed of each execution; 0: none."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""

    precision: ClassVar[str] = "fp32"
    trackers: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Refuse numbers that no run can mean, and several processes.

        Raises:
            InputError: a number out of its range, settings that exclude one another, or more than one process.
        """
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise InputError("one process", f"{processes}", "start scrimp audit without torchrun")
        for name, least in {"images": 2, "budget": LEAST_BUDGET, "batch_size": 1, "calls": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} at least {least}", f"{value}", "correct it")
        if self.minutes is not None and (self.minutes <= 0 or self.budget is not None):
            raise InputError("--minutes above 0, or --budget", f"{self.minutes} and {self.budget}", "pass one of them")
        if not all(batch >= 1 for batch in self.batches):
            raise InputError("--batches of at least 1", f"{list(self.batches)}", "correct them")
        strange = ["method", "r", "ratio", "samples", "blocks", "max_flops", "max_tokens", "pretrained", "weights"]
        strange = [name for name in strange if getattr(self, name)] if self.victim else []
        if strange:
            got = f"--{strange[0].replace('_', '-')}"
            raise InputError("a --victim that its factory sets up", got, "leave it out, or set it in the factory")

    def thin(self, method: Method | None = None) -> ThinConfig:
        """What `scrimp thin` would be asked for the same model; its method is tome, which fits any, until there is one.

        Raises:
            InputError: numbers out of range, or settings of another method.
        """
        shared = ("model", "data", "seed", "device", "max_flops", "max_tokens", "pretrained", "weights", "size")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*shared, "batch_size", "on_corrupt")}
        if method is not None:
            given |= {
                name: (getattr(self, name),) for name in ("r", "ratio", "samples") if getattr(self, name) is not None
            }
            given |= {"method": method, "blocks": self.blocks}
        found = ThinConfig(**given)
        found.check()
        return found

    def given(self, method: Method) -> bool:
        """Whether the flags say how much this method leaves out, or where."""
        return getattr(self, VALUES[method], None) is not None or bool(self.blocks)
