"""Encoders from weights files, run folders, timm and transformers, each with how it wants its images.

Nothing is unpickled: weights are read from safetensors only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scrimp.data import ImageData, Images
from scrimp.jobs.encode import as_encoder_takes, encode, run_encoder
from scrimp.jobs.encoders_hf import load_transformers
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.models import create_model
from scrimp.primitives.errors import InputError

__all__ = [
    "Encoder",
    "EncoderFacts",
    "as_encoder_takes",
    "create_encoder",
    "encode",
    "encoder_from_metadata",
    "encoder_metadata",
    "features_of",
    "load_encoder",
]


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """What must be known of an encoder to use it.

    Attributes:
        name: the architecture, as `scrimp.jobs.models.create_model` takes it.
        dim: width of the features.
        channels, size: of the images, size in pixels a side.
        mean, std: that the images are normalised with, a number a channel, for pixels in 0 to 1.
    """

    name: str
    dim: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder(EncoderFacts):
    """A model in eval mode that maps images [n, channels, size, size] to features [n, dim], and its facts."""

    model: nn.Module


def encoder_metadata(
    name: str, *, channels: int, size: int, mean: Sequence[float], std: Sequence[float], dim: int
) -> dict[str, str]:
    """What an encoder's weights file says of it, as safetensors keeps it: text by name."""
    return {
        "format": "pt",
        "kind": "encoder",
        "model": name,
        "channels": str(channels),
        "size": str(size),
        "mean": ",".join(map(str, mean)),
        "std": ",".join(map(str, std)),
        "dim": str(dim),
    }


def encoder_from_metadata(metadata: Mapping[str, str]) -> EncoderFacts:
    """What `encoder_metadata` wrote.

    Raises:
        InputError: something is missing, or is no number.
    """
    try:
        mean, std = (tuple(float(item) for item in metadata[key].split(",")) for key in ("mean", "std"))
        dim, channels, size = (int(metadata[key]) for key in ("dim", "channels", "size"))
        facts = EncoderFacts(name=metadata["model"], dim=dim, channels=channels, size=size, mean=mean, std=std)
    except (KeyError, ValueError) as error:
        raise InputError("an encoder's whole metadata", f"{error} missing or misshapen", "write it again") from error
    if not len(mean) == len(std) == channels:
        raise InputError(f"mean and std of {channels} channels", f"{len(mean)} and {len(std)}", "write it again")
    return facts


def create_encoder(name: str, *, channels: int, size: int, pretrained: bool = False) -> nn.Module:
    """A fresh network, images [n, channels, size, size] -> features [n, dim]; arguments as for `create_model`.

    Raises:
        InputError: no such model, or pretrained weights that cannot be had.
    """
    return create_model(name, classes=0, channels=channels, size=size, pretrained=pretrained)


def load_encoder(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    pretrained: bool = False,
    size: int | None = None,
    data: ImageData | Callable[[], ImageData] | None = None,
) -> Encoder:
    """An encoder in eval mode on the CPU, from one of

    - the weights of an encoder (.safetensors) or the run folder that holds them: the file says the rest;
    - the weights of a classifier of `scrimp train`, or its run folder: the classifier is dropped; the images'
      size, mean and std are those of ``data``, as they were in training;
    - any other .safetensors file of an architecture named by ``model``: size, mean and std are timm's for it, or those
      of ``data`` where it is none of timm's;
    - a timm name, with ``pretrained``: timm's weights, size, mean and std;
    - the folder of a transformers vision model, size, mean and std being its preprocessor's. Its features are the
      pooled output, unless the weights of the pooling are not in the folder; then the class token of the last layer;
      where there is none, the mean over tokens or places.

    Args:
        model: architecture of a file that does not name it.
        pretrained: let timm load (and fetch) its weights.
        size: side of the images in pixels, instead of the usual one.
        data: images the encoder was made for, or a function that loads them, called only if they are needed.

    Raises:
        InputError: what is no source, a file that does not fit, or facts that nothing tells.
        MissingExtraError: transformers is not installed.
    """
    path = Path(source).expanduser()
    weights = path / WEIGHTS if path.is_dir() else path
    if path.is_dir() and not weights.is_file():
        _refuse(model is not None or pretrained, "a transformers folder alone", "a model name or pretrained too")
        return _from_transformers(path, size)
    if weights.is_file():
        _refuse(pretrained, "a weights file or pretrained weights", "both")
        return _from_file(_File.read(weights), model, size, data)
    if path.suffix or os.sep in os.fspath(source):
        import timm

        if not timm.is_model(os.fspath(source)):
            raise InputError("weights or a model folder", f"{source}, which is absent", "check the path")
    _refuse(model is not None, "a file of weights for the model named", f"{source}")
    _refuse(not pretrained, f"weights for {source}", "none", "ask for timm's by pretrained, or pass a file")
    return _from_timm(os.fspath(source), size)


def features_of(encoder: Encoder, images: Images, *, device: str | torch.device, **options: Any) -> Tensor:
    """`encode` by an encoder with its own mean and std; ``encoder.model`` is on ``device``."""
    return encode(encoder.model, images, mean=encoder.mean, std=encoder.std, device=device, **options)


