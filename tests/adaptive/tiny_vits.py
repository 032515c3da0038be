"""Tiny instances of the families of vision transformers that the host library has, with weights that all matter."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

_SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}

HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "gap": ("vit_medium_patch16_gap_256", {}),
    "registers_only": ("vit_medium_patch16_reg4_gap_256", {}),
    "avgmax": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "rope": ("vit_small_patch16_rope_224", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "flexivit": ("flexivit_small", {}),
    "naflex": ("naflexvit_base_patch16_gap", {"img_size": None}),
    "pwee": ("vit_pwee_patch16_reg1_gap_256", {}),
    "parallel_scaling": ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}),
    "parallel_things": ("vit_tiny_patch16_224", {"block_fn": ParallelThingsBlock}),
    "differential": ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "relpos": ("vit_relpos_small_patch16_224", {}),
    "relpos_shared": ("vit_srelpos_small_patch16_224", {}),
    "post_norm": ("vit_relpos_base_patch16_rpn_224", {}),
}


def build(host: str, **more: Any) -> nn.Module:
    """A model in evaluation mode for images [3, 32, 32]; layer scales, biases and tables are moved away from 0."""
    name, extra = HOSTS[host]
    options = {**_SMALL, "img_size": 32, **extra, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, **{k: v for k, v in options.items() if v is not None})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pictures(count: int = 2, seed: int = 0) -> Tensor:
    """Images [count, 3, 32, 32] of unlike contrast, so that they keep unlike numbers of tokens."""
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.2, 3, max(count, 1))[:count, None, None, None]
