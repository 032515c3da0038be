"""How far a picture is from another: the loss that scenes are trained with, PSNR and SSIM.

The loss is 3DGS's (Kerbl et al. 2023, arXiv 2308.04079): (1 - w) mean |x - y| + w (1 - SSIM). SSIM (Wang et al. 2004)
takes windows of 11 x 11 pixels weighted by a Gaussian with sigma 1.5, zeros beyond the border, and values from 0 to 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats.operators import operator

REACH, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2


def image_loss(rendered: Tensor, target: Tensor, *, ssim_weight: float = 0.2, mask: Tensor | None = None) -> Tensor:
    """(1 - w) mean |x - y| + w (1 - SSIM), a scalar.

    float32 on a CPU runs a native kernel, which finds the gradient by the way; anything else `image_loss_twin`.

    Args:
        rendered: [h, w, 3], 0 to 1; the gradient goes here.
        target: [h, w, 3], 0 to 1; receives no gradient.
        mask: [h, w], 0 to 1, what each pixel counts. Both pictures are black where it is 0, in SSIM's windows too.

    Raises:
        InputError: shapes, dtypes or devices that differ, a weight outside 0 to 1, or a mask of nothing.
    """
    _check(rendered, target, mask)
    if not 0 <= ssim_weight <= 1:
        raise InputError("ssim_weight from 0 to 1", str(ssim_weight), "choose it there")
    if not _by_kernels(rendered):
        return image_loss_twin(rendered, target, ssim_weight=ssim_weight, mask=mask)
    wanted = torch.is_grad_enabled() and rendered.requires_grad
    return image_loss_op(rendered, target.detach(), None if mask is None else mask.detach(), ssim_weight, wanted)[0]


def image_loss_twin(
    rendered: Tensor, target: Tensor, *, ssim_weight: float = 0.2, mask: Tensor | None = None
) -> Tensor:
    """`image_loss` in plain torch, any dtype and device."""
    _check(rendered, target, mask)
    count = _count(rendered, mask)
    weight = torch.ones_like(rendered[..., 0]) if mask is None else mask.detach()
    x, y = rendered * weight[..., None], target.detach() * weight[..., None]
    unlike = (1 - _ssim_map(x, y)) * weight[..., None]
    return ((1 - ssim_weight) * (x - y).abs().sum() + ssim_weight * unlike.sum()) / count


def ssim(rendered: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Structural similarity, a scalar, 1 for equal pictures; as `image_loss` takes it."""
    return 1 - image_loss(rendered, target, ssim_weight=1.0, mask=mask)


