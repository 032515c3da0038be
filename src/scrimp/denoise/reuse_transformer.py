"""Which blocks of a diffusers transformer a step may leave out.

The first ``depth`` blocks run at every step. The rest, a chain of residual blocks, is one long residual: what it added
at the last refresh is added again. (The idea is first-block caching's; diffusers has that for models with
``enable_cache``, which DiT, SD3, Sana and PixArt lack.)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from scrimp.denoise.reuse_rules import Plan
from scrimp.primitives.errors import InputError

# Place of the image tokens in what a block returns, where that is a tuple.
TUPLES = {"JointTransformerBlock": 1}
OTHER_STACKS = ("single_transformer_blocks", "joint_transformer_blocks", "temporal_transformer_blocks")


def is_transformer(model: nn.Module) -> bool:
    """Whether it has diffusers' ``transformer_blocks``."""
    return isinstance(getattr(model, "transformer_blocks", None), nn.ModuleList)


def transformer_plan(model: Any, depth: int) -> Plan:
    """What a reused step leaves out of a transformer.

    Args:
        model: a diffusers DiTTransformer2DModel, SD3Transformer2DModel, SanaTransformer2DModel,
            PixArtTransformer2DModel, or another of one stack ``transformer_blocks`` over image tokens.
        depth: how many blocks run always.

    Raises:
        InputError: a second stack of blocks, or a depth that leaves nothing out.
    """
    others = [name for name in OTHER_STACKS if len(getattr(model, name, None) or ())]
    if others:
        raise InputError(
            "one stack of transformer_blocks",
            f"{type(model).__name__} with {', '.join(others)}",
            "use diffusers' own cache where the model has one (model.enable_cache)",
        )
    blocks = list(model.transformer_blocks)
    if not 1 <= depth < len(blocks):
        raise InputError(
            f"a depth from 1 to {len(blocks) - 1} for {len(blocks)} transformer blocks",
            repr(depth),
            "1 leaves out the most; a model of one block has nothing to leave out",
        )
    hidden = TUPLES.get(type(blocks[-1]).__name__, 0)
    return Plan(tuple(blocks[depth:]), len(blocks) - 1, residual=True, hidden=hidden)
