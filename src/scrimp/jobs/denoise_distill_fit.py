"""Distilling a denoiser: the loop of `scrimp.jobs.fit` over pairs of a noise and its teacher's image."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scrimp.data import ImageData
from scrimp.denoise.flow_map import Velocity, consistency_loss, flow_map_loss, straight_loss, u_shaped
from scrimp.denoise.process import new_scheduler, process_of
from scrimp.denoise.quality import paired_error
from scrimp.denoise.solvers import integrate, solver_for
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_distill_pairs import HeldOut, Pairs
from scrimp.jobs.denoise_distill_plan import Plan, grids_of
from scrimp.jobs.denoise_models import Denoiser
from scrimp.jobs.fit import Fitting
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

_LEVELS = 13  # key of this random stream among those of one seed
_SEGMENTS = (8, 64)  # of a path, between which consistency is asked for: at first and at last


@dataclass(frozen=True, eq=False)
class Lesson:
    """A share of a batch, on the device; the fields beside the pairs are those of the step's method."""

    method: str
    clean: Tensor
    noise: Tensor
    labels: Tensor | None
    sigma: Tensor
    lower: Tensor
    grids: Tensor
    jumps: Tensor


def student_of(teacher: Denoiser) -> Denoiser:
    """A copy of the teacher's network to be trained as a velocity on straight paths, whatever it predicted before."""
    scheduler = new_scheduler("flow", teacher.process.levels)
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    return dataclasses.replace(teacher, model=model, process=process_of(scheduler), scheduler=scheduler)


