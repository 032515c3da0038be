"""Views: an image cropped, mirrored, recoloured and blurred at random; whole batches at once, where they live.

Every image draws its own parameters. torchvision's transforms, given a batch, draw one set of them for all of it, and
given one image after another they take many times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.data.foreign_views import per_image, two_views
from scrimp.data.images import pair_of
from scrimp.data.view_ops import (
    check_colours,
    check_crops,
    check_images,
    check_rows,
    colour_jitter,
    crop_resize,
    described,
    gaussian_blur,
    kernel_size,
    to_grey,
)
from scrimp.primitives.errors import InputError

__all__ = [
    "STRONG",
    "WEAK",
    "View",
    "crop_resize",
    "draw_crops",
    "per_image",
    "standardise",
    "strong_for",
    "two_views",
    "view_of",
]

CHANCES = 8
"""Random numbers that colours and blur of one view of one image follow."""

_TRIES = 10  # proposals a crop gets before the centre is taken, as in torchvision
_CHUNK = 2**18  # numbers that go through a view's steps at a time on a CPU: they stay in its cache


@dataclass(frozen=True)
class View:
    """How one view of an image is made, in this order: crop and mirror, jitter, grey, blur.

    Attributes:
        scale: share of the image's area a crop has, from and to.
        ratio: width over height of a crop, from and to; drawn evenly in its logarithm.
        flip: probability of a mirror image, left to right.
        jitter: strength of brightness, contrast, saturation (factors from 1 - s, at least 0, to 1 + s) and hue (from
            -s to s of the circle, at most 0.5), as torchvision's ``ColorJitter``; or none.
        jitter_p, grey, blur_p: share of the images that are jittered, made grey, blurred.
        blur: standard deviation of the blur in pixels, from and to; or none.
        size: side in pixels of what comes out; as the image when not given.

    Raises:
        InputError: a value out of range, by name.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] | None = None
    jitter_p: float = 0.8
    grey: float = 0.0
    blur: tuple[float, float] | None = None
    blur_p: float = 0.5
    size: int | None = None

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf), ("blur", math.inf)):
            span = getattr(self, name)
            if span is not None and not (len(span) == 2 and 0 < span[0] <= span[1] <= most):
                limit = "" if most == math.inf else f" and at most {most:g}"
                raise InputError(f"{name} from and to, above 0{limit}", str(span), "choose another")
        for name in ("flip", "jitter_p", "grey", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} from 0 to 1", str(getattr(self, name)), "choose another")
        if self.jitter is not None and not (len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5):
            raise InputError("four jitter strengths from 0, the hue's to 0.5", str(self.jitter), "choose others")
        if self.size is not None:
            pair_of(self.size)


WEAK = View()
"""The target's view in mean shift (Koohpayegani et al., ICCV 2021): crop and mirror."""

STRONG = View(jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=(0.1, 2.0))
"""The query's view in mean shift, which is MoCo v2's (Chen et al. 2020)."""


def strong_for(size: int) -> View:
    """`STRONG`, without its blur for images of 64 pixels and less, as small images are usually treated."""
    return STRONG if size > 64 else replace(STRONG, blur=None)


