"""Token merging against a loop over tokens in float64, and its schedules."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
from tiny_vits import build, pictures
from torch import Tensor

from scrimp.adaptive import restore_, token_merging_
from scrimp.adaptive.token_merging import match
from scrimp.primitives.errors import InputError


def _attention(block: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Attention of one image [n, dim] with every key counted as often as it stands for tokens, and its keys."""
    part = block.attn
    q, k, v = part.qkv(block.norm1(x)).view(len(x), 3, part.num_heads, part.head_dim).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) * part.scale).exp() * torch.tensor(sizes, dtype=x.dtype)
    out = weights / weights.sum(-1, keepdim=True) @ v
    return block.ls1(part.proj(out.transpose(0, 1).flatten(1))), k.mean(0)


def _merge(x: list[Tensor], keys: Tensor, sizes: list[int], groups: list[list[int]], r: int) -> tuple[Any, Any, Any]:
    """The class token first; then odd patches that stay, then even ones with what they took in."""
    odd, even = list(range(2, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for a in odd:
        cosines = [float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in even]
        edges.append((max(cosines), a, even[cosines.index(max(cosines))]))
    gone = {a: b for _, a, b in sorted(edges, reverse=True)[:r]}
    rows, counts, members = [], [], []
    for i in [0, *(a for a in odd if a not in gone), *even]:
        all_of = [i, *(a for a, b in gone.items() if b == i)]
        total = sum(sizes[j] for j in all_of)
        rows.append(sum((x[j] * sizes[j] for j in all_of), torch.zeros_like(x[0])) / total)
        counts.append(total)
        members.append(functools.reduce(operator.iadd, (groups[j] for j in all_of), []))
    return rows, counts, members


@torch.no_grad()
def test_merging_is_the_papers() -> None:
    model: Any = build("deit3").double()
    images, schedule = pictures(2).double(), [3, 4, 0]
    control = token_merging_(model, schedule)
    got, source = model(images), control.source
    restore_(model)
    for image in range(2):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images[image : image + 1])))[0]
        sizes, groups = [1] * len(x), [[i] for i in range(len(x))]
        for block, r in zip(model.blocks, schedule, strict=True):
            change, keys = _attention(block, x, sizes)
            x = x + change
            if r:
                rows, sizes, groups = _merge(list(x), keys, sizes, groups, r)
                x = torch.stack(rows)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        assert torch.allclose(got[image], model.head(model.norm(x)[0]), atol=1e-10)
        for row, members in enumerate(groups):
            assert sorted((source[image] == row).nonzero().flatten().tolist()) == sorted(members)


@pytest.mark.parametrize("patches", [1, 2, 5])
def test_matching_small_sets(patches: int) -> None:
    metric = torch.randn(2, patches, 3, generator=torch.Generator().manual_seed(0))
    source, target, rest = match(metric, patches // 2)
    assert source.shape == target.shape == (2, patches // 2)
    assert rest.shape == (2, 0)
    assert sorted(source[0].tolist()) == list(range(1, patches, 2))


@pytest.mark.parametrize(
    ("r", "left"), [(13, [8, 4, 2]), ([5, 0, 1], [11, 11, 10]), (0.25, [12, 9, 7]), (16, [8, 4, 2]), (0, [16] * 3)]
)
@torch.no_grad()
def test_schedules(r: Any, left: list[int]) -> None:
    model = build("gap")
    control = token_merging_(model, r)
    model(torch.full((2, 3, 32, 32), torch.nan))
    assert control.tokens.tolist() == [left] * 2


@pytest.mark.parametrize("r", [-1, 1.0, [1, 2], [0, -0.5, 1], True])
def test_wrong_r(r: Any) -> None:
    with pytest.raises(InputError):
        token_merging_(build("vit"), r)
