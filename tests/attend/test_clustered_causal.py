"""The causal form sees no future, leaves no row empty, and is nearer to softmax than the near keys alone are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from scrimp import native
from scrimp.attend import grouping_ops
from scrimp.attend.causal_clustered import assign_epochs, causal_clustered_attention
from scrimp.attend.causal_clustered_ops import attend
from scrimp.attend.causal_clustered_twin import Plan, forward_twin
from scrimp.attend.clustered import clustered_attention
from scrimp.attend.grouping import group_queries
from scrimp.attend.improved import improved_clustered_attention
from scrimp.attend.softmax import softmax_attention
from scrimp.primitives.errors import InputError

LEVELS = ("generic", "avx2", "avx512", "neon")


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    module = native.load()
    if module is None or not hasattr(module, "causal_clustered_forward"):
        pytest.skip("the native library is not built here")
    chosen, threads = module.capabilities()["simd"], torch.get_num_threads()
    yield module
    module.set_simd(chosen)
    torch.set_num_threads(threads)


def levels(kernels: ModuleType) -> Iterator[str]:
    """The instruction sets of this machine, one after the other in use."""
    for level in LEVELS:
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        yield level


def with_gradients(fn: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of its product with fixed numbers."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out.dtype))]


def agree(found: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    for name, one, other in zip(("out", "query", "key", "value"), found, wanted, strict=True):
        error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(0.1)
        assert error <= bound, f"{name}: {float(error):.2e}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(tokens: int = 150, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    query, key = normal(2, 4, tokens, 8, seed=1, dtype=dtype), normal(2, 2, tokens, 8, seed=2, dtype=dtype)
    return query, key, normal(2, 2, tokens, 5, seed=3, dtype=dtype)


@pytest.mark.parametrize("topk", [0, 6])
@pytest.mark.parametrize("place", [1, 16, 40, 149])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_future_changes_no_bit_before_it(place: int, topk: int, dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    others = [tensor.clone() for tensor in tensors]
    for seed, other in enumerate(others):
        other[:, :, place:] = 5 * normal(*other[:, :, place:].shape, seed=10 + seed, dtype=dtype)
    before, after = (causal_clustered_attention(*each, clusters=9, topk=topk, block=16) for each in (tensors, others))
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert not torch.equal(before[:, :, place:], after[:, :, place:])
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    causal_clustered_attention(*leaves, clusters=9, topk=topk, block=16)[:, :, :place].sum().backward()
    assert all((leaf.grad[:, :, place:] == 0).all() for leaf in leaves)


def test_no_row_is_empty() -> None:
    query, key, value = inputs()
    for topk in (0, 6):
        out = causal_clustered_attention(query, key, value.abs() + 1, clusters=9, topk=topk, block=16)
        assert out.isfinite().all()
        assert (out > 0.5).all()
        ones = causal_clustered_attention(query, key, torch.ones_like(value), clusters=9, topk=topk, block=16)
        assert torch.allclose(ones, torch.ones_like(ones))  # the weights of every row sum to 1


@pytest.mark.parametrize("key_lengths", [None, [150, 40], [20, 0]])
@pytest.mark.parametrize("tokens", [150, 31, 1])
def test_every_key_on_top_is_softmax(tokens: int, key_lengths: list[int] | None) -> None:
    tensors = inputs(tokens)
    lengths = None if key_lengths is None else torch.tensor(key_lengths)
    wanted = softmax_attention(*tensors, causal=True, key_lengths=lengths)
    found = causal_clustered_attention(*tensors, clusters=9, topk=tokens, block=16, key_lengths=lengths)
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("topk", [0, 2])
@pytest.mark.parametrize("key_lengths", [None, [5], [0]])
def test_gradcheck(topk: int, key_lengths: list[int] | None) -> None:
    tensors = [normal(1, heads, 10, 3, seed=heads).requires_grad_() for heads in (2, 1, 1)]
    lengths = None if key_lengths is None else torch.tensor(key_lengths)
    assert torch.autograd.gradcheck(
        lambda *x: causal_clustered_attention(*x, clusters=2, topk=topk, block=3, key_lengths=lengths),
        tensors,
        fast_mode=True,
    )


def structured(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys about a few slowly visited centres: what came long ago matters as much as what is near."""
    centres = 2.5 * normal(10, 16, seed=7)
    topics = torch.randint(10, (tokens,), generator=torch.Generator().manual_seed(8))
    query, key = (centres[topics] + 0.7 * normal(1, 2, tokens, 16, seed=seed) for seed in (9, 10))
    return query, key, normal(1, 2, tokens, 8, seed=11) + normal(10, 8, seed=12)[topics]


