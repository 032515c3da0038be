"""The causal form sees no future, leaves no row empty, and is nearer to softmax than the near keys alone are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scrimp.attend.causal_clustered import causal_clustered_attention
from scrimp.attend.clustered import clustered_attention
from scrimp.attend.grouping import group_queries
from scrimp.attend.improved import improved_clustered_attention
from scrimp.attend.softmax import softmax_attention
from scrimp.primitives.errors import InputError


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
