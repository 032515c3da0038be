"""Linear attention against every pair of tokens in float64: values and all gradients."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_reference import assert_agrees, inputs, reference, with_gradients

from scrimp.attend import linear
from scrimp.attend.feature_maps import elu_plus_one, relu
from scrimp.attend.linear import linear_attention
from scrimp.primitives.errors import InputError

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 200])
def test_values_and_gradients(tokens: int, dtype: torch.dtype, causal: bool) -> None:
    tensors = inputs(queries=tokens, keys=tokens, dtype=dtype)
    assert_agrees(
        with_gradients(linear_attention, *tensors, causal=causal), with_gradients(reference, *tensors, causal=causal)
    )


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "key_heads": st.integers(1, 3),
            "queries": st.integers(1, 140),
            "keys": st.integers(1, 140),
            "dim": st.integers(1, 40),
            "value_dim": st.integers(1, 40),
            "token_major": st.booleans(),
            "dtype": st.sampled_from([torch.float32, torch.float64]),
        }
    ),
    st.integers(1, 3),
    st.booleans(),
    st.data(),
)
def test_any_shape(sizes: dict, group: int, causal: bool, data: st.DataObject) -> None:
    sizes["heads"] = sizes["key_heads"] * group
    if causal:
        sizes["keys"] = sizes["queries"]
    tensors = inputs(**sizes)
    lengths = data.draw(st.none() | st.lists(st.integers(0, sizes["keys"] + 2), min_size=sizes["batch"], max_size=3))
    key_lengths = None if lengths is None else torch.tensor(lengths[: sizes["batch"]])
    options = {"causal": causal, "key_lengths": key_lengths}
    assert_agrees(with_gradients(linear_attention, *tensors, **options), with_gradients(reference, *tensors, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_keys_that_do_not_exist_are_never_read(causal: bool, dtype: torch.dtype) -> None:
    query, key, value, grad = inputs(batch=3, dtype=dtype)
    lengths = torch.tensor([0, 33, 70], dtype=torch.int32)
    options = {"causal": causal, "key_lengths": lengths}
    expected = with_gradients(reference, query, key, value, grad, **options)
    for sample, length in enumerate(lengths.tolist()):
        key[sample, :, length:] = torch.nan
        value[sample, :, length:] = torch.nan
    found = with_gradients(linear_attention, query, key, value, grad, **options)
    assert_agrees(found, expected)
    assert not found[0][0].any()
    for gradient in found[2:]:
        assert not gradient[0].any()
        assert not gradient[1, :, 33:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_a_denominator_of_zero_gives_zeros(causal: bool, dtype: torch.dtype) -> None:
    query, key, value, grad = inputs(dtype=dtype)
    query[:, :, 3] = -query[:, :, 3].abs()
    key[:, 1] = -key[:, 1].abs()
    options = {"causal": causal, "feature_map": relu}
    found = with_gradients(linear_attention, query, key, value, grad, **options)
    assert not found[0][:, :, 3].any()
    assert not found[0][:, 2:].any()
    assert all(tensor.isfinite().all() for tensor in found)
    assert_agrees(found, with_gradients(reference, query, key, value, grad, causal=causal, feature_map=torch.relu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_below_zero_the_map_does_not_vanish(dtype: torch.dtype) -> None:
    """``elu(x) + 1`` in bfloat16 is exactly 0 from x = -8 down; then every output would be 0."""
    query, key, value, grad = inputs(dtype=dtype)
    key = (key * 0.2 - 9).to(dtype)
    options = {"causal": True, "eps": 1e-12}
    exact = {**options, "feature_map": lambda x: torch.where(x > 0, x + 1, x.clamp_max(0).exp())}
    assert_agrees(
        with_gradients(linear_attention, query, key, value, grad, **options),
        with_gradients(reference, query, key, value, grad, **exact),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_inputs_stay_finite(dtype: torch.dtype) -> None:
    query, key, value, grad = inputs(dtype=dtype)
    query[0, 0, 0], key[0, 0, 1], key[1] = -1e30, 1e4, -float("inf")
    for tensor in with_gradients(linear_attention, query, key, value, grad, causal=True):
        assert tensor.isfinite().all()


def test_nan_is_passed_on_and_not_to_the_past() -> None:
    query, key, value, _ = inputs()
    key[0, 0, 40, 2] = torch.nan
    out = linear_attention(query, key, value, causal=True)
    assert out[0, :2, 40:].isnan().all()
    assert out[0, :2, :40].isfinite().all()
    assert out[0, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_future_is_not_seen(dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(queries=150, keys=150, dtype=dtype)
    before = linear_attention(query, key, value, causal=True)
    key[:, :, 100:], value[:, :, 100:] = 3.0, -5.0
    after = linear_attention(query, key, value, causal=True)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


@pytest.mark.parametrize("causal", [True, False])
def test_strided_and_expanded_inputs(causal: bool) -> None:
    query, key, value, grad = inputs(key_heads=1)
    query = query.repeat_interleave(2, 3)[..., ::2]
    key, value = key.expand(-1, 4, -1, -1), value[:, :, :1].expand(-1, 4, 70, -1)
    leaves = [tensor.clone() for tensor in (query, key, value)]
    expected = with_gradients(reference, *leaves, grad, causal=causal)
    assert_agrees(with_gradients(linear_attention, query, key, value, grad, causal=causal), expected)
    query, key, value = leaves[0].requires_grad_(), leaves[1], leaves[2]
    linear_attention(query, key, value, causal=causal).sum().backward()  # an expanded gradient
    exact = with_gradients(reference, query.detach(), key, value, torch.ones_like(grad), causal=causal)
    assert_agrees([query.grad], [exact[1]], room=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_laid_out_as_the_query(dtype: torch.dtype) -> None:
    for token_major in (True, False):
        query, key, value, _ = inputs(dtype=dtype, token_major=token_major)
        out = linear_attention(query, key, value)
        assert out.transpose(1, 2).is_contiguous() == token_major
        assert out.dtype == dtype


def test_arguments_are_left_alone_and_results_repeat() -> None:
    tensors = inputs(queries=300, keys=300)
    kept = [tensor.clone() for tensor in tensors]
    first, second = (with_gradients(linear_attention, *tensors, causal=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, tensors, kept))


@pytest.mark.parametrize("causal", [True, False])
def test_no_tokens(causal: bool) -> None:
    for shape in ({"queries": 0, "keys": 0}, {"batch": 0}):
        tensors = inputs(**shape)
        for tensor in with_gradients(linear_attention, *tensors, causal=causal):
            assert tensor.numel() == 0
    query, key, value, grad = inputs(keys=0)
    found = with_gradients(linear_attention, query, key, value, grad)
    assert not found[0].any()
    assert found[0].shape == grad.shape


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal: bool) -> None:
    query, key, value, _ = inputs(1, 2, 1, 5, 5, 3, 2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    lengths = torch.tensor([4])
    assert torch.autograd.gradcheck(
        lambda *tensors: linear_attention(*tensors, causal=causal, key_lengths=lengths), leaves
    )


def test_a_pair_of_maps_and_a_map_of_its_own() -> None:
    tensors = inputs()

    def square(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.square(), x.exp()], -1)

    for causal in (True, False):
        assert_agrees(
            with_gradients(linear_attention, *tensors, causal=causal, feature_map=square),
            with_gradients(reference, *tensors, causal=causal, feature_map=square),
            room=4,
        )
    pair = linear_attention(*tensors[:3], feature_map=(relu, lambda x: elu_plus_one(x)))
    plain = linear_attention(tensors[0], tensors[1], tensors[2], feature_map=(relu, elu_plus_one))
    torch.testing.assert_close(pair, plain)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, _ = inputs()
    with pytest.raises(InputError, match="as many queries as keys"):
        linear_attention(query[:, :, :-1], key, value, causal=True)
    with pytest.raises(InputError, match="map the last dimension"):
        linear_attention(query, key, value, feature_map=lambda x: x.flatten(2))
    with pytest.raises(InputError, match="as many features"):
        linear_attention(query, key, value, feature_map=(relu, lambda x: torch.cat([x, x], -1)))
    with pytest.raises(InputError, match="heads that divide"):
        linear_attention(query, key[:, :1].expand(-1, 3, -1, -1), value[:, :1].expand(-1, 3, -1, -1))


def test_the_gradient_has_no_gradient() -> None:
    query, key, value, _ = inputs()
    query.requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        grad.sum().backward()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for flash-linear-attention, after its documentation: [batch, tokens, heads, dim], no denominator."""

    def chunk_linear_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, normalize: bool
    ) -> tuple[torch.Tensor, None]:
        assert not normalize
        assert q.shape == k.shape
        assert q.shape[2] == v.shape[2] == 4
        scores = torch.einsum("bihd,bjhd->bhij", q, k).tril() * scale
        return torch.einsum("bhij,bjhm->bihm", scores, v), None

    package = types.ModuleType("fla.ops.linear_attn")
    package.chunk_linear_attn = chunk_linear_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", package)
    linear._flash_kernel.cache_clear()
    yield
    linear._flash_kernel.cache_clear()


@pytest.mark.usefixtures("flash")
def test_flash_linear_attention_is_asked_for_numerators_only() -> None:
    query, key, value, grad = inputs()
    lengths = torch.tensor([70, 20])
    key[1, :, 20:] = torch.nan

    def handed_over(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        kernel = linear._flash(query)
        return linear._hand_over(kernel, elu_plus_one(query), elu_plus_one(key), value, lengths, 1e-6)

    expected = with_gradients(linear_attention, query, key, value, grad, causal=True, key_lengths=lengths)
    assert_agrees(with_gradients(handed_over, query, key, value, grad), expected, room=4)
    assert linear._flash(query.half()) is None
    assert linear._flash(query[:, :, :3]) is None
    assert linear._flash(query.bfloat16()) is not None


def test_without_flash_linear_attention_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    linear._flash_kernel.cache_clear()
    assert linear._flash(torch.zeros(1, 1, 2, 2)) is None
    linear._flash_kernel.cache_clear()
