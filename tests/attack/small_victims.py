"""Victims to attack: one whose best attack is known, and tiny vision transformers that spend by the image."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from scrimp.adaptive import gating_, token_halting_, token_merging_, token_sampling_
from scrimp.attack import AdaptiveVictim, victim_of


class Lit(nn.Module):
    """Weights [3, 8, 8] that a pixel's brightness costs by, and three answers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.Parameter(torch.randn(3, 8, 8, generator=generator))
        self.answer = nn.Parameter(torch.randn(3, 192, generator=generator))
        self.mode = nn.Dropout()


class Toy:
    """The cost of an image is 1000, and 10 for each whole number in the weighted sum of its pixels."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.model = Lit(seed)
        self.full, self.ceiling, self.scale, self.asked = 3000, None, scale, 0

    def _sum(self, images: Tensor) -> Tensor:
        return (images * self.model.weights.to(images)).sum((1, 2, 3))

    def cost(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return 1000 + 10 * self._sum(images).detach().floor().long()

    def policy_loss(self, images: Tensor) -> Tensor:
        assert not self.model.training
        assert not self.model.weights.requires_grad
        return -self.scale * self._sum(images)

    def logits(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.model.answer.to(images).T


def pixels(count: int, side: int = 8, seed: int = 0) -> Tensor:
    """Images [count, 3, side, side] on the 256 levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=generator) / 255


def pictures(count: int, seed: int = 0) -> Tensor:
    """Images [count, 3, 32, 32] on the 256 levels: squares and some noise."""
    coarse = pixels(count, 4, seed).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return ((0.3 + 0.25 * coarse + 0.1 * pixels(count, 32, seed + 1)) * 255).round() / 255


def vit(**more: Any) -> nn.Module:
    """A transformer for images [3, 32, 32] whose attention says something, though it is not trained."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5, "img_size": 32, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in model.parameters():
            part += 0.1 * torch.randn(part.shape, generator=generator)
        model.patch_embed.proj.weight *= 3
        for block in model.blocks:
            block.attn.qkv.weight *= 3
            block.attn.proj.weight *= 3
    return model.eval()


def victim(kind: str, **more: Any) -> AdaptiveVictim:
    """A victim of each method; ``halting`` has its gates where most tokens halt in the first two blocks."""
    surrogate = more.pop("surrogate", None)
    model: Any = vit(**more)
    if kind == "halting":
        token_halting_(model, gate_scale=4, gate_center=-2)
    elif kind == "sampling":
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight[:64] *= 2
        token_sampling_(model, blocks=range(1, len(model.blocks)), least=2)
    elif kind == "gating":
        control, generator = gating_(model), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for part in control.parameters():
                part.copy_(0.5 * torch.randn(part.shape, generator=generator))
    else:
        token_merging_(model, 2)
    return victim_of(model, surrogate=surrogate)
