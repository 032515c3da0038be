"""What a run of `scrimp adapt` goes by: data, model, method and the counted cost of a step."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scrimp.adapt import attach_, bias, full, linear, lora, lora_of, lora_of_bytes, nola, nola_of, nola_of_bytes
from scrimp.adapt.methods import Method
from scrimp.adapt.targets import find_targets
from scrimp.data import ImageData
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_fit import AdaptFitting, TextFitting, token_losses
from scrimp.jobs.adapt_images import as_model_takes, encoder_and_images
from scrimp.jobs.adapt_labels import shot_rows
from scrimp.jobs.adapt_models import Subject, bare, fit_for_, head_of, image_subject, text_subject
from scrimp.jobs.adapt_text import TextData, is_text, load_text, load_tokenizer
from scrimp.jobs.budget import StepCost, checked_budget, flops_in, seconds_a_step
from scrimp.jobs.engine import slowest
from scrimp.jobs.evaluate import ready
from scrimp.jobs.folder import CHECKPOINT
from scrimp.meter import Reading, count_flops
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

_RATES = {"nola": 5e-3, "bias": 5e-3, "lora": 1e-3, "linear": 5e-3, "full": 1e-4}
_USUAL_EPOCHS, _FEW_SHOT_EPOCHS, _TEXT_EPOCHS = 10.0, 50.0, 3.0


@dataclass(frozen=True)
class Adaptation:
    """One way of adapting one model to one set of data.

    Attributes:
        config: its learning rate and batch size resolved.
        where: which weights, as `scrimp.adapt.attach_` takes it.
        numbers: trained ones, without the classifier's; ``head`` those.
        cost: of an example.
    """

    config: AdaptConfig
    subject: Subject
    data: ImageData | TextData
    accelerator: Accelerator
    method: Method
    where: str | None
    numbers: int
    head: int
    cost: StepCost

    @property
    def on_text(self) -> bool:
        """Whether the data are text."""
        return isinstance(self.data, TextData)

    @property
    def labels(self) -> int:
        """How many labels training uses."""
        return 0 if self.subject.continues else len(self.data.train)

    def model(self) -> nn.Module:
        """The model anew, its adapter at its start."""
        return _attached(self.config, self.subject, self.method, self.where)

    def fitting(self, folder: Path, budget: float) -> AdaptFitting:
        """A run that has not begun."""
        kind = TextFitting if isinstance(self.data, TextData) else AdaptFitting
        return kind(
            self.config,
            self.model(),
            self.data,
            accelerator=self.accelerator,
            cost=self.cost,
            budget=budget,
            checkpoint=folder / CHECKPOINT,
        )

    def budget(self) -> float:
        """FLOPs of the run: the smallest of the budgets given, the usual passes with none."""
        config, step = self.config, self.cost.train * self.config.batch_size
        budgets = [config.flops] if config.flops is not None else []
        if config.minutes is not None:
            train, look = self._seconds()
            shown = config.evaluations * (len(self.data.test) + min(config.probe, len(self.data.train)))
            extra = 1.0 + look * shown / config.batch_size
            budgets.append(flops_in(config.minutes * 60, step, train_seconds=train, extra_seconds=extra))
        if config.epochs is not None or not budgets:
            # Passes are of whole batches, as the sampler deals them.
            rows = len(self.data.train) // config.batch_size * config.batch_size
            budgets.append(self.cost.train * rows * (self._usual_epochs() if config.epochs is None else config.epochs))
        # A little more than whole steps, lest the last one is lost to rounding.
        return checked_budget(min(budgets) * (1 + 1e-9), step)

    def seconds_a_flop(self) -> float:
        """Wall seconds of training a FLOP takes, measured; the slowest process's."""
        return self._seconds()[0] / (self.cost.train * self.config.batch_size)

    def _usual_epochs(self) -> float:
        if self.config.shots is not None:
            return _FEW_SHOT_EPOCHS
        return _TEXT_EPOCHS if self.subject.continues else _USUAL_EPOCHS

    def _seconds(self) -> tuple[float, float]:
        """Wall seconds of one training step and of one forward pass, the slowest process's."""
        rows = self.config.batch_size // self.accelerator.num_processes
        device = self.accelerator.device
        model = self.model().to(device)
        batch, labels = _sample(self.data, rows, device)

        def train() -> None:
            with self.accelerator.autocast():
                logits = model(batch)
            token_losses(logits, batch, labels).mean().backward()

        def look() -> None:
            with torch.no_grad(), self.accelerator.autocast():
                model(batch)

        step, shown = slowest(self.accelerator, seconds_a_step(train, repeats=3), seconds_a_step(look, repeats=3))
        return step, shown


def prepare_adaptation(config: AdaptConfig, source: Any, accelerator: Accelerator) -> Adaptation:
    """Load data and model, decide on the size of the adapter, count the cost of a step.

    Raises:
        InputError: data, model, method, size or batch size that cannot be used.
    """
    with accelerator.main_process_first():  # it may download or unpack what the others then find
        subject, data = _text(config) if is_text(config.model, source) else _images(config, source)
    if config.shots is not None:
        if subject.continues:
            raise InputError("labelled examples for --shots", "text to be continued", "leave --shots out")
        rows = shot_rows(data.train.labels, config.shots, seed=config.seed)
        data = replace(data, train=data.train.take(rows))  # type: ignore[arg-type]
    return adaptation_of(config, subject, data, accelerator)


