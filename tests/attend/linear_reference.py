"""Linear attention as the paper writes it, tokens by tokens and in float64; and inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Largest error allowed, as a fraction of the largest number of the reference (at least 1: gradients may cancel to 0),
# which is given the same rounded inputs.
# Values are rounded once on the way out; gradients also meet the rounded output (in dz), so they get twice the room.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def reference_map(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    feature_map: Callable[[Tensor], Tensor] = reference_map,
    key_lengths: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Every pair of tokens, [tokens, tokens], in float64."""
    group = query.shape[1] // key.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (key, value))
    scores = feature_map(query.double()) @ feature_map(keys).mT
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    seen = (seen.tril() if causal else seen).expand(scores.shape)
    if key_lengths is not None:
        seen = seen & (torch.arange(key.shape[2]) < key_lengths[:, None])[:, None, None]
    scores = scores.masked_fill(~seen, 0)
    return scores @ values / (scores.sum(-1, keepdim=True) + eps)


def inputs(
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    queries: int = 70,
    keys: int = 70,
    dim: int = 8,
    value_dim: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    token_major: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and a gradient of the output; token_major: as a layer's view of [batch, tokens, heads, dim]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int, dim: int) -> Tensor:
        if token_major:
            return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)

    return (
        draw(heads, queries, dim),
        draw(key_heads, keys, dim),
        draw(key_heads, keys, value_dim),
        draw(heads, queries, value_dim),
    )


def with_gradients(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor, **options: object
) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = attend(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_agrees(found: list[Tensor], exact: list[Tensor], *, room: float = 1.0) -> None:
    """Within `TOLERANCE`, gradients within twice of it, all times ``room``."""
    for place, (mine, right) in enumerate(zip(found, exact, strict=True)):
        assert mine.shape == right.shape
        if not mine.numel():
            continue
        scale = max(1.0, float(right.abs().max()))
        bound = room * TOLERANCE[mine.dtype] * scale * (2 if place else 1)
        error = float((mine.double() - right.double()).abs().max())
        assert error <= bound, f"tensor {place}: error {error:.2e} above {bound:.2e}"
