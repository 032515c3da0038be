"""Both kinds of bases against the explicit sum in float64, forward and backward; caches, compilers, precisions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from scrimp import native
from scrimp.adapt import combine
from scrimp.adapt.basis import basis
from scrimp.adapt.cache import hadamard
from scrimp.adapt.combine import Cache, independent, orthogonal, orthogonal_basis
from scrimp.primitives.errors import InputError

KINDS = [orthogonal, independent]
SIZES = [(0, 3), (1, 1), (5, 1), (7, 3), (64, 64), (100, 2), (33, 40), (1000, 65), (2310, 64), (2050, 130), (3000, 5)]
SEED, STREAM = 2**64 - 3, 2**32 - 1
CPU = torch.device("cpu")


def numbers(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)


def explicit(kind: Callable[..., Tensor], bases: int, count: int) -> Tensor:
    """Every basis on its own, float64 [bases, count]."""
    if kind is orthogonal:
        rows = [orthogonal_basis(SEED, index, count, bases=bases, stream=STREAM) for index in range(bases)]
    else:
        rows = [basis(SEED, index, (count,), stream=STREAM) for index in range(bases)]
    return torch.stack(rows).double()


def both(
    kind: Callable[..., Tensor], coefficients: Tensor, grad: Tensor, cache: Cache | None = None
) -> tuple[Tensor, Tensor]:
    """The sum and the gradient of the coefficients."""
    leaf = coefficients.clone().requires_grad_()
    found = kind(leaf, len(grad), seed=SEED, stream=STREAM, cache=cache)
    found.backward(grad)
    assert leaf.grad is not None
    assert found.dtype == leaf.grad.dtype == coefficients.dtype
    return found.detach(), leaf.grad


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "native_for", lambda device, kernel: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("count", "bases"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_and_its_gradient_are_those_of_explicit_bases(
    kind: Callable[..., Tensor], count: int, bases: int, dtype: torch.dtype
) -> None:
    table = explicit(kind, bases, count)
    coefficients, grad = numbers(bases, dtype), numbers(count, dtype)
    # Rounded sums of `bases` and of `count` terms, each relative to the sum of the terms' sizes.
    unit = torch.finfo(dtype).eps
    for cache in (None, Cache(bytes=0), Cache(bytes=2**24), Cache(bytes=300)):
        found, slope = both(kind, coefficients, grad, cache)
        assert found.shape == (count,)
        error = (found.double() - table.T @ coefficients.double()).abs()
        assert bool((error <= 16 * unit * (table.abs().T @ coefficients.double().abs())).all())
        error = (slope.double() - table @ grad.double()).abs()
        assert bool((error <= 16 * unit * (table.abs() @ grad.double().abs() + unit)).all())


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(("count", "bases"), SIZES)
def test_torch_alone_gives_the_explicit_sum_too(count: int, bases: int) -> None:
    test_the_sum_and_its_gradient_are_those_of_explicit_bases(orthogonal, count, bases, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strange_reference_is_told_apart(kind: Callable[..., Tensor]) -> None:
    other = KINDS[1 - KINDS.index(kind)]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(kind(numbers(9), 50, seed=SEED, stream=STREAM), numbers(9) @ explicit(other, 9, 50))


@pytest.mark.parametrize(("bases", "length"), [(1, 2), (2, 2), (3, 4), (64, 64), (65, 128), (5, 8)])
def test_the_bases_are_exactly_orthogonal(bases: int, length: int) -> None:
    for blocks in (1, 3):
        table = explicit(orthogonal, bases, blocks * length)
        assert torch.equal(table @ table.T, blocks * length * torch.eye(bases, dtype=torch.float64))
        assert torch.equal(table.abs(), torch.ones_like(table))


def test_the_hadamard_matrix_is_that_of_sylvester() -> None:
    found = torch.ones(1, 1)
    for power in range(6):
        assert torch.equal(hadamard(2**power, torch.float32, CPU), found)
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    kernels = native.load()
    if kernels is None:
        pytest.skip("the native library is not built here")
    chosen, threads = kernels.capabilities()["simd"], torch.get_num_threads()
    found = []
    for level in ("generic", "avx2", "avx512", "neon"):
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                [both(orthogonal, numbers(k, torch.float32), numbers(200_003, torch.float32)) for k in (3, 64)]
            )
    kernels.set_simd(chosen)
    torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b)
        for other in found
        for x, y in zip(found[0], other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_rounded_once(kind: Callable[..., Tensor], dtype: torch.dtype) -> None:
    coefficients, grad = numbers(33, dtype), numbers(200, dtype)
    wide = both(kind, coefficients.float(), grad.float())
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(both(kind, coefficients, grad), wide, strict=True))


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: Callable[..., Tensor], kept: int) -> None:
    coefficients, grad = numbers(64, torch.float32), numbers(1000, torch.float32)
    plain = both(kind, coefficients, grad, Cache(bytes=kept))
    with torch.autocast("cpu", torch.bfloat16):
        cast = both(kind, coefficients, grad, Cache(bytes=kept))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.usefixtures("without_kernels")
def test_a_cache_changes_no_bit_of_the_orthogonal_sum() -> None:
    coefficients, grad = numbers(64, torch.float32), numbers(1000, torch.float32)
    plain = both(orthogonal, coefficients, grad)
    cache = Cache(bytes=2**20)
    for _ in range(2):  # filled, then read
        assert all(torch.equal(a, b) for a, b in zip(both(orthogonal, coefficients, grad, cache), plain, strict=True))
    assert cache.used == 2 * 1024 + 8 * 8 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradient(kind: Callable[..., Tensor]) -> None:
    leaf, grad = numbers(64, torch.float32).requires_grad_(), numbers(1000, torch.float32)
    plain = both(kind, leaf.detach(), grad)[1]
    checkpoint(lambda x: kind(x, 1000, seed=SEED, stream=STREAM), leaf, use_reentrant=False).backward(grad)
    assert torch.equal(leaf.grad, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_for_backward(kind: Callable[..., Tensor]) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kind(numbers(64).requires_grad_(), 10_000, seed=1)
    assert saved == []


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_agrees_forward_and_backward(kind: Callable[..., Tensor], kept: int) -> None:
    cache = Cache(bytes=kept)
    coefficients, grad = numbers(33, torch.float32), numbers(500, torch.float32)

    def two(x: Tensor, seed: int) -> Tensor:
        return kind(x, 500, seed=seed, stream=1, cache=cache) + kind(x, 500, seed=seed, stream=2, cache=cache)

    torch._dynamo.reset()
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    for autocast, seed in ((False, 3), (True, 2**64 - 1)):
        slopes, sums = [], []
        for call in (two, compiled):
            leaf = coefficients.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                sums.append(call(leaf, seed))
                sums[-1].backward(grad)
            slopes.append(leaf.grad)
        torch.testing.assert_close(sums[1], sums[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(slopes[1], slopes[0], atol=1e-4, rtol=1e-5)
    torch._dynamo.reset()


def test_compiled_code_reads_the_cache_and_is_compiled_anew_when_it_is_cleared() -> None:
    cache, x = Cache(bytes=2**24), numbers(33, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: orthogonal(x, 500, seed=1, cache=cache), fullgraph=True, backend="aot_eager")
    first = compiled(x)
    assert cache.used > 0
    cache.clear()
    assert cache.used == 0
    assert torch.equal(compiled(x), first)
    assert cache.used > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_functional_transforms_agree(kind: Callable[..., Tensor]) -> None:
    coefficients, grad = numbers(5), numbers(21)

    def sum_of(x: Tensor) -> Tensor:
        return kind(x, 21, seed=SEED, stream=STREAM) @ grad

    torch.testing.assert_close(torch.func.grad(sum_of)(coefficients), both(kind, coefficients, grad)[1])
    rows = torch.stack([coefficients, 2 * coefficients])
    torch.testing.assert_close(torch.vmap(sum_of)(rows), torch.stack([sum_of(row) for row in rows]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused(kind: Callable[..., Tensor]) -> None:
    leaf, grad = numbers(5).requires_grad_(), numbers(21).requires_grad_()
    (slope,) = torch.autograd.grad(kind(leaf, 21, seed=1), leaf, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_the_work_is_counted() -> None:
    leaf = numbers(64, torch.float32).requires_grad_()
    for kind, products in ((orthogonal, 640 * (8 + 8)), (independent, 640 * 64)):
        with FlopCounterMode(display=False) as counter:
            kind(leaf, 640, seed=1).sum().backward()
        assert counter.get_total_flops() == 2 * 2 * products


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_is_that_of_the_coefficients(kind: Callable[..., Tensor]) -> None:
    cache = Cache(bytes=2**24)
    found = kind(torch.ones(3, device="meta"), 2**20, seed=1, cache=cache)
    assert found.device.type == "meta"
    assert found.shape == (2**20,)
    assert cache.used == 0


@pytest.mark.parametrize(
    ("coefficients", "said"),
    [(torch.ones(2, 2), "bases"), (torch.ones(0), "bases"), (torch.ones(3, dtype=torch.int64), "floating")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_coefficients_are_refused(kind: Callable[..., Tensor], coefficients: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kind(coefficients, 4, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_out_of_range_are_refused(kind: Callable[..., Tensor]) -> None:
    for count, seed, stream in ((-1, 0, 0), (4, -1, 0), (4, 2**64, 0), (4, 0, 2**32)):
        with pytest.raises(InputError):
            kind(torch.ones(3), count, seed=seed, stream=stream)


class TestCache:
    def test_keeps_to_its_budget_and_gives_what_fits_once(self) -> None:
        cache = Cache(bytes=250)
        first = cache.signs(1, 0, 100, stream=0, device=CPU)
        assert cache.signs(1, 0, 100, stream=0, device=CPU).data_ptr() == first.data_ptr()
        cache.signs(1, 0, 100, stream=1, device=CPU)
        assert cache.used == 200
        third = cache.signs(1, 0, 100, stream=2, device=CPU)
        assert cache.used == 200
        assert cache.signs(1, 0, 100, stream=2, device=CPU).data_ptr() != third.data_ptr()
        cache.clear()
        assert cache.used == 0

    def test_entries_differ_by_all_that_makes_them(self) -> None:
        cache = Cache(bytes=2**20)
        for seed, index, count, stream in ((1, 0, 64, 0), (2, 0, 64, 0), (1, 1, 64, 0), (1, 0, 65, 0), (1, 0, 64, 1)):
            fresh = combine.sign_rows(seed, index, count, rows=1, stream=stream)
            for _ in range(2):
                assert torch.equal(cache.signs(seed, index, count, stream=stream, device=CPU), fresh.view(-1))

    def test_what_is_made_in_inference_mode_can_be_trained_with(self) -> None:
        cache = Cache(bytes=2**20)
        with torch.inference_mode():
            independent(numbers(5), 20, seed=1, cache=cache)
        leaf = numbers(5).requires_grad_()
        (leaf @ cache.keep("uniform", 1, 20, 5, 0, torch.float64, CPU)).sum().backward()
        assert leaf.grad is not None

    def test_entries_of_a_device_that_was_left_are_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cache, away = Cache(bytes=2**20), torch.device("cpu", 0)  # for the dictionary another device
        for stream in range(4):
            cache.signs(1, 0, 100, stream=stream, device=away)
        for step in range(200):
            cache.signs(1, 0, 100, stream=step % 4, device=CPU)
        assert cache.used == 400

    def test_a_model_over_two_devices_keeps_both(self) -> None:
        cache, second = Cache(bytes=2**20), torch.device("cpu", 0)
        for _ in range(50):
            for stream in range(20):
                cache.signs(1, 0, 100, stream=stream, device=CPU if stream < 10 else second)
        assert cache.used == 2000

    def test_copies_begin_empty(self) -> None:
        cache = Cache(bytes=1000)
        cache.signs(1, 0, 100, stream=0, device=CPU)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert (other.bytes, other.used) == (1000, 0)
            assert other.name != cache.name

    def test_a_negative_budget_is_refused(self) -> None:
        with pytest.raises(InputError, match="budget"):
            Cache(bytes=-1)
