"""Pretrained models for `scrimp swap`: timm by name, transformers from a local folder. Nothing is fetched unasked."""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from scrimp.jobs.models import create_model, load_weights_
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.swap_subject import Subject, subject_of
from scrimp.primitives.errors import InputError, require

_HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
}


def load_subject(config: SwapConfig) -> Subject:
    """The model in eval mode on the CPU.

    Raises:
        InputError: no such model, weights that do not fit, or a transformers model without "sdpa" attention.
        MissingExtraError: transformers is not installed.
    """
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if config.pretrained or config.weights is not None:
            raise InputError("a model folder alone", "--pretrained or --weights beside it", "leave them out")
        return _from_folder(folder, config)
    if os.sep in config.model and not config.model.startswith(("hf_hub:", "hf-hub:", "timm/")):
        raise InputError("a timm model name or a model folder", f"{config.model}, which is absent", "check the path")
    return _from_timm(config)


def _from_folder(folder: Path, config: SwapConfig) -> Subject:
    transformers = require("transformers", "hf")
    settings = _read_settings(folder)
    architecture = (settings.get("architectures") or [""])[0]
    auto = next((loader for ending, loader in _HEADS.items() if architecture.endswith(ending)), "AutoModel")
    try:
        loader: Any = getattr(transformers, auto)
        model = loader.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa").eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            "a transformers model with weights and 'sdpa' attention", f"{folder} ({_first_line(error)})", "check it"
        ) from error
    subject = subject_of(model, folder.resolve().name, layers=config.layers)
    subject = replace(subject, native=_native(model.config))
    if subject.gives == "classes":
        subject = replace(subject, classes=model.config.num_labels)
    if model.main_input_name == "pixel_values":
        return replace(subject, main_input="pixel_values", **_pixels(folder, model))
    return replace(subject, tokenizer=_tokenizer(transformers, folder))


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            "a model folder with config.json and *.safetensors", f"{folder} ({_first_line(error)})", "save it again"
        ) from error
    return settings if isinstance(settings, dict) else {}


def _native(settings: Any) -> int | None:
    for name in ("image_size", "max_position_embeddings", "n_positions"):
        value = getattr(settings, name, None)
        if isinstance(value, int):
            return value
    return None


def _pixels(folder: Path, model: nn.Module) -> dict[str, Any]:
    """How the model wants its images; without a preprocessor's file, each channel around 0.5."""
    settings: Any = model.config
    channels = getattr(settings, "num_channels", 3)
    about: dict[str, Any] = {"mean": (0.5,) * channels, "std": (0.5,) * channels, "channels": channels}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        about["options"] = {"interpolate_pos_encoding": True}  # changes nothing at the model's own size
    file = folder / "preprocessor_config.json"
    if file.is_file():
        wanted = json.loads(file.read_text())
        for key, name in (("mean", "image_mean"), ("std", "image_std")):
            if len(wanted.get(name) or ()) == channels:
                about[key] = tuple(wanted[name])
    return about


def _tokenizer(transformers: Any, folder: Path) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError("a tokenizer in the model's folder", _first_line(error), "save it there") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # padding on the left cannot be swapped
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_timm(config: SwapConfig) -> Subject:
    if config.weights is None and not config.pretrained:
        raise InputError(f"weights for {config.model}", "none", "pass --pretrained or --weights FILE")
    state = {} if config.weights is None else _shapes(config.weights)
    model = _build(config, state, None)
    position = state.get("pos_embed")
    if position is not None and position != tuple(getattr(model, "pos_embed", nn.Parameter()).shape):
        model = _build(config, state, _side(model, position[1]))
    if config.weights is not None:
        if load_weights_(model, config.weights):
            raise InputError("weights with the model's classifier", f"{config.weights}", "pass the whole weights")
        about: dict[str, Any] = {}
    else:
        about = {key: tuple(model.pretrained_cfg[key]) for key in ("mean", "std")}
    form = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    projection = state.get("patch_embed.proj.weight")
    return Subject(
        model.eval(),
        config.model,
        gives="classes" if model.num_classes else "features",
        layers=config.layers,
        classes=model.num_classes or None,
        native=int(form[0]),
        channels=projection[1] if projection else model.pretrained_cfg["input_size"][0],
        **about,
    )


def _build(config: SwapConfig, state: dict[str, tuple[int, ...]], side: int | None) -> Any:
    """A timm model of the weights' classes and channels that takes images of any side, where it can."""
    import timm

    options: dict[str, Any] = {"pretrained": config.pretrained}
    if not timm.is_model(config.model):
        create_model(config.model, classes=1, channels=3, size=224)  # says which names are near
        raise InputError("a model with attention", config.model, "pass a timm transformer")
    if state:
        head = getattr(timm.get_pretrained_cfg(config.model), "classifier", None) or "head"
        rows = state.get(f"{head}.weight")
        options["num_classes"] = rows[0] if rows else 0
        projection = state.get("patch_embed.proj.weight")
        options["in_chans"] = projection[1] if projection else 3
    if side is not None:
        options["img_size"] = side
    try:
        try:
            return timm.create_model(config.model, dynamic_img_size=True, **options)
        except TypeError:
            return timm.create_model(config.model, **options)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"pretrained weights of {config.model}", _first_line(error), "go online once, or pass --weights FILE"
        ) from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    if not path.is_file():
        raise InputError("a .safetensors file", f"{path}, which is absent", "check --weights")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own error class has no stable home
        raise InputError("a whole .safetensors file", f"{path} ({error})", "copy it again") from error


def _side(model: Any, tokens: int) -> int | None:
    """Side of the images that so many embedded positions were made for."""
    patch = model.patch_embed.patch_size[0]
    for prefix in dict.fromkeys((getattr(model, "num_prefix_tokens", 0), 0)):
        side = math.isqrt(max(tokens - prefix, 0))
        if side and side * side == tokens - prefix:
            return side * patch
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