def adaptation_of(
    config: AdaptConfig, subject: Subject, data: ImageData | TextData, accelerator: Accelerator
) -> Adaptation:
    """One way, named by ``config.method``, for a model and data that are there."""
    config = replace(config, batch_size=_batch_size(config, len(data.train), accelerator), lr=_rate(config))
    method, where = _decided(config, subject)
    model = _attached(config, subject, method, where).to(accelerator.device)
    numbers, head = _counts(model)
    if not numbers + head:
        raise InputError("something to train", f"--method {config.method} without a classifier", "choose another")
    cost = _counted(model, data, config, accelerator)
    return Adaptation(config, subject, data, accelerator, method, where, numbers, head, cost)


def _text(config: AdaptConfig) -> tuple[Subject, TextData]:
    tokenizer = load_tokenizer(config.model)
    data = load_text(config, tokenizer)
    subject = text_subject(config.model, data.classes)
    build = subject.build

    def fitted(seed: int) -> nn.Module:
        model = build(seed)
        fit_for_(model, length=data.length, padding=tokenizer.pad_token_id)
        return model

    return replace(subject, build=fitted), data


def _images(config: AdaptConfig, source: Any) -> tuple[Subject, ImageData]:
    encoder, data = encoder_and_images(config, source)
    return image_subject(encoder, data.classes), as_model_takes(data, encoder)


def _rate(config: AdaptConfig) -> float:
    """The learning rate asked for, or the usual one of the method."""
    if config.lr is not None:
        return config.lr
    return _RATES[config.method] * (10 if config.optimizer == "sgd" else 1)


def _batch_size(config: AdaptConfig, rows: int, accelerator: Accelerator) -> int:
    """The batch size asked for, or that of few examples."""
    world = accelerator.num_processes
    if config.batch_size % world or rows < world:
        got = f"{config.batch_size} of {rows}"
        raise InputError(f"a batch that {world} process(es) share evenly", got, "pass another --batch-size")
    return min(config.batch_size, rows // world * world)


def _decided(config: AdaptConfig, subject: Subject) -> tuple[Method, str | None]:
    """The method, of the size asked for, and which weights it adapts."""
    model = subject.build(config.seed)
    if config.method in ("bias", "linear", "full"):
        return {"bias": bias, "linear": linear, "full": full}[config.method](), None
    where = _where(config, model)
    method = _sized(config, bare(model), where)
    if config.parallel == "fsdp" and getattr(method, "shared", False):
        few = f"{config.numbers or config.bytes}, few enough for all weights to share them"
        raise InputError("more --numbers or --bytes with --parallel fsdp", few, "ask for more, or use --parallel ddp")
    return method, where


def _where(config: AdaptConfig, model: nn.Module) -> str | None:
    """What the configuration says, but for fresh parameters before the classifier: those are trained in full."""
    head = re.compile(head_of(model) or "$^")
    targets = find_targets(bare(model), config.where)
    kept = [target.name for target in targets if not head.search(f"{target.name}.weight")]
    if not kept:
        raise InputError("a --where that takes more than the classifier", f"{config.where}", "choose --method linear")
    return config.where if len(kept) == len(targets) else "^(" + "|".join(map(re.escape, kept)) + ")$"


def _sized(config: AdaptConfig, model: nn.Module, where: str | None) -> Method:
    size, numbers, seed = config.bytes, config.numbers, config.seed
    if config.method == "lora":
        if size is not None:
            return lora_of_bytes(model, size, bits=config.bits, where=where, seed=seed)
        return lora(config.rank or 4, seed=seed) if numbers is None else lora_of(model, numbers, where=where, seed=seed)
    rank, bits = config.rank or 4, config.trained_bits
    if size is not None:
        found = nola_of_bytes(model, size, bits=config.bits, where=where, rank=rank, seed=seed)
        return replace(found, bits=bits)
    if numbers is not None:
        return nola_of(model, numbers, where=where, rank=rank, seed=seed, bits=bits)
    return nola(rank, config.bases or 64, seed, bits=bits)


def _attached(config: AdaptConfig, subject: Subject, method: Method, where: str | None) -> nn.Module:
    model = subject.build(config.seed)
    attach_(bare(model), method, where=where, also=head_of(model))
    return model


def _counts(model: nn.Module) -> tuple[int, int]:
    """Trained numbers, and those of the classifier."""
    head = re.compile(head_of(model) or "$^")
    trained = {name: item.numel() for name, item in bare(model).named_parameters() if item.requires_grad}
    own = sum(count for name, count in trained.items() if head.search(name))
    return sum(trained.values()) - own, own


def _counted(model: nn.Module, data: Any, config: AdaptConfig, accelerator: Accelerator) -> StepCost:
    """FLOPs of an example in a step: building the factors costs the same for every batch, so two sizes are counted."""
    few, more = (_flops_of(model, *_sample(data, rows, accelerator.device)) for rows in (2, 4))
    if few.value is None or more.value is None:
        raise InputError("a model whose FLOPs can be counted", config.model, "choose another")
    each = (more.value - few.value) / 2
    fixed = (few.value - 2 * each) * accelerator.num_processes
    return StepCost(each + fixed / config.batch_size, 0.0, more.missed)


def _flops_of(model: nn.Module, batch: Tensor, labels: Tensor) -> Reading:
    with torch.random.fork_rng([batch.device] if batch.is_cuda else []), contextlib.ExitStack() as stack:
        stack.callback(model.zero_grad)
        return count_flops(lambda: token_losses(model.train()(batch), batch, labels).mean().backward())


def _sample(data: ImageData | TextData, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    chosen = torch.arange(rows) % len(data.train)
    batch, labels, _ = data.train.__getitems__(chosen.tolist())
    labels = labels.to(device)
    return (batch.to(device) if isinstance(data, TextData) else ready(batch, data, device)), labels
