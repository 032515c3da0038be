"""New denoising networks by name: a UNet and a transformer of diffusers, in sizes that fit small images."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import torch
from torch import nn

from scrimp.primitives.errors import InputError, require

LAYERS = 6
"""Blocks of a new transformer."""
_GROUPS = 8  # of the norms of a new UNet
_NAME = re.compile(r"(unet|dit)-(\d+)(?:/(\d+))?")


def build_denoiser(name: str, shape: tuple[int, int, int], classes: int | None = None, *, seed: int = 0) -> nn.Module:
    """A fresh network of diffusers.

    Args:
        name: ``unet-WIDTH``: three levels of WIDTH, 2 and 4 x WIDTH channels, attention at the last; ``dit-WIDTH`` or
            ``dit-WIDTH/PATCH``: a transformer of 6 blocks, its first outputs zero as in its paper (Peebles and Xie
            2023, adaLN-Zero). Patches are 4 pixels wide for sides up to 32 unless given.
        shape: channels, height, width of the images.
        classes: of labels, one label for none added; None: no labels.
        seed: of the initial weights.

    Raises:
        InputError: no such name, or images that do not fit it.
        MissingExtraError: diffusers is not installed.
    """
    kind, width, patch = _parsed(name)
    require("diffusers", "diffusers")
    make = _unet if kind == "unet" else _transformer
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make(width, patch, shape, classes)


def _parsed(name: str) -> tuple[str, int, int | None]:
    found = _NAME.fullmatch(name)
    if found is None or (found[1] == "unet" and found[3]):
        raise InputError("a model named unet-WIDTH, dit-WIDTH or dit-WIDTH/PATCH", repr(name), "such as dit-64")
    width, unit = int(found[2]), _GROUPS if found[1] == "unet" else 16
    if width < unit or width % unit:
        raise InputError(f"a width of {found[1]} that is a multiple of {unit}", f"{width}", "pass another --model")
    return found[1], width, None if found[3] is None else int(found[3])


def _unet(width: int, patch: int | None, shape: tuple[int, int, int], classes: int | None) -> nn.Module:
    from diffusers import UNet2DModel

    channels, *side = shape
    if any(item % 4 for item in side):
        raise InputError("images whose sides are multiples of 4 for a UNet", f"{side[0]}x{side[1]}", "pass --size")
    model: Any = UNet2DModel(
        sample_size=side[0] if side[0] == side[1] else tuple(side),
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(width, 2 * width, 4 * width),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=_GROUPS,
        num_class_embeds=None if classes is None else classes + 1,
    )
    return cast(nn.Module, model)


def _transformer(width: int, patch: int | None, shape: tuple[int, int, int], classes: int | None) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    channels, height, side = shape
    patch = patch or max(4, 2 ** math.ceil(math.log2(side / 8)))
    if height != side or side % patch:
        raise InputError(
            f"square images whose side is a multiple of {patch} for this transformer", f"{height}x{side}", "pass --size"
        )
    dim = 32 if width % 32 == 0 else 16
    model: Any = DiTTransformer2DModel(
        num_attention_heads=width // dim,
        attention_head_dim=dim,
        in_channels=channels,
        num_layers=LAYERS,
        norm_num_groups=1,
        sample_size=side,
        patch_size=patch,
        num_embeds_ada_norm=1 if classes is None else classes,
    )
    _start_at_zero_(model)
    keep_labels_(model)
    return cast(nn.Module, model)


def _start_at_zero_(model: Any) -> None:
    """adaLN-Zero: every block is the identity at first, and the output zero; diffusers leaves torch's usual numbers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    zero = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1, model.proj_out_2]
    for layer in zero:
        nn.init.zeros_(layer.weight)


def keep_labels_(model: nn.Module) -> None:
    """No labels dropped at random inside the network, from the global generator: who trains it drops them."""
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            cast(Any, module).dropout_prob = 0.0
