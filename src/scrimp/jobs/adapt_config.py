"""What a person can ask of `scrimp adapt`; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import JobConfig
from scrimp.primitives.errors import InputError

Method = Literal["nola", "lora", "bias", "full", "linear"]
_SIZED = ("nola", "lora")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(JobConfig):
    """Fine-tune a model on images or text by a few trained numbers, beside what one would do instead.

    Leaves adapter.safetensors: those numbers (and a new classifier), not the model.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """For images: a timm model name (with --pretrained or --weights), or the weights (.safetensors) or run folder of
    `scrimp pretrain`, `distill` or `train`. For text: the folder of a transformers model and its tokenizer, or its hub
    name."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Images: folder of class folders, or builtin, fashion-mnist, mnist, cifar10, cifar100. Text to be continued: a
    .txt file or a folder of them, the last tenth of each held out. Text to be classified: .jsonl or .csv with a text
    and a label a row."""
    method: Method = "nola"
    """nola (combinations of random bases), lora (low rank), bias (all biases), linear (the classifier alone), full."""
    numbers: int | None = None
    """How many numbers may be trained, the classifier not counted. With no size at all: the method's default."""
    bytes: int | None = None
    """How many bytes the file may have, at --bits a number, the classifier not counted."""
    rank: int | None = None
    """Rank of the change of each weight; 4 by default, for lora with --numbers or --bytes the largest that fits."""
    bases: int | None = None
    """nola: random bases a factor, instead of --numbers or --bytes; 64 by default."""
    bits: Literal[32, 16, 8, 4, 3, 2] = 32
    """Bits a trained number is stored with."""
    quantize: Literal["aware", "after"] = "aware"
    """8 bits and fewer: train with the rounding in place (nola only), or round afterwards."""
    where: str | None = None
    """Regular expression searched for in module names: which weights to adapt; by default all but the classifier."""
    baseline: Literal["auto", "linear", "lora", "full", "none"] = "auto"
    """What to run beside it: a linear classifier on the untouched model's features, LoRA of rank 4, or full
    fine-tuning; auto takes linear for images and none for text (which shows the untouched model's perplexity)."""
    shots: int | None = None
    """Labelled examples a class, drawn by the seed; by default all."""
    test: Path | None = None
    """Text to be classified: file to test on; by default a tenth of every class is held out."""
    text_column: str = "text"
    """Name of the text in each row."""
    label_column: str = "label"
    """Name of the label in each row."""
    length: int = 128
    """Text: tokens a block, or at most a row."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    weights: Path | None = None
    """Weights (.safetensors) of the timm model named."""
    size: int | None = None
    """Side of the images in pixels; by default what the model was made for."""
    batch_size: int = 32
    """Examples a step, over all processes together; fewer where there are not so many."""
    epochs: float | None = None
    """Budget in passes. With no budget at all: 10, with --shots 50, for text to be continued 3."""
    flops: float | None = None
    """Budget in FLOPs."""
    minutes: float | None = None
    """Budget in minutes, turned into FLOPs by timing a few steps first. Of several budgets the smallest holds."""
    optimizer: Literal["sgd", "adamw", "radam"] = "adamw"
    """SGD with Nesterov momentum 0.9, AdamW, or RAdam."""
    lr: float | None = None
    """Peak learning rate; by default 0.005 (nola, bias, linear), 0.001 (lora) or 0.0001 (full), with sgd ten times
    that. Warm-up and cosine decay follow the budget."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""
    augment: Literal["none", "flip", "crop"] = "none"
    """Random mirror images, or padded random crops as well."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto takes bf16 on GPUs that have it, else fp32."""
    compile: bool = False
    """Use torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the model: replicas, or FSDP2 shards."""
    workers: int = 0
    """Processes that prepare batches ahead."""
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    """Stop at an image that cannot be read, naming it, or leave it out."""
    evaluations: int = 5
    """Validations over the budget, the last one at its end."""
    probe: int = 2000
    """Training examples, always the same, on which the training loss is measured."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints, which hold the trained numbers only."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    ema: ClassVar[None] = None

    def check(self) -> None:
        """Refuse numbers that no run can mean, and sizes given twice.

        Raises:
            InputError: a number out of its range, or settings that exclude one another.
        """
        for name, (holds, wanted) in self._ranges().items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        for wanted, wrong in self._conflicts().items():
            if wrong:
                raise InputError(wanted, wrong, "leave one out")

    @property
    def trained_bits(self) -> int | None:
        """Bits whose rounding is in place while training."""
        return self.bits if self.method == "nola" and self.quantize == "aware" and self.bits <= 8 else None

    @property
    def stored_bits(self) -> int | None:
        """Bits numbers are rounded to when they are stored, where training did not know of it."""
        return None if self.bits == 32 or self.trained_bits is not None else self.bits

    def _ranges(self) -> dict[str, tuple[bool, str]]:
        least_one = ("rank", "bases", "shots", "batch_size", "evaluations", "probe", "bytes", "numbers")
        whole = {name: getattr(self, name) for name in least_one}
        return {name: (value is None or value >= 1, "at least 1") for name, value in whole.items()} | {
            "length": (self.length >= 2, "at least 2"),
            "lr": (self.lr is None or self.lr > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "warmup": (0 <= self.warmup < 1, "in [0, 1)"),
            "workers": (self.workers >= 0, "at least 0"),
            "checkpoint_seconds": (self.checkpoint_seconds > 0, "above 0"),
        }

    def _conflicts(self) -> dict[str, str]:
        """What is expected, and where it is not so, what came."""
        sizes = [name for name in ("numbers", "bytes", "bases") if getattr(self, name) is not None]
        given = sizes + (["rank"] if self.rank is not None else [])
        lora_twice = self.method == "lora" and self.rank is not None and sizes
        aware = self.method != "nola" and self.bits <= 8 and self.quantize == "aware"
        return {
            "one of --numbers, --bytes and --bases": " and ".join(f"--{name}" for name in sizes if len(sizes) > 1),
            f"no size, which {self.method} has none to choose": f"--{given[0]}"
            if given and self.method not in _SIZED
            else "",
            f"no --where with {self.method}": "one" if self.where is not None and self.method not in _SIZED else "",
            "no --bases, which only nola has": "--bases" if self.method == "lora" and self.bases is not None else "",
            "a --rank or a size that decides on it": f"--rank and --{sizes[0]}" if lora_twice else "",
            f"--quantize after with {self.method}": f"--bits {self.bits} without it" if aware else "",
            "a --baseline that is not the method itself": self.method if self.baseline == self.method else "",
        }
