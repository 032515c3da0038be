"""What other people's data sets call an image, brought to uint8 [C, H, W]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scrimp.data.decode import ImageError, Peek, decode_image, peek_image, peek_picture, picture_pixels
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_PIXELS = "pixels as uint8, or as floats in 0 to 1"


def to_pixels(value: Any, *, size: tuple[int, int], mode: str, name: str) -> Tensor:
    """Whatever a data set calls an image, as uint8 [C, H, W].

    Args:
        value: a PIL image; a tensor [C, H, W] or [H, W] or an array [H, W, C], [C, H, W] or [H, W], uint8 or floats
            in 0 to 1; or Hugging Face's record of ``bytes`` or ``path``.
        size, mode: as for `decode_image`.
        name: what an error calls it.

    Raises:
        ImageError: a picture that cannot be decoded.
        InputError: anything else.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        content = value.get("bytes")
        source = value.get("path") if content is None else content
        if source is None:
            raise ImageError.of(name, "neither bytes nor a path")
        return decode_image(source, size=size, mode=mode, name=value.get("path") or name)
    if value is None:
        raise ImageError.of(name, "no image")
    if isinstance(value, (Tensor, np.ndarray)):
        pixels = _bytes(value, name)
        if tuple(pixels.shape) == (1 if mode == "L" else 3, *size):
            return pixels
        value = _picture(pixels)
    if not hasattr(value, "getbands"):
        raise InputError("a PIL image, tensor or array", f"{type(value).__name__} at {name}", "convert it first")
    try:
        return picture_pixels(value, size=size, mode=mode)
    except (OSError, SyntaxError, ValueError) as error:  # PIL decodes late
        raise ImageError.of(name, str(error)) from error


def peek_value(value: Any, name: str) -> Peek | None:
    """Size and colour of what `to_pixels` takes; ``None`` when it is unreadable."""
    if isinstance(value, Mapping):
        source = value.get("path") if value.get("bytes") is None else value["bytes"]
        return None if source is None else peek_image(source)
    if isinstance(value, (Tensor, np.ndarray)):
        channels, height, width = _bytes(value, name).shape
        return Peek((height, width), channels == 1)
    return peek_picture(value) if hasattr(value, "getbands") else None


def _bytes(value: Tensor | np.ndarray, name: str) -> Tensor:
    """A tensor or array as uint8 [C, H, W]; arrays may have their channels last."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 and value.dtype.kind != "f":
            raise InputError(_PIXELS, f"{value.dtype} at {name}", "convert them first")
        pixels = torch.from_numpy(np.ascontiguousarray(value))
        if pixels.ndim == 3 and pixels.shape[2] in (1, 3):
            pixels = pixels.permute(2, 0, 1)
    else:
        pixels = value.detach().cpu()
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise InputError("an image of 1 or 3 channels", f"shape {list(value.shape)} at {name}", "give [C, H, W]")
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise InputError(_PIXELS, f"{str(pixels.dtype).removeprefix('torch.')} at {name}", "convert them first")
    if bool(((pixels >= 0) & (pixels <= 1)).all()):
        return (pixels * 255).round().to(torch.uint8)
    span = f"floats from {pixels.min().item():g} to {pixels.max().item():g} at {name}"
    raise InputError(_PIXELS, span, "leave normalising out of the data set: it is done later")


def _picture(pixels: Tensor) -> Picture:
    from PIL import Image

    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
