"""Sampled images as bytes and as PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

SAMPLES = "samples.png"
GRID = 256
"""Images shown in it at most."""
FOLDER = "images"


def as_bytes(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1].

    Raises:
        InputError: neither grey nor coloured.
    """
    if images.shape[1] not in (1, 3):
        raise InputError("images of 1 or 3 channels", f"{images.shape[1]}", "pass the pipeline with its decoder")
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def save_each(images: Tensor, first: int, folder: Path) -> None:
    """Each image, uint8 [batch, channels, height, width], as ``images/000000.png`` counted from ``first``."""
    from PIL import Image

    for number, image in enumerate(images, start=first):
        content = io.BytesIO()
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(content, "PNG")
        path = folder / FOLDER / f"{number:06d}.png"
        if not path.is_file():
            write_atomic(path, content.getvalue())
