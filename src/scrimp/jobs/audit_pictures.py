"""Pictures of an audit: patches enlarged, and what a model keeps of images with and without one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scrimp.attack import AdaptiveVictim, Patch, Perturbation, frozen
from scrimp.jobs.thin_pictures import kept_picture
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

KEPT = Path("attacks") / "kept.png"
"""Where in a run folder the picture of kept tokens lies; the page shows it."""
PATCH_SIDE = 160
"""Pixels of an enlarged patch, at most, on its longer side."""


def attack_picture(victim: AdaptiveVictim, images: Tensor, patch: Patch | Perturbation) -> bytes | None:
    """Images without and with an attack, two rows each, and the patches that are left after each block that took some.

    Args:
        victim: left as it was.
        images: [n, 1 or 3, height, width], from 0 to 1; n from 1, some four fit a page.
        patch: a patch without a place goes where a fixed generator says.

    Returns:
        A PNG; None for a model whose patches make no grid.

    Raises:
        InputError: no images, or such as are neither grey nor RGB.
    """
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise InputError("images [n, 1 or 3, height, width], n >= 1", str(list(images.shape)), "pass grey or RGB ones")
    attacked = patch.on(images, generator=torch.Generator().manual_seed(0)) if isinstance(patch, Patch) else None
    attacked = patch.on(images) if attacked is None else attacked
    both = torch.stack([images, attacked], 1).flatten(0, 1)
    with frozen(victim.model):
        costs = victim.cost(both).tolist()
    kept = victim.controller.kept
    assert kept is not None
    patches = kept[:, :, victim.controller.host.prefix :]
    grid = _grid(victim, images)
    if grid is None or grid[0] * grid[1] != patches.shape[2]:
        return None
    return kept_picture(as_bytes(both), patches.unflatten(2, grid), flops=[int(cost) for cost in costs])


def write_attack_picture(
    victim: AdaptiveVictim, images: Tensor, patch: Patch | Perturbation, folder: Path
) -> Path | None:
    """`attack_picture` into a run folder, where the page looks for it; None where there is none to draw."""
    png = attack_picture(victim, images, patch)
    return None if png is None else write_atomic(folder / KEPT, png)


def patch_picture(pixels: Tensor) -> bytes:
    """A patch [1 or 3, h, w], from 0 to 1, as it is, pixel by pixel: a PNG."""
    from PIL import Image

    colours = as_bytes(pixels[None])[0].expand(3, -1, -1).permute(1, 2, 0).contiguous()
    return _png(Image.fromarray(colours.numpy()))


def enlarged(png: bytes, *, side: int = PATCH_SIDE) -> bytes:
    """A PNG with its pixels enlarged by a whole number, so that the longer side is up to ``side``."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    factor = max(1, side // max(picture.size))
    return _png(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))


def as_bytes(images: Tensor) -> Tensor:
    """Images from 0 to 1 as uint8, on the CPU."""
    return (images.detach().float() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def _grid(victim: AdaptiveVictim, images: Tensor) -> tuple[int, int] | None:
    embed = getattr(victim.model, "patch_embed", None)
    size: Sequence[int] | int | None = getattr(embed, "patch_size", None)
    if size is None:
        return None
    rows, columns = (size, size) if isinstance(size, int) else tuple(size)
    return images.shape[2] // rows, images.shape[3] // columns


def _png(picture: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")  # type: ignore[attr-defined]
    return content.getvalue()
