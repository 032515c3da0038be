"""How far a picture is from another: the loss that scenes are trained with, PSNR and SSIM.

The loss is 3DGS's (Kerbl et al. 2023, arXiv 2308.04079): (1 - w) mean |x - y| + w (1 - SSIM). SSIM (Wang et al. 2004)
takes windows of 11 x 11 pixels weighted by a Gaussian with sigma 1.5, zeros beyond the border, and values from 0 to 1.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scrimp import native
from scrimp.primitives.errors import InputError

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
    count = _check(rendered, target, mask)
    if not 0 <= ssim_weight <= 1:
        raise InputError("ssim_weight from 0 to 1", str(ssim_weight), "choose it there")
    plain = rendered.device.type == "cpu" and rendered.dtype == torch.float32
    kernels = native.load() if plain else None
    if kernels is None or not hasattr(kernels, "splat_image_loss"):
        return image_loss_twin(rendered, target, ssim_weight=ssim_weight, mask=mask)
    factors = ((1 - ssim_weight) / count, ssim_weight / count)
    return _ImageLoss.apply(kernels, rendered, target.detach(), None if mask is None else mask.detach(), factors)


def image_loss_twin(
    rendered: Tensor, target: Tensor, *, ssim_weight: float = 0.2, mask: Tensor | None = None
) -> Tensor:
    """`image_loss` in plain torch, any dtype and device."""
    count = _check(rendered, target, mask)
    weight = torch.ones_like(rendered[..., 0]) if mask is None else mask.detach()
    x, y = rendered * weight[..., None], target.detach() * weight[..., None]
    unlike = (1 - _ssim_map(x, y)) * weight[..., None]
    return ((1 - ssim_weight) * (x - y).abs().sum() + ssim_weight * unlike.sum()) / count


def ssim(rendered: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Structural similarity, a scalar, 1 for equal pictures; as `image_loss` takes it."""
    return 1 - image_loss(rendered, target, ssim_weight=1.0, mask=mask)


def psnr(rendered: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, a scalar, of pictures from 0 to 1; infinite for equal ones."""
    count = _check(rendered, target, mask)
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


class _ImageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, rendered: Tensor, *others: Any) -> Tensor:
        target, mask, (absolute, similar) = others
        x, y = rendered.contiguous(), target.contiguous()
        kept = None if mask is None else mask.contiguous()
        pull = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        addresses = [0 if values is None else values.data_ptr() for values in (x, y, kept)]
        to = 0 if pull is None else pull.data_ptr()
        difference, unlike = kernels.splat_image_loss(*addresses, *x.shape[:2], absolute, similar, to)
        ctx.save_for_backward(pull)
        return x.new_tensor(absolute * difference + similar * unlike)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> Any:
        return None, ctx.saved_tensors[0] * by_loss, None, None, None


def _check(rendered: Tensor, target: Tensor, mask: Tensor | None) -> float:
    """How many values count."""
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
    count = rendered.numel() if mask is None else 3 * float(mask.detach().sum())
    if count <= 0:
        raise InputError("a mask that keeps a pixel", "one of zeros", "leave the picture out")
    return count