@dataclass(frozen=True)
class _File:
    """A safetensors file, read."""

    path: Path
    metadata: dict[str, str]
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> _File:
        if path.suffix != ".safetensors":
            raise InputError("a .safetensors file", f"{path}", "convert it: other formats can run code when read")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
            return cls(path, metadata, load_file(path))
        except Exception as error:  # safetensors' own error class has no stable home
            raise InputError("a whole .safetensors file", f"{path} ({error})", "copy it again") from error


def _from_file(file: _File, named: str | None, size: int | None, data: Any) -> Encoder:
    own = file.metadata.get("model")
    name = own or named
    if name is None:
        raise InputError("a file that names its model", f"{file.path}", "name the architecture: --model NAME")
    _refuse(named not in (None, name), f"no other model than the file's, {own}", f"{named}")
    if file.metadata.get("kind") == "encoder":
        facts = encoder_from_metadata(file.metadata)
        about = {"size": size or facts.size, "mean": facts.mean, "std": facts.std}
        return _filled(file, name, [facts.channels], about)
    told = (_told_by_timm(name) if own is None else None) or _told_by_data(file, data)
    if size is not None:
        told["size"] = size
    return _filled(file, name, list(dict.fromkeys([len(told["mean"]), 3, 1])), told)


def _told_by_timm(name: str) -> dict[str, Any] | None:
    import timm

    if not timm.is_model(name):
        return None
    about = timm.get_pretrained_cfg(name)
    if about is None:
        return None
    return {"size": about.input_size[-1], "mean": tuple(about.mean), "std": tuple(about.std)}


def _told_by_data(file: _File, data: Any) -> dict[str, Any]:
    images = data() if callable(data) else data
    if images is None:
        raise InputError(
            "images to take size, mean and std from", f"none, and {file.path} does not say them", "pass data="
        )
    return {"size": images.train.shape[-1], "mean": images.mean, "std": images.std}


def _filled(file: _File, name: str, channels: Sequence[int], told: dict[str, Any]) -> Encoder:
    """The encoder with the file's weights, of the first number of channels that they fit."""
    wrong: list[str] = []
    for number in channels:
        with torch.random.fork_rng([]):  # initial weights are drawn, to be overwritten
            model = create_encoder(name, channels=number, size=told["size"])
        misfits = _misfits(model, file.state)
        if not misfits:
            model.load_state_dict({key: file.state[key] for key in model.state_dict()})
            found = _described(model, name, number, told)
            _check_head(file, found)
            return found
        wrong = wrong or misfits
    raise InputError(
        f"weights of {name} for images of {told['size']} pixels",
        f"{file.path} with {wrong[0]} and {len(wrong) - 1} more differing",
        "name the model that wrote them, and its size",
    )


def _misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Entries that are missing, of another shape, or no part of a classifier on top."""
    own = model.state_dict()
    wrong = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    return wrong + sorted(key for key in set(state) - set(own) if not key.startswith(_heads(model)))


def _heads(model: nn.Module) -> tuple[str, ...]:
    named = getattr(model, "default_cfg", {}).get("classifier", ("head", "fc"))
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _check_head(file: _File, encoder: Encoder) -> None:
    """A classifier's width tells the size of the images where the encoder itself takes any."""
    own = encoder.model.state_dict()
    for key, value in file.state.items():
        if key not in own and value.ndim == 2 and value.shape[1] != encoder.dim:
            got = f"{file.path}, whose classifier takes {value.shape[1]}"
            wanted = f"weights for {encoder.dim} features, as of images of {encoder.size} pixels"
            raise InputError(wanted, got, "pass the size of the images it was trained on")


def _described(model: nn.Module, name: str, channels: int, told: dict[str, Any]) -> Encoder:
    """The encoder with its facts; the width of its features is tried out."""
    mean, std = (_as_many(told[key], channels) for key in ("mean", "std"))
    with torch.no_grad():
        model.eval()
        dim = run_encoder(model, torch.zeros(1, channels, told["size"], told["size"])).shape[1]
    return Encoder(model=model, name=name, dim=dim, channels=channels, size=told["size"], mean=mean, std=std)


def _as_many(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _from_timm(name: str, size: int | None) -> Encoder:
    told = _told_by_timm(name)
    if told is None:
        create_encoder(name, channels=3, size=224, pretrained=True)  # says which names are near
        raise InputError("a timm model with pretrained weights", name, "choose another")
    if size is not None:
        told["size"] = size
    with torch.random.fork_rng([]):
        model = create_encoder(name, channels=len(told["mean"]), size=told["size"], pretrained=True)
    return _described(model, name, len(told["mean"]), told)


def _from_transformers(folder: Path, size: int | None) -> Encoder:
    model, told = load_transformers(folder)
    return _described(model, folder.resolve().name, len(told["mean"]), told | ({} if size is None else {"size": size}))


def _refuse(wrong: bool, expected: str, got: str, remedy: str = "leave one out") -> None:
    if wrong:
        raise InputError(expected, got, remedy)
