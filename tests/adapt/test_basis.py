"""The generator philox-1: published vectors, a second implementation of integers, hashes; native, twin, compiled."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scrimp import native
from scrimp.adapt.basis import (
    MOST,
    basis,
    philox,
    sign_rows,
    signs,
    signs_op,
    signs_twin_,
    uniform,
    uniform_op,
    uniform_rows,
    uniform_twin_,
)
from scrimp.primitives.errors import InputError

MODULE = importlib.import_module("scrimp.adapt.basis")  # the package's own `basis` is the function
SEED = 2**63 + 20_240_407
HASHES = {
    "signs": "05238533327a1d54bebc8e4cc3313290523823954c967c00f6330d5f2d634398",
    torch.float32: "f39207d3209348c455b5b82d4fb991f815acab746de90ac3ed0bb92f860c1125",
    torch.bfloat16: "7b2fb2a51cfcb8b67d25e29cb196798c0562841054e901481c6c4ec23d4c17de",
    torch.float16: "d4d63814922cf306befaa31122181719450ff1dda5a8bd704d6b987c1139be30",
}
PUBLISHED = [  # Random123, kat_vectors, philox4x32 10: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
COUNTS = [0, 1, 3, 4, 5, 31, 33, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 300_001]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def block(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for bump in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        left, right = (k0 + bump * 0x9E3779B9) % 2**32, (k1 + bump * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = second // 2**32 ^ c1 ^ left, second % 2**32, first // 2**32 ^ c3 ^ right, first % 2**32
    return [c0, c1, c2, c3]


def number(seed: int, index: int, place: int, stream: int) -> float:
    word = block([place // 4, index, stream, 0], [seed % 2**32, seed // 2**32])[place % 4]
    return ((word - 2**32 if word >= 2**31 else word) // 2**8) / 2**23


def sign(seed: int, index: int, place: int, stream: int) -> int:
    word = block([place // 128, index, stream, 1], [seed % 2**32, seed // 2**32])[place // 32 % 4]
    return 1 - 2 * (word // 2 ** (place % 32) % 2)


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    module = native.load()
    if module is None:
        pytest.skip("the native library is not built here")
    chosen = module.capabilities()["simd"]
    yield module
    module.set_simd(chosen)


def each_set(kernels: ModuleType) -> Iterator[str]:
    for level in ("generic", "avx2", "avx512", "neon"):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        yield level


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "load", lambda: None)


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_the_published_vectors(counter: str, key: str, result: str) -> None:
    assert block(words(counter), words(key)) == words(result)
    first, *rest = words(counter)
    low, high = words(key)
    found = philox((torch.tensor([first]), *rest), (low, high))
    assert [int(word) for word in found] == words(result)


@pytest.mark.parametrize(
    ("seed", "index", "stream"), [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (SEED, 7, 2**31), (2**32, 1, 3)]
)
def test_both_kinds_against_a_second_implementation(seed: int, index: int, stream: int) -> None:
    places = range(301)
    assert signs(seed, index, 301, stream=stream).tolist() == [sign(seed, index, at, stream) for at in places]
    assert uniform(seed, index, 301, stream=stream).tolist() == [number(seed, index, at, stream) for at in places]


def test_the_hashes_of_the_specification() -> None:
    assert sha(signs(SEED, 3, 100_003, stream=5)) == HASHES["signs"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sha(uniform(SEED, 3, 100_003, stream=5, dtype=dtype)) == HASHES[dtype]


def test_the_specification_states_these_hashes() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "nola-generator.md"
    text = page.read_text(encoding="utf-8")
    assert all(f"`{value}`" in text for value in HASHES.values())


@pytest.mark.usefixtures("without_kernels")
def test_the_hashes_of_the_specification_by_torch_alone() -> None:
    test_the_hashes_of_the_specification()


@pytest.mark.parametrize("count", COUNTS)
def test_the_kernels_give_the_bits_of_their_twins(kernels: ModuleType, count: int) -> None:
    key, index = (SEED % 2**32, SEED >> 32), 2**32 - 2
    some_signs = signs_twin_(key, index, 9, torch.empty(2, count, dtype=torch.int8))
    numbers = uniform_twin_(key, index, 9, torch.empty(2, count))
    for level in each_set(kernels):
        assert torch.equal(sign_rows(SEED, index, count, rows=2, stream=9), some_signs), level
        assert torch.equal(uniform_rows(SEED, index, count, rows=2, stream=9), numbers), level


def test_the_twin_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    key = (3, 4)
    whole = [uniform_twin_(key, 1, 2, torch.empty(7, 1000)), signs_twin_(key, 1, 2, torch.empty(7, 1000).char())]
    for chunk in (128, 300, 2048):
        monkeypatch.setattr(MODULE, "_CHUNK", chunk)
        assert torch.equal(uniform_twin_(key, 1, 2, torch.empty(7, 1000)), whole[0])
        assert torch.equal(signs_twin_(key, 1, 2, torch.empty(7, 1000).char()), whole[1])


def test_the_number_of_threads_changes_nothing(kernels: ModuleType) -> None:
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((uniform(1, 2, 300_001), signs(1, 2, 3_000_001)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_shorter_vector_begins_a_longer_one_and_indices_and_streams_differ() -> None:
    for draw in (signs, uniform):
        assert torch.equal(draw(1, 2, 1000)[:77], draw(1, 2, 77))
        others = [
            draw(1, 2, 1000),
            draw(2, 2, 1000),
            draw(1, 3, 1000),
            draw(1, 2, 1000, stream=1),
            draw(1 + 2**32, 2, 1000),
        ]
        table = torch.corrcoef(torch.stack(others).double())
        assert float((table - torch.eye(5)).abs().max()) < 0.15  # 1000 numbers: a standard deviation is 0.03


def test_numbers_fill_their_interval_evenly() -> None:
    numbers = uniform(5, 0, 1_000_000).double()
    assert float(numbers.min()) >= -1
    assert float(numbers.max()) < 1
    assert torch.equal(numbers * 2**23, (numbers * 2**23).round())
    # Five standard deviations of the mean, the variance and a sixteenth's share.
    assert abs(float(numbers.mean())) < 5 * 3**-0.5 * 1e-3
    assert abs(float(numbers.var()) - 1 / 3) < 5 * 0.3 * 1e-3
    shares = torch.histc(numbers.float(), 16, -1, 1)
    assert float((shares - 62_500).abs().max()) < 5 * 62_500**0.5
    assert abs(int(signs(5, 0, 1_000_000).sum(dtype=torch.int64))) < 5_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_hold_the_rounded_float32_numbers(dtype: torch.dtype) -> None:
    exact = uniform(SEED, 1, 5001)
    found = uniform(SEED, 1, 5001, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
    assert torch.equal(exact.double(), uniform(SEED, 1, 5001, dtype=torch.float64))


def test_a_basis_is_the_next_vector_in_shape() -> None:
    found = basis(4, 2, (3, 5, 1), stream=6)
    assert found.shape == (3, 5, 1)
    assert torch.equal(found.flatten(), uniform(4, 3, 15, stream=6))
    assert basis(4, 2, []).shape == ()


def test_the_device_is_the_asked_for_one_or_torchs_default() -> None:
    assert signs(0, 0, 2**33, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert uniform(0, 0, MOST).shape == (MOST,)
    assert signs(0, 0, 3).device.type == "cpu"


@pytest.mark.parametrize("call", [signs, uniform])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1, 0, 1), "seed"),
        ((2**64, 0, 1), "seed"),
        ((0, -1, 1), "numbered"),
        ((0, 2**32, 1), "numbered"),
        ((0, 0, -1), "count"),
        ((0, 0, MOST + 1), "count"),
        ((0, 0, 1, 2**32), "stream"),
        ((0, 0, 1, -1), "stream"),
    ],
)
def test_numbers_out_of_range_are_refused(
    call: Callable[..., torch.Tensor], arguments: tuple[int, ...], said: str
) -> None:
    stream = arguments[3] if len(arguments) > 3 else 0
    with pytest.raises(InputError, match=said):
        call(*arguments[:3], stream=stream)


def test_a_type_without_fractions_is_refused() -> None:
    with pytest.raises(InputError, match="floating"):
        uniform(0, 0, 3, dtype=torch.int32)


def test_compiled_code_draws_the_same_bits() -> None:
    def draw(seed: int, x: torch.Tensor) -> torch.Tensor:
        return x + signs(seed, 1, 1001) * uniform(seed, 2, 1001, dtype=torch.bfloat16).float()

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for seed in (5, 2**64 - 1):
        assert torch.equal(compiled(seed, torch.zeros(1001)), draw(seed, torch.zeros(1001)))
    torch._dynamo.reset()


def test_the_operators_keep_torchs_contract() -> None:
    device = torch.device("cpu")
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(signs_op, (1, 2, 3, 4, 2, 77, device), test_utils=utils)
    torch.library.opcheck(uniform_op, (1, 2, 3, 4, 2, 77, torch.bfloat16, device), test_utils=utils)
