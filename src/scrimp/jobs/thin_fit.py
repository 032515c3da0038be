"""Fine-tuning a thinned transformer: the loop of `scrimp.jobs.fit`, with what the method adds to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.adaptive import Controller
from scrimp.data import ImageData
from scrimp.jobs.budget import StepCost, checked_budget, count_step, flops_in, time_step
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.engine import slowest, tracked
from scrimp.jobs.evaluate import evaluate, ready
from scrimp.jobs.fit import Fitting, read_clocks
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, WEIGHTS, plain
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.once import cost_of, save_weights
from scrimp.jobs.optim import peak_rate
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.thin_defend import Defence
from scrimp.jobs.thin_methods import Setting, gates_of
from scrimp.jobs.thin_models import GATES, ThinSubject
from scrimp.meter import EnergyWindow, ResidentPeak
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

GATE_RATE = 0.02
"""Peak learning rate of gates that start open, with AdamW or RAdam."""
TRAINING = "training"
"""Folder, in a way's own, of the receipt of its fine-tuning."""


class Thinned(nn.Module):
    """A model and what its method learns itself, as one module; images -> logits.

    Args:
        model: with the method attached, or none.
        controller: of the method.
    """

    def __init__(self, model: nn.Module, controller: Controller | None) -> None:
        super().__init__()
        self.model = model
        self.gates = None if controller is None else gates_of(controller)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, size, size] -> [batch, classes]."""
        logits: Tensor = self.model(images)
        return logits


@dataclass(frozen=True, eq=False)
class ThinSetup:
    """What all ways of one job share.

    Attributes:
        config: its learning rate resolved.
    """

    config: ThinConfig
    subject: ThinSubject
    data: ImageData
    accelerator: Accelerator

    def model(self, setting: Setting | None) -> tuple[Thinned, Controller | None]:
        """The model anew on its device, thinned as ``setting`` says, with what was learnt before."""
        model = self.subject.build().to(self.accelerator.device)
        seed = self.config.seed + 7919 * self.accelerator.process_index  # each process draws for its own images
        controller = None if setting is None else setting.attach_(model, self.subject, self.config, seed=seed)
        thinned = Thinned(model, controller)
        learnt = self.subject.gates
        if setting is not None and thinned.gates is not None and learnt is not None:
            fill_gates_(thinned, learnt)
        return thinned.eval(), controller

    def cost(self, setting: Setting | None) -> StepCost:
        """Counted FLOPs of an image in a training step."""
        return count_step(self.model(setting)[0], *self._sample(min(8, self.config.batch_size)))

    def budget(self, setting: Setting | None, cost: StepCost) -> float:
        """FLOPs of fine-tuning: the smallest of the budgets given."""
        config, step = self.config, cost.train * self.config.batch_size
        budgets = [config.flops] if config.flops else []
        if config.minutes:
            train, look = self._seconds(setting)
            shown = config.evaluations * (len(self.data.test) + min(config.probe, len(self.data.train)))
            extra = 1.0 + look * shown / config.batch_size / self.accelerator.num_processes
            budgets.append(flops_in(config.minutes * 60, step, train_seconds=train, extra_seconds=extra))
        if config.epochs:
            # Passes are of whole batches, as the sampler deals them.
            budgets.append(cost.train * (len(self.data.train) // config.batch_size * config.batch_size) * config.epochs)
        # A little more than whole steps, lest the last one is lost to rounding.
        budget = checked_budget(min(budgets) * (1 + 1e-9), step)
        if setting is not None and config.defend > budget // step:
            got = f"{config.defend} and {budget // step:.0f} steps"
            raise InputError("as many steps of training as --defend patches, or more", got, "raise the budget")
        return budget

    def _seconds(self, setting: Setting | None) -> tuple[float, float]:
        """Wall seconds of one training step and of one forward pass, the slowest process's."""
        batch, labels = self._sample(self.config.batch_size // self.accelerator.num_processes)
        model = self.model(setting)[0].train()
        train, look = slowest(self.accelerator, *time_step(model, batch, labels, shown=batch))
        return train, look

    def _sample(self, rows: int) -> tuple[Tensor, Tensor]:
        chosen, device = torch.arange(rows) % len(self.data.train), self.accelerator.device
        return ready(self.data.train.batch(chosen), self.data, device), self.data.train.labels[chosen].to(device)


class ThinFitting(Fitting):
    """A run in the making, see `Fitting`; each image's loss holds its share of what the method asks for.

    Args:
        setup: data, model and loop.
        setting: the method; ``None`` keeps all tokens.
        cost: counted FLOPs of an image.
        budget: FLOPs of the whole run.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self, setup: ThinSetup, setting: Setting | None, *, cost: StepCost, budget: float, checkpoint: Path
    ) -> None:
        thinned, self.controller = setup.model(setting)
        self.setting, self.thinned = setting, thinned
        super().__init__(
            cast(ModelConfig, setup.config),  # it has all that the loop asks for
            thinned,
            setup.data,
            accelerator=setup.accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=cost,
            budget=budget,
            seed=setup.config.seed,
            checkpoint=checkpoint,
        )
        hardened = setup.config.defend and self.controller is not None
        self.defence = Defence(setup.config, setup.data, thinned.model, setup.accelerator) if hardened else None

    def run(self, report: Callable[..., None]) -> None:
        """As `Fitting.run`; ``report`` is also told, as a second argument, of a patch that is being made."""
        self._report = report
        with stop_requests() as stop:
            self._harden(stop)
        super().run(report)

    def _pause(self, begin: tuple[float, float], stop: Callable[[], bool]) -> tuple[float, float]:
        begin = super()._pause(begin, stop)
        if not self._patch_due():
            return begin
        self._clock(begin)
        self._harden(stop)
        return read_clocks()

    def _patch_due(self) -> bool:
        return self.defence is not None and not self.done and self.defence.due(self.spent.flops / self.budget)

    def _harden(self, stop: Callable[[], bool]) -> None:
        """Make the patches that are due; stopped within one, it is made anew and alike when the run goes on."""
        try:
            while self._patch_due():
                assert self.defence is not None
                self.defence.grow(self.spent.flops / self.budget, lambda doing: self._report(self.spent, doing), stop)
                if self.defence.stops(stop):
                    raise Interrupted
        except Interrupted:
            if self.spent.steps:  # before the first step there is nothing to go on from
                self.save()
            raise

    def _more_state(self) -> dict[str, Any]:
        return {} if self.defence is None else {"defence": self.defence.state_dict()}

    def _take_up(self, state: dict[str, Any]) -> None:
        if self.defence is not None:
            self.defence.load_state_dict(state["defence"])

    def _set_apart(self) -> None:
        """New gates are far from where they shut: at a rate that is right for trained weights they would stay open."""
        if self.controller is None or not (own := {id(item) for item in self.controller.parameters()}):
            return
        config, groups = cast(ThinConfig, self.config), self.raw_optimizer.param_groups
        for group in groups:
            group["params"] = [item for item in group["params"] if id(item) not in own]
        gates = [item for item in self.model.parameters() if id(item) in own]
        rate = config.gate_lr or GATE_RATE * (10 if config.optimizer == "sgd" else 1)
        self.raw_optimizer.add_param_group(
            {"params": gates, "weight_decay": 0.0, "times": rate / peak_rate(self.config)}
        )

    def _losses(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        if self.defence is not None:
            images = self.defence.on(images, self.spent.steps)
        losses, logits = super()._losses(images, labels)
        if self.setting is None or self.controller is None:
            return losses, logits
        penalty = self.setting.penalty(self.controller)
        return losses if penalty is None else losses + penalty, logits

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        rows, model = evaluation_rows(cast(ThinConfig, self.config)), self.best_model()
        options: dict[str, Any] = {"accelerator": self.accelerator, "batch_size": rows}
        test = evaluate(model, self.data.test, self.data, **options)
        probe = evaluate(model, self.data.train, self.data, limit=self.config.probe, **options)
        self._keep_point({"train_loss": probe.loss, "test_accuracy": test.accuracy, "test_loss": test.loss})


@dataclass(frozen=True)
class Training:
    """One fine-tuning: the study and the way its receipt belongs to, the folder, FLOPs to spend."""

    name: str
    way: str
    folder: Path
    budget: float
    cost: StepCost


def evaluation_rows(config: ThinConfig) -> int:
    """Images a forward pass, where nothing is kept for a backward one."""
    return max(1, min(500, 4 * config.batch_size))


def fine_tune(
    setup: ThinSetup, setting: Setting | None, run: Training, report: Callable[..., None]
) -> tuple[Thinned, Controller | None, Receipt]:
    """Train, save the weights, write the receipt; a finished run is read back, an interrupted one goes on.

    Raises:
        Interrupted: a stop was asked for; the checkpoint is written.
    """
    done = run.folder / TRAINING / RECEIPT
    if setup.config.resume and done.is_file():
        return *_read_back(setup, setting, run.folder), load_receipt(done)
    accelerator = setup.accelerator
    devices = [accelerator.device.index or 0] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices), ResidentPeak() as peak, EnergyWindow() as energy:
        # Dropout and the like: restored afterwards, and not alike on every process.
        torch.manual_seed(setup.config.seed + 7919 * accelerator.process_index)
        checkpoint = run.folder / CHECKPOINT
        fitting = ThinFitting(setup, setting, cost=run.cost, budget=run.budget, checkpoint=checkpoint)
        if setup.config.resume and checkpoint.is_file():
            fitting.resume()
        with tracked(accelerator, setup.config.trackers, run.folder, plain(setup.config)):
            fitting.run(report)
        stored = _save(setup, setting, fitting, run.folder)
    cost = cost_of(_Costed(setup, run.cost), fitting.spent, peak.reading, energy.reading, stored)
    receipt = replace(_receipt(setup, run, fitting), cost=cost)
    if accelerator.is_main_process:
        save_receipt(receipt, done)
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return fitting.thinned.eval(), fitting.controller, receipt


class _Costed:
    """What `cost_of` asks of a job's setup."""

    def __init__(self, setup: ThinSetup, cost: StepCost) -> None:
        self.accelerator, self.data, self.cost = setup.accelerator, setup.data, cost


def _save(setup: ThinSetup, setting: Setting | None, fitting: ThinFitting, folder: Path) -> int:
    """Write the weights, and beside them what the method learnt itself; returns the bytes of both."""
    names = setup.subject.marked({} if setting is None else setting.options)
    size = save_weights(fitting, folder / WEIGHTS, names, part="model")
    if fitting.thinned.gates is not None:
        content = pack_weights({name: value.cpu() for name, value in fitting.thinned.gates.state_dict().items()}, names)
        size += len(content)
        if setup.accelerator.is_main_process:
            write_atomic(folder / GATES, content)
    if fitting.defence is not None and setup.accelerator.is_main_process:
        fitting.defence.save(folder)
    return size


def _read_back(setup: ThinSetup, setting: Setting | None, folder: Path) -> tuple[Thinned, Controller | None]:
    thinned, controller = setup.model(setting)
    thinned.model.load_state_dict(load_file(folder / WEIGHTS))
    if thinned.gates is not None:
        fill_gates_(thinned, folder / GATES)
    return thinned, controller


def fill_gates_(thinned: Thinned, file: Path) -> None:
    """Put what a method has learnt into a model that it is attached to.

    Raises:
        InputError: a file of another model's.
    """
    assert thinned.gates is not None
    try:
        thinned.gates.load_state_dict(load_file(file))
    except Exception as error:  # safetensors' own error class has no stable home
        got = f"{file} ({str(error).splitlines()[0]})"
        raise InputError("gates of this model, whole", got, "pass the whole folder of the run") from error


def _receipt(setup: ThinSetup, run: Training, fitting: ThinFitting) -> Receipt:
    last = fitting.spent.curve[-1]
    return Receipt(
        kind="run",
        name=f"{run.name}: fine-tuning",
        way=run.way,
        seed=setup.config.seed,
        baseline=fitting.setting is None,
        quality={key: last[key] for key in ("test_accuracy", "train_loss", "test_loss")},
        curve=fitting.spent.curve,
        config={**plain(setup.config), "budget_flops": run.budget},
        notes={
            "data": setup.data.name,
            "training images": len(setup.data.train),
            "test images": len(setup.data.test),
            "processes": setup.accelerator.num_processes,
            "device": str(setup.accelerator.device),
            "precision": setup.accelerator.mixed_precision,
            "resumed": fitting.spent.resumes,
            **({} if fitting.defence is None else {"defence": fitting.defence.note()}),
        },
    )
