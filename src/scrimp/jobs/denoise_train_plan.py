"""What a denoiser's training steps cost, on parts of images and on whole ones, and how many of each a budget pays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scrimp.jobs.budget import checked_budget, flops_in, seconds_a_step
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.denoise_models import Denoiser
from scrimp.jobs.denoise_train_step import Objective, Rows
from scrimp.jobs.engine import slowest
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

_USUAL_MINUTES = 5.0


@dataclass(frozen=True)
class Costs:
    """Counted FLOPs of an image: trained on a part, trained whole, predicted.

    Scoring timesteps costs none beyond: the scores are the losses that training computes.
    """

    partial: float
    whole: float
    forward: float
    missed: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """How many steps on parts of images come first, and on whole ones then; FLOPs of an image in each."""

    partial_steps: int
    whole_steps: int
    partial_flops: float
    whole_flops: float

    @property
    def steps(self) -> int:
        return self.partial_steps + self.whole_steps

    def flops(self, batch_size: int) -> float:
        """Of the whole run; a little more than whole steps, lest the last one is lost to rounding."""
        images = self.partial_steps * self.partial_flops + self.whole_steps * self.whole_flops
        return batch_size * images * (1 + 1e-9)

    def record(self, batch_size: int) -> dict[str, Any]:
        """What a resumed run takes up."""
        return {"plan": asdict(self), "budget_flops": self.flops(batch_size)}


class Trial:
    """Steps on a copy of a denoiser, to be counted and timed.

    Args:
        config: of the run.
        denoiser: stays as it is.
        rows: images a step.
        labelled: whether the network is told classes.
    """

    def __init__(self, config: DenoiseTrainConfig, denoiser: Denoiser, rows: int, *, labelled: bool) -> None:
        twin = replace(denoiser, model=copy.deepcopy(denoiser.model).train())
        self.objective = Objective(twin, weighting=config.part("weighting"), keep=config.part("keep"))
        self.generator, self.rows = generator_for(0), Rows(0, rows, rows)
        self.clean = torch.randn(rows, *denoiser.shape, generator=self.generator).to(denoiser.device)
        labels = torch.arange(rows, device=denoiser.device) % (denoiser.classes or 1)
        self.labels = labels if labelled else None
        self.index = torch.arange(rows) * denoiser.process.levels // rows
        self.trained = [item for item in twin.model.parameters() if item.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)

    def train(self, *, partial: bool, accelerator: Accelerator | None = None) -> None:
        """One step forward and backward; with an accelerator under its autocast, and the optimiser's as well."""
        autocast = None if accelerator is None else accelerator.autocast()
        images: tuple[Tensor, Tensor | None] = (self.clean, self.labels)
        losses, _ = self.objective.losses(
            images, self.index, partial=partial, rows=self.rows, generator=self.generator, autocast=autocast
        )
        losses.mean().backward()
        if accelerator is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def look(self) -> None:
        """One prediction."""
        denoiser = self.objective.denoiser
        with torch.no_grad():
            denoiser.predict(self.clean, denoiser.process.timestep(self.index), self.labels)


def count_costs(config: DenoiseTrainConfig, denoiser: Denoiser, *, labelled: bool) -> Costs:
    """Count both kinds of steps, and a forward pass.

    Raises:
        InputError: a model whose FLOPs cannot be counted, or that has no such parts.
    """
    trial = Trial(config, denoiser, min(4, config.batch_size), labelled=labelled)
    partly = config.part("keep") < 1
    calls: list[Callable[[], None]] = [lambda: trial.train(partial=partly), lambda: trial.train(partial=False)]
    counted = [count_flops(call) for call in [*calls, trial.look]]
    values = [_value(item, denoiser) / trial.rows.count for item in counted]
    missed = tuple(sorted({name for item in counted for name in item.missed}))
    return Costs(values[0], values[1], values[2], missed)


def make_plan(
    config: DenoiseTrainConfig,
    denoiser: Denoiser,
    costs: Costs,
    *,
    accelerator: Accelerator,
    images: int,
    labelled: bool,
) -> Plan:
    """The steps that the smallest of the budgets pays for.

    Args:
        images: how many there are to train on.
        labelled: whether the network is told classes.

    Raises:
        InputError: a budget below one step.
    """
    share = config.part("whole") if config.part("keep") < 1 else 1.0
    batch = config.batch_size
    a_flop = (1 - share) / costs.partial / batch + share / costs.whole / batch  # steps
    budgets = [] if config.flops is None else [config.flops]
    if config.steps is not None:
        budgets.append(config.steps / a_flop)
    if config.epochs is not None:
        budgets.append(config.epochs * images / batch / a_flop)
    minutes = config.minutes if config.minutes is not None or budgets else _USUAL_MINUTES
    if minutes is not None:
        step, extra = _seconds(config, denoiser, costs, accelerator, labelled=labelled)
        budgets.append(flops_in(minutes * 60, 1 / a_flop, train_seconds=step, extra_seconds=extra))
    budget = checked_budget(min(budgets) * (1 + 1e-9), 1 / a_flop)
    if config.steps is not None and budget >= config.steps / a_flop:
        total = config.steps
        partial = round((1 - share) * budget / costs.partial / batch)
    else:
        partial = int((1 - share) * budget / costs.partial / batch)
        total = partial + int((budget / batch - partial * costs.partial) / costs.whole)
    return Plan(partial, total - partial, costs.partial, costs.whole)


def _seconds(
    config: DenoiseTrainConfig, denoiser: Denoiser, costs: Costs, accelerator: Accelerator, *, labelled: bool
) -> tuple[float, float]:
    """Wall seconds of a step, both kinds in their shares, and of all that is not training; the slowest process's."""
    rows = config.batch_size // accelerator.num_processes
    trial = Trial(config, denoiser, rows, labelled=labelled)
    whole = seconds_a_step(lambda: trial.train(partial=False, accelerator=accelerator), repeats=5)
    partial, share = whole, 1.0
    if config.part("keep") < 1:
        partial = seconds_a_step(lambda: trial.train(partial=True, accelerator=accelerator), repeats=5)
        share = config.part("whole")
    look = seconds_a_step(trial.look, repeats=3) / rows
    # Of steps, not of FLOPs: both kinds cost differently.
    mix = (1 - share) / costs.partial + share / costs.whole
    step = ((1 - share) / costs.partial * partial + share / costs.whole * whole) / mix
    measured = 2 * config.probe * config.evaluations / accelerator.num_processes
    step, extra = slowest(accelerator, step, look * (measured + config.samples * config.sample_steps) + 1.0)
    return step, extra


def _value(counted: Reading, denoiser: Denoiser) -> float:
    if counted.value is None:
        raise InputError("a model whose FLOPs can be counted", type(denoiser.model).__name__, "report this")
    return counted.value