def draw_crops(count: int, view: View, *, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random crops, distributed as those of torchvision's ``RandomResizedCrop``, and whether to mirror them.

    Each of them draws ten proposals and takes the first that lies within the image; where none does, the centre, in
    the nearest ratio that is allowed.

    Args:
        count: crops to draw.
        height, width: of the images, in pixels.
        generator: on the CPU; advanced by ``23 * count`` draws, whatever the view.

    Returns:
        float32 [count, 5]: top, left, height and width, all whole pixels, and 1 for a mirror image, else 0.

    Raises:
        InputError: an image without pixels, a negative count, or a generator that is not on the CPU.
    """
    pair_of((height, width))
    if count < 0 or generator.device.type != "cpu":
        got = f"{count} on {generator.device}"
        raise InputError("a count from 0 on and a generator on the CPU", got, "use torch.Generator()")
    chance = torch.rand(count, 2 * _TRIES + 3, generator=generator, dtype=torch.float64)
    area = height * width * (view.scale[0] + chance[:, :_TRIES] * (view.scale[1] - view.scale[0]))
    low, high = map(math.log, view.ratio)
    ratio = (low + chance[:, _TRIES : 2 * _TRIES] * (high - low)).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.byte().argmax(1, keepdim=True)
    last_tall, last_wide = _central(height, width, view.ratio)
    fit = fits.any(1)
    tall = torch.where(fit, tall.gather(1, first)[:, 0], last_tall)
    wide = torch.where(fit, wide.gather(1, first)[:, 0], last_wide)
    top = torch.where(fit, (chance[:, -3] * (height - tall + 1)).floor(), (height - last_tall) // 2)
    left = torch.where(fit, (chance[:, -2] * (width - wide + 1)).floor(), (width - last_wide) // 2)
    return torch.stack([top, left, tall, wide, (chance[:, -1] < view.flip).double()], 1).float()


def view_of(
    images: Tensor,
    view: View,
    *,
    generator: torch.Generator,
    crops: Tensor | None = None,
    chances: Tensor | None = None,
    rows: slice | None = None,
    total: int | None = None,
) -> Tensor:
    """A random view of every image, each with its own parameters; only the order of the jitter's four is shared.

    The numbers are drawn on the CPU, the same on every device and whatever parts of the view are switched off. Where
    several processes share a global batch, each passes the batch's ``total`` and its own ``rows``: together they do
    what one process would have done.

    Args:
        images: uint8 [n, C, H, W]; not altered.
        generator: on the CPU.
        crops: [n, 5], crops of these very images to use again; then none are drawn.
        chances: [n, `CHANCES`], numbers from 0 to 1 that the colours and blur of these very images follow; likewise.
        rows: which rows of the global batch ``images`` are; all of them when not given.
        total: images in the global batch; ``n`` when not given.

    Returns:
        float32 [n, C, size, size] in 0 to 1 ([n, C, H, W] for a view without a size), on the same device.

    Raises:
        InputError: arguments that do not fit one another, or a colour change of images with 2, 4, ... channels.
    """
    check_images(images, bytes_only=True)
    total = len(images) if total is None else total
    rows = slice(None) if rows is None else rows
    check_rows(rows, total, len(images), generator)
    if view.jitter is not None or view.grey > 0:
        check_colours(images)
    height, width = images.shape[2:]
    if crops is None:
        crops = draw_crops(total, view, height=height, width=width, generator=generator)[rows]
    if chances is None:
        chances = torch.rand(total, CHANCES, generator=generator)[rows]
    if chances.shape != (len(images), CHANCES):
        raise InputError(f"chances of shape {[len(images), CHANCES]}", described(chances), "draw one row an image")
    order = torch.randperm(4, generator=generator).tolist()
    check_crops(crops, len(images), height, width)
    shape = (view.size, view.size) if view.size is not None else (height, width)
    out = torch.empty((*images.shape[:2], *shape), device=images.device)
    step = max(1, _CHUNK // images.shape[1:].numel() if images.device.type == "cpu" else len(images))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        out[part] = _made(images[part], view, crops[part], chances=chances[part], order=order)
    return out


def _made(images: Tensor, view: View, crops: Tensor, *, chances: Tensor, order: list[int]) -> Tensor:
    """Views [n, C, ...] from eight even chances an image."""
    out = crop_resize(images, crops, size=view.size or (images.shape[2], images.shape[3]))
    if view.jitter is not None:
        strengths = _strengths(view.jitter, chances[:, :4])
        _change_some_(out, chances[:, 4] < view.jitter_p, lambda some, at: colour_jitter(some, strengths[at], order))
    if view.grey > 0:
        _change_some_(out, chances[:, 5] < view.grey, lambda some, at: to_grey(some))
    if view.blur is not None:
        sigmas = view.blur[0] + chances[:, 7] * (view.blur[1] - view.blur[0])
        taps = kernel_size(min(out.shape[2:]))
        _change_some_(out, chances[:, 6] < view.blur_p, lambda some, at: gaussian_blur(some, sigmas[at], kernel=taps))
    return out


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images - mean) / std`` per channel.

    Args:
        images: floats in 0 to 1, [n, C, H, W]; not altered.
        mean, std: C numbers each.

    Returns:
        [n, C, H, W] of the same type, with the channels last in memory.

    Raises:
        InputError: no floats, or another number of channels.
    """
    if not images.is_floating_point() or images.ndim != 4:
        raise InputError("floats [n, C, H, W] in 0 to 1", described(images), "use normalise for bytes")
    if not len(mean) == len(std) == images.shape[1]:
        got = f"{len(mean)} and {len(std)}"
        raise InputError(f"a mean and a std for each of {images.shape[1]} channels", got, "use those of the data set")
    scale = torch.tensor([1 / value for value in std], dtype=images.dtype, device=images.device).view(-1, 1, 1)
    shift = [-a / b for a, b in zip(mean, std, strict=True)]
    moved = torch.tensor(shift, dtype=images.dtype, device=images.device).view(-1, 1, 1)
    return torch.addcmul(moved, images, scale).contiguous(memory_format=torch.channels_last)


def _central(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest crop in the nearest ratio that is allowed."""
    if width / height < ratio[0]:
        return max(1, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, max(1, round(height * ratio[1]))
    return height, width


def _strengths(jitter: Sequence[float], chances: Tensor) -> Tensor:
    """Brightness, contrast, saturation and turn of the hue, [n, 4], from as many even chances."""
    spread = torch.tensor(jitter)
    low = torch.cat([(1 - spread[:3]).clamp(min=0), -spread[3:]])
    high = torch.cat([1 + spread[:3], spread[3:]])
    return low + chances * (high - low)


def _change_some_(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the chosen images by ``change(those images, their rows on the CPU)``."""
    at = chosen.nonzero().flatten()
    if len(at):
        there = at.to(images.device)
        images.index_copy_(0, there, change(images.index_select(0, there), at))
