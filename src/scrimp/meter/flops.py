"""Floating-point operations of a call, counted operator by operator as torch dispatches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from scrimp.meter.cost import Reading
from scrimp.meter.eager import eager, take_apart
from scrimp.meter.ops import is_free, is_metadata, op_name
from scrimp.primitives.errors import InputError

Shape = tuple[int, ...]
Formula = Callable[..., int]


def count_flops(fn: Callable[[], Any]) -> Reading:
    """Run ``fn()`` once and count the floating-point operations it makes; 1 multiply-add = 2 FLOPs.

    Matrix products and convolutions are counted, forward and backward, as often as they run (recomputation under
    checkpointing included); bias, pointwise work and reductions are not, as is the custom. Attention is taken as its
    plain matrix products, compiled code as the eager code it stands for. ``missed`` names, sorted, every operator
    that ran and may do such work but has no formula (see `register_flops`): with any there, the value is a lower
    bound. Work outside torch's dispatcher (NumPy, ctypes, other threads or processes) cannot be seen.

    Args:
        fn: called once, without arguments, several times slower than usual: never time it in the same pass.

    Raises:
        Whatever ``fn`` raises.
    """
    with counting() as counter:
        fn()
    return counter.reading()


@contextmanager
def counting() -> Iterator[FlopCount]:
    """Count the floating-point operations made in the ``with`` block; see `count_flops` for what is counted.

    ``counter.reading()`` may be asked inside the block, for the count so far, and after it.
    """
    mode = _CountingMode()
    with ExitStack() as stack:
        # The fused attention and encoder kernels are single operators without a formula on the CPU.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_encoder_fastpath())
        stack.enter_context(eager())
        stack.enter_context(mode)
        yield FlopCount(mode)


class FlopCount:
    """The running count of a `counting` block."""

    def __init__(self, mode: _CountingMode) -> None:
        self._mode = mode

    def reading(self) -> Reading:
        """The count so far and the names of the operators it misses."""
        missed = tuple(sorted(self._mode.missed))
        how = "counted by torch operator as dispatched, 1 multiply-add = 2 FLOPs"
        return Reading(self._mode.total, f"{how}; lower bound" if missed else how, missed)


def register_flops(op: Any, formula: Formula) -> None:
    """Give an operator a formula, so that it is counted instead of listed as missed.

    Args:
        op: ``torch.ops.lib.name``, one of its overloads, or what ``torch.library.custom_op`` returned.
        formula: called as the operator was, with the shape in the place of each tensor and the output's shape as
            ``out_shape``; returns the FLOPs of one call. The backward operator, if any, needs its own.

    Raises:
        InputError: ``op`` is no torch operator, or has a formula already.
    """
    overload = getattr(op, "_opoverload", op)
    packet = getattr(overload, "_overloadpacket", overload)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise InputError("a torch operator", repr(op), "pass torch.ops.<library>.<name>")
    if packet in flop_registry or packet in _FORMULAS:
        raise InputError("an operator without a FLOP formula", str(packet), "register each operator once")
    register_flop_formula(packet)(formula)


class _CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.missed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _formula(func)
        if formula is not None:
            out = func(*args, **kwargs)
            self.total += int(formula(*args, **kwargs, out_val=out))
            return out
        if is_metadata(func):  # a nested tensor asks again and again, without end, when these are taken apart
            return func(*args, **kwargs)
        out = take_apart(self, func, types, args, kwargs)
        if out is not NotImplemented:
            return out
        if not is_free(func):
            self.missed.add(op_name(func))
        return func(*args, **kwargs)


@contextmanager
def _no_encoder_fastpath() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _formula(func: Any) -> Callable[..., Any] | None:
    packet = getattr(func, "_overloadpacket", func)
    ours = _FORMULAS.get(packet)
    if ours is None:
        return flop_registry.get(packet)
    return lambda *args, out_val, **kwargs: ours(*args, **kwargs)


def _matrix_vector(matrix: torch.Tensor, *rest: Any, **options: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(_: torch.Tensor, matrix: torch.Tensor, *rest: Any, **options: Any) -> int:
    return 2 * matrix.numel()


def _dot(left: torch.Tensor, *rest: Any, **options: Any) -> int:
    return 2 * left.numel()


def _added_product(_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *rest: Any, **options: Any) -> int:
    """2 b m k n of ``[b,] m x k`` times ``[b,] k x n``, summed over b or not."""
    return 2 * left.numel() * right.shape[-1]


def _convolution_backward(
    grad: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, *geometry: Any, output_mask: Any = None
) -> int:
    """The gradient by the input and that by the weight each cost what the forward pass did.

    torch's own formula charges the weight's gradient ``groups`` times too much, as if a depthwise convolution were
    dense.
    """
    *_, transposed, _output_padding, _groups = geometry[:7]
    wanted = geometry[7] if output_mask is None else output_mask
    places = prod((image if transposed else grad).shape[2:])
    return 2 * grad.shape[0] * places * weight.numel() * sum(map(bool, wanted[:2]))


_aten = torch.ops.aten
# Beside torch's registry, not in it: a host program's own counters must not change under it.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: _matrix_vector,
    _aten.addmv: _added_matrix_vector,
    _aten.addmv_: _added_matrix_vector,
    _aten.dot: _dot,
    _aten.vdot: _dot,
    _aten.addmm_: _added_product,
    _aten._addmm_activation: _added_product,
    _aten.baddbmm_: _added_product,
    _aten.addbmm: _added_product,
    _aten.addbmm_: _added_product,
    _aten.convolution_backward: _convolution_backward,
}