def psnr(rendered: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, a scalar, of pictures from 0 to 1; infinite for equal ones."""
    _check(rendered, target, mask)
    count = _count(rendered, mask)
    square = (rendered - target).square()
    total = square.sum() if mask is None else (square * mask[..., None]).sum()
    return -10 * torch.log10(total / count)


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    mx, my, xx, yy, xy = (_blur(values) for values in (x, y, x * x, y * y, x * y))
    spread = (2 * (xy - mx * my) + C2) / (xx - mx * mx + yy - my * my + C2)
    return (2 * mx * my + C1) / (mx * mx + my * my + C1) * spread


def _blur(image: Tensor) -> Tensor:
    """[h, w, 3], rows and then columns."""
    places = torch.arange(-REACH, REACH + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-places.square() / (2 * SIGMA**2))
    taps = (taps / taps.sum()).reshape(1, 1, -1, 1)
    planes = image.permute(2, 0, 1)[:, None]
    planes = torch.nn.functional.conv2d(planes, taps, padding=(REACH, 0))
    return torch.nn.functional.conv2d(planes, taps.mT, padding=(0, REACH))[:, 0].permute(1, 2, 0)


def _run(
    rendered: Tensor, target: Tensor, mask: Tensor | None, ssim_weight: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the rendered picture where it is wanted, else nothing."""
    kernels, count = native.load(), _count(rendered, mask)
    if kernels is None:
        raise RuntimeError("a compiled loss of pictures needs the native library; install it, or run eagerly")
    parts = [None if values is None else values.contiguous() for values in (rendered, target, mask)]
    pull = rendered.new_empty(rendered.shape if wanted else 0)
    addresses = [0 if values is None else values.data_ptr() for values in parts]
    absolute, similar = (1 - ssim_weight) / count, ssim_weight / count
    to = pull.data_ptr() if wanted else 0
    difference, unlike = kernels.splat_image_loss(*addresses, *rendered.shape[:2], absolute, similar, to)
    return rendered.new_tensor(absolute * difference + similar * unlike), pull


def _run_backward(by_loss: Tensor, rendered: Tensor, pull: Tensor) -> Tensor:
    """The gradient by the rendered picture, which is named so that a second derivative is refused, not taken for 0."""
    return pull * by_loss


def _fake(
    rendered: Tensor, target: Tensor, mask: Tensor | None, ssim_weight: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    return rendered.new_empty(()), rendered.new_empty(rendered.shape if wanted else 0)


def _backward_fake(by_loss: Tensor, rendered: Tensor, pull: Tensor) -> Tensor:
    return torch.empty_like(pull)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, by_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return None if by_loss is None else image_loss_backward_op(by_loss, *ctx.saved_tensors), None, None, None, None


image_loss_op = operator(
    "splat_image_loss",
    "(Tensor rendered, Tensor target, Tensor? mask, float ssim_weight, bool wanted) -> (Tensor, Tensor)",
    _run,
    fake=_fake,
    keep=_keep,
    gradient=_differentiate,
)
image_loss_backward_op = operator(
    "splat_image_loss_backward",
    "(Tensor by_loss, Tensor rendered, Tensor pull) -> Tensor",
    _run_backward,
    fake=_backward_fake,
)


@register_flop_formula(torch.ops.scrimp.splat_image_loss)
def _flops(shape: Any, target: Any, mask: Any, ssim_weight: float, wanted: bool, **_: Any) -> int:
    """Of the windows alone, as of convolutions: of five images along rows and columns, of three on the way back."""
    return 2 * math.prod(shape) * 2 * (2 * REACH + 1) * (5 + 3 * wanted)


@register_flop_formula(torch.ops.scrimp.splat_image_loss_backward)
def _backward_flops(*_: Any, **__: Any) -> int:
    return 0


def _by_kernels(rendered: Tensor) -> bool:
    if rendered.dtype != torch.float32 or rendered.device.type not in ("cpu", "meta"):
        return False
    # What is compiled, or has no numbers, needs the operator's shape alone, and the compiler cannot look for a library.
    return torch.compiler.is_compiling() or rendered.is_meta or hasattr(native.load(), "splat_image_loss")


def _check(rendered: Tensor, target: Tensor, mask: Tensor | None) -> None:
    shape = rendered.shape
    if len(shape) != 3 or shape[2] != 3 or rendered.numel() == 0:
        raise InputError("a picture [h, w, 3]", f"{list(shape)}", "put the channels last")
    for name, values, wanted in (("target", target, shape), ("mask", mask, shape[:2])):
        if values is not None and values.shape != wanted:
            raise InputError(f"{name} {list(wanted)}", f"{list(values.shape)}", "crop or resize it")
        if values is not None and (values.dtype, values.device) != (rendered.dtype, rendered.device):
            raise InputError(
                f"{name} {rendered.dtype}, {rendered.device}", f"{values.dtype}, {values.device}", "move it"
            )


def _count(rendered: Tensor, mask: Tensor | None) -> float:
    """How many values count."""
    count = rendered.numel() if mask is None else 3 * float(mask.detach().sum())
    if count <= 0:
        raise InputError("a mask that keeps a pixel", "one of zeros", "leave the picture out")
    return count
