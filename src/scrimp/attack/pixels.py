"""Images as numbers from 0 to 1 on the 256 levels of 8 bits: checked, rounded, kept in a ball, pasted upon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError

LEVELS = 255
"""Steps from 0 to 1."""
_SLACK = 1e-4  # of a level: a level that float32 has rounded is one still


class Normalised(nn.Module):
    """A model that takes images from 0 to 1 and normalises them itself: model((images - mean) / std).

    Attacks are on pixels, before normalisation; this puts it behind them. The wrapped model is ``model``.

    Args:
        model: of normalised images.
        mean: of each channel, or one for all.
        std: likewise, above 0.

    Raises:
        InputError: a deviation that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not all(value > 0 for value in std):
            raise InputError("standard deviations above 0", str(tuple(std)), "correct them")
        self.model = model
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The model on ``images`` [n, channels, height, width], from 0 to 1."""
        return self.model((images - self.mean.to(images)) / self.std.to(images))


def check_images(images: Tensor, *, name: str = "images") -> None:
    """Refuse what is no floating [n, channels, height, width] of numbers from 0 to 1; n may be 0."""
    if images.ndim != 4 or not images.is_floating_point():
        got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise InputError(f"{name} as floating [n, channels, height, width]", got, "convert them: images.float() / 255")
    inside = bool(((images >= 0) & (images <= 1)).all())  # not so for NaN
    if not inside:
        raise InputError(
            f"{name} from 0 to 1, before normalisation", "values outside, or NaN", "see scrimp.attack.Normalised"
        )


def check_labels(name: str, labels: Tensor, count: int) -> None:
    """Refuse anything but one whole number from 0 an image."""
    whole = labels.shape == (count,) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or bool((labels < 0).any()):
        got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise InputError(f"{name} as int64 [{count}], from 0", got, "pass one class an image")


def quantise(values: Tensor) -> Tensor:
    """The nearest of the 256 levels, clipped to [0, 1]; no direction is preferred, so nothing drifts."""
    return (values.clamp(0, 1) * LEVELS).round() / LEVELS


def check_epsilon(epsilon: float) -> None:
    """Refuse a radius that leaves some pixel without a level, or is more than all there is."""
    if not 1 / LEVELS - _SLACK / LEVELS <= epsilon <= 1:
        raise InputError("epsilon from 1/255 to 1, of images from 0 to 1", str(epsilon), "write it as 8 / 255")


def to_ball(values: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """The nearest levels that are within ``epsilon`` of the images, l-infinity; there is one wherever epsilon >= 1/255.

    Args:
        values: [n, channels, height, width], anything finite.
        images: of that shape, from 0 to 1, on the levels or between them.
        epsilon: radius.

    Returns:
        of the shape and dtype of the images, from 0 to 1.
    """
    wide = images.double()
    low = ((wide - epsilon).clamp_min(0) * LEVELS - _SLACK).ceil()
    high = ((wide + epsilon).clamp_max(1) * LEVELS + _SLACK).floor()
    level = (values.double() * LEVELS).round().clamp(low, high)
    return (level / LEVELS + 0.0).to(images)  # no minus zero


def paste(images: Tensor, pixels: Tensor, places: Tensor) -> Tensor:
    """Images with a patch on each, a new tensor.

    Args:
        images: [n, channels, height, width].
        pixels: [channels, h, w].
        places: [n, 2], top and left of the patch, which must be inside.
    """
    out = images.clone()
    out[_region(places, pixels.shape)] = pixels.to(images)
    return out


def crops(images: Tensor, shape: torch.Size, places: Tensor) -> Tensor:
    """What is under a patch of ``shape`` [channels, h, w] at ``places`` [n, 2]: [n, channels, h, w]."""
    return images[_region(places, shape)]


def _region(places: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, height, width = shape
    places = places.cpu()
    image = torch.arange(len(places))[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    row = places[:, 0, None, None, None] + torch.arange(height)[None, None, :, None]
    column = places[:, 1, None, None, None] + torch.arange(width)[None, None, None, :]
    return image, channel, row, column
