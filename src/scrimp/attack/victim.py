"""What an attack asks of the model that it is to slow down: the protocol `Victim`, and common ways to use one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError

Cost = Callable[[Tensor], Tensor]
"""Images [n, channels, height, width] from 0 to 1 to what each costs, [n]."""


class Victim(Protocol):
    """A model whose cost depends on the image. Images are floating [n, channels, height, width], from 0 to 1.

    Each image must cost, lose and be answered alike whatever the others of its batch are. A victim may also have
    ``policy_and_logits(images)``, both in one forward, which is then used.
    """

    @property
    def model(self) -> nn.Module:
        """The network; while it is attacked it is in evaluation mode and asks for no gradients of its own."""

    @property
    def full(self) -> int:
        """FLOPs an image of the same model with nothing left out: the dense cost."""

    @property
    def ceiling(self) -> int | None:
        """The highest cost that the policy can give to any image; None where it is not known.

        Not ``full``: below it under a budget, or where the policy can never keep all; above it by what deciding costs.
        """

    def cost(self, images: Tensor) -> Tensor:
        """FLOPs counted image by image, [n], int64, in evaluation mode; 1 multiply-add = 2 FLOPs."""

    def policy_loss(self, images: Tensor) -> Tensor:
        """A differentiable stand-in that falls where the cost rises, by image, [n].

        By image and not their mean: so one that is not a number spoils no other, and each can keep its best.
        """

    def logits(self, images: Tensor) -> Tensor:
        """The answers, [n, classes], differentiable."""


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of weights, and all of it back as it was, errors included."""
    training = [module for model in models for module in model.modules() if module.training]
    learning = [part for model in models for part in model.parameters() if part.requires_grad]
    try:
        for model in models:
            model.eval()
        for part in learning:
            part.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for part in learning:
            part.requires_grad_(True)


def costs_of(cost: Cost, images: Tensor, *, batch: int = 64) -> Tensor:
    """``cost`` of all images, a batch after another, without gradients.

    Args:
        cost: such as ``victim.cost``.
        images: [n, channels, height, width], from 0 to 1; n may be 0.
        batch: images at a time, at least 1.

    Returns:
        [n], on the CPU: int64, or float64 if that is what ``cost`` gives.

    Raises:
        InputError: a batch below 1, or a cost that is not [n].
    """
    if batch < 1:
        raise InputError("a batch of at least 1", str(batch), "correct it")
    found = [torch.zeros(0, dtype=torch.int64)] if not len(images) else []
    with torch.no_grad():
        for part in images.split(batch):
            given = cost(part)
            if given.shape != (len(part),):
                raise InputError(
                    f"one cost an image, [{len(part)}]", str(list(given.shape)), "see scrimp.attack.Victim"
                )
            found.append(given.detach().cpu().to(torch.float64 if given.is_floating_point() else torch.int64))
    return torch.cat(found)
