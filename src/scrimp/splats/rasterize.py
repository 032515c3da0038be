"""The native rasteriser for the CPU as a differentiable function, and gsplat's behind the same signature on CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scrimp.primitives.errors import require
from scrimp.splats.camera import Camera
from scrimp.splats.scene import COUNTS, Splats

Images = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""Colour [h, w, 3], alpha [h, w], depth weighted by alpha [h, w] where wanted, radii [n]."""


@dataclass(frozen=True, eq=False)
class Look:
    """How a scene is drawn."""

    camera: Camera
    background: tuple[float, float, float]
    degree: int
    antialias: bool
    depth: bool


def rasterize_native(kernels: ModuleType, splats: Splats, look: Look, offsets: Tensor | None) -> Images:
    """On the CPU, float32. The same bits whatever the number of threads."""
    found = _Native.apply(kernels, look, *splats.tensors().values(), offsets)
    color, alpha, radii, *depth = found
    return color, alpha, depth[0] if depth else None, radii


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, look: Look, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        scene = [None if values is None else values.detach().contiguous() for values in inputs]
        means = scene[0]
        assert means is not None
        camera = look.camera
        color = means.new_empty(camera.height, camera.width, 3)
        images = [color, *(color.new_empty(camera.height, camera.width) for _ in range(1 + look.depth))]
        radii = means.new_empty(len(means))
        to = [images[0], images[1], images[2] if look.depth else None, radii]
        counts = (len(means), scene[5].shape[1], COUNTS[look.degree])  # type: ignore[union-attr]
        size = (camera.width, camera.height, look.antialias)
        ctx.frame = kernels.splat_forward(*counts, _addresses(scene), *size, _numbers(look), _addresses(to))
        ctx.kernels, ctx.counts, ctx.deep = kernels, counts, look.depth
        ctx.save_for_backward(*scene, *images)
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return (images[0], images[1], radii, *images[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_color: Tensor | None, by_alpha: Tensor | None, _: Any, *by_depth: Tensor | None) -> Any:
        scene, images = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
        pulls = [torch.zeros_like(images[0]) if by_color is None else by_color, by_alpha, *by_depth]
        pulls = [None if pull is None else pull.contiguous() for pull in pulls]
        if not ctx.deep:
            images, pulls = [*images, None], [*pulls, None]
        wanted = zip(scene, ctx.needs_input_grad[2:], strict=True)
        grads = [torch.empty_like(values) if want and values is not None else None for values, want in wanted]
        ctx.kernels.splat_backward(
            ctx.frame, *ctx.counts, _addresses(scene), _addresses([*images, *pulls]), _addresses(grads)
        )
        return (None, None, *grads)


def _addresses(tensors: Any) -> list[int]:
    return [0 if values is None else values.data_ptr() for values in tensors]


def _numbers(look: Look) -> list[float]:
    camera, motion = look.camera, look.camera.world_to_camera.double()
    placed = [*motion[:3, :3].flatten().tolist(), *motion[:3, 3].tolist()]
    position = (-motion[:3, :3].T @ motion[:3, 3]).tolist()
    return [*camera.focal, *camera.centre, camera.near, *placed, *position, *look.background]


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
