"""Distillation: the loop of `scrimp.jobs.fit` with one view of each image, and what its teachers make of it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.data import ImageData, standardise
from scrimp.jobs.budget import StepCost
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_lessons import Lesson, Lessons
from scrimp.jobs.distill_plan import PLAN
from scrimp.jobs.distill_student import Answers, Objective, Student
from scrimp.jobs.distill_teachers import Teacher
from scrimp.jobs.encoder_fit import EncoderFitting
from scrimp.jobs.evaluate import evaluate
from scrimp.jobs.fit import Spent
from scrimp.select import Policy, Record, Selection, uniform_sample

if TYPE_CHECKING:
    from accelerate import Accelerator

KEPT = "teacher"
"""Folder of the teachers' features in a run folder, until the run is finished."""


@dataclass(frozen=True, eq=False)
class Before:
    """What was spent before the first step, on this process."""

    flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Teaching:
    """Where the lessons come from and how they are marked.

    Attributes:
        lessons: see `scrimp.jobs.distill_lessons`.
        objective: see `scrimp.jobs.distill_student`.
        teachers: asked in every step whose lesson brings no features.
        labelled: the images to train on, int64 rows; all of them where ``None``.
        before: what it took to get here.
    """

    lessons: Lessons
    objective: Objective
    teachers: Sequence[Teacher] = ()
    labelled: Tensor | None = None
    before: Before = Before()


class DistillFitting(EncoderFitting):
    """A run in the making, see `scrimp.jobs.fit.Fitting`; its curve holds the loss and the accuracy of neighbours.

    While it runs, ``spent`` and the budget are those of the steps; at its end ``spent`` and the curve hold what went
    before as well.

    Args:
        config: teachers, student and loop.
        student: fresh and unwrapped.
        teaching: lessons and losses.
        data: images; their labels are used to measure, and where the objective wants them.
        accelerator: see `scrimp.jobs.engine.start`.
        cost: counted FLOPs of an image in a step.
        budget: FLOPs of all steps.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        teaching: Teaching,
        data: ImageData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
    ) -> None:
        super().__init__(
            config, student, data, accelerator=accelerator, cost=cost, budget=budget, checkpoint=checkpoint
        )
        self.settings, self.teaching = config, teaching
        if teaching.labelled is not None:
            self.sampler.policy = among(teaching.labelled)

    def run(self, report: Callable[[Spent], None]) -> None:
        super().run(report)
        before = self.teaching.before
        for point in self.spent.curve:
            for name in ("flops", "seconds", "cpu_seconds"):
                point[name] = (point[name] or 0.0) + getattr(before, name)
        self.spent = replace(
            self.spent,
            flops=self.spent.flops + before.flops,
            seconds=self.spent.seconds + before.seconds,
            cpu_seconds=self.spent.cpu_seconds + before.cpu_seconds,
        )

    def clean(self) -> None:
        super().clean()
        folder = self.checkpoint.parent
        (folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(folder / KEPT, ignore_errors=True)

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Lesson, Tensor]:
        rank, rows, device = self.accelerator.process_index, len(images), self.accelerator.device
        place = slice(rank * rows, (rank + 1) * rows)
        return self.teaching.lessons(images.to(device), indices, number, place), labels.to(device)

    def _backward(self, images: Lesson, labels: Tensor, weights: Tensor | None) -> None:
        count = self.settings.accumulate
        parts = zip(images.parts(count), labels.chunk(count), strict=True)
        self.accumulate([functools.partial(self._mean_loss, part, some) for part, some in parts])

    def _mean_loss(self, images: Lesson, labels: Tensor) -> Tensor:
        return self._losses(images, labels)[0].mean()

    def _losses(self, images: Lesson, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = images.targets
        if targets is None:
            targets = [teacher(images.views, autocast=self.accelerator.autocast) for teacher in self.teaching.teachers]
        shown = standardise(images.views, self.data.mean, self.data.std)
        with self.accelerator.autocast():
            outputs = self.model([shown])
        losses = self.teaching.objective([item.float() for item in outputs], targets, labels)
        return losses, losses

    def neighbour_accuracies(self) -> dict[str, float | None]:
        """Those of neighbours, and where the student's head gives logits, theirs as ``test_accuracy``."""
        found = super().neighbour_accuracies()
        if self.settings.uses_labels:
            answers = Answers(self.model)
            found["test_accuracy"] = evaluate(answers, self.data.test, self.data, accelerator=self.accelerator).accuracy
        return found


def among(rows: Tensor) -> Policy:
    """A policy that draws from some images only, each as often as any other of them."""

    def policy(record: Record, budget: int, *, generator: torch.Generator) -> Selection:
        chosen = uniform_sample(len(rows), budget, generator=generator)
        return Selection(rows[chosen.indices], chosen.weights)

    return policy