def velocity_of(student: Denoiser, labels: Tensor | None, through: nn.Module, autocast: Callable[[], Any]) -> Velocity:
    """The student as the losses take it; of fewer samples than labels, those of the first ones."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        given = None if labels is None else labels[: len(x)]
        with autocast():
            return student.predict(x, sigma * student.process.levels, given, through=through).float()

    return velocity


class DenoiseDistillFitting(Fitting):
    """A run in the making, see `Fitting`; its curve holds the loss and the paired errors at few steps.

    Args:
        config: method and loop.
        student: see `student_of`.
        pairs: to learn from.
        held_out: to measure on.
        accelerator: see `scrimp.jobs.engine.start`.
        plan: see `Plan`.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: DenoiseDistillConfig,
        student: Denoiser,
        pairs: Pairs,
        held_out: HeldOut,
        *,
        accelerator: Accelerator,
        plan: Plan,
        checkpoint: Path,
    ) -> None:
        empty = ImageData(train=cast(Any, pairs), test=cast(Any, pairs), classes=(), name="pairs", mean=(), std=())
        super().__init__(
            cast(ModelConfig, config),  # it has all that the loop asks for
            student.model,
            empty,
            accelerator=accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=plan.cost,
            budget=plan.budget,
            seed=config.seed,
            checkpoint=checkpoint,
        )
        self.settings, self.student, self.held_out, self.plan = config, student, held_out, plan
        self._loss = torch.zeros(2, dtype=torch.float64)  # this process's sum since the last look, and how many steps

    @property
    def done(self) -> bool:
        """Whether all steps are made: they differ in FLOPs, so that what is left of the budget would not tell."""
        return self.spent.steps >= self.plan.steps

    def trained(self) -> Denoiser:
        """What is measured and saved, in eval mode; unwrapped, so that replicas need not wait."""
        model = self.ema.module if self.ema is not None else self.plain
        return dataclasses.replace(self.student, model=model.eval())

    def errors(self) -> dict[str, float | None]:
        """Mean paired error of the held-out noises' images at few steps, by name; on every rank."""
        reference = self.held_out.reference
        return {
            f"paired_error_{steps}": float(paired_error(self.images(steps), reference).mean())
            for steps in self.settings.jumps
        }

    def images(self, steps: int) -> Tensor:
        """The trained student's images of the held-out noises, on the CPU; on every rank, each gets all."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = len(self.held_out.noise)
        share = -(-count // world)
        mine = (torch.arange(share) * world + rank) % count
        found = []
        for rows in mine.split(self.settings.batch_size):
            labels = None if self.held_out.labels is None else self.held_out.labels[rows]
            made = few_step_images(
                self.trained(), self.held_out.noise[rows], labels, steps, autocast=self.accelerator.autocast
            )
            found.append(made)
        every = cast(Tensor, self.accelerator.gather(torch.cat(found)))
        return every.unflatten(0, (world, share)).transpose(0, 1).flatten(0, 1)[:count].cpu()

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Lesson, Tensor]:
        rank, rows, device = self.accelerator.process_index, len(images), self.accelerator.device
        place = slice(rank * rows, (rank + 1) * rows)
        method, count = self.plan.lesson(number), self.plan.batch_size
        sigma = u_shaped(count, generator=generator_for(self.seed, _LEVELS, number))[place]
        turns = self.plan.turns()[place]
        grids = grids_of([steps for steps, _ in turns], max(self.plan.jumps))
        lower = (sigma - 1 / self._segments(number)).clamp_min(0)
        jumps = torch.tensor([jump for _, jump in turns])
        # Those with most jumps to make stand first: the walk asks the network for ever fewer of them.
        order = jumps.argsort(descending=True, stable=True)
        clean, noise = images[order].to(device).unbind(1)
        given = None if self.student.classes is None else labels[order].to(device)
        sigma, lower, grids, jumps = (item[order].to(device) for item in (sigma, lower, grids, jumps))
        return Lesson(method, clean, noise, given, sigma, lower, grids, jumps), labels

    def _losses(self, images: Lesson, labels: Tensor) -> tuple[Tensor, Tensor]:
        lesson, autocast = images, self.accelerator.autocast
        student = velocity_of(self.student, lesson.labels, self.model, autocast)
        # The weights as they are: their average lags behind by more than these few jumps forgive.
        target = velocity_of(self.student, lesson.labels, self.plain, autocast)
        if lesson.method == "reflow":
            losses = straight_loss(student, lesson.clean, lesson.noise, lesson.sigma)
        elif lesson.method == "flow-map":
            losses = flow_map_loss(student, target, lesson.clean, lesson.noise, sigmas=lesson.grids, jumps=lesson.jumps)
        else:
            losses = consistency_loss(
                student, target, lesson.clean, lesson.noise, sigma=lesson.sigma, lower=lesson.lower
            )
        if not bool(torch.isfinite(losses).all()):
            kept = "the last checkpoint is kept" if self.checkpoint.is_file() else "there is no checkpoint yet"
            raise InputError(
                "finite losses",
                f"NaN or infinite ones in step {self.spent.steps + 1}; {kept}",
                "start a new run with a lower --lr, or --precision fp32 or bf16",
            )
        self._loss += torch.tensor([float(losses.detach().mean()), 1.0], dtype=torch.float64)
        return losses, losses

    def _clip(self) -> None:
        self.accelerator.unscale_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _step_flops(self, pool: int = 1) -> float:
        return self.plan.flops(self.spent.steps - 1)  # asked once the step is counted

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        value, steps = self._summed().tolist()
        self._loss.zero_()
        self._keep_point({"train_loss": value / steps if steps else None, **self.errors()})

    def _segments(self, number: int) -> int:
        """Into how many parts consistency cuts a path: twice as many every so often (Song and Dhariwal 2023)."""
        share = (number - self.plan.straight) / max(1, self.plan.steps - self.plan.straight)
        first, last = _SEGMENTS
        doublings = (last // first).bit_length()
        return first << min(doublings - 1, max(0, int(share * doublings)))

    def _summed(self) -> Tensor:
        if self.accelerator.num_processes == 1:
            return self._loss.clone()
        return cast(Tensor, self.accelerator.reduce(self._loss.to(self.accelerator.device), reduction="sum")).cpu()

    def _more_state(self) -> dict[str, Any]:
        return {"loss": self._summed() / self.accelerator.num_processes}

    def _take_up(self, state: dict[str, Any]) -> None:
        self._loss.copy_(state["loss"])

    def _make_ema(self) -> AveragedModel | None:
        if self.config.ema is None:
            return None
        return AveragedModel(self.plain, multi_avg_fn=warmed_average(self.config.ema), use_buffers=True)


def few_step_images(
    student: Denoiser, noise: Tensor, labels: Tensor | None, steps: int, *, autocast: Callable[[], Any]
) -> Tensor:
    """Images by Euler's steps, [batch, C, H, W] on the model's device."""
    device = student.device
    labels = None if labels is None else labels.to(device)

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        with autocast():
            return student.predict(x, timestep, labels)

    with torch.no_grad():
        return integrate(denoise, solver_for("euler", student.scheduler), noise.to(device), steps=steps)


def warmed_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """A moving average that forgets its start: the decay of step n is at most (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update_(averages: Any, values: Any, number: Any) -> None:
        count = int(number)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        for average, value in zip(averages, values, strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average.device, average.dtype), weight)
            else:
                average.copy_(value)

    return update_
