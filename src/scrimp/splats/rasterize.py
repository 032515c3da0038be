"""The native rasteriser for the CPU as an operator, and gsplat's behind the same signature on CUDA.

Its work depends on where the Gaussians lie, which no formula of shapes can say: the meter names it as not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import require
from scrimp.splats.camera import Camera
from scrimp.splats.operators import operator
from scrimp.splats.scene import COUNTS, Splats

Images = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Colour [h, w, 3], alpha [h, w], depth weighted by alpha [h, w] where wanted, radii [n]."""
_SCENE = (
    "Tensor means, Tensor quaternions, Tensor scales, Tensor opacities, Tensor colors, Tensor harmonics,"
    " Tensor? offsets, Tensor world_to_camera, int[] sizes, float[] lens"
)


@dataclass(frozen=True, eq=False)
class Look:
    """How a scene is drawn."""

    camera: Camera
    background: tuple[float, float, float]
    degree: int
    antialias: bool
    depth: bool

    def sizes(self) -> list[int]:
        """Width, height, coefficients looked at, and whether to dim small Gaussians and to draw the depth."""
        camera = self.camera
        return [camera.width, camera.height, COUNTS[self.degree], int(self.antialias), int(self.depth)]

    def lens(self) -> list[float]:
        """Focal lengths, centre, nearest depth, and the background."""
        return [*self.camera.focal, *self.camera.centre, self.camera.near, *self.background]


def rasterize_native(splats: Splats, look: Look, offsets: Tensor | None) -> Images:
    """On the CPU, float32. The same bits whatever the number of threads."""
    motion = look.camera.world_to_camera.detach()
    found = draw(*splats.tensors().values(), offsets, motion, look.sizes(), look.lens())
    color, alpha, depth, radii, _ = found
    return color, alpha, depth if look.depth else None, radii


class _Frame(bytearray):
    """What the kernels found out while drawing, for the way back; it lives as long as the tensor made of it.

    The tensor is one more output of `draw`, so that whoever keeps outputs for the backward pass keeps the frame, and
    lets it go. It holds nothing: should a copy of it come back, the scene is drawn again, to the same bits.
    """

    kept: Any


_FRAMES: WeakValueDictionary[int, _Frame] = WeakValueDictionary()
"""By the address of their tensors."""


def _draw(*inputs: Any) -> tuple[Tensor, ...]:
    """Colour, alpha, depth or nothing, radii, and the tensor of a `_Frame`."""
    *scene, motion, sizes, lens = inputs
    packed = _packed(scene)
    frame, images = _Frame(1), _images(inputs[0], sizes)
    to = [*images[:2], images[2] if sizes[4] else None, images[3]]
    frame.kept = _kernels().splat_forward(
        *_counts(packed, sizes), _addresses(packed), *sizes[:2], bool(sizes[3]), _numbers(motion, lens), _addresses(to)
    )
    ticket = torch.frombuffer(frame, dtype=torch.uint8)
    _FRAMES[ticket.data_ptr()] = frame
    return *images, ticket


def _draw_backward(*inputs: Any) -> list[Tensor]:
    """Gradients of the tensors of the scene, and of the offsets, that are wanted."""
    by_color, by_alpha, by_depth, color, alpha, depth, ticket, wanted, *given = inputs
    scene, sizes = _packed(given[:7]), given[8]
    if ticket.data_ptr() not in _FRAMES:
        ticket = _draw(*given)[-1]
    pulls = _packed([torch.zeros_like(color) if by_color is None else by_color, by_alpha, by_depth])
    images = [color, alpha, depth if sizes[4] else None, *pulls]
    grads = _gradients(scene, wanted)
    to = iter(grads)
    places = [next(to) if want else None for want in wanted]
    _kernels().splat_backward(
        _FRAMES[ticket.data_ptr()].kept, *_counts(scene, sizes), *map(_addresses, (scene, images, places))
    )
    return grads


def _draw_fake(*inputs: Any) -> tuple[Tensor, ...]:
    return *_images(inputs[0], inputs[8]), inputs[0].new_empty(1, dtype=torch.uint8)


