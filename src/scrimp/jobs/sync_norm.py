"""Batch normalisation over the batch of all processes: without it two processes train another network than one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scrimp.represent.heads import BatchNorm


def synchronise_norms_(model: nn.Module, device: torch.device) -> nn.Module:
    """Let plain batch norms of ``model`` take their statistics over all processes; returns the model.

    On GPUs torch's ``SyncBatchNorm`` does it; it has no CPU form, so there a small one of ours does. Subclasses of
    torch's norms (timm's fused ones) keep to their own process's part of the batch.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in _KINDS:
            module.__class__ = _KINDS[type(module)]
    return model


class _Synced(_BatchNorm):
    """A batch norm whose mean and variance are those of all processes' batches together."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(input)
        wide = input.float()
        axes = [axis for axis in range(input.ndim) if axis != 1]
        count = torch.full((1,), input.numel() / input.shape[1], device=input.device)
        sums = _AllSum.apply(torch.cat([wide.sum(axes), wide.square().sum(axes), count]))
        mean, square = sums[:-1].view(2, -1) / sums[-1]
        variance = (square - mean.square()).clamp_min(0)
        self._remember(mean.detach(), variance.detach(), float(sums[-1].detach()))
        shape = [1, -1] + [1] * (input.ndim - 2)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale + (self.bias if self.affine else 0)
        return (wide * scale.view(shape) + shift.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: float) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * count / max(1.0, count - 1), share)


class _Synced1d(_Synced, nn.BatchNorm1d):
    pass


class _Synced2d(_Synced, nn.BatchNorm2d):
    pass


_KINDS: dict[type, type] = {nn.BatchNorm1d: _Synced1d, BatchNorm: _Synced1d, nn.BatchNorm2d: _Synced2d}


class _AllSum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total
