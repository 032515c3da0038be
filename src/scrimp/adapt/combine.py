"""Combinations of frozen random bases: ``coefficients [bases] -> sum_i coefficients_i basis_i [count]``.

Two kinds of bases, exchangeable for one another. `orthogonal` takes some ``2 count sqrt(bases)`` products and keeps
nothing but signs; `independent` is the paper's, and takes ``count * bases``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from scrimp.adapt.basis import key_of, native_for, register, sign_rows, uniform_op
from scrimp.adapt.cache import Cache, kept, parity, taken, uniform_of
from scrimp.primitives.errors import InputError

CHUNK_BYTES = 4 << 20
"""Most that `independent` draws at once where it keeps no bases; one basis at least."""


def orthogonal(coefficients: Tensor, count: int, *, seed: int, stream: int = 0, cache: Cache | None = None) -> Tensor:
    """The sum of bases of signs that are orthogonal in blocks of L, the power of two from ``bases`` up, at least 2.

    In block b, ``basis_i[b L + t] = e[b L + t] (-1)^popcount(t & i) d[b L + i]`` with random signs d and e: a
    Hadamard matrix whose rows and columns change sign at random. The bases are orthogonal, each of length
    sqrt(count), where L divides ``count``.

    Args:
        coefficients: [bases], floating; half precision is summed in float32.
        count: numbers of the sum.
        seed: of the generator; see `scrimp.adapt.basis.signs`.
        stream: of the generator, one for each factor.
        cache: keeps the signs for devices that have no compiled kernel, which draws them faster than it would read
            them. Without one they are drawn anew in forward and in backward.

    Returns:
        [count], of the type and on the device of ``coefficients``, differentiable in them once.

    Raises:
        InputError: coefficients that are no floating vector of one number or more, or a number outside its range.

    Source: random signs around a Hadamard matrix are those of fast random projections (Ailon and Chazelle 2006); to
    take them for the bases of NOLA is ours.
    """
    _check(coefficients, count, seed, stream)
    return _apply(coefficients, count, (seed, stream, cache), _orthogonal_sum, _orthogonal_dot, _orthogonal_sum_twin)


def independent(coefficients: Tensor, count: int, *, seed: int, stream: int = 0, cache: Cache | None = None) -> Tensor:
    """The sum of independent uniform bases, `scrimp.adapt.basis` number 0, 1, ...: the paper's kind.

    Arguments, result and errors are those of `orthogonal`. Where the cache has no room for all bases, or where there
    is none, they are drawn in pieces of `CHUNK_BYTES`, in forward and once more in backward.

    Source: NOLA (Koohpayegani et al. 2024), equation 3 and its section on memory.
    """
    _check(coefficients, count, seed, stream)
    return _apply(
        coefficients, count, (seed, stream, cache), _independent_sum, _independent_dot, _independent_sum_whole
    )


def orthogonal_basis(
    seed: int, index: int, count: int, *, bases: int, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Basis number ``index`` of the ``bases`` that `orthogonal` sums, entry by entry: int8 [count]. The reference."""
    length = _block(bases)
    padded = _blocks(count, length) * length
    outer, inner = sign_rows(seed, 0, padded, rows=2, stream=stream, device=device)
    places = torch.arange(count, device=outer.device)
    chosen = outer[places // length * length + index]
    return inner[:count] * (1 - 2 * parity(places % length & index)).to(torch.int8) * chosen


def _check(coefficients: Tensor, count: int, seed: int, stream: int) -> None:
    if coefficients.ndim != 1 or len(coefficients) == 0 or not coefficients.is_floating_point():
        got = f"{str(coefficients.dtype).removeprefix('torch.')} {list(coefficients.shape)}"
        raise InputError("floating coefficients [bases], one or more", got, "pass one number a basis")
    key_of(seed, 0, count, len(coefficients) + 1, stream)


class _Linear(torch.autograd.Function):
    """A frozen linear map of the coefficients, and its transpose: nothing of it is saved."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, product: Any, transposed: Any, count: int, drawn: Any) -> Tensor:
        ctx.transposed, ctx.drawn = transposed, drawn
        ctx.bases, ctx.dtype = len(coefficients), coefficients.dtype
        with _without_autocast(coefficients):
            return product(_wide(coefficients), count, *drawn).to(coefficients.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        with _without_autocast(grad):
            found = ctx.transposed(_wide(grad).contiguous(), ctx.bases, *ctx.drawn)
        return found.to(ctx.dtype), None, None, None, None


def _apply(
    coefficients: Tensor,
    count: int,
    drawn: tuple[int, int, Cache | None],
    product: Any,
    transposed: Any,
    open_product: Any,
) -> Tensor:
    """The sum in the coefficients' type; torch.func gets operators that it can differentiate."""
    # Constants for torch.compile, which may have made symbols of them.
    count, drawn = operator.index(count), (operator.index(drawn[0]), operator.index(drawn[1]), drawn[2])
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        with _without_autocast(coefficients):
            return open_product(_wide(coefficients), count, *drawn).to(coefficients.dtype)
    return _Linear.apply(coefficients, product, transposed, count, drawn)


def _wide(tensor: Tensor) -> Tensor:
    """float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    kind = tensor.device.type
    if torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _block(bases: int) -> int:
    """L: the power of two from ``bases`` up, at least 2."""
    return max(2, 1 << (bases - 1).bit_length())


def _blocks(count: int, length: int) -> int:
    return -(-count // length)


def _kernels_for(tensor: Tensor) -> Any:
    """The compiled module, if it takes this tensor and nobody counts or replaces torch's operators."""
    if torch.compiler.is_compiling():
        return None
    plain = type(tensor) is Tensor and tensor.dtype == torch.float32 and not torch._C._len_torch_dispatch_stack()
    return native_for(tensor.device, "orthogonal_sum") if plain else None


def _orthogonal_sum(coefficients: Tensor, count: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    native = _kernels_for(coefficients)
    if native is None:
        return _orthogonal_sum_twin(coefficients, count, seed, stream, cache)
    out, packed = coefficients.new_empty(count), coefficients.contiguous()
    low, high = key_of(seed, 0, count, 1, stream)
    native.orthogonal_sum(low, high, stream, packed.data_ptr(), len(packed), _block(len(packed)), count, out.data_ptr())
    return out


def _orthogonal_dot(grad: Tensor, bases: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    native = _kernels_for(grad)
    if native is None:
        return _orthogonal_dot_twin(grad, bases, seed, stream, cache)
    out = grad.new_empty(bases)
    low, high = key_of(seed, 0, len(grad), 1, stream)
    native.orthogonal_dot(low, high, stream, grad.data_ptr(), len(grad), _block(bases), bases, out.data_ptr())
    return out


def _orthogonal_sum_twin(coefficients: Tensor, count: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    bases = coefficients.shape[0]
    length = _block(bases)
    outer, inner = _both_signs(count, length, seed, stream, coefficients.device, cache)
    changed = _transform(pad(coefficients, (0, length - bases)) * outer, cache)
    return (changed * inner).flatten()[:count]


def _orthogonal_dot_twin(grad: Tensor, bases: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    length = _block(bases)
    outer, inner = _both_signs(len(grad), length, seed, stream, grad.device, cache)
    padded = pad(grad, (0, inner.numel() - len(grad))).view(-1, length)
    return (_transform(padded * inner, cache) * outer).sum(0)[:bases]


def _both_signs(
    count: int, length: int, seed: int, stream: int, device: torch.device, cache: Cache | None
) -> tuple[Tensor, Tensor]:
    """d and e of the formula, int8 [blocks, length] each."""
    blocks = _blocks(count, length)
    found = taken(cache, "signs", seed, 0, blocks * length, 2, stream, device).view(2, blocks, length)
    return found[0], found[1]


def _transform(rows: Tensor, cache: Cache | None) -> Tensor:
    """Every row of [blocks, length] by the Hadamard matrix, as the product of two smaller ones."""
    blocks, length = rows.shape
    right = 1 << (length.bit_length() - 1) // 2
    left = length // right
    by_left = taken(cache, "hadamard", left, rows.dtype, rows.device)
    by_right = taken(cache, "hadamard", right, rows.dtype, rows.device)
    return (by_left @ (rows.view(blocks, left, right) @ by_right)).view(blocks, length)


def _independent_sum(coefficients: Tensor, count: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    bases = len(coefficients)
    known = kept(cache, "uniform", seed, count, bases, stream, coefficients.dtype, coefficients.device)
    if known is not None:
        return coefficients @ known
    return sum_op(coefficients, count, *key_of(seed, 0, count, 1, stream), stream)


def _independent_dot(grad: Tensor, bases: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    known = kept(cache, "uniform", seed, len(grad), bases, stream, grad.dtype, grad.device)
    if known is not None:
        return known @ grad
    return dot_op(grad, bases, *key_of(seed, 0, len(grad), 1, stream), stream)


def _independent_sum_whole(coefficients: Tensor, count: int, seed: int, stream: int, cache: Cache | None) -> Tensor:
    """For torch.func, which does not look into operators: all bases at once."""
    return coefficients @ uniform_of(
        seed, count, coefficients.shape[0], stream, coefficients.dtype, coefficients.device
    )


def _pieces(like: Tensor, count: int, bases: int, low: int, high: int, stream: int) -> Iterator[tuple[slice, Tensor]]:
    """All bases in pieces of `CHUNK_BYTES`: which, and their rows [some, count]."""
    rows = max(1, CHUNK_BYTES // max(1, count * like.dtype.itemsize))
    for first in range(0, bases, rows):
        some = min(rows, bases - first)
        drawn = uniform_op(low, high, 1 + first, stream, some, count, like.dtype, like.device)
        yield slice(first, first + some), drawn


def _sum(coefficients: Tensor, count: int, low: int, high: int, stream: int) -> Tensor:
    out = coefficients.new_zeros(count)
    for which, rows in _pieces(coefficients, count, len(coefficients), low, high, stream):
        out += coefficients[which] @ rows
    return out


def _dot(grad: Tensor, bases: int, low: int, high: int, stream: int) -> Tensor:
    return torch.cat([rows @ grad for _, rows in _pieces(grad, len(grad), bases, low, high, stream)])


# Operators, lest compiled code keeps the bases of forward for backward, or holds them all at once.
sum_op = register(
    "independent_sum",
    "Tensor coefficients, SymInt count, int seed_low, int seed_high, int stream",
    _sum,
    lambda coefficients, count, *_: coefficients.new_empty(count),
    flops=lambda coefficients, count, *_, **__: 2 * coefficients[0] * count,
)
dot_op = register(
    "independent_dot",
    "Tensor grad, SymInt bases, int seed_low, int seed_high, int stream",
    _dot,
    lambda grad, bases, *_: grad.new_empty(bases),
    flops=lambda grad, bases, *_, **__: 2 * grad[0] * bases,
)
