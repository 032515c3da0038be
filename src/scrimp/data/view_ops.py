"""Crop, colour and blur of whole batches, every image with its own given parameters; new tensors, nothing random.

The definitions are torchvision's (``torchvision.transforms.v2.functional`` on float images); what differs is that a
parameter is a tensor, a value for each image, where torchvision takes one for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scrimp.data.images import pair_of
from scrimp.primitives.errors import InputError

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, to the digits that torchvision and PIL's users know


def crop_resize(images: Tensor, crops: Tensor, *, size: int | tuple[int, int]) -> Tensor:
    """Cut a window out of every image and bring it to one size.

    Bilinear as torchvision's ``resized_crop(..., antialias=True)``: where a crop is enlarged that is plain bilinear
    interpolation (``align_corners=False``), where it is shrunk the filter widens with it. Either axis is a product
    with a matrix of weights per image, in the images' own precision and at least float32, also under autocast.

    Args:
        images: [n, C, H, W], uint8, or floats in 0 to 1; not altered.
        crops: [n, 5], see `draw_crops`.
        size: side in pixels, or (height, width).

    Returns:
        float32 [n, C, height, width] in 0 to 1, on the images' device (float64 for images in float64).

    Raises:
        InputError: other shapes or types, or a crop that is empty or not inside the image.
    """
    check_images(images)
    count, channels, height, width = images.shape
    tall, wide = pair_of(size)
    check_crops(crops, count, height, width)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    crops = crops.to(images.device, dtype)
    across = _weights(crops[:, 1], crops[:, 3], wide, width, mirror=crops[:, 4] > 0)
    down = _weights(crops[:, 0], crops[:, 2], tall, height, mirror=torch.zeros_like(crops[:, 4], dtype=torch.bool))
    if images.dtype == torch.uint8:
        down = down / 255
    with torch.autocast(images.device.type, enabled=False):
        lines = torch.bmm(images.to(dtype).reshape(count, channels * height, width), across.transpose(1, 2))
        planes = lines.view(count * channels, height, wide)
        return torch.bmm(down.repeat_interleave(channels, 0), planes).view(count, channels, tall, wide)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """``images * factor``, clamped to 0 to 1.

    Args:
        images: float [n, C, H, W] in 0 to 1.
        factors: [n], from 0 (black) over 1 (no change) up.
    """
    return (images * _per_image(factors, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """A blend of every image with the mean of its grey version; arguments as for `adjust_brightness`.

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    return _blend(luminance(images).mean((1, 2, 3), keepdim=True), images, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """A blend of every image with its grey version; arguments and errors as for `adjust_contrast`."""
    return images.clone() if images.shape[1] == 1 else _blend(luminance(images), images, factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Every image's hues moved along the circle of HSV.

    A colour keeps its largest channel and the spread between its channels, so no HSV image has to be made: with the
    hue h as a part of the circle, a channel is ``largest - spread * min(1, max(0, 2 - 6 d))``, d being the distance
    along the circle between h and the hue opposite the channel's own colour (Smith 1978, in closed form).

    Args:
        images: float [n, C, H, W] in 0 to 1.
        turns: [n], parts of the whole circle, -0.5 to 0.5.

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    if check_colours(images).shape[1] == 1:
        return images.clone()
    red, green, blue = images.unbind(1)
    largest = images.amax(1)
    spread = largest - images.amin(1)
    divisor = torch.where(spread == 0, 1, spread)
    sixths = torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(largest == red, (green - blue) / divisor, sixths)
    opposite = torch.tensor([3 / 6, 5 / 6, 1 / 6], dtype=images.dtype, device=images.device).view(3, 1, 1)
    away = (sixths.div_(6).add_(turns.to(images).view(-1, 1, 1)))[:, None] - opposite
    share = away.sub_(away.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return share.mul_(spread[:, None]).neg_().add_(largest[:, None])


def luminance(images: Tensor) -> Tensor:
    """The grey version [n, 1, H, W] of images [n, C, H, W].

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    if check_colours(images).shape[1] == 1:
        return images.clone()
    red, green, blue = images.split(1, 1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def to_grey(images: Tensor) -> Tensor:
    """The grey version with as many channels as before; errors as for `luminance`."""
    return luminance(images).expand(images.shape).contiguous()


def colour_jitter(images: Tensor, strengths: Tensor, order: Sequence[int]) -> Tensor:
    """Brightness, contrast, saturation and hue, one after the other.

    Args:
        images: float [n, C, H, W] in 0 to 1.
        strengths: [n, 4]: three factors and the turn of the hue.
        order: the numbers 0 to 3, of the columns of ``strengths``, in the order to go through.

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    steps = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    check_colours(images)
    for step in order:
        images = steps[step](images, strengths[:, step])
    return images


def kernel_size(side: int) -> int:
    """Pixels of the blur's kernel for images of so many pixels: a tenth of them (as SimCLR), odd, at least 3."""
    return max(3, side // 10 | 1)


def gaussian_blur(images: Tensor, sigmas: Tensor, *, kernel: int) -> Tensor:
    """A Gaussian blur along either axis; what lies outside is the reflected image.

    Every tap of the kernel is one multiply-add of a shifted batch. A grouped convolution, a group for each channel of
    each image, gives the same and takes 1 to 6 times as long on a CPU (sides of 28 to 96); it would also follow
    autocast down to half precision.

    Args:
        images: float [n, C, H, W].
        sigmas: [n], in pixels, above 0.
        kernel: taps, odd; an axis too short to be reflected that far takes as many as it can (one pixel: 1).

    Raises:
        InputError: an even kernel.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise InputError("an odd kernel size", str(kernel), "see kernel_size for the usual one")
    for axis in (3, 2):
        images = _blur_axis(images, sigmas, min(kernel // 2, images.shape[axis] - 1), axis)
    return images


def _blur_axis(images: Tensor, sigmas: Tensor, reach: int, axis: int) -> Tensor:
    length = images.shape[axis]
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    taps = (offsets / sigmas.to(images).view(-1, 1)).square().div(-2).softmax(1)[..., None, None, None]
    framed = pad(images, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode="reflect")
    out = framed.narrow(axis, 0, length) * taps[:, 0]
    for place in range(1, 2 * reach + 1):
        out.addcmul_(framed.narrow(axis, place, length), taps[:, place])
    return out


def _blend(base: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    return torch.lerp(base, images, _per_image(factors, images)).clamp_(0, 1)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images).view(-1, 1, 1, 1)


def check_colours(images: Tensor) -> Tensor:
    """The images again, if they are [n, C, H, W] and grey or coloured: 1 or 3 channels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError("images [n, C, H, W] of 1 or 3 channels", described(images), "leave their colours alone")
    return images


def check_images(images: Tensor, *, bytes_only: bool = False) -> None:
    """Refuse what is no batch of images with a pixel in each.

    Raises:
        InputError: no uint8 or float [n, C, H, W]; with ``bytes_only``, no uint8.
    """
    kind = images.dtype == torch.uint8 or (images.is_floating_point() and not bytes_only)
    if not kind or images.ndim != 4 or 0 in images.shape[1:]:
        expected = "images as uint8 [n, C, H, W]" if bytes_only else "images [n, C, H, W], uint8 or floats in 0 to 1"
        raise InputError(expected, described(images), "pass the batch as the data set gives it")


def check_crops(crops: Tensor, count: int, height: int, width: int) -> None:
    """Refuse other than [count, 5] crops, each of a pixel or more and inside images of that height and width."""
    if tuple(crops.shape) != (count, 5):
        raise InputError(f"crops [{count}, 5]", f"shape {list(crops.shape)}", "draw one an image: draw_crops")
    top, left, tall, wide, _ = crops.unbind(1)
    inside = (top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1) & (top + tall <= height) & (left + wide <= width)
    if not bool(inside.all()):
        worst = crops[~inside][0, :4].tolist()
        raise InputError(f"crops inside {height} x {width} pixels", str(worst), "give top, left, height, width")


def check_rows(rows: slice, total: int, count: int, generator: torch.Generator) -> None:
    """Refuse ``count`` images that are not the ``rows`` of a batch of ``total``, and a generator not on the CPU."""
    if generator.device.type != "cpu":
        raise InputError("a generator on the CPU", f"one on {generator.device}", "use torch.Generator()")
    wanted = len(range(total)[rows])
    if wanted != count:
        raise InputError("as many images as rows of the global batch", f"{count} and {wanted}", "pass this one's rows")


def described(value: object) -> str:
    """What an error calls a value: type and shape of a tensor, members of a short tuple or list."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return f"{type(value).__name__} of ({', '.join(map(described, value))})"
    return type(value).__name__


def _weights(start: Tensor, length: Tensor, out: int, count: int, *, mirror: Tensor) -> Tensor:
    """What each of ``count`` pixels along an axis gives to each of ``out``: [n, out, count], rows summing to 1.

    A tent around the place in the image that an output pixel's centre falls on, one pixel wide to either side, or as
    wide as an output pixel where that is more; what would come from outside the crop goes to what is inside.
    """
    step = (length / out)[:, None]
    place = torch.arange(out, device=start.device) + 0.5
    centre = start[:, None] - 0.5 + step * torch.where(mirror[:, None], out - place, place)
    pixel = torch.arange(count, device=start.device, dtype=start.dtype)
    tent = (pixel - centre[:, :, None]).abs_().div_(step.clamp(min=1)[:, :, None]).neg_().add_(1).clamp_(min=0)
    tent *= ((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None]
    return tent.div_(tent.sum(2, keepdim=True))
