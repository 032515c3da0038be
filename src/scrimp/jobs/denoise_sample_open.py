"""The model that is to be sampled, by whatever a person gave for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scrimp.jobs.denoise_models import INDEX, find_model, load_denoiser
from scrimp.jobs.denoise_sample_config import DenoiseSampleConfig
from scrimp.jobs.denoise_sample_model import DenoiserSubject
from scrimp.jobs.denoise_sample_pipeline import PipelineSubject, load_pipeline
from scrimp.jobs.denoise_sample_ways import Subject
from scrimp.primitives.errors import InputError

_OURS = {"UNet2DModel", "DiTTransformer2DModel"}
_PARTS = {"unet", "transformer", "scheduler"}


def open_subject(config: DenoiseSampleConfig, device: torch.device) -> Subject:
    """A denoiser of pixels where the folder holds one, else whatever pipeline diffusers makes of it.

    Raises:
        InputError: no such folder or hub id, or a model that does not fit the settings.
        MissingExtraError: diffusers is not installed.
    """
    if not Path(config.model).exists():
        pipeline = load_pipeline(config.model, config.adapter, local=False)
        return PipelineSubject(config.model.replace("/", "-"), pipeline, config, device)
    root = find_model(config.model)
    run = Path(config.model).resolve()
    name = run.parent.name if run == root.resolve() and run.name == "model" else run.name
    if not of_pixels(read_index(root)):
        return PipelineSubject(name, load_pipeline(str(root), config.adapter, local=True), config, device)
    denoiser = load_denoiser(root, adapter=config.adapter)
    denoiser.model.to(device)
    return DenoiserSubject(name, denoiser, config, class_names(root))


def of_pixels(index: dict[str, Any]) -> bool:
    """Whether a pipeline is a network and a scheduler alone: no decoder, no text."""
    parts = {key: value for key, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    networks = [value[1] for key, value in parts.items() if key in ("unet", "transformer")]
    return set(parts) <= _PARTS and len(networks) == 1 and networks[0] in _OURS


def class_names(root: Path) -> Sequence[str]:
    """Names as `scrimp denoise train` noted them; empty where nobody did."""
    noted = read_index(root).get("_scrimp", {}).get("names")
    return [str(name) for name in noted] if isinstance(noted, list) else []


def read_index(root: Path) -> dict[str, Any]:
    """The pipeline's table of parts.

    Raises:
        InputError: it cannot be read.
    """
    try:
        content = json.loads((root / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"a readable {INDEX}", f"{root / INDEX} ({error})", "copy the folder again") from error
    if not isinstance(content, dict):
        raise InputError(f"a readable {INDEX}", f"{root / INDEX} without a table", "copy the folder again")
    return content
