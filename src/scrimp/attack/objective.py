"""What an attack minimises: the victims' policy loss, beside what it does to their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.attack.attached import Victims, as_list
from scrimp.attack.pixels import check_images, check_labels
from scrimp.attack.victim import Victim, frozen
from scrimp.primitives.errors import InputError

Goal = Literal["ignore", "preserve", "destroy", "accuracy"]
"""What happens to the answers: no matter, kept, made wrong; ``accuracy``: made wrong and nothing else, the control."""

PolicyLoss = Callable[[Tensor], Tensor]
"""Images to a loss by image, [n], or their mean, []."""


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of an attack: policy + task_weight * sign * cross-entropy, averaged over the victims.

    Attributes:
        victims: that are attacked together.
        goal: ``ignore``: sign 0; ``preserve``: 1; ``destroy``: -1; ``accuracy``: -1 and no policy.
        task_weight: of the cross-entropy.
        policy_loss: in place of the victims' own.
        labels: for each victim [images], what its answers are held against; empty for ``ignore``.
    """

    victims: tuple[Victim, ...]
    goal: Goal
    task_weight: float
    policy_loss: PolicyLoss | None
    labels: tuple[Tensor, ...]

    def losses(self, images: Tensor, rows: Tensor) -> Tensor:
        """By image, [n]; ``rows`` [n] are the images' places in ``labels``."""
        parts = [self._one(index, victim, images, rows) for index, victim in enumerate(self.victims)]
        return torch.stack(parts).mean(0)

    def _one(self, index: int, victim: Victim, images: Tensor, rows: Tensor) -> Tensor:
        if self.goal == "ignore":
            return self._policy(victim, images)
        together = getattr(victim, "policy_and_logits", None)
        if self.goal == "accuracy":
            policy, logits = None, victim.logits(images)
        elif together is not None and self.policy_loss is None:
            policy, logits = together(images)
        else:
            policy, logits = self._policy(victim, images), victim.logits(images)
        wanted = self.labels[index][rows.to(self.labels[index].device)].to(logits.device)
        task = self.task_weight * functional.cross_entropy(logits, wanted, reduction="none")
        task = task if self.goal == "preserve" else -task
        return task if policy is None else policy + task

    def _policy(self, victim: Victim, images: Tensor) -> Tensor:
        given = victim.policy_loss(images) if self.policy_loss is None else self.policy_loss(images)
        if given.shape not in ((), (len(images),)):
            raise InputError(f"a loss by image, [{len(images)}]", str(list(given.shape)), "see scrimp.attack.Victim")
        return given.expand(len(images))

    def gradient(self, images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses by image, [n], and the gradient of their sum, of the images' shape.

        An image whose gradient is not finite gets none, and so does one whose loss does not depend on it.
        """
        point = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(point, rows)
            slope = None
            if losses.requires_grad:
                (slope,) = torch.autograd.grad(losses.sum(), point, allow_unused=True)
        if slope is None:
            slope = torch.zeros_like(images)
        sound = slope.isfinite().flatten(1).all(1)[:, None, None, None]
        return losses.detach(), torch.where(sound, slope, 0)


def objective_for(
    victims: Victims,
    images: Tensor,
    *,
    goal: Goal,
    labels: Tensor | None,
    task_weight: float,
    policy_loss: PolicyLoss | None,
) -> Objective:
    """The objective of an attack on these images; without labels answers are held against those to the clean images.

    Raises:
        InputError: images, labels, goal or weight out of range.
    """
    check_images(images)
    found = as_list(victims)
    if goal not in get_args(Goal):
        raise InputError(f"a goal out of {', '.join(get_args(Goal))}", repr(goal), "correct it")
    if not task_weight >= 0:
        raise InputError("a task_weight from 0", str(task_weight), "correct it")
    if labels is not None:
        check_labels("labels", labels, len(images))
    wanted: Sequence[Tensor] = ()
    if goal != "ignore":
        wanted = [answers(victim, images) if labels is None else labels for victim in found]
    return Objective(tuple(found), goal, task_weight, policy_loss, tuple(wanted))


def answers(victim: Victim, images: Tensor, *, batch: int = 64) -> Tensor:
    """The class that a victim gives to each image, [n], int64."""
    none = torch.zeros(0, dtype=torch.int64, device=images.device)
    with frozen(victim.model), torch.no_grad():
        return torch.cat([none, *(victim.logits(part).argmax(1) for part in images.split(batch) if len(part))])
