"""What `scrimp audit` attacks: a model with its method attached, or a victim of the user's own; and the images."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scrimp.attack import AdaptiveVictim, Normalised, Victim, victim_of
from scrimp.data import ImageData, load_images
from scrimp.jobs.audit_config import AuditConfig
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.thin_config import LEARNT, VALUES, Method
from scrimp.jobs.thin_fit import ThinSetup
from scrimp.jobs.thin_methods import Build, Setting, build_of, settings_of
from scrimp.jobs.thin_models import ThinSubject, load_thin_subject
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, eq=False)
class Subject:
    """A victim, and what the job knows of it.

    Attributes:
        victim: attacked.
        name, method: what reports call the model, and how it saves.
        data: where the images are from.
        capped: gives the same with a hard budget of so many FLOPs an image; None where that cannot be had.
        setup: makes the model anew, thinned in any way; None for a victim of the user's own.
        build: what the model is like; likewise.
    """

    victim: Victim
    name: str
    method: str
    data: ImageData
    capped: Callable[[int], Victim] | None
    setup: ThinSetup | None = None
    build: Build | None = None

    def model(self, setting: Setting | None) -> Normalised:
        """The same weights in another way, or with all tokens; takes images from 0 to 1."""
        assert self.setup is not None
        thinned, _ = self.setup.model(setting)
        return Normalised(thinned.model, self.data.mean, self.data.std)

    @property
    def device(self) -> torch.device:
        """Where the victim is."""
        return next((part.device for part in self.victim.model.parameters()), torch.device("cpu"))

    def images(self, config: AuditConfig) -> tuple[Tensor, Tensor | None, Tensor]:
        """Test images, their labels or None, and training images; drawn by the seed, from 0 to 1.

        Raises:
            InputError: fewer than 2 test images, or no others.
        """
        parts = []
        for place, part in enumerate((self.data.test, self.data.train)):
            rows = torch.randperm(len(part), generator=generator_for(config.seed, place))[: config.images]
            parts.append((part.batch(rows).float().to(self.device) / 255, part.labels[rows]))
        (images, labels), (learn, _) = parts
        if len(images) < 2 or not len(learn):
            raise InputError("2 test images or more, and others", f"{len(images)} and {len(learn)}", "pass more images")
        return images, None if config.unlabelled else labels.to(images.device), learn


def load_subject(
    config: AuditConfig, source: Any, accelerator: Accelerator, *, model: nn.Module | None, victim: Victim | None
) -> Subject:
    """The victim that a configuration names, and its images.

    Raises:
        InputError: no such model, victim or data, or a model without a method.
    """
    if victim is not None or config.victim is not None:
        return _own(config, source, victim)
    source = _with_classes(config, source) if config.unlabelled else source
    plain = config.thin()
    subject, data = load_thin_subject(plain, source, model)
    method = _method(config, subject, given=model is not None)
    thin = config.thin(method)
    setup, build = ThinSetup(thin, subject, data, accelerator), build_of(subject)
    setting = _setting(config, method, subject, build)

    def attached(max_flops: int | None) -> AdaptiveVictim:
        thinned, _ = replace(setup, config=replace(thin, max_flops=max_flops)).model(setting)
        return victim_of(thinned.model, mean=data.mean, std=data.std)

    return Subject(attached(thin.max_flops), subject.name, setting.way, data, attached, setup, build)


def others_of(config: AuditConfig, source: Any, accelerator: Accelerator) -> dict[str, Victim]:
    """The models that attacks are tried on too, by name.

    Raises:
        InputError: no such model, one without a method, or one of images of another size.
    """
    found: dict[str, Victim] = {}
    for run in config.transfer_to:
        path = Path(run)
        bare = replace(config, model=run, victim=None, weights=None, pretrained=False, r=None, ratio=None, samples=None)
        bare = replace(bare, blocks=(), max_flops=None, max_tokens=None, method=config.method)
        try:
            other = load_subject(replace(bare, method=None), source, accelerator, model=None, victim=None)
        except _NoMethod:
            other = load_subject(bare, source, accelerator, model=None, victim=None)
        name = path.name if path.name not in found else f"{path.name}-{len(found) + 1}"
        found[name] = other.victim
    return found


class _NoMethod(InputError):
    """Weights that were fine-tuned with no method, and none was asked for."""


def _method(config: AuditConfig, subject: ThinSubject, *, given: bool) -> Method:
    method = config.method or subject.thinned.get("method")
    if method not in get_args(Method):
        remedy = "pass --method, or the folder of a way that scrimp thin fine-tuned"
        raise _NoMethod("a model with an adaptive method", f"{subject.name} without", remedy)
    learnt = subject.thinned.get("method") == method and (method != "adavit" or subject.gates is not None)
    if method in LEARNT and not learnt and not (given and method == "avit"):
        raise InputError(f"weights that learnt {method}", f"{subject.name} without", "fine-tune them by scrimp thin")
    return cast(Method, method)


def _setting(config: AuditConfig, method: Method, subject: ThinSubject, build: Build) -> Setting:
    if subject.thinned.get("method") == method and not config.given(method):
        return Setting(f"{method}-{subject.thinned[VALUES[method]]:g}", subject.thinned)
    found = settings_of(config.thin(method), build)
    usual = {"tome": -2, "keep": 1}.get(method, 0)
    return found[usual if len(found) > 2 else 0]


def _own(config: AuditConfig, source: Any, victim: Victim | None) -> Subject:
    found = _made(str(config.victim), config.model) if victim is None else victim
    data = load_images(source, size=config.size, on_corrupt=config.on_corrupt, unlabelled=config.unlabelled)
    name = Path(config.model).name or "model"
    method = type(found).__name__ if config.victim is None else config.victim
    return Subject(found, name, method, data, getattr(found, "capped", None))


def _made(named: str, model: str) -> Victim:
    module, _, factory = named.partition(":")
    sys.path.insert(0, "")  # a module beside the user, as python -m finds it
    try:
        make = getattr(importlib.import_module(module), factory)
        found = make(model)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        got = f"{named} ({(str(error) or type(error).__name__).splitlines()[0]})"
        raise InputError("--victim package.module:factory, called with MODEL", got, "correct it") from error
    finally:
        sys.path.remove("")
    missing = [
        name for name in ("model", "full", "ceiling", "cost", "policy_loss", "logits") if not hasattr(found, name)
    ]
    if missing:
        raise InputError(
            "a scrimp.attack.Victim", f"{type(found).__name__} without {missing[0]}", "add what is missing"
        )
    return cast(Victim, found)


def _with_classes(config: AuditConfig, source: Any) -> ImageData:
    """Pictures without labels, with the classes that the weights name."""
    data = load_images(source, size=config.size, on_corrupt=config.on_corrupt, unlabelled=True)
    path = Path(config.model if config.weights is None else config.weights).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    told = None
    if file.is_file() and file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stored:
            told = (stored.metadata() or {}).get("classes")
    if told is None:
        raise InputError("weights that name their classes, for --unlabelled", f"{file.name}", "pass labelled images")
    return replace(data, classes=tuple(told.split("\n")))
