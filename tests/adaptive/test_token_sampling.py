"""Token sampling against loops in float64: the draw, and a whole model, one image at a time."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tiny_vits import build, pictures
from torch import Tensor

from scrimp.adaptive import restore_, token_sampling_
from scrimp.adaptive.token_sampling import sample
from scrimp.primitives.errors import InputError


def _drawn(significance: list[float], samples: int, least: int) -> set[int]:
    """Sort, sum up, scale to 0..1, and take what is nearest to each point from the smallest positive value to 1."""
    order = sorted(range(len(significance)), key=lambda i: significance[i])
    mass = np.array([significance[i] for i in order], dtype=np.float64) / sum(significance)
    cdf = np.cumsum(mass)
    cdf = (cdf - cdf[0]) / (cdf[-1] - cdf[0]) if cdf[-1] > cdf[0] else np.zeros_like(cdf)
    positive = cdf[cdf > 0]
    points = np.linspace(1, positive[0] if len(positive) else 1, samples)
    kept = {order[int(np.abs(cdf - y).argmin())] for y in points} if len(positive) else set()
    best = sorted(range(len(significance)), key=lambda i: -significance[i])
    return kept | set([i for i in best if i not in kept][: max(0, least - len(kept))])


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.integers(1, 20), st.integers(1, 24), st.integers(1, 6), st.integers(0, 999))
def test_the_draw(patches: int, samples: int, least: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((2, patches)) ** 6 + 1e-9
    valid = np.concatenate([np.ones((2, patches), bool), np.zeros((2, 3), bool)], 1)
    shuffled = rng.permutation(patches + 3)
    padded = np.concatenate([values, rng.random((2, 3))], 1)[:, shuffled]
    got = sample(torch.tensor(padded), torch.tensor(valid[:, shuffled]), samples, least=least)
    for row in range(2):
        kept = {int(shuffled[i]) for i in got[row].nonzero().flatten()}
        assert kept == _drawn(values[row].tolist(), samples, least)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_no_significance_at_all(bad: float) -> None:
    valid = torch.tensor([[True] * 5 + [False] * 2])
    kept = sample(torch.full((1, 7), bad), valid, 4, least=3)
    assert 3 <= int(kept.sum()) <= 4
    assert not kept[0, 5:].any()


def _significance(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    part, heads = block.attn, []
    q, k, v = part.qkv(block.norm1(x)).view(len(x), 3, part.num_heads, part.head_dim).permute(1, 2, 0, 3)
    for head in range(part.num_heads):
        heads.append((q[head] @ k[head].T * part.scale).softmax(-1))
    received = sum(weights[0] for weights in heads)
    out = torch.cat([weights @ v[head] for head, weights in enumerate(heads)], -1)
    return received * v.transpose(0, 1).flatten(1).norm(dim=-1), block.ls1(part.proj(out))


@pytest.mark.parametrize("host", ["deit3", "avgmax"])
@torch.no_grad()
def test_sampling_is_the_papers(host: str) -> None:
    model: Any = build(host).double()
    images = pictures(3).double()
    control = token_sampling_(model, 6, blocks=(0, 2), least=3)
    got, kept = model(images), control.kept
    restore_(model)
    for image in range(3):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images[image : image + 1])))[0]
        places = list(range(len(x)))
        for index, block in enumerate(model.blocks):
            significance, change = _significance(block, x)
            x = x + change
            if index != 1:
                rows = [0, *sorted(i + 1 for i in _drawn(significance[1:].tolist(), 6, 3))]
                x, places = x[rows], [places[i] for i in rows]
            assert kept[image, index].nonzero().flatten().tolist() == places
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        pooled = x[0] if host == "deit3" else (x[1:].mean(0) + x[1:].amax(0)) / 2
        assert torch.allclose(got[image], model.head(model.fc_norm(pooled)), atol=1e-10)


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"least": 0}, {"blocks": (3,)}, {"blocks": (-1,)}, {"form": "dense"}]
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        token_sampling_(build("vit"), **wrong)
