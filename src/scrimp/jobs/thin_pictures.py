"""What is left of images, block by block: patches that stay as they are, those that are gone dimmed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.adaptive import Controller
from scrimp.jobs.evaluate import ready
from scrimp.jobs.thin_fit import Thinned, ThinSetup
from scrimp.jobs.thin_measure import spread_out
from scrimp.jobs.thin_methods import Build
from scrimp.primitives.files import write_atomic
from scrimp.report import Section, picture

if TYPE_CHECKING:
    from pathlib import Path

KEPT = "kept.png"
"""File of the picture in a way's folder."""
TILE, GAP, HEAD = 112, 6, 16
"""Pixels: the longest side of an image, between images, of the line of text above them."""
_SHADE, _DIMMED = 128, 0.82  # grey that what is gone fades to, and how far
_MOST_BLOCKS = 7  # columns that still fit a page


def keep_picture(
    setup: ThinSetup, thinned: Thinned, controller: Controller, build: Build, *, costs: Tensor, path: Path
) -> None:
    """Draw some test images, from the cheapest to the dearest, beside what is left of them; writes a PNG.

    Nothing is written where patches make no grid, or no picture is asked for.
    """
    rows = spread_out(costs, setup.config.pictures)
    if build.grid is None or not rows:
        return
    pixels = setup.data.test.batch(torch.tensor(rows))
    with torch.no_grad():
        thinned(ready(pixels, setup.data, setup.accelerator.device))
    kept = controller.kept
    assert kept is not None
    patches = kept[:, :, build.prefix :].unflatten(2, build.grid)
    write_atomic(path, kept_picture(pixels, patches, flops=costs[rows].tolist()))


def kept_picture(pixels: Tensor, kept: Tensor, *, flops: list[int]) -> bytes:
    """Images, one a row: the image, then what is left after each block that took something.

    Args:
        pixels: uint8 [images, channels, height, width], grey or RGB.
        kept: bool [images, blocks, rows, columns] of the patches.
        flops: of each image, named beside it.

    Returns:
        A PNG.
    """
    from PIL import Image, ImageDraw

    from scrimp.report import units

    blocks = shown_blocks(kept)
    height, width = _tile(pixels.shape[2], pixels.shape[3])
    across, down = width + GAP, height + HEAD + GAP
    canvas = Image.new("RGB", ((1 + len(blocks)) * across + GAP, len(pixels) * down + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, image in enumerate(pixels):
        tile, top = _drawn(image, (height, width)), GAP + row * down
        for column, block in enumerate([None, *blocks]):
            left = GAP + column * across
            if block is None:
                text, drawn = units.flops(flops[row]), tile
            else:
                there = kept[row, block]
                text, drawn = f"block {block + 1}: {int(there.sum())}", dimmed(tile, there)
            pen.text((left, top), text, fill="#33383f")
            canvas.paste(Image.fromarray(drawn.permute(1, 2, 0).contiguous().numpy()), (left, top + HEAD))
    content = io.BytesIO()
    canvas.save(content, "PNG")
    return content.getvalue()


def shown_blocks(kept: Tensor) -> list[int]:
    """Blocks after which some image has fewer patches than before, at most seven, the last of them included."""
    left = kept.flatten(2).sum(2)
    before = torch.cat([torch.full_like(left[:, :1], kept[0, 0].numel()), left[:, :-1]], 1)
    changed = (left != before).any(0).nonzero().flatten().tolist() or [kept.shape[1] - 1]
    if len(changed) <= _MOST_BLOCKS:
        return [int(block) for block in changed]
    places = torch.linspace(0, len(changed) - 1, _MOST_BLOCKS).round().int().tolist()
    return [int(changed[place]) for place in places]


def dimmed(image: Tensor, kept: Tensor) -> Tensor:
    """An image uint8 [3, height, width] whose patches that are not ``kept`` [rows, columns] fade to grey."""
    rows = torch.arange(image.shape[1]) * kept.shape[0] // image.shape[1]
    columns = torch.arange(image.shape[2]) * kept.shape[1] // image.shape[2]
    there = kept[rows][:, columns]
    faded = (image.float() * (1 - _DIMMED) + _SHADE * _DIMMED).round().to(torch.uint8)
    return torch.where(there, image, faded)


def kept_section(way: str, png: bytes) -> Section:
    """The part of a report that shows the picture."""
    text = (
        "Test images from the cheapest to the dearest, with their FLOPs, and the patches that are left after blocks "
        "that took some; those that are gone, or merged into another, are dimmed."
    )
    alt = f"Images with the patches that {way} keeps, block by block"
    return Section(f"What {way} keeps", picture(png, alt), text)


def _tile(height: int, width: int) -> tuple[int, int]:
    scale = TILE / max(height, width)
    if scale >= 1:
        return height * int(scale), width * int(scale)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _drawn(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels uint8 [1 or 3, h, w] as colours of this size; enlarged pixel by pixel."""
    from torch.nn import functional

    colours = image.expand(3, -1, -1)
    if size[0] >= image.shape[1]:
        return functional.interpolate(colours[None], size, mode="nearest")[0]
    shrunk = functional.interpolate(colours[None].float(), size, mode="bilinear", antialias=True)
    return shrunk[0].round().clamp(0, 255).to(torch.uint8)
