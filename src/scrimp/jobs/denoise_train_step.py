"""What one training step of a denoiser asks of the network: noise, target, weight, and which part of the images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.denoise import WEIGHTINGS, TokenDrop, cut, denoising_loss, gradient_bound
from scrimp.jobs.denoise_models import Denoiser
from scrimp.primitives.errors import InputError

_UNIT = 4  # a UNet of three levels halves its images twice


@dataclass(frozen=True)
class Rows:
    """Which rows of the batch of all processes are this one's: draws are made for all, so that they are the same."""

    first: int
    count: int
    total: int

    def of(self, values: Tensor) -> Tensor:
        """These rows of [total, ...]."""
        return values[self.first : self.first + self.count]


class Parts:
    """Which part of each image a partial step sees: some of a transformer's tokens, a random square for a UNet.

    Args:
        denoiser: its model not wrapped.
        keep: share asked for; 1 is all.

    Attributes:
        share: of the pixels that are kept.

    Raises:
        InputError: images that the network cannot take a part of that size of.
    """

    def __init__(self, denoiser: Denoiser, keep: float) -> None:
        self.drop: TokenDrop | None = None
        self.side: int | None = None
        self.share = 1.0
        if keep == 1:
            return
        if hasattr(denoiser.model, "transformer_blocks"):
            self.drop = TokenDrop(denoiser.model, keep)
            self.share = self.drop.kept / self.drop.tokens
            return
        height, width = denoiser.shape[1:]
        shorter = min(height, width)
        self.side = round(math.sqrt(keep * height * width) / _UNIT) * _UNIT
        if not 2 * _UNIT <= self.side < shorter:
            sides = range(2 * _UNIT, shorter, _UNIT)
            shares = ", ".join(f"{side * side / height / width:.2f}" for side in sides) or "none"
            raise InputError(
                f"for images of {height}x{width} a --keep near one of: {shares}, or 1", f"{keep}", "pass one of them"
            )
        self.share = self.side**2 / (height * width)

    def cut(self, images: Tensor, rows: Rows, *, generator: torch.Generator) -> Tensor:
        """Random squares of a UNet's images; a transformer's stay whole here."""
        if self.side is None:
            return images
        height, width = images.shape[2:]
        places = torch.arange(height * width).view(1, 1, height, width).expand(rows.total, 1, height, width)
        places = rows.of(cut(places, self.side, generator=generator)).flatten(1)[:, None].to(images.device)
        kept = images.flatten(2).gather(2, places.expand(-1, images.shape[1], -1))
        return kept.unflatten(2, (self.side, self.side))

    @contextmanager
    def masked(self, rows: Rows, *, generator: torch.Generator) -> Iterator[Tensor | None]:
        """Within it a transformer takes some tokens only; yields the pixels these are, a UNet's all."""
        if self.drop is None:
            yield None
            return
        # The draws of the rows before: so that what is kept does not depend on the number of processes.
        torch.rand(rows.first, self.drop.tokens, generator=generator)
        with self.drop.dropping(rows.count, generator=generator) as mask:
            yield mask


class Objective:
    """The loss of a recipe.

    Args:
        denoiser: what is trained, not wrapped.
        weighting: a name out of `scrimp.denoise.WEIGHTINGS`.
        keep: share of each image that a partial step sees.
    """

    def __init__(self, denoiser: Denoiser, *, weighting: str, keep: float) -> None:
        self.denoiser, self.weigh, self.parts = denoiser, WEIGHTINGS[weighting], Parts(denoiser, keep)

    def losses(
        self,
        images: tuple[Tensor, Tensor | None],
        index: Tensor,
        *,
        partial: bool,
        rows: Rows,
        generator: torch.Generator,
        through: nn.Module | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses of a batch, without the factors of the draw of levels.

        Args:
            images: clean ones in [-1, 1], [rows, channels, height, width], and labels [rows] or None.
            index: noise levels [rows].
            partial: train on a part of each image.
            rows: which of the batch of all processes these are.
            generator: of the step; draws the parts and the noise.
            through: the wrapped model.
            autocast: context of the network's call.

        Returns:
            Weighted squared errors and bounds of the gradients' norms, both [rows].
        """
        process, (clean, labels) = self.denoiser.process, images
        if partial:
            clean = self.parts.cut(clean, rows, generator=generator)
        noise = rows.of(torch.randn(rows.total, *clean.shape[1:], generator=generator)).to(clean.device)
        index = index.to(clean.device)
        masked = self.parts.masked(rows, generator=generator) if partial else nullcontext(None)
        with masked as mask, autocast or nullcontext():
            noisy, times = process.noisy(clean, noise, index), process.timestep(index)
            output = self.denoiser.predict(noisy, times, labels, through=through)
        errors = denoising_loss(output, process.target(clean, noise, index), mask=mask)
        weight = self.weigh(process.snr(index), process.prediction)
        return errors * weight, gradient_bound(errors, weight)
