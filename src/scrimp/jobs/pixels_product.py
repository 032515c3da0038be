"""Matrix products of a step: weights laid out once for the few rows of a batch, in float or rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError

_FEW = 8
"""Rows up to which reading the weights takes longer than the arithmetic."""


class Products:
    """Makes products of the weights of `torch.nn.Linear` with ``rows`` rows.

    Args:
        rows: of every input.
        weights: ``"float"``, or ``"int8"``: each row of a weight rounded to whole multiples of its largest entry / 127,
            and inputs to bfloat16.

    Raises:
        InputError: ``"int8"`` and weights that are not on the CPU.
    """

    def __init__(self, rows: int, weights: str = "float") -> None:
        self.rows, self.rounded = rows, weights == "int8"

    def after_norm(self, norm: nn.LayerNorm, linear: nn.Linear, out: Tensor) -> Callable[[Tensor], Any]:
        """``linear(factor * x + offset)`` into ``out`` [rows, outputs], for x without the norm's factor and offset."""
        weight, bias = linear.weight.detach(), linear.bias.detach()
        bias = torch.addmv(bias, weight, norm.bias.detach())
        weight = weight * norm.weight.detach()
        if self.rounded:
            product = self._rounded(weight)
            return lambda x: torch.add(bias, product(x), out=out)
        # One after the other in memory along the outputs: the quicker order for one row, and no slower for many.
        packed = weight.t().contiguous()
        return lambda x: torch.addmm(bias, x, packed, out=out)

    def adding_(self, linear: nn.Linear) -> Callable[[Tensor, Tensor], Any]:
        """``x += linear(inner)``, in place, for a linear map without bias."""
        weight = linear.weight.detach()
        if self.rounded:
            product = self._rounded(weight)
            return lambda x, inner: x.add_(product(inner))
        packed = weight.t().contiguous()
        return lambda x, inner: x.addmm_(inner, packed)

    def _rounded(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        if weight.device.type != "cpu":
            raise InputError("a model on the CPU for 8-bit weights", f"{weight.device}", "pass --device cpu")
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        whole = (weight / scales[:, None]).round().to(torch.int8)
        if self.rows <= _FEW and hasattr(torch, "_weight_int8pack_mm"):
            half = scales.bfloat16()
            return lambda x: torch._weight_int8pack_mm(x.bfloat16(), whole, half)
        # Whole numbers up to 127 are exact in bfloat16, whose products are the quicker ones from here on.
        exact = whole.bfloat16().t()
        return lambda x: torch.mm(x.bfloat16(), exact) * scales
