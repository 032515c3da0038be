"""Coefficients at 8, 4, 3 or 2 bits each, for training and for files.

The grid: the scale s of a vector is the edge of its range, cut into ``L = 2^bits`` equal cells; code q stands for the
middle of its cell, ``s (2 q + 1 - L) / L``. No level lies at zero, so that at 2 bits all four are of use; a vector of
zeros has scale 0. Scales have eleven significant bits, hence every level is exact in float32.

The largest entry always takes an outermost code: scales are searched from there downwards, clipping, never leaving the
outermost codes idle. The scale of a vector on the grid can then be read off its largest entry, which is why quantising
twice, or saving and loading twice, changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError

_LOWEST = {8: 0.95, 4: 0.5, 3: 0.3, 2: 0.2}  # smallest scale tried, as a share of the full range, by bits
_CANDIDATES = 16
_PLAIN = {32: torch.float32, 16: torch.float16}
_LARGEST = 1024.0  # of a coefficient that is coded
_STORED = 32.0  # scales are stored as float16 of this multiple: the range then is that of coefficients
_SMALLEST = 2.0**-14 / _STORED  # scale; less is float16's coarse end, and far below what an adapter can feel
_FLOAT16 = 65504.0


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest codes, under a scale of about least squared error.

    For quantising NOLA's coefficients after training (Koohpayegani et al., ICLR 2024). Tried are 16 scales, from the
    full range down. A vector whose entries are all below 1.4e-6 in size becomes zero.

    Args:
        values: [..., count], finite, of size up to 1024. Each last dimension is a vector of its own.
        bits: 8, 4, 3 or 2.

    Returns:
        codes, uint8 [..., count], below 2^bits, and scale, float32 [...].

    Raises:
        InputError: other bits, a single number, or one that is not finite or too large.
    """
    if bits not in _LOWEST:
        raise InputError("8, 4, 3 or 2 bits", f"{bits}", "use pack for 32 and 16, which need no codes")
    _check_vector(values)
    plain = values.detach().float()
    if not bool((plain.abs() <= _LARGEST).all()):
        raise InputError(f"finite values of size up to {_LARGEST:g}", "one beyond", "lower the learning rate")
    codes, scale = _search(plain, bits)
    return codes.to(torch.uint8), scale.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The values that codes [..., count] stand for under scales [...], float32 [..., count]."""
    return _levels(codes.float(), bits) * scale.float().unsqueeze(-1)


def fake_quantize(values: Tensor, bits: int) -> Tensor:
    """``dequantize(*quantize(values, bits), bits)`` with a straight-through gradient, for training at few bits.

    The gradient is passed as it is to entries within [-scale, scale] and is zero for those that are clipped (Hubara et
    al. 2016); a vector whose scale is 0 gets all of it. Nothing is checked and nothing waits for the device: an
    entry that is not finite comes back as NaN and may spoil its vector. At 16 bits values are rounded to float16, at 32
    returned as they are. Many vectors of one length cost little more than one: stack them.

    Args:
        values: [..., count], each last dimension a vector of its own.
        bits: 32, 16, 8, 4, 3 or 2.

    Returns:
        [..., count] in the dtype of ``values``; a dtype narrower than float32 rounds the result once more.

    Raises:
        InputError: other bits, or a single number.
    """
    _check_bits(bits)
    _check_vector(values)
    if bits == 32:
        return values
    plain = values.detach().float()
    if bits == 16:
        rounded, inside = _float16(plain), plain.abs() <= _FLOAT16
    else:
        codes, scale = _search(plain, bits)
        rounded, inside = _levels(codes, bits) * scale, plain.abs() <= _divisor(scale)
    passed = torch.where(inside, values, values.detach())
    # The difference is exactly zero (NaN where not finite), so that only its gradient is felt.
    return rounded.to(values.dtype) + (passed - passed.detach())


def packed_bytes(lengths: Sequence[int], bits: int) -> int:
    """Bytes that `pack` takes for vectors of these lengths."""
    _check_bits(bits)
    if any(length < 0 for length in lengths):
        raise InputError("lengths from 0 up", f"{min(lengths)}", "pass one length a vector")
    count = sum(lengths)
    return count * bits // 8 if bits in _PLAIN else 2 * len(lengths) + -(-count * bits // 8)


def pack(vectors: Sequence[Tensor], bits: int) -> Tensor:
    """Vectors as bytes: the scales of all, then the codes of all, lowest bit first, without gaps.

    Scales are little-endian float16, 32-fold. At 32 and 16 bits: the values themselves, little-endian, without scales.
    Bits left in the last byte are 0.

    Args:
        vectors: each [count]; counts may differ and be 0.
        bits: 32, 16, 8, 4, 3 or 2.

    Returns:
        uint8 [packed_bytes(lengths, bits)] on the CPU; the same bytes for ``unpack`` of them.

    Raises:
        InputError: other bits, no vector, or an entry that is not finite or too large: beyond float16 or float32 at
            16 and 32 bits, else beyond 1024.
    """
    _check_bits(bits)
    for vector in vectors:
        if vector.ndim != 1:
            raise InputError("vectors of shape [count]", f"shape {list(vector.shape)}", "flatten them")
    flat = [vector.detach().cpu() for vector in vectors]
    if bits in _PLAIN:
        whole = torch.cat([vector.to(_PLAIN[bits]) for vector in flat]) if flat else torch.zeros(0, dtype=_PLAIN[bits])
        if not bool(torch.isfinite(whole).all()):
            remedy = "lower the learning rate, or store more bits"
            raise InputError(f"finite values within the range of {bits}-bit floats", "one beyond", remedy)
        return _little_endian(whole.view(torch.uint8), bits // 8)
    if not flat:
        return torch.zeros(0, dtype=torch.uint8)
    coded = [quantize(vector, bits) for vector in flat]
    scales = (torch.stack([scale for _, scale in coded]) * _STORED).half()
    codes = torch.cat([codes for codes, _ in coded])
    return torch.cat([_little_endian(scales.view(torch.uint8), 2), _bits_to_bytes(codes, bits)])


def unpack(buffer: Tensor, lengths: Sequence[int], bits: int) -> list[Tensor]:
    """The vectors that `pack` wrote.

    Args:
        buffer: uint8 [packed_bytes(lengths, bits)].
        lengths: of the vectors.
        bits: as packed.

    Returns:
        float32 vectors on the CPU; packing them again gives the same bytes.

    Raises:
        InputError: a buffer of another size or type, or one that `pack` cannot have written.
    """
    expected = packed_bytes(lengths, bits)
    if buffer.dtype != torch.uint8 or buffer.shape != (expected,):
        got = f"{str(buffer.dtype).removeprefix('torch.')} {list(buffer.shape)}"
        raise InputError(f"uint8 [{expected}] for these vectors", got, "copy the file again")
    raw = buffer.detach().to("cpu", copy=True)
    if bits in _PLAIN:
        values = _little_endian(raw, bits // 8).view(_PLAIN[bits]).float()
        _check_damage(bool(torch.isfinite(values).all()), "values that are not finite")
        return [vector.clone() for vector in values.split(list(lengths))]
    scales = _little_endian(raw[: 2 * len(lengths)].clone(), 2).view(torch.float16).float() / _STORED
    codes = _bytes_to_bits(raw[2 * len(lengths) :], sum(lengths), bits)
    vectors = []
    for own, scale in zip(codes.split(list(lengths)), scales, strict=True):
        _check_damage(_regular(own, scale, bits), "a scale or codes that no vector has")
        vectors.append(dequantize(own, scale, bits))
    return vectors


def _levels(codes: Tensor, bits: int) -> Tensor:
    """Middle of each cell as a share of the scale: odd multiples of 2^-bits."""
    return codes * 2 ** (1 - bits) + (2**-bits - 1)


def _search(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes as floats [..., count] and scales [..., 1] of least squared error. No branch looks at the data."""
    if values.shape[-1] == 0:
        return values, values.new_zeros((*values.shape[:-1], 1))
    half, top = 2 ** (bits - 1), 2**bits - 1
    full = values.abs().amax(-1, keepdim=True) * (2**bits / top)
    ratios = torch.linspace(1, _LOWEST[bits], _CANDIDATES, device=values.device)
    shares = (values / full.clamp_min(1e-30)).unsqueeze(-2)
    places = shares * (half / ratios).unsqueeze(-1) + (half - 0.5)
    errors = (places.round().clamp(0, top) - places).square().sum(-1) * ratios.square()
    # The first of equals: on the grid, the full range before all.
    scale = _storable(full * ratios[errors.argmin(-1, keepdim=True)])
    # Zero lies halfway and all halves are even: under scale 0 every code is that of +0, one code for one value.
    codes = (values / _divisor(scale) * half + (half - 0.5)).round().clamp(0, top)
    return codes, scale


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.inf, scale)


