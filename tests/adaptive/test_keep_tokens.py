"""Keeping the attentive tokens against a loop in float64, with and without the token of the dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vits import build, pictures
from torch import Tensor

from scrimp.adaptive import keep_tokens_, restore_
from scrimp.primitives.errors import InputError


def _attention(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    part = block.attn
    q, k, v = part.qkv(block.norm1(x)).view(len(x), 3, part.num_heads, part.head_dim).permute(1, 2, 0, 3)
    weights = (q @ k.transpose(1, 2) * part.scale).softmax(-1)
    return block.ls1(part.proj((weights @ v).transpose(0, 1).flatten(1))), weights.mean(0)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("host", ["deit3", "gap"])
@torch.no_grad()
def test_keeping_is_the_papers(host: str, fuse: bool) -> None:
    model: Any = build(host).double()
    images = pictures(2).double()
    control = keep_tokens_(model, 0.4, blocks=(0, 2), fuse=fuse)
    got, prefix = model(images), control.host.prefix
    restore_(model)
    for image in range(2):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images[image : image + 1])))[0]
        for index, block in enumerate(model.blocks):
            change, weights = _attention(block, x)
            x, scores = x + change, weights[0] if prefix else weights.mean(0)
            if index != 1:
                patches = sorted(range(prefix, len(x)), key=lambda i: -scores[i])
                stay = -(-2 * len(patches) // 5)
                kept, gone = sorted(patches[:stay]), patches[stay:]
                rows = [*x[:prefix], *x[kept]]
                if fuse:
                    rows.append(sum(scores[i] * x[i] for i in gone) / sum(scores[i] for i in gone))
                x = torch.stack(rows)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        pooled = x[0] if prefix else x.mean(0)
        assert torch.allclose(got[image], model.head(model.fc_norm(pooled)), atol=1e-10)


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.1}, {"ratio": 0.5, "blocks": (3,)}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        keep_tokens_(build("vit"), **wrong)
