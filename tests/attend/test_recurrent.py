"""The recurrence against the parallel form: steps, chunks, states kept, changed, saved and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_reference import TOLERANCE, inputs, reference
from torch import Tensor

from scrimp.attend.feature_maps import relu
from scrimp.attend.linear import linear_attention
from scrimp.attend.recurrent import (
    LinearState,
    empty_state,
    linear_attention_step,
    linear_attention_step_,
    load_state,
    save_state,
)
from scrimp.primitives.errors import InputError


def walk(state: LinearState | None, tensors: tuple[Tensor, ...], cuts: list[int]) -> tuple[LinearState | None, Tensor]:
    """Parts of these lengths, one after the other."""
    outs = []
    for parts in zip(*(tensor.split(cuts, 2) for tensor in tensors), strict=True):
        state, out = linear_attention_step(state, *parts)
        outs.append(out)
    return state, torch.cat(outs, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [[1] * 20, [20], [13, 1, 1, 5], [1, 19]], ids=str)
def test_steps_and_chunks_are_the_parallel_form(cuts: list[int], dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(queries=20, keys=20, dtype=dtype)
    state, out = walk(None, (query, key, value), cuts)
    exact = reference(query, key, value, causal=True)
    assert float((out.double() - exact).abs().max()) <= TOLERANCE[dtype] * float(exact.abs().max())
    assert out.dtype == dtype
    assert state.kv.dtype == torch.promote_types(dtype, torch.float32)
    assert state.kv.shape == (2, 2, 8, 5)
    assert state.normaliser.shape == (2, 2, 8)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 3), st.booleans())
def test_any_cuts(cuts: list[int], key_heads: int, group: int, in_place: bool) -> None:
    tokens = sum(cuts)
    query, key, value, _ = inputs(2, key_heads * group, key_heads, tokens, tokens, 9, 17, token_major=in_place)
    whole = linear_attention(query, key, value, causal=True)
    _, out = walk(empty_state(key, value) if in_place else None, (query, key, value), cuts)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_in_place_is_the_same_in_the_same_memory(dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(queries=9, keys=9, dtype=dtype)
    state, mine = None, empty_state(key, value)
    place = mine.kv.data_ptr(), mine.normaliser.data_ptr()
    for parts in zip(*(tensor.split([1, 6, 1, 1], 2) for tensor in (query, key, value)), strict=True):
        state, out = linear_attention_step(state, *parts)
        assert torch.equal(linear_attention_step_(mine, *parts), out)
        assert torch.equal(mine.kv, state.kv)
        assert torch.equal(mine.normaliser, state.normaliser)
    assert place == (mine.kv.data_ptr(), mine.normaliser.data_ptr())


def test_a_step_leaves_its_arguments_alone() -> None:
    query, key, value, _ = inputs(queries=1, keys=1)
    state = LinearState(torch.ones(2, 2, 8, 5), torch.ones(2, 2, 8))
    linear_attention_step(state, query, key, value)
    assert torch.equal(state.kv, torch.ones(2, 2, 8, 5))
    assert torch.equal(state.normaliser, torch.ones(2, 2, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_flow_through_the_states(dtype: torch.dtype) -> None:
    query, key, value, grad = inputs(queries=20, keys=20, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    _, out = walk(None, (query, key, value), [7, 1, 1, 11])
    stepped = torch.autograd.grad(out, leaves, grad)
    exact = torch.autograd.grad(reference(query, key, value, causal=True), leaves, grad.double())
    for mine, right in zip(stepped, exact, strict=True):
        torch.testing.assert_close(mine.double(), right.double(), rtol=1e-4, atol=2e-5)


def test_gradcheck_of_state_and_output() -> None:
    query, key, value, _ = inputs(1, 2, 1, 3, 3, 3, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(1, 1, 3, 2, generator=generator, dtype=torch.float64)
    ones = torch.rand(1, 1, 3, generator=generator, dtype=torch.float64) + 1
    leaves = [tensor.requires_grad_() for tensor in (kv, ones, query, key, value)]

    def advance(kv: Tensor, ones: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        state, out = linear_attention_step(LinearState(kv, ones), *tensors)
        return state.kv, state.normaliser, out

    assert torch.autograd.gradcheck(advance, leaves)


def test_the_gradient_of_a_state_alone() -> None:
    query, key, value, _ = inputs(queries=4, keys=4)
    key.requires_grad_()
    state, _ = linear_attention_step(None, query, key, value)
    (found,) = torch.autograd.grad(state.normaliser.sum(), key)
    torch.testing.assert_close(found, key.detach().clamp_max(0).exp())


def test_a_map_that_changes_the_dim() -> None:
    query, key, value, _ = inputs(queries=6, keys=6)

    def doubled(x: Tensor) -> Tensor:
        return torch.cat([relu(x), relu(-x)], -1)

    state, outs = empty_state(key, value, features=16), []
    for parts in zip(*(tensor.split(1, 2) for tensor in (query, key, value)), strict=True):
        outs.append(linear_attention_step_(state, *parts, feature_map=doubled))
    whole = linear_attention(query, key, value, causal=True, feature_map=doubled)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-4, atol=2e-6)


def test_a_million_tokens_stay_accurate() -> None:
    """The newest output against one computed in float64 from all keys."""
    generator = torch.Generator().manual_seed(0)
    state, chunk = None, 1 << 16
    exact_kv, exact_ones = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(16):
            query, key, value = torch.randn(3, 1, 1, chunk, 4, generator=generator)
            state, out = linear_attention_step(state, query, key, value + 1)
            features = torch.nn.functional.elu(key[0, 0].double()) + 1
            exact_kv += features.T @ (value[0, 0].double() + 1)
            exact_ones += features.sum(0)
    assert out.isfinite().all()
    last = torch.nn.functional.elu(query[0, 0, -1].double()) + 1
    torch.testing.assert_close(out[0, 0, -1].double(), last @ exact_kv / (last @ exact_ones), rtol=2e-5, atol=0)
    torch.testing.assert_close(state.kv[0, 0].double(), exact_kv, rtol=1e-4, atol=0)


def test_generation_under_compile() -> None:
    query, key, value, _ = inputs(queries=3, keys=3)
    step = torch.compile(linear_attention_step_, fullgraph=True, backend="aot_eager")
    mine, right = empty_state(key, value), empty_state(key, value)
    for parts in zip(*(tensor.split(1, 2) for tensor in (query, key, value)), strict=True):
        torch.testing.assert_close(step(mine, *parts), linear_attention_step_(right, *parts))
        torch.testing.assert_close(mine.kv, right.kv)


def test_states_are_saved_and_read(tmp_path: Path) -> None:
    query, key, value, _ = inputs(queries=5, keys=5)
    first, _ = linear_attention_step(None, query, key, value)
    second, _ = linear_attention_step(first, query, key, value)
    save_state(first, tmp_path / "one.safetensors")
    save_state([first, second], tmp_path / "deep" / "two.safetensors")
    one, two = load_state(tmp_path / "one.safetensors"), load_state(tmp_path / "deep" / "two.safetensors")
    assert isinstance(one, LinearState)
    assert isinstance(two, list)
    for mine, right in zip([one, *two], [first, first, second], strict=True):
        assert torch.equal(mine.kv, right.kv)
        assert torch.equal(mine.normaliser, right.normaliser)
    after, _ = linear_attention_step(one, query, key, value)
    assert torch.equal(after.kv, second.kv)
    save_state([], tmp_path / "none.safetensors")
    assert load_state(tmp_path / "none.safetensors") == []


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    with pytest.raises(InputError, match="save_state wrote"):
        load_state(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(InputError, match="which has none"):
        load_state(path)
    query, key, value, _ = inputs(queries=5, keys=5)
    save_state(linear_attention_step(None, query, key, value)[0], path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="a whole file"):
        load_state(path)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, _ = inputs(queries=1, keys=1)
    state = empty_state(key, value)
    for wrong in (
        LinearState(state.kv[:1], state.normaliser),
        LinearState(state.kv, state.normaliser[..., 1:]),
        LinearState(state.kv.double(), state.normaliser),
    ):
        for step in (linear_attention_step, linear_attention_step_):
            with pytest.raises(InputError, match="a state whose"):
                step(wrong, query, key, value)
    with pytest.raises(InputError, match="without gradient"):
        linear_attention_step_(state, query.requires_grad_(), key, value)
    with torch.no_grad():
        linear_attention_step_(state, query, key, value)
    with pytest.raises(InputError, match="as many queries as keys"):
        linear_attention_step(None, query.expand(-1, -1, 2, -1), key, value)