def _storable(scale: Tensor) -> Tensor:
    """Positive float32 numbers to the nearest of eleven significant bits; the smallest ones to 0.

    By integers: compilers drop a pair of casts to float16 and back. The relative error is below 2^-11, so that the
    largest entry stays in its outermost cell, which at 8 bits is 2^-8 wide on either side.
    """
    rounded = ((scale.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return rounded * (rounded >= _SMALLEST)


def _float16(values: Tensor) -> Tensor:
    """float32 values rounded to float16's nearest, ties to even, still as float32; beyond its range the largest."""
    values = values.clamp(-_FLOAT16, _FLOAT16)
    pattern = values.view(torch.int32)
    normal = ((pattern + 0xFFF + ((pattern >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(values.abs() < 2.0**-14, (values * 2.0**24).round() * 2.0**-24, normal)


def _little_endian(raw: Tensor, width: int) -> Tensor:
    """Bytes of numbers this wide, from or to this machine's order."""
    return raw if sys.byteorder == "little" else raw.view(-1, width).flip(1).reshape(-1)


def _bits_to_bytes(codes: Tensor, bits: int) -> Tensor:
    digits = ((codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten()
    digits = functional.pad(digits, (0, -len(digits) % 8))
    return (digits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _bytes_to_bits(raw: Tensor, count: int, bits: int) -> Tensor:
    digits = ((raw.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    _check_damage(not bool(digits[count * bits :].any()), "bits beyond the last code")
    return (digits[: count * bits].view(count, bits) << torch.arange(bits, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )


def _regular(codes: Tensor, scale: Tensor, bits: int) -> bool:
    """Whether `quantize` can have given these: an outermost code in use, or under scale 0 none but that of zero."""
    if scale == 0:
        return not bool(torch.signbit(scale)) and bool((codes == 2 ** (bits - 1)).all())
    in_range = bool((scale >= _SMALLEST) & (scale * (1 - 2.0**-bits) <= _LARGEST))
    return in_range and bool(((codes == 0) | (codes == 2**bits - 1)).any())


def _check_damage(intact: bool, found: str) -> None:
    if not intact:
        raise InputError("packed vectors as written", found, "the file is damaged: copy it again")


def _check_bits(bits: int) -> None:
    if bits not in _LOWEST and bits not in _PLAIN:
        raise InputError("8, 4, 3, 2 bits with a scale a vector, or 32, 16 without", f"{bits}", "choose one of these")


def _check_vector(values: Tensor) -> None:
    if values.ndim == 0 or not values.is_floating_point():
        got = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise InputError("floating values of shape [..., count]", got, "pass vectors of coefficients")
