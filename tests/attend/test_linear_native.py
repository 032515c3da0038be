"""The compiled kernel against its twin: every instruction set, one thread and two, cut tokens, states handed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from linear_reference import inputs
from torch import Tensor

from scrimp import native
from scrimp.attend import linear_kernel as kernel
from scrimp.attend import linear_twin as twin


def levels() -> list[str]:
    """The instruction sets this processor has; without a compiled module one that stands for all."""
    if not native.available():
        return ["none"]
    module = native.load()
    assert module is not None
    found, chosen = [], module.capabilities()["simd"]
    for level in ("generic", "avx2", "avx512", "neon"):
        try:
            module.set_simd(level)
        except ValueError:
            continue
        found.append(level)
    module.set_simd(chosen)
    return found


@pytest.fixture(params=levels())
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The compiled module on one instruction set, the processor's own put back afterwards."""
    if not native.available() and not os.environ.get("SCRIMP_REQUIRE_NATIVE"):
        pytest.skip("the native library is not built here; CI sets SCRIMP_REQUIRE_NATIVE and then this fails")
    module = native.load()
    assert module is not None
    chosen = module.capabilities()["simd"]
    module.set_simd(request.param)
    yield module
    module.set_simd(chosen)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def states(batch: int, heads: int, dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(batch, heads, dim, value_dim, generator=generator)
    return kv, torch.rand(batch, heads, dim, generator=generator) + 1


def both(
    sizes: dict, maps: tuple[int, int], causal: bool, lengths: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Every result of forward and backward: the kernel's and, in float64, the twin's."""
    query, key, value, grad = inputs(**sizes)
    before = states(*key.shape[:2], key.shape[3], value.shape[3])
    after = states(*key.shape[:2], key.shape[3], value.shape[3])
    found = kernel.forward(query, key, value, lengths, *before, causal, *maps, 1e-6)
    met = before if causal else found[2:]
    gradients = kernel.backward(grad, *after, query, key, value, lengths, *met, found[0], found[1], causal, *maps, 1e-6)
    wide = [tensor.double() for tensor in (query, key, value)]
    wide_before = [tensor.double() for tensor in before]
    exact = twin.forward(*wide, lengths, *wide_before, causal, maps, 1e-6)
    wide_met = wide_before if causal else exact[2:]
    saved = (*wide, lengths, *wide_met, exact[0], exact[1])
    wide_after = [tensor.double() for tensor in after]
    right = twin.backward(grad.double(), *wide_after, saved, causal, maps, 1e-6)
    return list(zip((*found, *gradients), (*exact, *right), strict=True))


def assert_close(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for place, (mine, right) in enumerate(pairs):
        assert mine.dtype == torch.float32
        scale = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        assert float((mine - right).abs().max()) <= 1e-5 * scale, f"result {place}"


SHAPES = [
    {"queries": 1, "keys": 1},
    {"queries": 129, "keys": 129, "dim": 16, "value_dim": 32},
    {"queries": 64, "keys": 64, "dim": 64, "value_dim": 64, "token_major": True},
    {"queries": 95, "keys": 95, "dim": 3, "value_dim": 17, "key_heads": 1},
    {"queries": 200, "keys": 200, "dim": 33, "value_dim": 7, "token_major": True},
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_the_kernel_is_its_twin(kernels: ModuleType, shape: dict, causal: bool) -> None:
    lengths = torch.tensor([shape["keys"], shape["keys"] // 3])
    for maps in ((twin.ELU_PLUS_ONE, twin.ELU_PLUS_ONE), (twin.RELU, twin.ELU_PLUS_ONE)):
        assert_close(both(shape, maps, causal))
        assert_close(both(shape, maps, causal, lengths))


@pytest.mark.usefixtures("kernels", "threads")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 2), (6, 3)])
def test_few_heads_are_cut_into_segments(heads: tuple[int, int], causal: bool) -> None:
    """Long enough to be worth two threads; the cut gives the same numbers but for rounding."""
    sizes = {"batch": 1, "heads": heads[0], "key_heads": heads[1], "queries": 650, "keys": 650, "dim": 48}
    for token_major in (True, False):
        shape = {**sizes, "value_dim": 48, "token_major": token_major}
        assert_close(both(shape, (1, 1), causal, torch.tensor([400])))


def test_more_keys_than_queries_and_fewer(kernels: ModuleType) -> None:
    for queries, keys in ((5, 2000), (2000, 5)):
        assert_close(both({"batch": 1, "queries": queries, "keys": keys, "dim": 32, "value_dim": 32}, (1, 1), False))


def test_results_repeat_bit_by_bit(kernels: ModuleType, threads: int) -> None:
    sizes = {"batch": 1, "heads": 1, "key_heads": 1, "queries": 1500, "keys": 1500, "dim": 32, "value_dim": 32}
    first, second = (both(sizes, (1, 1), True) for _ in range(2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_the_exponential_is_accurate(kernels: ModuleType) -> None:
    """phi as the kernel sees it: one token whose value is 1 leaves phi(k) in S."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([-torch.rand(4000, generator=generator) * 88, torch.linspace(-2, 2, 999), -torch.logspace(-9, 0, 40)])
    key = x.reshape(1, 1, 1, -1)
    found = kernel.forward(key, key, torch.ones(1, 1, 1, 1), None, None, None, False, 1, 1, 1e-6)[2].flatten()
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    normal = x > -86.9
    assert float((found / exact - 1).abs()[normal].max()) < 3e-7
    assert float(found[~normal].max()) < 2e-38
    special = torch.tensor([-torch.inf, -1e30, torch.nan, torch.inf, 0.0, -0.0]).reshape(1, 1, 1, -1)
    found = kernel.forward(special, special, torch.ones(1, 1, 1, 1), None, None, None, False, 1, 1, 1e-6)[2].flatten()
    assert torch.equal(found[3:], torch.tensor([torch.inf, 1.0, 1.0]))
    assert found[2].isnan()
    assert float(found[:2].max()) < 2e-38


@pytest.mark.parametrize("group", [1, 3])
def test_a_step_is_its_twin(kernels: ModuleType, threads: int, group: int) -> None:
    for dim, value_dim in ((1, 1), (17, 33), (64, 64), (64, 130)):
        sizes = {"heads": 4 * group, "key_heads": 4, "queries": 1, "keys": 1, "dim": dim, "value_dim": value_dim}
        query, key, value, _ = inputs(batch=40, **sizes, token_major=True)
        mine = states(40, 4, dim, value_dim)
        right = [tensor.double() for tensor in mine]
        found = kernel.step(query, key, value, *mine, 1, 2, 1e-6)
        exact = twin.step(query.double(), key.double(), value.double(), *right, (1, 2), 1e-6)
        assert_close([(found, exact), *zip(mine, right, strict=True)])
