"""Which modules of a diffusers UNet a step may leave out.

A UNet's skip connections are counted from the outermost: 0 leaves the first convolution, 1 the first block of the
outermost level, and so on inwards. At ``depth`` d the modules that make skips 0 to d - 1 run at every step, and so do
those of the way back that take them; in between, the features that enter the way back at skip d - 1 are reused.

In a small UNet most of the arithmetic is at the outermost level, so a branch that only left out the inner levels would
save little. Depth 1 runs the first convolution and the last block of the way back, in the manner of DeepCache's
shallowest branch (arXiv:2312.00858); depth 2 adds one block on the way in, which knows the timestep, and one back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from scrimp.denoise.reuse_rules import Plan
from scrimp.primitives.errors import InputError

KINDS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
    "CrossAttnUpBlock2D",
    "ResnetUpsampleBlock2D",
    "SimpleCrossAttnUpBlock2D",
)


def is_unet(model: nn.Module) -> bool:
    """Whether it is built like diffusers' UNet2DModel and UNet2DConditionModel."""
    return all(hasattr(model, name) for name in ("conv_in", "down_blocks", "mid_block", "up_blocks"))


def unet_plan(model: Any, depth: int) -> Plan:
    """What a reused step leaves out of a UNet.

    Args:
        model: a diffusers UNet2DModel, UNet2DConditionModel or one built alike.
        depth: how many skip connections, from the outermost, stay fresh.

    Raises:
        InputError: blocks that pass features on in another way, or a depth the model does not have.
    """
    blocks = [*model.down_blocks, *model.up_blocks]
    strange = sorted({type(block).__name__ for block in blocks} - set(KINDS))
    if strange:
        raise InputError(
            f"a UNet of blocks out of {', '.join(KINDS)}", ", ".join(strange), "run this model without reuse"
        )
    down = [list(_down_units(block)) for block in model.down_blocks]
    skips = 1 + sum(len(units) for units in down)
    deepest = skips if model.mid_block is not None else skips - 1
    if not 1 <= depth <= deepest:
        raise InputError(f"a depth from 1 to {deepest} for this UNet", repr(depth), "1 leaves out the most")
    skipped: list[nn.Module] = []
    skip = 1
    for block, units in zip(model.down_blocks, down, strict=True):
        fresh = min(max(depth - skip, 0), len(units))
        skipped += _whole_or_parts(block, units, range(fresh, len(units)))
        skip += len(units)
    if model.mid_block is not None:
        skipped.append(model.mid_block)
    left = skips
    for block in model.up_blocks:
        units = list(_layers(block))
        old = min(max(left - depth, 0), len(units))
        skipped += _whole_or_parts(block, units, range(old))
        left -= len(units)
    return Plan(tuple(skipped), deepest)


def _layers(block: Any) -> Iterator[list[nn.Module]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        yield [module for module in (resnet, attention) if module is not None]


def _down_units(block: Any) -> Iterator[list[nn.Module]]:
    """Modules of a block on the way in, one list for each skip connection that it makes."""
    yield from _layers(block)
    if block.downsamplers is not None:
        yield list(block.downsamplers)


def _whole_or_parts(block: nn.Module, units: list[list[nn.Module]], old: Iterable[int]) -> list[nn.Module]:
    chosen = [units[index] for index in old]
    # A block left out as a whole spares its concatenations and resampling too.
    return [block] if len(chosen) == len(units) else [module for unit in chosen for module in unit]
