"""The classifiers that `scrimp thin` starts from, and the images as they take them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scrimp.data import ImageData, load_images
from scrimp.jobs.adapt_images import as_model_takes, encoder_and_images
from scrimp.jobs.adapt_models import head_of, image_subject
from scrimp.jobs.encoders import Encoder, encoder_metadata
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.models import create_model
from scrimp.jobs.thin_config import LEARNT, ThinConfig
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

GATES = "gates.safetensors"
"""File of what a method itself has learnt, beside the weights of the model."""
_THINNED = "thin"  # in a file's metadata: what its weights were fine-tuned with


@dataclass(frozen=True, kw_only=True, eq=False)
class ThinSubject:
    """A classifier to be thinned.

    Attributes:
        name: what receipts call it.
        build: makes it anew, in eval mode on the CPU, the same each time.
        channels, size: of its images.
        fresh: whether its classifier has never been trained.
        metadata: that its weights are to be saved with.
        thinned: settings of the method that its weights were fine-tuned with, ``method`` among them.
        gates: file of what that method has learnt itself.
    """

    name: str
    build: Callable[[], nn.Module]
    channels: int
    size: int
    fresh: bool = False
    metadata: dict[str, str]
    thinned: dict[str, Any]
    gates: Path | None = None

    def example(self) -> Tensor:
        """Two images of noise, [2, channels, size, size]."""
        return torch.randn(2, self.channels, self.size, self.size, generator=generator_for(0))

    def marked(self, settings: dict[str, Any]) -> dict[str, str]:
        """The metadata of weights fine-tuned with a method of these settings."""
        return {**self.metadata, _THINNED: json.dumps(settings)} if settings else self.metadata


def load_thin_subject(config: ThinConfig, source: Any, model: nn.Module | None) -> tuple[ThinSubject, ImageData]:
    """The model and the data, fit for one another.

    Args:
        config: which model.
        source: as `scrimp.data.load_images` takes it.
        model: a ready classifier instead, whose images are normalised by the data's own mean and std.

    Raises:
        InputError: no such model or data, or a classifier that would have to be trained without a budget.
    """
    if model is not None:
        data = load_images(source, size=config.size, on_corrupt=config.on_corrupt)
        subject = _given(model, Path(config.model).name or "model", data)
    else:
        subject, data = _named(config, source)
    _refuse_untrained(config, subject, given=model is not None)
    return subject, data


def _given(model: nn.Module, name: str, data: ImageData) -> ThinSubject:
    channels, size, width = data.train.shape
    if size != width:
        raise InputError("square images", f"{size} x {width}", "pass --size")
    with torch.no_grad():
        answers = copy.deepcopy(model).eval()(torch.zeros(1, channels, size, size))
    if answers.ndim != 2 or answers.shape[1] != len(data.classes):
        raise InputError(f"a classifier of {len(data.classes)} classes", f"outputs {list(answers.shape)}", "replace it")
    build = lambda: copy.deepcopy(model).cpu().eval()  # noqa: E731
    metadata = {"format": "pt", "classes": "\n".join(data.classes)}
    return ThinSubject(name=name, build=build, channels=channels, size=size, metadata=metadata, thinned={})


def _named(config: ThinConfig, source: Any) -> tuple[ThinSubject, ImageData]:
    encoder, data = encoder_and_images(config, source)
    subject = image_subject(encoder, data.classes)
    file = _file(config)
    bare = subject.build(config.seed)
    head = _head_of_file(file, bare, data.classes) if file else _head_of_timm(encoder, bare, len(data.classes))
    return ThinSubject(
        name=encoder.name,
        build=lambda: _with_head(subject.build(config.seed), head),
        channels=encoder.channels,
        size=encoder.size,
        fresh=head is None,
        metadata={**_metadata(encoder), "classes": "\n".join(data.classes)},
        thinned=_thinned(file),
        gates=_gates(file),
    ), as_model_takes(data, encoder)


def _metadata(encoder: Encoder) -> dict[str, str]:
    return encoder_metadata(
        encoder.name,
        channels=encoder.channels,
        size=encoder.size,
        mean=encoder.mean,
        std=encoder.std,
        dim=encoder.dim,
    )


def _file(config: ThinConfig) -> Path | None:
    if config.pretrained:
        return None
    path = Path(config.model if config.weights is None else config.weights).expanduser()
    return path / WEIGHTS if path.is_dir() else path


def _with_head(model: nn.Module, head: dict[str, Tensor] | None) -> nn.Module:
    model.load_state_dict(head or {}, strict=False)
    return model.eval()


def _head_names(model: nn.Module) -> list[str]:
    found = re.compile(head_of(model) or "$^")
    return [name for name in model.state_dict() if found.search(name)]


def _head_of_file(file: Path, model: nn.Module, classes: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The classifier in a file that `load_encoder` has read, if it is one of these classes."""
    own, names = model.state_dict(), _head_names(model)
    with safe_open(file, framework="pt") as stored:
        told = (stored.metadata() or {}).get("classes")
        known = set(stored.keys())
        head = {name: stored.get_tensor(name) for name in names if name in known}
    fits = bool(head) and all(name in head and head[name].shape == own[name].shape for name in names)
    return head if fits and told in (None, "\n".join(classes)) else None


def _head_of_timm(encoder: Encoder, model: nn.Module, classes: int) -> dict[str, Tensor] | None:
    """Timm's own classifier, if it is one of so many classes."""
    import timm

    about = timm.get_pretrained_cfg(encoder.name)
    if about is None or about.num_classes != classes:
        return None
    whole = create_model(
        encoder.name, classes=classes, channels=encoder.channels, size=encoder.size, pretrained=True
    ).state_dict()
    return {name: whole[name] for name in _head_names(model)}


def _thinned(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    with safe_open(file, framework="pt") as stored:
        told = (stored.metadata() or {}).get(_THINNED, "{}")
    try:
        settings = json.loads(told)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise InputError("settings of scrimp thin in the weights' metadata", told[:60], "write the file again")
    return settings


def _gates(file: Path | None) -> Path | None:
    found = None if file is None else file.parent / GATES
    return found if found is not None and found.is_file() else None


def _refuse_untrained(config: ThinConfig, subject: ThinSubject, *, given: bool) -> None:
    if config.trains:
        return
    if subject.fresh:
        got = f"{subject.name} without one"
        raise InputError("weights with a classifier of the data's classes", got, "pass --epochs to train one")
    learnt = subject.thinned.get("method") == config.method and (config.method != "adavit" or subject.gates is not None)
    if config.method in LEARNT and not learnt and not (given and config.method == "avit"):
        got = f"{subject.name} without"
        raise InputError(f"weights that learnt {config.method}", got, "pass --epochs, or weights of scrimp thin")
