"""What a run of `scrimp zoom train` goes by: data, model, and the counted cost of an image."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp.jobs.budget import StepCost, checked_budget, flops_in, seconds_a_step
from scrimp.jobs.engine import slowest
from scrimp.jobs.folder import CHECKPOINT
from scrimp.jobs.zoom_config import ZoomTrainConfig
from scrimp.jobs.zoom_data import Progress, ZoomData, load_zoom_data
from scrimp.jobs.zoom_fit import ZoomFitting
from scrimp.jobs.zoom_plan import Plan, plan_of
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

_USUAL_EPOCHS = 20.0


@dataclass(frozen=True, eq=False)
class ZoomSetup:
    """Loaded once.

    Attributes:
        config: its batch size resolved.
        cost: of an image.
    """

    config: ZoomTrainConfig
    plan: Plan
    data: ZoomData
    accelerator: Accelerator
    cost: StepCost

    def fitting(self, folder: Path, budget: float) -> ZoomFitting:
        """A run that has not begun."""
        return ZoomFitting(
            self.config,
            self.plan,
            self.plan.build(seed=self.config.seed, pretrained=self.config.pretrained),
            self.data,
            accelerator=self.accelerator,
            cost=self.cost,
            budget=budget,
            checkpoint=folder / CHECKPOINT,
        )

    def budget(self, folder: Path) -> float:
        """FLOPs of the run: the smallest of the budgets given, the usual passes with none."""
        config, step = self.config, self.cost.train * self.config.batch_size
        budgets = [config.flops] if config.flops is not None else []
        if config.minutes is not None:
            train, look = self._seconds(folder)
            shown = config.evaluations * (len(self.data.test) + min(config.probe, len(self.data.train)))
            extra = 1.0 + look * shown / config.batch_size
            budgets.append(flops_in(config.minutes * 60, step, train_seconds=train, extra_seconds=extra))
        if config.epochs is not None or not budgets:
            # Passes are of whole batches, as the sampler deals them.
            rows = len(self.data.train) // config.batch_size * config.batch_size
            budgets.append(self.cost.train * rows * (_USUAL_EPOCHS if config.epochs is None else config.epochs))
        # A little more than whole steps, lest the last one is lost to rounding.
        return checked_budget(min(budgets) * (1 + 1e-9), step)

    def _seconds(self, folder: Path) -> tuple[float, float]:
        """Wall seconds of one training step and of one look at as many images, the slowest process's."""
        trial = self.fitting(folder, 1.0)
        rows = torch.arange(self.config.batch_size // self.accelerator.num_processes)
        train = self.data.train

        def step() -> None:
            batch, labels = trial._prepare(train.batch(rows), train.labels[rows], 0, rows)
            trial.model.train()
            losses, _ = trial._losses(batch, labels)
            losses.mean().backward()

        def look() -> None:
            with torch.no_grad():
                trial.trained()(trial.scenes_of(train, rows, train.batch(rows)))

        trained, shown = slowest(self.accelerator, seconds_a_step(step, repeats=3), seconds_a_step(look, repeats=3))
        return trained, shown


def prepare_zoom(config: ZoomTrainConfig, source: Any, accelerator: Accelerator, progress: Progress) -> ZoomSetup:
    """Load the data, make their views, build the model once to count its cost.

    Raises:
        InputError: data, networks, patches or a batch size that cannot be used.
    """
    with accelerator.main_process_first():  # the views it makes the others then find
        data = load_zoom_data(config, source, progress)
    config = dataclasses.replace(config, batch_size=_batch_size(config, len(data.train), accelerator))
    plan = plan_of(config, data)
    model = plan.build(seed=config.seed, pretrained=config.pretrained).to(accelerator.device)
    cost = count_image(plan, model, data.train.sizes)
    return ZoomSetup(config, plan, data, accelerator, cost)


def count_image(plan: Plan, model: nn.Module, sizes: torch.Tensor) -> StepCost:
    """FLOPs of one image, forward and backward and forward alone, counted on a copy.

    Of all patches' features the cost grows evenly with their number: two and three are counted.
    """
    device = next(model.parameters()).device
    if plan.method != "abmil":
        train, score, missed = _counted(plan, model, None, device)
        return StepCost(train, score, missed)
    side = plan.patch_size[0]
    counts = torch.stack([(sizes[:, axis].double() / side).ceil() for axis in (0, 1)]).prod(0)
    two, three = (_counted(plan, model, torch.tensor([[side * n, side]] * 2), device) for n in (2, 3))
    more = float(counts.mean()) - 2
    return StepCost(two[0] + more * (three[0] - two[0]), two[1] + more * (three[1] - two[1]), two[2])


def _counted(
    plan: Plan, model: nn.Module, sizes: torch.Tensor | None, device: torch.device
) -> tuple[float, float, tuple[str, ...]]:
    """Of one image, counted in a batch of two: batch statistics need more than one value."""
    twin, scenes = copy.deepcopy(model), plan.blank(2, device, sizes)

    def step() -> None:
        outputs, spread = twin.train()(scenes, lambda number: [generator_for(0)] * 2)
        (outputs.sum() + spread.sum()).backward()

    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        trained = count_flops(step)
        with torch.no_grad():
            scored = count_flops(lambda: twin.eval()(scenes))
    if trained.value is None or scored.value is None or not math.isfinite(trained.value):
        raise InputError("a model whose FLOPs can be counted", plan.features, "choose other networks")
    return trained.value / 2, scored.value / 2, trained.missed


def _batch_size(config: ZoomTrainConfig, rows: int, accelerator: Accelerator) -> int:
    """The batch size asked for, or that of few images."""
    world = accelerator.num_processes
    if config.batch_size % world or rows < world:
        got = f"{config.batch_size} of {rows}"
        raise InputError(f"a batch that {world} process(es) share evenly", got, "pass another --batch-size")
    return min(config.batch_size, rows // world * world)