def test_is_nearer_to_softmax_than_the_near_keys_alone() -> None:
    query, key, value = structured(640)
    exact = softmax_attention(query, key, value, causal=True)
    places = torch.arange(640)
    near = (places[:, None] >= places) & (places[:, None] // 64 == places // 64)
    local = scaled_dot_product_attention(query, key, value, attn_mask=near)
    plain, improved = (
        causal_clustered_attention(query, key, value, clusters=20, topk=topk, block=64) for topk in (0, 16)
    )
    errors = [float((out - exact).norm() / exact.norm()) for out in (local, plain, improved)]
    assert errors[2] < errors[1] < 0.5 * errors[0]


def test_is_what_causal_true_runs() -> None:
    query, key, value = inputs(600)
    found = improved_clustered_attention(query, key, value, clusters=9, topk=6, causal=True)
    assert torch.equal(found, causal_clustered_attention(query, key, value, clusters=9, topk=6))
    found = clustered_attention(query, key, value, clusters=9, causal=True, generator=torch.Generator().manual_seed(4))
    again = clustered_attention(query, key, value, clusters=9, causal=True, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, again)
    assert torch.equal(
        found[:, :, :256], softmax_attention(query, key, value, causal=True)[:, :, :256]
    ) or torch.allclose(found[:, :, :256], softmax_attention(query, key, value, causal=True)[:, :, :256], atol=1e-12)


def test_bfloat16_stays_near() -> None:
    tensors = tuple(tensor.bfloat16() for tensor in inputs())
    found = causal_clustered_attention(*tensors, clusters=9, topk=6, block=16)
    wanted = causal_clustered_attention(*(tensor.float() for tensor in tensors), clusters=9, topk=6, block=16)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_refuses_groups_made_of_all_queries() -> None:
    query, key, value = inputs()
    with pytest.raises(InputError, match="causal=True"):
        clustered_attention(query, key, value, causal=True, groups=group_queries(query))


@pytest.mark.parametrize("topk", [0, 1, 6])
@pytest.mark.parametrize("key_lengths", [None, [150, 40], [20, 0]])
@pytest.mark.parametrize("tokens", [150, 97, 16, 11])
def test_the_derived_gradient_is_autograds(tokens: int, key_lengths: list[int] | None, topk: int) -> None:
    tensors, lengths = inputs(tokens), None if key_lengths is None else torch.tensor(key_lengths)
    options = {"clusters": 9, "topk": topk, "block": 16, "key_lengths": lengths}
    past = (tokens - 1) // 16 * 16
    plan = Plan(min(9, max(past, 1)), min(topk, past), 16, 8**-0.5)
    assignment = assign_epochs(tensors[0], 9, 16, None)
    wanted = with_gradients(lambda *x: forward_twin(*x, assignment, lengths, plan)[0], tensors)
    agree(with_gradients(lambda *x: causal_clustered_attention(*x, **options), tensors), wanted, 1e-12)


@pytest.mark.parametrize(("topk", "clusters"), [(0, 20), (1, 20), (8, 20), (32, 70)])
def test_native_is_its_twin_on_every_instruction_set_and_thread_count(
    kernels: ModuleType, topk: int, clusters: int
) -> None:
    tensors = tuple(normal(2, heads, 701, dim, seed=dim + heads) for heads, dim in ((2, 20), (1, 20), (1, 33)))
    options = {"clusters": clusters, "topk": topk, "block": 100, "key_lengths": torch.tensor([701, 330])}
    wanted = with_gradients(lambda *x: causal_clustered_attention(*x, **options), tensors)
    lowered = tuple(tensor.float() for tensor in tensors)
    for level in levels(kernels):
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(with_gradients(lambda *x: causal_clustered_attention(*x, **options), lowered))
            agree(made[-1], wanted, 4e-6)
        assert all(torch.equal(one, two) for one, two in zip(*made, strict=True)), level


@pytest.mark.parametrize("topk", [0, 32])
def test_the_future_changes_no_bit_on_any_instruction_set(kernels: ModuleType, topk: int) -> None:
    tensors = tuple(normal(1, 2, 700, 24, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    for level in levels(kernels):
        before = causal_clustered_attention(*tensors, clusters=20, topk=topk, block=128)
        for place in (129, 333, 640):
            others = tuple(torch.cat((x[:, :, :place], -3 * x[:, :, place:]), 2) for x in tensors)
            after = causal_clustered_attention(*others, clusters=20, topk=topk, block=128)
            assert torch.equal(before[:, :, :place], after[:, :, :place]), level
            assert not torch.equal(before[:, :, place:], after[:, :, place:])


@pytest.mark.parametrize("tokens", [1, 63, 64, 257, 400])
def test_native_with_every_key_on_top_is_softmax(kernels: ModuleType, tokens: int) -> None:
    tensors = inputs(tokens)
    lengths = torch.tensor([tokens, tokens // 3])
    wanted = with_gradients(lambda *x: softmax_attention(*x, causal=True, key_lengths=lengths), tensors)
    options = {"clusters": 9, "topk": tokens, "block": 64, "key_lengths": lengths}
    lowered = tuple(tensor.float() for tensor in tensors)
    agree(with_gradients(lambda *x: causal_clustered_attention(*x, **options), lowered), wanted, 4e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside opcheck
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operators_are_sound(dtype: torch.dtype) -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(29, dtype))
    assignment = assign_epochs(tensors[0].detach(), 4, 8, None)
    for lengths, topk in ((None, 0), (torch.tensor([29, 4]), 3)):
        arguments = (*tensors, assignment, lengths, 4, topk, 8, 0.5)
        torch.library.opcheck(torch.ops.scrimp.causal_clustered_attention.default, arguments)
        saved = [tensor.detach() for tensor in attend(*arguments)]
        given = [tensor.detach() for tensor in tensors]
        backward = (torch.ones_like(saved[0]), *given, assignment, lengths, *saved, 8, 0.5)
        torch.library.opcheck(torch.ops.scrimp.causal_clustered_attention_backward.default, backward)


def test_flops_are_those_of_the_kernel() -> None:
    tensors = tuple(normal(1, 1, 300, dim, seed=dim, dtype=torch.float32).requires_grad_() for dim in (8, 8, 4))
    with FlopCounterMode(display=False) as counter:
        out = causal_clustered_attention(*tensors, clusters=9, topk=6, block=100)
        forward = counter.get_total_flops()
        out.sum().backward()
    # Epochs at 100 and 200 tokens: they take in 100 and 200 keys. Own blocks: 64 rows of 64, then 36 of 100.
    pairs = 3 * (64 * 64 + 36 * 100) + 9 * (100 + 200) + 200 * 6
    grouping = 2 * 300 * 8 * (63 + 2 * 9)
    assert forward == 2 * (pairs * (8 + 4) + 200 * 9 * 8) + grouping
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 8 + 2 * 4)


def test_is_cheaper_than_softmax_from_2048_tokens_on() -> None:
    tensors = tuple(normal(1, 1, 2048, 64, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    with FlopCounterMode(display=False) as counter:
        causal_clustered_attention(*tensors)
    assert counter.get_total_flops() <= 0.5 * 2 * 2048**2 * 64


def test_compiles_whole() -> None:
    tensors = inputs(60, torch.float32)

    def both(*given: Tensor) -> Tensor:
        return sum(causal_clustered_attention(*given, clusters=5, topk=topk, block=16) for topk in (0, 4))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    agree(with_gradients(compiled, tensors), with_gradients(both, tensors), 1e-6)


def test_vmap_maps_over_samples() -> None:
    tensors = tuple(normal(3, *tensor.shape, seed=5, dtype=torch.float32) for tensor in inputs(40))

    def fn(*given: Tensor) -> Tensor:
        return causal_clustered_attention(*given, clusters=5, topk=4, block=16)

    wanted = torch.stack([fn(*each) for each in zip(*tensors, strict=True)])
    assert torch.allclose(torch.vmap(fn)(*tensors), wanted, atol=1e-6)


def test_runs_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(dtype=torch.float32)

    def fn(*given: Tensor) -> Tensor:
        return causal_clustered_attention(*given, clusters=9, topk=6, block=16, key_lengths=torch.tensor([150, 9]))

    wanted = with_gradients(fn, tensors)
    monkeypatch.setattr(grouping_ops, "load", lambda: None)
    agree(with_gradients(fn, tensors), wanted, 4e-6)


def test_extreme_inputs_do_not_crash() -> None:
    for odd in (float("nan"), float("inf"), -float("inf"), 3e38):
        query, key, value = (tensor.clone() for tensor in inputs(dtype=torch.float32))
        query[0, 0, 20], key[0, 0, 3] = odd, odd
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        out = causal_clustered_attention(*leaves, clusters=9, topk=4, block=16)
        out.sum().backward()
        assert out[1].isfinite().all()


def test_no_tokens_give_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        assert causal_clustered_attention(*inputs(0, dtype)).shape == (2, 4, 0, 5)


def test_arguments_are_left_alone_and_the_same_call_gives_the_same_bits() -> None:
    tensors = inputs(dtype=torch.float32)
    kept = [tensor.clone() for tensor in tensors]
    made = [causal_clustered_attention(*tensors, clusters=9, topk=4, block=16) for _ in range(2)]
    assert torch.equal(*made)
    assert all(torch.equal(tensor, one) for tensor, one in zip(tensors, kept, strict=True))


def test_the_grouping_is_the_one_asked_for() -> None:
    query, key, value = (torch.randn(1, 2, 600, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    fine = clustered_attention(query, key, value, causal=True, clusters=9)
    coarse = clustered_attention(query, key, value, causal=True, clusters=9, bits=1, iterations=0)
    assert not torch.equal(fine, coarse)
