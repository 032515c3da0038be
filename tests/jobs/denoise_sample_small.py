"""What the tests of `scrimp denoise sample` share: small models, a configuration, the images that a run saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scrimp.denoise import new_scheduler, process_of
from scrimp.jobs.denoise_models import Denoiser, save_denoiser
from scrimp.jobs.denoise_sample_config import DenoiseSampleConfig
from scrimp.primitives.draw import generator_for

SHAPE = (1, 8, 8)
FIXED: dict[str, Any] = {"solver": "dpm++", "steps": 3, "cache": "none"}


def make_models(root: Path) -> Path:
    """A folder of run folders: unet (no classes), dit (three classes), flow (no classes), big (many tokens)."""
    for name, classes, prediction in (
        ("unet", None, "epsilon"),
        ("dit", 3, "v"),
        ("flow", None, "flow"),
        ("big", None, "v"),
    ):
        scheduler, shape = new_scheduler(prediction), (1, 16, 16) if name == "big" else SHAPE
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = _unet() if name in ("unet", "flow") else _transformer(shape[1], classes)
        _randomise_(model)
        save_denoiser(Denoiser(model, process_of(scheduler), scheduler, shape, classes, classes), root / name / "model")
    return root


def config(model: Path, out: Path, **settings: Any) -> DenoiseSampleConfig:
    usual = {"count": 5, "batch": 2, "pilot": 2, "baseline_steps": 5, "reference_steps": 10, "device": "cpu"}
    return DenoiseSampleConfig(**{**usual, "json": True, "calibrate": 0, **settings}, model=str(model), out=out)


def saved(out: Path) -> Tensor:
    found = []
    for file in sorted((out / "images").iterdir()):
        with Image.open(file) as image:
            found.append(torch.from_numpy(np.array(image)))
    return torch.stack(found)


def _unet() -> torch.nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        attention_head_dim=8, norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _transformer(side: int, classes: int | None) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=3, dropout=0.0,
        sample_size=side, patch_size=2 if side > 8 else 4, num_embeds_ada_norm=classes or 1, norm_num_groups=1,
    )  # fmt: skip


def _randomise_(model: torch.nn.Module) -> None:
    """Weights of some size everywhere: fresh transformers give zeros."""
    generator = generator_for(3)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn(weights.shape, generator=generator))
