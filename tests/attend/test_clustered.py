"""(Improved) clustered attention against a loop over the queries in float64: values, every gradient, every edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scrimp import native
from scrimp.attend import clustered_ops, grouping_ops
from scrimp.attend.clustered import clustered_attention
from scrimp.attend.clustered_twin import top_keys
from scrimp.attend.grouping import Groups, group_queries
from scrimp.attend.improved import improved_clustered_attention
from scrimp.attend.softmax import softmax_attention
from scrimp.primitives.errors import InputError

# Largest error relative to the largest entry, against float64 on the same (rounded) inputs: three roundings of the
# result's type (8 bits for bfloat16, 11 for float16) and, for float32, the summation of a thousand terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12}
LEVELS = ("generic", "avx2", "avx512", "neon")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(
    *, batch: int = 2, heads: int = 4, key_heads: int = 2, queries: int = 67, keys: int = 53, dim: int = 9,
    value_dim: int = 7, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query = normal(batch, heads, queries, dim, seed=1, dtype=dtype)
    key = normal(batch, key_heads, keys, dim, seed=2, dtype=dtype)
    return query, key, normal(batch, key_heads, keys, value_dim, seed=3, dtype=dtype)


def attend(topk: int, **options: object) -> Callable[..., Tensor]:
    """The public function for this topk; 0 is plain clustered attention."""
    if topk == 0:
        return lambda *tensors: clustered_attention(*tensors, **options)
    return lambda *tensors: improved_clustered_attention(*tensors, topk=topk, **options)


def reference(
    query: Tensor, key: Tensor, value: Tensor, assignment: Tensor, *, topk: int, key_lengths: list[int] | None = None,
    freeze_mass: bool = False,
) -> Tensor:  # fmt: skip
    """Query by query, by the formulas; autograd gives its gradient. freeze_mass drops the one through m_j."""
    batch, heads, queries, dim = query.shape
    rows = []
    for sample, head, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(queries)):
        own = head * key.shape[1] // heads
        length = key.shape[2] if key_lengths is None else key_lengths[sample]
        cluster = assignment[sample, head, i]
        if cluster < 0 or length == 0:
            rows.append(query.new_zeros(value.shape[3]))
            continue
        keys, values = key[sample, own, :length], value[sample, own, :length]
        mean = query[sample, head][assignment[sample, head] == cluster].mean(0)
        weights = torch.softmax(keys @ mean / dim**0.5, 0)
        best = weights.detach().argsort(descending=True, stable=True)[:topk]
        rest = torch.ones(length, dtype=query.dtype).index_fill(0, best, 0.0)
        mass = weights[best].sum().detach() if freeze_mass else weights[best].sum()
        exact = torch.softmax(keys[best] @ query[sample, head, i] / dim**0.5, 0)
        rows.append(mass * (exact @ values[best]) + (weights * rest) @ values)
    return torch.stack(rows).view(batch, heads, queries, -1)


def with_gradients(fn: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of its product with fixed numbers."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = fn(*leaves)
    pull = normal(*out.shape, seed=9, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


def agree(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for name, one, other in zip(("out", "query", "key", "value"), found, wanted, strict=True):
        assert one.dtype == dtype
        # Terms of order 1 may cancel: then float32's rounding is that of the terms, not of their small sum.
        floor = 1.0 if dtype == torch.float32 else 1e-3
        error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(floor)
        assert error <= TOLERANCE[dtype], f"{name}: {float(error):.2e}"


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    module = native.load()
    if module is None or not hasattr(module, "clustered_forward"):
        pytest.skip("the native library is not built here")
    chosen, threads = module.capabilities()["simd"], torch.get_num_threads()
    yield module
    module.set_simd(chosen)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("key_lengths", [None, [53, 5], [0, 31]])
@pytest.mark.parametrize("topk", [0, 1, 8, 53])
def test_values_and_gradients_are_the_reference(topk: int, key_lengths: list[int] | None, dtype: torch.dtype) -> None:
    tensors = inputs(queries=23)
    groups = group_queries(tensors[0], clusters=6, query_lengths=torch.tensor([23, 15]))
    lengths = None if key_lengths is None else torch.tensor(key_lengths)
    wanted = with_gradients(lambda *x: reference(*x, groups.assignment, topk=topk, key_lengths=key_lengths), tensors)
    lowered = tuple(tensor.to(dtype) for tensor in tensors)
    agree(with_gradients(attend(topk, groups=groups, key_lengths=lengths), lowered), wanted, dtype)


@pytest.mark.parametrize("topk", [0, 3])
def test_gradcheck(topk: int) -> None:
    tensors = tuple(
        t.requires_grad_() for t in inputs(queries=9, keys=8, dim=3, value_dim=2, batch=1, heads=2, key_heads=1)
    )
    groups = group_queries(tensors[0], clusters=3)
    assert torch.autograd.gradcheck(attend(topk, groups=groups), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gradient_flows_through_the_mass(dtype: torch.dtype) -> None:
    tensors = inputs(queries=30, batch=1)
    groups = group_queries(tensors[0], clusters=5)
    frozen = with_gradients(lambda *x: reference(*x, groups.assignment, topk=8, freeze_mass=True), tensors)
    whole = with_gradients(lambda *x: reference(*x, groups.assignment, topk=8), tensors)
    found = with_gradients(attend(8, groups=groups), tuple(t.to(dtype) for t in tensors))
    agree(found, whole, dtype)
    # Dropping it, as is sometimes done, would be a visible error in the query's and the key's gradients only.
    for place in (1, 2):
        assert (frozen[place] - whole[place]).norm() > 0.02 * whole[place].norm()
    assert torch.allclose(frozen[3], whole[3])


@pytest.mark.parametrize("topk", [0, 32])
@pytest.mark.parametrize("clusters", [7, 300])
def test_native_is_its_twin_on_every_instruction_set_and_thread_count(
    kernels: ModuleType, topk: int, clusters: int
) -> None:
    tensors = inputs(batch=1, heads=2, key_heads=1, queries=700, keys=4300, dim=20, value_dim=33)
    groups, lengths = group_queries(tensors[0], clusters=clusters), torch.tensor([4250])
    wanted = with_gradients(attend(topk, groups=groups, key_lengths=lengths), tensors)
    lowered = tuple(tensor.float() for tensor in tensors)
    for level in LEVELS:
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        made = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(with_gradients(attend(topk, groups=groups, key_lengths=lengths), lowered))
            agree(made[-1], wanted, torch.float32)
        assert all(torch.equal(one, two) for one, two in zip(*made, strict=True)), level


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [0, 8])
def test_half_precision_keeps_the_written_tolerance(topk: int, dtype: torch.dtype) -> None:
    tensors = tuple(tensor.to(dtype) for tensor in inputs(queries=90, keys=80))
    groups = group_queries(tensors[0], clusters=8)
    wanted = with_gradients(attend(topk, groups=groups), tuple(tensor.double() for tensor in tensors))
    agree(with_gradients(attend(topk, groups=groups), tensors), wanted, dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 50), st.integers(0, 50),
)  # fmt: skip
def test_any_shape(
    batch: int, heads: tuple[int, int], queries: int, keys: int, dim: int, value_dim: int, clusters: int, topk: int
) -> None:
    tensors = inputs(
        batch=batch, heads=heads[0], key_heads=heads[1], queries=queries, keys=keys, dim=dim, value_dim=value_dim
    )
    groups = group_queries(tensors[0], clusters=clusters)
    wanted = with_gradients(attend(topk, groups=groups), tensors)
    agree(with_gradients(attend(topk, groups=groups), tuple(t.float() for t in tensors)), wanted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_softmax_with_one_query_a_cluster_or_every_key(dtype: torch.dtype) -> None:
    tensors = inputs(dtype=dtype)
    lengths = torch.tensor([53, 20])
    wanted = with_gradients(lambda *x: softmax_attention(*x, key_lengths=lengths), tensors)
    for fn in (
        attend(0, clusters=1000, key_lengths=lengths),
        attend(5, clusters=1000, key_lengths=lengths),
        attend(53, clusters=4, key_lengths=lengths),
        attend(1000, clusters=4, key_lengths=lengths),
    ):
        agree(with_gradients(fn, tensors), wanted, dtype)


def test_improved_is_nearer_to_softmax() -> None:
    query, key, value = inputs(queries=400, keys=300, dim=8)
    exact = softmax_attention(query, key, value)
    errors = [float((attend(k, clusters=20)(query, key, value) - exact).norm() / exact.norm()) for k in (0, 8, 64)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("topk", [0, 4])
def test_padding_gives_zeros_and_changes_nothing(topk: int, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    query_lengths, key_lengths = torch.tensor([67, 30]), torch.tensor([11, 0])
    fn = attend(topk, clusters=6, query_lengths=query_lengths, key_lengths=key_lengths)
    found = with_gradients(fn, (query, key, value))
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert (found[0][1] == 0).all()
    assert (found[1][1, :, 30:] == 0).all()
    assert (found[2][0, :, 11:] == 0).all()
    others = [query.clone(), key.clone(), value.clone()]
    others[0][1, :, 30:], others[1][0, :, 11:], others[2][0, :, 11:] = 1e4, 1e4, 1e4
    assert torch.equal(fn(*others), found[0])


def test_arguments_are_left_alone_and_the_same_call_gives_the_same_bits() -> None:
    tensors = inputs(dtype=torch.float32)
    before = [tensor.clone() for tensor in tensors]
    first, second = (improved_clustered_attention(*tensors, clusters=9, topk=4) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(one, two) for one, two in zip(before, tensors, strict=True))
    made = [
        clustered_attention(*tensors, clusters=9, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_groups_are_shared() -> None:
    query, key, value = inputs()
    groups = group_queries(query, clusters=9)
    assert torch.equal(
        clustered_attention(query, key, value, groups=groups), clustered_attention(query, key, value, clusters=9)
    )


def test_ties_go_to_the_earlier_key() -> None:
    logits = torch.tensor([[[[1.0, 2.0, 1.0, 2.0, 1.0, float("-inf")]]]])
    assert top_keys(logits, 3).tolist() == [[[[0, 1, 3]]]]
    assert top_keys(logits, 6).tolist() == [[[[0, 1, 2, 3, 4, -1]]]]
    for dtype in (torch.float32, torch.float64):
        query = key = torch.ones(1, 1, 40, 4, dtype=dtype)
        top = clustered_ops.attend(query, key, key, torch.zeros(1, 1, 40, dtype=torch.int64), None, 1, 5, 1.0)[4]
        assert top.tolist() == [[[[0, 1, 2, 3, 4]]]]


def test_extreme_inputs_do_not_crash() -> None:
    query, key, value = inputs(dtype=torch.float32)
    large = improved_clustered_attention(100 * query, 100 * key, value, clusters=9, topk=4)
    assert large.isfinite().all()
    key[0, 0, 3] = float("nan")
    assert improved_clustered_attention(query, key, value, clusters=9, topk=4)[1].isfinite().all()
    stray = torch.full(query.shape[:3], 77)
    assert (clustered_attention(query, key, value, groups=Groups(stray, torch.zeros(2, 4, 3)))[1] == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside opcheck
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operators_are_sound(dtype: torch.dtype) -> None:
    tensors = tuple(tensor.requires_grad_() for tensor in inputs(queries=12, keys=10, dtype=dtype))
    groups = group_queries(tensors[0], clusters=4)
    for lengths, topk in ((None, 0), (torch.tensor([10, 4]), 3)):
        arguments = (*tensors, groups.assignment, lengths, 4, topk, 0.5)
        torch.library.opcheck(torch.ops.scrimp.clustered_attention.default, arguments)
        saved = [tensor.detach() for tensor in clustered_ops.attend(*arguments)]
        given = [tensor.detach() for tensor in tensors]
        backward = (torch.ones_like(saved[0]), *given, groups.assignment, lengths, *saved[1:], 0.5)
        torch.library.opcheck(torch.ops.scrimp.clustered_attention_backward.default, backward)


def test_flops_are_counted() -> None:
    tensors = tuple(t.requires_grad_() for t in inputs(batch=1, heads=2, key_heads=1, dtype=torch.float32))
    groups = group_queries(tensors[0].detach(), clusters=5)
    with FlopCounterMode(display=False) as counter:
        out = attend(8, groups=groups)(*tensors)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = 2 * (5 * 53 + 67 * 8)
    assert forward == 2 * pairs * (9 + 7)
    assert counter.get_total_flops() - forward == 2 * pairs * (3 * 9 + 2 * 7)


def test_compiles_whole() -> None:
    tensors = inputs(dtype=torch.float32, queries=30)

    def both(*given: Tensor) -> Tensor:
        return attend(4, clusters=5)(*given) + attend(0, clusters=5)(*given)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    agree(with_gradients(compiled, tensors), with_gradients(both, tensors), torch.float32)


def test_autocast_is_as_for_torchs_own() -> None:
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(4, clusters=5)(*tensors)
        assert found.dtype == softmax_attention(*tensors).dtype == torch.bfloat16
    wanted = attend(4, clusters=5)(*(tensor.bfloat16() for tensor in tensors))
    assert torch.equal(found, wanted)


def test_vmap_maps_over_samples() -> None:
    tensors = tuple(normal(3, *tensor.shape, seed=5, dtype=torch.float32) for tensor in inputs(queries=20))
    mapped = torch.vmap(attend(4, clusters=5))(*tensors)
    wanted = torch.stack([attend(4, clusters=5)(*each) for each in zip(*tensors, strict=True)])
    assert torch.allclose(mapped, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": Groups(torch.zeros(1, 1, 3, dtype=torch.int64), torch.ones(1, 1, 1))}, "groups of"),
        ({"topk": 0}, "topk >= 1"),
        ({"causal": True}, "as many queries as keys"),
        ({"key_lengths": torch.ones(2)}, "key_lengths"),
    ],
)
def test_refuses(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        improved_clustered_attention(*inputs(), **options)  # type: ignore[arg-type]


def test_refuses_groups_with_lengths() -> None:
    query, key, value = inputs()
    with pytest.raises(InputError, match="query_lengths or groups"):
        clustered_attention(query, key, value, groups=group_queries(query), query_lengths=torch.tensor([1, 1]))


@pytest.mark.parametrize("topk", [0, 8])
def test_many_heads_are_taken_in_waves(topk: int) -> None:
    tensors = inputs(batch=9, heads=4, key_heads=2, queries=20, keys=17)
    groups, lengths = group_queries(tensors[0], clusters=5), torch.arange(9) * 2
    wanted = with_gradients(attend(topk, groups=groups, key_lengths=lengths), tensors)
    lowered = tuple(tensor.float() for tensor in tensors)
    agree(with_gradients(attend(topk, groups=groups, key_lengths=lengths), lowered), wanted, torch.float32)


def test_runs_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(dtype=torch.float32)
    fn = attend(8, clusters=6, key_lengths=torch.tensor([53, 9]))
    wanted = with_gradients(fn, tensors)
    monkeypatch.setattr(grouping_ops, "load", lambda: None)
    agree(with_gradients(fn, tensors), wanted, torch.float32)
