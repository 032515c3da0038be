"""The baseline of the family is torch's attention, with key lengths that leave no NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from scrimp.attend import (
    clustered_attention,
    improved_clustered_attention,
    linear_attention,
    softmax_attention,
)
from scrimp.primitives.errors import InputError


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_torchs_own(causal: bool) -> None:
    query, key, value = tensors((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 5))
    ours = softmax_attention(query, key, value, causal=causal, scale=0.3)
    assert torch.equal(ours, scaled_dot_product_attention(query, key, value, is_causal=causal, scale=0.3))


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_cut_the_keys(causal: bool) -> None:
    query, key, value = tensors((3, 4, 9, 8), (3, 2, 9, 8), (3, 2, 9, 8))
    ours = softmax_attention(query, key, value, causal=causal, key_lengths=torch.tensor([9, 4, 1]))
    for row, length in enumerate([9, 4, 1]):
        logits = query[row] @ key[row].repeat_interleave(2, 0).transpose(-1, -2) * 8**-0.5
        seen = torch.arange(9) < length
        if causal:
            seen = seen & torch.ones(9, 9, dtype=torch.bool).tril()
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(ours[row], weights @ value[row].repeat_interleave(2, 0))


def test_a_query_without_keys_gives_zeros_and_zero_gradients() -> None:
    inputs = tensors((2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    out = softmax_attention(*inputs, causal=True, key_lengths=torch.tensor([0, 5]))
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert all(torch.equal(item[0], torch.zeros_like(item[0])) and item.isfinite().all() for item in gradients)
    assert out[1].abs().min() > 0


@pytest.mark.parametrize(
    ("shapes", "lengths", "words"),
    [
        (((4, 9, 8), (1, 4, 9, 8), (1, 4, 9, 8)), None, "query of shape"),
        (((1, 4, 9, 8), (1, 3, 9, 8), (1, 3, 9, 8)), None, "divide"),
        (((1, 4, 9, 8), (1, 4, 9, 7), (1, 4, 9, 7)), None, "dim"),
        (((1, 4, 9, 8), (1, 4, 9, 8), (1, 4, 7, 8)), None, "same heads and tokens"),
        (((1, 4, 9, 8), (1, 4, 9, 8), (1, 4, 9, 8)), torch.tensor([1, 2]), "key_lengths"),
        (((1, 4, 9, 8), (1, 4, 9, 8), (1, 4, 9, 8)), torch.tensor([1.0]), "key_lengths"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: tuple[tuple[int, ...], ...], lengths: Tensor | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        softmax_attention(*tensors(*shapes), key_lengths=lengths)


def test_causal_wants_as_many_queries_as_keys() -> None:
    with pytest.raises(InputError, match="as many queries"):
        softmax_attention(*tensors((1, 1, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)), causal=True)


def test_types_must_agree() -> None:
    query, key, value = tensors((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    with pytest.raises(InputError, match=r"float32"):
        softmax_attention(query, key.float(), value)


@pytest.mark.parametrize(
    "attend", [softmax_attention, linear_attention, clustered_attention, improved_clustered_attention]
)
@pytest.mark.parametrize("causal", [False, True])
def test_every_member_casts_as_autocast_has_it(attend: Callable[..., Tensor], causal: bool) -> None:
    """Rotary positions leave queries and keys in float32 beside values in bfloat16."""
    query, key, value = (tensor.detach().float() for tensor in tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value.bfloat16(), causal=causal)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(query, key, value, causal=causal), atol=0.05, rtol=0.05)
