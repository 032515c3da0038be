"""Transformers vision models from a local folder, as encoders."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.jobs.folder import WEIGHTS
from scrimp.primitives.errors import InputError, require


class _Pooled(nn.Module):
    """A transformers vision model as images -> features [n, dim]; `scrimp.jobs.encoders.load_encoder` says which."""

    def __init__(self, model: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled
        self.has_class_token = any(
            name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in model.named_parameters()
        )
        takes = inspect.signature(model.forward).parameters
        # Changes nothing at the model's own size, and lets it take others.
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images, **self.options)
        if self.pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        last = output.last_hidden_state
        if last.ndim == 4:
            return last.mean((2, 3))
        return last[:, 0] if self.has_class_token else last.mean(1)


def load_transformers(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A vision model as images -> features, and size, mean and std of its images.

    Raises:
        InputError: no such model, one that does not look at whole images, or weights or facts that are missing.
        MissingExtraError: transformers is not installed.
    """
    settings = _read(folder / "config.json", folder)
    transformers = require("transformers", "hf")
    try:
        with torch.random.fork_rng([]):
            model, report = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        got = f"{folder} ({_first_line(error)})"
        raise InputError("a transformers model in safetensors", got, "save it again") from error
    if model.main_input_name != "pixel_values" or hasattr(model.config, "mask_ratio"):
        got = f"{folder} with {type(model).__name__}"
        raise InputError("a vision model that looks at whole images", got, "save its vision encoder alone")
    missing = sorted(report["missing_keys"])
    lost = [key for key in missing if "pooler" not in key]
    if lost:
        got = f"{folder} without {lost[0]} and {len(lost) - 1} more"
        raise InputError("all weights of the model", got, "save it again")
    return _Pooled(model, pooled=not missing), _told_by_processor(folder, settings)


def _told_by_processor(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    whole = folder / "processor_config.json"
    about = _read(whole, folder).get("image_processor", {}) if whole.is_file() else None
    about = about or _read(folder / "preprocessor_config.json", folder)
    channels = settings.get("num_channels", 3)
    mean, std = about.get("image_mean"), about.get("image_std")
    if about.get("do_normalize") is False:
        mean, std = (0.0,) * channels, (1.0,) * channels
    sizes = [about.get("crop_size") if about.get("do_center_crop") else None, about.get("size")]
    sides = [side for found in sizes for side in ([found] if isinstance(found, int) else (found or {}).values())]
    side = next((value for value in [*sides, settings.get("image_size")] if isinstance(value, int)), None)
    if mean is None or std is None or side is None:
        raise InputError("image_mean, image_std and a size", f"{folder} without", "save the image processor there")
    return {"size": side, "mean": tuple(mean), "std": tuple(std)}


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        wanted = f"{WEIGHTS} of a run, or a transformers model with {path.name}"
        raise InputError(wanted, f"{folder} ({_first_line(error)})", "check the folder") from error
    return found if isinstance(found, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