def _draw_backward_fake(*inputs: Any) -> list[Tensor]:
    return _gradients(inputs[8:15], inputs[7])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    color, alpha, depth, radii, frame = output
    ctx.save_for_backward(color, alpha, depth, frame, *inputs[:8])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(radii, frame)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, by_color: Tensor | None, by_alpha: Tensor | None, by_depth: Any, *_: Any) -> Any:
    wanted = list(ctx.needs_input_grad[:7])
    saved = ctx.saved_tensors
    by_depth = by_depth if ctx.options[0][4] else None
    grads = iter(draw_backward(by_color, by_alpha, by_depth, *saved[:4], wanted, *saved[4:], *ctx.options))
    return *(next(grads) if want else None for want in wanted), None, None, None


draw = operator(
    "splat_draw",
    f"({_SCENE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _draw,
    fake=_draw_fake,
    keep=_keep,
    gradient=_differentiate,
)
draw_backward = operator(
    "splat_draw_backward",
    "(Tensor? by_color, Tensor? by_alpha, Tensor? by_depth, Tensor color, Tensor alpha, Tensor depth,"
    f" Tensor frame, bool[] wanted, {_SCENE}) -> Tensor[]",
    _draw_backward,
    fake=_draw_backward_fake,
)


def _kernels() -> Any:
    kernels = native.load()
    if kernels is None or not hasattr(kernels, "splat_forward"):
        raise RuntimeError("compiled code that draws Gaussians needs the native library; install it, or run eagerly")
    return kernels


def _images(means: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, height, _, _, deep = sizes
    depth = means.new_empty(height, width) if deep else means.new_empty(0)
    return means.new_empty(height, width, 3), means.new_empty(height, width), depth, means.new_empty(len(means))


def _gradients(scene: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    found = [values for values, want in zip(scene, wanted, strict=True) if want and values is not None]
    return [torch.empty_like(values, memory_format=torch.contiguous_format) for values in found]


def _packed(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if values is None else values.contiguous() for values in tensors]


def _counts(scene: Sequence[Any], sizes: Sequence[int]) -> tuple[int, int, int]:
    """Of Gaussians, and of their coefficients, stored and looked at."""
    return len(scene[0]), scene[5].shape[1], sizes[2]


def _addresses(tensors: Any) -> list[int]:
    return [0 if values is None else values.data_ptr() for values in tensors]


def _numbers(world_to_camera: Tensor, lens: Sequence[float]) -> list[float]:
    motion = world_to_camera.double()
    placed = [*motion[:3, :3].flatten().tolist(), *motion[:3, 3].tolist()]
    position = (-motion[:3, :3].T @ motion[:3, 3]).tolist()
    return [*lens[:5], *placed, *position, *lens[5:]]


def rasterize_cuda(splats: Splats, look: Look, offsets: Tensor | None) -> Images:
    """By gsplat. ``offsets`` are taken for zeros: there they serve only to receive their gradient."""
    camera, means = look.camera, splats.means
    motion = camera.world_to_camera.to(means)
    lens = means.new_tensor([[camera.focal[0], 0, camera.centre[0]], [0, camera.focal[1], camera.centre[1]], [0, 0, 1]])
    color, alpha, found = require("gsplat", "splats").rasterization(
        means=means,
        quats=splats.quaternions,
        scales=splats.scales.exp(),
        opacities=splats.opacities.sigmoid(),
        colors=torch.cat([splats.colors[:, None], splats.harmonics], 1),
        viewmats=motion[None],
        Ks=lens[None],
        width=camera.width,
        height=camera.height,
        near_plane=camera.near,
        sh_degree=look.degree,
        packed=False,
        backgrounds=means.new_tensor([look.background]),
        render_mode="RGB+D" if look.depth else "RGB",
        rasterize_mode="antialiased" if look.antialias else "classic",
    )
    if offsets is not None and offsets.requires_grad:
        found["means2d"].register_hook(lambda pull: _add_grad(offsets, pull[0]))
    radii = found["radii"][0].to(means.dtype)
    radii = radii.amax(-1) if radii.dim() == 2 else radii
    return color[0, ..., :3], alpha[0, ..., 0], color[0, ..., 3] if look.depth else None, radii


def _add_grad(leaf: Tensor, pull: Tensor) -> None:
    leaf.grad = pull.detach().clone() if leaf.grad is None else leaf.grad + pull
