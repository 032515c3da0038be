"""How well a scene shows what was photographed and not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.dataset import Dataset, View
from scrimp.splats.loss import psnr, ssim
from scrimp.splats.render import render
from scrimp.splats.scene import Splats


@dataclass(frozen=True)
class Quality:
    """Means over views.

    Attributes:
        psnr: dB.
        ssim: up to 1.
        perceptual: what the function that was passed says; None without one.
        by_view: PSNR of each, by name.
    """

    psnr: float
    ssim: float
    perceptual: float | None
    by_view: Mapping[str, float]


@torch.no_grad()
def evaluate(
    splats: Splats,
    dataset: Dataset,
    *,
    views: Sequence[View] | None = None,
    antialias: bool | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Quality:
    """Draw views and compare them with their photographs, both within 0 to 1; masks of the set's files count.

    Args:
        views: those held out by default.
        antialias: as the scene was trained; as it says when not given.
        perceptual: distance of a picture [h, w, 3] from another, such as LPIPS.

    Raises:
        InputError: no views.
    """
    chosen = dataset.test if views is None else tuple(views)
    if not chosen:
        raise InputError("views to compare with", "none", "hold some out, or pass views")
    rows = []
    for view in chosen:
        target = photograph(dataset, view).to(splats.means)
        mask = mask_of(dataset, view)
        mask = None if mask is None else mask.to(splats.means)
        shown = render(splats, view.camera, background=dataset.background, antialias=antialias).clamp(0, 1)
        distance = 0.0 if perceptual is None else float(perceptual(shown, target))
        rows.append((float(psnr(shown, target, mask=mask)), float(ssim(shown, target, mask=mask)), distance))
    sharp, similar, far = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    by_view = {view.name: row[0] for view, row in zip(chosen, rows, strict=True)}
    return Quality(sharp, similar, None if perceptual is None else far, by_view)


def photograph(dataset: Dataset, view: View) -> Tensor:
    """[h, w, 3] float32, 0 to 1."""
    return dataset.load(view).float() / 255


def mask_of(dataset: Dataset, view: View) -> Tensor | None:
    """[h, w] float32, 0 to 1, where the set has a file; what is transparent lies on the background and counts."""
    mask = None if view.mask is None else dataset.load_mask(view)
    return None if mask is None else mask.float() / 255
