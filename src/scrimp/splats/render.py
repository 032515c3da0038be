"""A scene seen by a camera: differentiable pictures on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.rasterize import Images, Look, rasterize_cuda, rasterize_native
from scrimp.splats.reference import rasterize_reference
from scrimp.splats.scene import Splats


@dataclass(frozen=True, eq=False)
class Rendered:
    """What a camera sees.

    Attributes:
        color: [h, w, 3], 0 upwards; not held below 1.
        alpha: [h, w], 0 where nothing is and 1 where it is opaque.
        depth: [h, w], mean depth of what is seen, weighted as its colour; 0 where nothing is. None unless asked for.
        radii: [n], the longest distance at which a Gaussian is drawn, pixels; 0 where it is not seen. On CUDA as
            gsplat measures it, rounded up to whole pixels.
    """

    color: Tensor
    alpha: Tensor
    depth: Tensor | None
    radii: Tensor


def render(
    splats: Splats,
    camera: Camera,
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    degree: int | None = None,
    antialias: bool | None = None,
) -> Tensor:
    """The picture [h, w, 3] alone; see `rasterize`."""
    return rasterize(splats, camera, background=background, degree=degree, antialias=antialias).color


def rasterize(
    splats: Splats,
    camera: Camera,
    *,
    background: Sequence[float] = (0.0, 0.0, 0.0),
    degree: int | None = None,
    antialias: bool | None = None,
    depth: bool = False,
    offsets: Tensor | None = None,
) -> Rendered:
    """Draw a scene, as 3DGS (Kerbl et al. 2023, arXiv 2308.04079) with gsplat's conventions.

    Gradients flow to every tensor of the scene. float32 on a CPU runs the native kernels, with the same bits whatever
    the number of threads; float64, and a machine without them, the far slower `rasterize_reference`; CUDA runs gsplat.

    Args:
        background: red, green and blue behind everything.
        degree: of the harmonics looked at, at most; all when not given.
        antialias: dim Gaussians smaller than a pixel instead of widening them only (arXiv 2311.16493); as the scene
            says when not given.
        depth: whether to draw it too.
        offsets: [n, 2], added to the projected means, pixels. Pass zeros that require a gradient: after the backward
            pass it holds the gradient by the place in the picture, which densification goes by.

    Raises:
        InputError: tensors of different or other dtypes and devices; offsets of another shape; a degree below 0.
        MissingExtraError: CUDA without gsplat.
    """
    _check(splats, offsets)
    shade = splats.degree if degree is None else min(degree, splats.degree)
    if shade < 0 or len(background) != 3:
        raise InputError("a degree of 0 or more and a background of 3", f"{degree}, {len(background)}", "correct it")
    red, green, blue = (float(part) for part in background)
    dimmed = splats.antialiased if antialias is None else antialias
    color, alpha, deep, radii = _draw(splats, Look(camera, (red, green, blue), shade, dimmed, depth), offsets)
    return Rendered(color, alpha, None if deep is None else deep / alpha.clamp_min(1e-10), radii)


def _draw(splats: Splats, look: Look, offsets: Tensor | None) -> Images:
    if splats.means.is_cuda:
        return rasterize_cuda(splats, look, offsets)
    if _by_kernels(splats.means):
        return rasterize_native(splats, look, offsets)
    options = {"background": look.background, "degree": look.degree, "antialias": look.antialias}
    color, alpha, deep, radii = rasterize_reference(splats, look.camera, offsets=offsets, **options)  # type: ignore[arg-type]
    return color, alpha, deep if look.depth else None, radii


def _by_kernels(means: Tensor) -> bool:
    if means.dtype != torch.float32 or means.device.type not in ("cpu", "meta"):
        return False
    # What is compiled, or has no numbers, needs the operator's shape alone, and the compiler cannot look for a library.
    return torch.compiler.is_compiling() or means.is_meta or hasattr(native.load(), "splat_forward")


def _check(splats: Splats, offsets: Tensor | None) -> None:
    tensors = splats.tensors() | ({} if offsets is None else {"offsets": offsets})
    first = splats.means
    if first.dtype not in (torch.float32, torch.float64):
        raise InputError("a scene in float32 or float64", str(first.dtype), "call splats.to(torch.float32)")
    for name, values in tensors.items():
        if (values.dtype, values.device) != (first.dtype, first.device):
            raise InputError(f"{name} {first.dtype} on {first.device}", f"{values.dtype} on {values.device}", "move it")
    if offsets is not None and offsets.shape != (len(splats), 2):
        raise InputError(f"offsets [{len(splats)}, 2]", f"{list(offsets.shape)}", "pass a place each")
