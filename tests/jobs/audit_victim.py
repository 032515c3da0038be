"""A victim as other people would write one; its file is also read as a module of theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bright:
    """The brighter the image, the dearer."""

    full = 1000

    def __init__(self, model: str = "", ceiling: int | None = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Linear(256, 3)
        self.name, self.ceiling = model, ceiling

    def capped(self, max_flops: int) -> Bright:
        return Bright(self.name, max_flops)

    def cost(self, images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3)) * 900).long().clamp_max(self.ceiling or self.full)

    def policy_loss(self, images: Tensor) -> Tensor:
        return -images.mean((1, 2, 3))

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images.flatten(1))


def broken(model: str) -> nn.Module:
    return nn.Identity()
