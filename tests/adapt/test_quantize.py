"""Few-bit coefficients against loops over a plainly written grid; and that what is saved twice is saved the same."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scrimp.adapt.quantize import dequantize, fake_quantize, pack, packed_bytes, quantize, unpack
from scrimp.primitives.errors import InputError

CODED = (8, 4, 3, 2)
EVERY = (32, 16, *CODED)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(scale: float, bits: int) -> list[float]:
    """The reference: middles of 2^bits equal cells over [-scale, scale]."""
    width = 2 * scale / 2**bits
    return [-scale + width * (code + 0.5) for code in range(2**bits)]


def least_error(values: Tensor, bits: int) -> float:
    """Squared error under the best of many scales, each value at its nearest level."""
    peak = float(values.abs().max())
    best = math.inf
    for step in range(1, 201):
        levels = torch.tensor(grid(peak * step / 170, bits))
        nearest = (values[:, None] - levels).abs().amin(1)
        best = min(best, float(nearest.square().sum()))
    return best


coefficients = st.lists(
    st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1.5e-6, -3e-6, 2e-5, 1.0, -1.0]), max_size=70
)


@pytest.mark.parametrize("bits", CODED)
def test_every_value_takes_the_nearest_level(bits: int) -> None:
    values = drawn(37) * 0.01
    codes, scale = quantize(values, bits)
    levels = grid(scale.item(), bits)
    for value, code, level in zip(
        values.tolist(), codes.tolist(), dequantize(codes, scale, bits).tolist(), strict=True
    ):
        assert level == levels[code]
        assert abs(value - level) == min(abs(value - other) for other in levels)


@pytest.mark.parametrize(("bits", "slack"), [(8, 1.15), (4, 1.03), (3, 1.03), (2, 1.03)])
@pytest.mark.parametrize("heavy", [False, True])
def test_the_scale_is_near_the_best_there_is(bits: int, slack: float, heavy: bool) -> None:
    values = drawn(100, seed=1)
    values = values * values.abs() if heavy else values
    codes, scale = quantize(values, bits)
    error = (dequantize(codes, scale, bits) - values).square().sum().item()
    assert error <= slack * least_error(values, bits)


def test_at_two_bits_all_levels_are_used() -> None:
    codes, _ = quantize(drawn(64), 2)
    assert codes.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_zeros_come_back_as_zeros(bits: int, count: int) -> None:
    zeros = torch.zeros(count)
    assert torch.equal(fake_quantize(zeros, bits), zeros)
    assert torch.equal(unpack(pack([zeros, -zeros], bits), [count, count], bits)[1], zeros)


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("value", [0.37, -0.001])
def test_a_single_number_keeps_its_eleven_bits(bits: int, value: float) -> None:
    assert fake_quantize(torch.tensor([value]), bits).item() == pytest.approx(value, rel=2**-11)


@settings(max_examples=60)
@given(coefficients, st.sampled_from(EVERY))
def test_quantising_twice_changes_nothing(values: list[float], bits: int) -> None:
    once = fake_quantize(torch.tensor(values), bits)
    assert torch.equal(fake_quantize(once, bits), once)


@settings(max_examples=60)
@given(st.lists(coefficients, max_size=5), st.sampled_from(EVERY))
def test_saving_twice_gives_the_same_bytes(lists: list[list[float]], bits: int) -> None:
    vectors = [torch.tensor(values) for values in lists]
    lengths = [len(vector) for vector in vectors]
    buffer = pack(vectors, bits)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (packed_bytes(lengths, bits),)
    again = unpack(buffer, lengths, bits)
    for vector, back in zip(vectors, again, strict=True):
        assert back.dtype == torch.float32
        assert torch.equal(back, fake_quantize(vector, bits))
    assert torch.equal(pack(again, bits), buffer)


def test_the_bytes_are_those_of_the_description() -> None:
    vectors = [drawn(5), drawn(3, seed=1)]
    coded = [quantize(vector, 3) for vector in vectors]
    bits = "".join(f"{code:03b}"[::-1] for codes, _ in coded for code in codes.tolist())
    expected = struct.pack("<2e", *(32 * scale.item() for _, scale in coded))
    expected += bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, 24, 8))
    assert bytes(pack(vectors, 3).tolist()) == expected
    flat = [number for vector in vectors for number in vector.tolist()]
    assert bytes(pack(vectors, 32).tolist()) == struct.pack("<8f", *flat)
    assert bytes(pack(vectors, 16).tolist()) == struct.pack("<8e", *flat)


def test_sizes_are_predicted() -> None:
    assert [packed_bytes([64] * 96, bits) for bits in EVERY] == [24576, 12288, 6336, 3264, 2496, 1728]
    assert packed_bytes([3, 0], 3) == 2 * 2 + 2


def test_rows_are_vectors_of_their_own() -> None:
    rows = drawn(2, 3, 20) * torch.tensor([[[1.0], [5.0], [0.0]], [[0.1], [30.0], [1e-4]]])
    for bits in CODED:
        codes, scale = quantize(rows, bits)
        assert (codes.shape, scale.shape) == (rows.shape, (2, 3))
        together, taken = dequantize(codes, scale, bits), fake_quantize(rows, bits)
        for first in range(2):
            for second in range(3):
                alone = fake_quantize(rows[first, second], bits)
                assert torch.equal(together[first, second], alone)
                assert torch.equal(taken[first, second], alone)


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_passes_within_the_scale_and_not_beyond(bits: int, dtype: torch.dtype) -> None:
    values = torch.cat([drawn(60), torch.tensor([9.0, -9.0])]).to(dtype).requires_grad_()
    result = fake_quantize(values, bits)
    weights = torch.arange(1.0, 63.0, dtype=dtype)
    (result * weights).sum().backward()
    codes, scale = quantize(values, bits)
    assert torch.equal(result, dequantize(codes, scale, bits).to(dtype))
    assert result.dtype == dtype
    within = values.detach().abs() <= scale
    assert torch.equal(values.grad, weights * within)
    if bits == 2:
        assert within.tolist()[-2:] == [False, False]


@pytest.mark.parametrize("start", [0.0, 1e-9])
def test_numbers_too_small_for_a_scale_still_learn(start: float) -> None:
    values = torch.full((5,), start, requires_grad=True)
    fake_quantize(values, 2).sum().backward()
    assert values.grad.tolist() == [1.0] * 5


@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_not_finite_shows(bits: int) -> None:
    result = fake_quantize(torch.tensor([1.0, math.inf, math.nan, -math.inf]), bits)
    assert result[1:].isnan().all()


def test_sixteen_bits_are_float16() -> None:
    values = torch.cat([drawn(500) * 10.0 ** torch.linspace(-9, 3, 500), torch.tensor([1 + 2**-11, 1 + 3 * 2**-11])])
    assert torch.equal(fake_quantize(values, 16), values.half().float())


@pytest.mark.parametrize("bits", [4, 2])
def test_a_regression_is_learned_from_zero(bits: int) -> None:
    inputs, wanted = drawn(40, 16), drawn(16, seed=2)
    targets = (inputs * wanted).sum(-1)
    numbers = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.Adam([numbers], lr=0.1)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 80)
        optimizer.zero_grad()
        ((inputs * fake_quantize(numbers, bits)).sum(-1) - targets).square().mean().backward()
        optimizer.step()
    left = ((inputs * fake_quantize(numbers.detach(), bits)).sum(-1) - targets).square().mean()
    assert left < {4: 0.03, 2: 0.25}[bits] * targets.square().mean()


@pytest.mark.parametrize("bits", [16, 3])
def test_one_graph_without_breaks(bits: int) -> None:
    compiled = torch.compile(fake_quantize, backend="aot_eager", fullgraph=True)
    values, other = (drawn(50).requires_grad_() for _ in range(2))
    result = compiled(values, bits)
    assert torch.equal(result, fake_quantize(other, bits))
    result.sum().backward()
    fake_quantize(other, bits).sum().backward()
    assert torch.equal(values.grad, other.grad)


def test_arguments_stay_as_they_are() -> None:
    values = drawn(9)
    kept = values.clone()
    buffer = pack([values], 4)
    stored = buffer.clone()
    unpack(buffer, [9], 4)[0].zero_()
    plain = pack([values], 32)
    unpack(plain, [9], 32)[0].zero_()
    fake_quantize(values, 4)
    assert torch.equal(values, kept)
    assert torch.equal(buffer, stored)
    assert torch.equal(unpack(plain, [9], 32)[0], kept)


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("change", ["cut", "grown", "other type", "other shape"])
def test_a_buffer_of_another_size_is_refused(bits: int, change: str) -> None:
    buffer = pack([drawn(5), drawn(6)], bits)
    wrong = {
        "cut": buffer[:-1],
        "grown": torch.cat([buffer, buffer[:1]]),
        "other type": buffer.to(torch.int16),
        "other shape": buffer[None],
    }[change]
    with pytest.raises(InputError, match="uint8"):
        unpack(wrong, [5, 6], bits)


def with_bytes(buffer: Tensor, start: int, content: bytes) -> Tensor:
    changed = buffer.clone()
    changed[start : start + len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return changed


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, -0.0, 0.0, 2**-15, 65000.0])
def test_a_damaged_scale_is_refused(scale: float) -> None:
    buffer = pack([drawn(5), drawn(6)], 4)
    with pytest.raises(InputError, match="damaged"):
        unpack(with_bytes(buffer, 2, struct.pack("<e", scale)), [5, 6], 4)


def test_damaged_codes_are_refused() -> None:
    buffer = pack([torch.tensor([1.0, 0.4, 0.2])], 4)
    with pytest.raises(InputError, match="damaged"):
        unpack(with_bytes(buffer, 2, b"\x88"), [3], 4)  # no outermost code is left
    with pytest.raises(InputError, match="beyond the last code"):
        unpack(with_bytes(buffer, 3, bytes([buffer[3].item() | 0x80])), [3], 4)
    with pytest.raises(InputError, match="damaged"):
        unpack(with_bytes(pack([torch.zeros(3)], 4), 2, b"\x99"), [3], 4)


@pytest.mark.parametrize(("bits", "pattern"), [(16, b"\x00\x7c"), (32, b"\x00\x00\xc0\x7f")])
def test_plain_values_that_are_not_finite_are_refused(bits: int, pattern: bytes) -> None:
    with pytest.raises(InputError, match="damaged"):
        unpack(with_bytes(pack([drawn(3)], bits), 0, pattern), [3], bits)


@pytest.mark.parametrize("bits", EVERY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_numbers_that_cannot_be_stored_are_refused(bits: int, value: float) -> None:
    with pytest.raises(InputError, match="finite"):
        pack([torch.tensor([1.0, value], dtype=torch.float64)], bits)


@pytest.mark.parametrize("bits", CODED)
def test_the_largest_number_goes_there_and_back(bits: int) -> None:
    back = unpack(pack([torch.tensor([1024.0])], bits), [1], bits)[0]
    assert back.item() == pytest.approx(1024, rel=2**-11)
    with pytest.raises(InputError, match="1024"):
        pack([torch.tensor([1025.0])], bits)


def test_wrong_arguments_are_refused() -> None:
    for call in (fake_quantize, quantize, lambda values, bits: pack([values], bits)):
        with pytest.raises(InputError, match="bits"):
            call(drawn(3), 5)
    with pytest.raises(InputError, match="32 and 16"):
        quantize(drawn(3), 16)
    with pytest.raises(InputError, match="count"):
        fake_quantize(torch.tensor(1.0), 4)
    with pytest.raises(InputError, match="count"):
        quantize(torch.tensor([1, 2]), 4)
    with pytest.raises(InputError, match="flatten"):
        pack([drawn(2, 2)], 4)
    with pytest.raises(InputError, match="lengths"):
        packed_bytes([3, -1], 4)
