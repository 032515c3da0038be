"""Random crops and flips of a whole batch at once, where the batch lives, and the step from bytes to floats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


def crop_flip(
    images: Tensor,
    *,
    padding: int,
    flip: bool,
    generator: torch.Generator,
    mode: str = "zero",
    rows: slice | None = None,
    total: int | None = None,
) -> Tensor:
    """Shift every image by its own random offset and mirror every second one, on average.

    The same as padding by ``padding`` and cutting a random window of the old size, per image. The numbers are drawn
    on the CPU, the same on every device and whether or not one of the two is switched off. Where several processes
    share a global batch, each passes the batch's ``total`` and its own ``rows``: together they do what one process
    would have done.

    Args:
        images: [n, C, H, W], any type; not altered.
        padding: largest shift in pixels, in both directions; 0 leaves the images in place.
        flip: mirror left to right with probability one half.
        generator: on the CPU; advanced by ``3 * total`` draws.
        mode: what comes in from outside, ``"zero"`` or ``"reflect"`` (without repeating the border).
        rows: which rows of the global batch ``images`` are; all of them when not given.
        total: images in the global batch; ``n`` when not given.

    Returns:
        [n, C, H, W], of the same type and on the same device.

    Raises:
        InputError: arguments that do not fit one another.
    """
    total = len(images) if total is None else total
    rows = slice(None) if rows is None else rows
    _check(images, padding, mode, generator, len(range(total)[rows]))
    corners = torch.randint(0, 2 * padding + 1, (total, 2), generator=generator)[rows]
    mirrored = torch.randint(0, 2, (total,), generator=generator)[rows].nonzero().flatten()
    out = _windows(images, padding, corners.to(images.device), mode) if padding and len(images) else images.clone()
    if flip:
        mirrored = mirrored.to(images.device)
        out.index_copy_(0, mirrored, out.index_select(0, mirrored).flip(3))
    return out


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images / 255 - mean) / std`` per channel.

    Args:
        images: uint8 [n, C, H, W].
        mean, std: C numbers each, for pixels in 0 to 1.

    Returns:
        float32 [n, C, H, W], on the same device and in the same memory format.

    Raises:
        InputError: another type, or another number of channels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(
            "images as uint8 [n, C, H, W]",
            f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}",
            "pass the batch as the data set gives it",
        )
    if not len(mean) == len(std) == images.shape[1]:
        raise InputError(
            f"a mean and a std for each of {images.shape[1]} channels",
            f"{len(mean)} and {len(std)}",
            "use those of the data set",
        )
    scale = torch.tensor([1 / (255 * value) for value in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([-a / b for a, b in zip(mean, std, strict=True)], device=images.device).view(-1, 1, 1)
    return images.float().mul_(scale).add_(shift)  # float() is a new tensor, since the images are bytes


def _windows(images: Tensor, padding: int, corners: Tensor, mode: str) -> Tensor:
    """Cut an H x W window out of each padded image, its upper left corner at ``corners`` [n, 2] (down, right).

    A window's rows are runs of W values in memory. Seen as a table of every run of W values (rows overlapping), the
    padded batch gives all windows in one `index_select`, which copies whole runs, several times faster than a gather.
    """
    count, channels, height, width = images.shape
    padded = _pad(images, padding, mode).contiguous()
    high, wide = padded.shape[2:]
    steps = torch.arange(max(count * channels, height), device=images.device)
    planes = (steps[: count * channels] * high * wide).view(count, channels, 1)
    lines = ((corners[:, :1] + steps[:height]) * wide + corners[:, 1:]).view(count, 1, height)
    runs = padded.view(-1).as_strided((padded.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, (planes + lines).view(-1)).view(images.shape)


def _pad(images: Tensor, padding: int, mode: str) -> Tensor:
    if mode == "zero":
        return torch.nn.functional.pad(images, (padding,) * 4)
    for axis in (2, 3):  # torch's reflecting pad does not take bytes
        length = images.shape[axis]
        places = torch.arange(-padding, length + padding, device=images.device).abs()
        images = images.index_select(axis, (length - 1) - ((length - 1) - places).abs())
    return images


def _check(images: Tensor, padding: int, mode: str, generator: torch.Generator, count: int) -> None:
    if images.ndim != 4:
        raise InputError("images [n, C, H, W]", f"shape {list(images.shape)}", "add the missing axes")
    if mode not in ("zero", "reflect"):
        raise InputError("mode 'zero' or 'reflect'", repr(mode), "choose one of them")
    limit = min(images.shape[2:]) - 1
    if padding < 0 or (mode == "reflect" and padding > limit):
        most = f" and at most {limit}, less than the image" if mode == "reflect" else ""
        raise InputError(f"a padding of at least 0{most}", str(padding), "choose another")
    if generator.device.type != "cpu":
        raise InputError("a generator on the CPU", f"one on {generator.device}", "use torch.Generator()")
    if count != len(images):
        raise InputError(
            "as many images as rows of the global batch", f"{len(images)} and {count}", "pass this process's rows"
        )
