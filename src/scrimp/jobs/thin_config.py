"""What a person can ask of `scrimp thin`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Method = Literal["tome", "keep", "ats", "avit", "adavit"]
LEARNT = ("avit", "adavit")
"""Methods that learn what to leave out, and without that know nothing."""
BY_IMAGE = ("ats", "avit", "adavit")
"""Methods whose cost depends on the image, so that an image can be made to raise it."""
VALUES = {"tome": "r", "keep": "ratio", "ats": "samples", "avit": "ponder", "adavit": "usage"}
"""The setting that says how much a method leaves out."""
_DEFENCE = ("defend_steps", "defend_images")


@dataclass(frozen=True, kw_only=True)
class ThinConfig(JobConfig):
    """Let a vision transformer spend less on images, beside the same transformer with all tokens.

    Writes accuracy, FLOPs of every image and images a second, and a report that shows what is left of some images.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Weights (.safetensors) or run folder of `scrimp train`, `distill`, `pretrain` or `thin`, or a timm model name
    (with --pretrained or --weights): a vision transformer."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100."""
    method: Method = "tome"
    """tome (token merging) and keep (the tokens attended to) leave out as much of every image; ats (token sampling) as
    much as an image allows; none of these needs training. avit (token halting) and adavit (gates) learn it."""
    r: tuple[int, ...] = ()
    """tome: pairs of tokens merged in every block. Of this and the next four several are tried, by default a ladder."""
    ratio: tuple[float, ...] = ()
    """keep: share of the tokens that stays in each of --blocks."""
    samples: tuple[int, ...] = ()
    """ats: points of the grid, the most tokens that stay."""
    ponder: tuple[float, ...] = ()
    """avit: weight of the ponder loss; more halts earlier."""
    usage: tuple[float, ...] = ()
    """adavit: share of tokens, heads and layers to use on average."""
    blocks: tuple[int, ...] = ()
    """keep, ats: blocks that leave tokens out, counted from 0; by default three at even distances, or all but the first
    quarter."""
    gate_scale: float = 10.0
    """avit: factor of the halting score."""
    gate_center: float | None = None
    """avit: its offset, how late tokens halt before anything is learnt; by default 30, for wide models 75."""
    gate_lr: float | None = None
    """adavit: peak learning rate of the gates, which start open; by default 0.02, with sgd 0.2."""
    depth: float | None = None
    """avit: block, counted from 1, that tokens are to halt around; by default two thirds of all."""
    max_flops: int | None = None
    """Most FLOPs that any image may cost, whatever it shows."""
    max_tokens: int | None = None
    """Most tokens of any image that may leave the last block."""
    epochs: float | None = None
    """Fine-tune for so many passes. With no budget at all: not."""
    flops: float | None = None
    """Fine-tune for so many FLOPs."""
    minutes: float | None = None
    """Fine-tune for so many minutes, turned into FLOPs by timing a few steps first. Of several the smallest holds."""
    baseline: Literal["tuned", "given"] = "tuned"
    """With fine-tuning: set against the model with all tokens fine-tuned under the same budget, or as it came."""
    export: bool = False
    """Also write each thinned model by torch.export (model.pt2), where its shapes are fixed."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    weights: Path | None = None
    """Weights (.safetensors) of the timm model named."""
    size: int | None = None
    """Side of the images in pixels; by default what the model was made for."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images a call that are timed."""
    repeats: int = 5
    """Alternating pairs of calls that are timed at each; 0: none."""
    pictures: int = 4
    """Images whose tokens the report shows, from the cheapest to the dearest."""
    defend: int = 0
    """ats, avit, adavit: harden the fine-tuning against patches that raise what images cost. So many are made over the
    budget, each on the model as it is then; later batches carry one of them. Making them comes on top of the budget.
    Start from weights of scrimp thin: of a model that saves nothing yet a patch learns nothing."""
    defend_size: float = 0.08
    """Share of an image's area that a patch covers, as a square."""
    defend_steps: int = 500
    """Steps that a patch is made by."""
    defend_rate: float = 0.8
    """Learning rate of these steps, for pixels from 0 to 1."""
    defend_clean: float = 0.5
    """Share of the batches that carry no patch, from 0 (as published) to below 1."""
    defend_images: int = 256
    """Training images that patches are made on, --batch-size of them a step."""
    defend_place: Literal["top-left", "random"] = "top-left"
    """Where patches go; random: anywhere, drawn for each image."""
    batch_size: int = 32
    """Images a step of training, over all processes together; evaluation takes four times as many."""
    optimizer: Literal["sgd", "adamw", "radam"] = "adamw"
    """SGD with Nesterov momentum 0.9, AdamW, or RAdam."""
    lr: float | None = None
    """Peak learning rate; by default 0.0001, with sgd 0.001. Warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    augment: Literal["none", "flip", "crop"] = "none"
    """Random mirror images, or padded random crops as well."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    workers: int = 0
    """Processes that decode images ahead."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 3
    """Validations over the budget, the last one at its end."""
    probe: int = 2000
    """Training images, always the same, on which the training loss is measured."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    ema: ClassVar[None] = None
    compile: ClassVar[bool] = False
    parallel: ClassVar[str] = "ddp"

    @property
    def trains(self) -> bool:
        """Whether there is a budget to fine-tune under."""
        return any(budget for budget in (self.epochs, self.flops, self.minutes))

    @property
    def values(self) -> tuple[float, ...]:
        """How much to leave out, as asked for; empty where that is left to the job."""
        asked: tuple[float, ...] = getattr(self, VALUES[self.method])
        return asked

    def check(self) -> None:
        """Refuse numbers that no run can mean, and settings of another method.

        Raises:
            InputError: a number out of its range, or a setting that the method does not have.
        """
        for name, (holds, wanted) in self._ranges().items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        strange = [name for method, name in VALUES.items() if method != self.method and getattr(self, name)]
        strange += ["blocks"] if self.blocks and self.method not in ("keep", "ats") else []
        strange += ["gate-lr"] if self.gate_lr is not None and self.method != "adavit" else []
        if strange:
            raise InputError(
                f"settings of {self.method}", f"--{strange[0]}", "leave it out, or choose another --method"
            )
        self._check_defence()

    def _check_defence(self) -> None:
        usual = {field.name: field.default for field in fields(self) if field.name.startswith("defend_")}
        changed = [name.replace("_", "-") for name, value in usual.items() if getattr(self, name) != value]
        if changed and not self.defend:
            raise InputError(f"--defend N with --{changed[0]}", "no --defend", "pass both, or neither")
        if self.defend and self.method not in BY_IMAGE:
            cost = f"{self.method}, which spends the same on every image"
            raise InputError(f"--defend with --method {', '.join(BY_IMAGE)}", cost, "leave --defend out")
        if self.defend and not self.trains:
            raise InputError("a budget to --defend in", "none", "pass --epochs, --flops or --minutes")

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        least_one = ("max_flops", "max_tokens", "size", "batch_size", "evaluations", "probe", *_DEFENCE)
        least_zero = ("epochs", "flops", "minutes", "repeats", "pictures", "weight_decay", "workers", "defend")
        whole = {name: (getattr(self, name) is None or getattr(self, name) >= 1, "at least 1") for name in least_one}
        rest = {name: (getattr(self, name) is None or getattr(self, name) >= 0, "at least 0") for name in least_zero}
        shares = {name: (_all(getattr(self, name), 1e-9, 1), "above 0, at most 1") for name in ("ratio", "usage")}
        return {
            **whole,
            **rest,
            **shares,
            "r": (_all(self.r, 0), "with different numbers from 0 up"),
            "samples": (_all(self.samples, 1), "with different numbers from 1 up"),
            "ponder": (_all(self.ponder, 0), "with different numbers from 0 up"),
            "blocks": (_all(self.blocks, 0), "with different numbers from 0 up"),
            "batches": (_all(self.batches, 1), "with different numbers from 1 up"),
            "lr": (self.lr is None or self.lr > 0, "above 0"),
            "gate_lr": (self.gate_lr is None or self.gate_lr > 0, "above 0"),
            "defend_size": (0 < self.defend_size <= 1, "above 0, at most 1"),
            "defend_rate": (self.defend_rate > 0, "above 0"),
            "defend_clean": (0 <= self.defend_clean < 1, "in [0, 1)"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "checkpoint_seconds": (self.checkpoint_seconds > 0, "above 0"),
        }


def _all(numbers: tuple[float, ...], least: float, most: float = float("inf")) -> bool:
    return len(numbers) == len(set(numbers)) and all(least <= number <= most for number in numbers)
