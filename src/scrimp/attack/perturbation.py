"""Changes of all pixels within a small l-infinity ball that raise the cost: by image, for all images, by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.attack.attached import Victims
from scrimp.attack.objective import Goal, Objective, PolicyLoss, objective_for
from scrimp.attack.pixels import check_epsilon, check_images, check_labels, to_ball
from scrimp.attack.victim import frozen
from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What is added to images.

    Attributes:
        deltas: [k, channels, height, width]: one for each image, for each class, or for all (k = 1).
        epsilon: their largest entry.
    """

    deltas: Tensor
    epsilon: float

    def on(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """The images changed, a new tensor: on the 256 levels, from 0 to 1, within epsilon of what they were.

        Args:
            images: [n, channels, height, width], from 0 to 1.
            rows: [n], which of the deltas each image gets: its class; None: each its own, or the one there is.

        Raises:
            InputError: images of another shape, or rows that are missing or not there.
        """
        check_images(images)
        if images.shape[1:] != self.deltas.shape[1:]:
            got = str(list(images.shape))
            raise InputError(f"images [n, {', '.join(map(str, self.deltas.shape[1:]))}]", got, "resize them")
        count = len(self.deltas)
        if rows is None:
            if count not in (1, len(images)):
                raise InputError(f"rows, out of {count} deltas, for {len(images)} images", "none", "pass rows=")
            rows = torch.zeros(len(images), dtype=torch.int64) if count == 1 else torch.arange(count)
        check_labels("rows", rows, len(images))
        if len(rows) and int(rows.max()) >= count:
            raise InputError(f"rows below {count}", str(int(rows.max())), "a class that was not attacked has none")
        return to_ball(images + self.deltas[rows.to(self.deltas.device)].to(images), images, self.epsilon)


def perturb(
    victim: Victims,
    images: Tensor,
    *,
    epsilon: float,
    generator: torch.Generator,
    steps: int = 20,
    step_size: float | None = None,
    universal: bool = False,
    classes: Tensor | None = None,
    batch: int | None = None,
    goal: Goal = "ignore",
    labels: Tensor | None = None,
    task_weight: float = 1.0,
    policy_loss: PolicyLoss | None = None,
) -> Perturbation:
    """Projected gradient descent by signs on what a model spends, in an l-infinity ball (Madry et al. 2018).

    By image as a rule; one perturbation for all with ``universal``, one a class with ``classes`` (DeepSloth, ICLR 2021;
    DeSparsify, NeurIPS 2024). The model sees what `Perturbation.on` gives: the levels of 8 bits inside of the ball.

    Args:
        victim: or several: then the mean of their losses is minimised. Weights, gradients and mode are left as found.
        images: [n, channels, height, width], from 0 to 1, n >= 1; not written to.
        epsilon: radius, from 1/255, such as 8 / 255.
        generator: on the CPU; draws the start, uniform in the ball, and batches.
        steps: from 0.
        step_size: None: 2.5 epsilon / steps.
        universal: one for all images.
        classes: [n], from 0: one for each class; ``deltas`` then has max + 1 rows.
        batch: images at a time: by image one batch after another, else drawn for each step. None: all. What is kept is
            the perturbation of the lowest loss where each step sees all that it is for, else the last.
        goal: see `universal_patch`.
        labels: see `universal_patch`.
        task_weight: see `universal_patch`.
        policy_loss: in place of the victim's own.

    Raises:
        InputError: arguments out of range.
    """
    check_epsilon(epsilon)
    task = objective_for(victim, images, goal=goal, labels=labels, task_weight=task_weight, policy_loss=policy_loss)
    size = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size
    if not len(images) or steps < 0 or not size > 0 or (batch is not None and batch < 1):
        saw = f"{len(images)} images, steps={steps}, step_size={step_size}, batch={batch}"
        raise InputError("1 image or more, steps from 0, step_size above 0, batch from 1", saw, "correct them")
    if universal and classes is not None:
        raise InputError("universal or classes", "both", "leave one out")
    search = _Search(task, images.detach(), epsilon, size, steps, generator)
    with frozen(*(one.model for one in task.victims)):
        if universal or classes is not None:
            shared = torch.zeros(len(images), dtype=torch.int64) if classes is None else classes
            check_labels("classes", shared, len(images))
            return Perturbation(search.shared(shared.cpu(), batch), epsilon)
        parts = torch.arange(len(images)).split(batch or len(images))
        return Perturbation(torch.cat([search.own(part) for part in parts]), epsilon)


@dataclass(frozen=True, eq=False)
class _Search:
    """The descent; ``shared`` and ``own`` give deltas."""

    task: Objective
    images: Tensor
    epsilon: float
    size: float
    steps: int
    generator: torch.Generator

    def own(self, rows: Tensor) -> Tensor:
        """One for each of the images ``rows``."""
        images = self.images[rows.to(self.images.device)]
        deltas = self._start(len(rows))
        deltas = torch.maximum(torch.minimum(deltas, 1 - images), -images)
        best, lowest = deltas, torch.full((len(rows),), torch.inf, dtype=torch.float64)
        for step in range(self.steps + 1):
            losses, slope = self._look(images, deltas, rows)
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            best = torch.where(better.to(deltas.device)[:, None, None, None], deltas, best)
            if step < self.steps:
                deltas = self._moved(deltas, slope)
                deltas = torch.maximum(torch.minimum(deltas, 1 - images), -images)
        return best

    def shared(self, groups: Tensor, batch: int | None) -> Tensor:
        """One for each group of images, ``groups`` [n]."""
        count, kinds = len(groups), int(groups.max()) + 1
        deltas = self._start(kinds)
        whole = batch is None or batch >= count
        best, lowest = deltas, torch.full((kinds,), torch.inf, dtype=torch.float64)
        for step in range(self.steps + whole):
            rows = torch.arange(count) if whole else torch.randperm(count, generator=self.generator)[:batch]
            images, group = self.images[rows.to(self.images.device)], groups[rows]
            at = group.to(deltas.device)
            losses, slope = self._look(images, deltas[at], rows)
            mean = _means(losses, group, kinds)
            better = mean < lowest
            lowest = torch.where(better, mean, lowest)
            best = torch.where(better.to(deltas.device)[:, None, None, None], deltas, best)
            if step < self.steps:
                deltas = self._moved(deltas, torch.zeros_like(deltas).index_add(0, at, slope.to(deltas)))
        return best if whole else deltas

    def _start(self, count: int) -> Tensor:
        shape = (count, *self.images.shape[1:])
        noise = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        wide = torch.promote_types(self.images.dtype, torch.float32)
        return ((2 * noise - 1) * self.epsilon).to(self.images.device, wide)

    def _look(self, images: Tensor, deltas: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        shown = to_ball(images + deltas, images, self.epsilon)
        losses, slope = self.task.gradient(shown, rows)
        return losses.double().cpu().nan_to_num(nan=torch.inf, neginf=torch.inf), slope

    def _moved(self, deltas: Tensor, slope: Tensor) -> Tensor:
        return (deltas - self.size * slope.to(deltas).sign()).clamp(-self.epsilon, self.epsilon)


def _means(losses: Tensor, groups: Tensor, kinds: int) -> Tensor:
    """Mean loss of each group, of the losses that are numbers; infinite without any."""
    sound = losses.isfinite()
    total = torch.zeros(kinds, dtype=torch.float64).index_add(0, groups[sound], losses[sound])
    count = torch.zeros(kinds, dtype=torch.float64).index_add(0, groups, sound.double())
    return torch.where(count > 0, total / count.clamp_min(1), torch.inf)
