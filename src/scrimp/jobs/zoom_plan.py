"""What a model of `scrimp zoom` is made of, kept in its weights file, so that the file alone makes it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scrimp.data import normalise
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.models import load_weights_
from scrimp.jobs.zoom_config import Method, ZoomTrainConfig
from scrimp.jobs.zoom_data import ZoomData
from scrimp.jobs.zoom_labels import Target
from scrimp.jobs.zoom_model import AbmilNet, Looking, Read, Scenes, WholeNet, ZoomNet
from scrimp.jobs.zoom_networks import make_attention, make_features, width_of
from scrimp.jobs.zoom_places import mirrored
from scrimp.jobs.zoom_readers import Readers, Shape
from scrimp.primitives.errors import InputError

_KEY = "zoom"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The architecture, and how images come to it.

    Attributes:
        method, attention, attention_level, features, maps, patches, patch_size, smooth, replacement, control: as in
            `ZoomTrainConfig`.
        shape: of a view.
        mean, std: that pixels are normalised with.
        target: what is learnt.
    """

    method: Method
    attention: str
    attention_level: int
    features: str
    maps: int
    patches: int
    patch_size: tuple[int, ...]
    smooth: float
    replacement: bool
    control: bool
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target: Target

    def build(self, *, seed: int = 0, pretrained: bool = False) -> nn.Module:
        """A fresh model, its weights fixed by ``seed``; a `scrimp.jobs.zoom_model.Looking`.

        Raises:
            InputError: no such network, or one that does not take these patches.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self._build(pretrained)

    def scenes(self, readers: Readers, rows: Sequence[int], views: Tensor, *, flips: Tensor | None = None) -> Scenes:
        """A batch as the model takes it.

        Args:
            rows: of the gallery.
            views: uint8 [batch, C, h, w], on the device to compute on.
            flips: bool [batch]; which images to mirror.
        """
        device, sizes = views.device, torch.tensor([readers.open(row).size for row in rows])
        turned = [False] * len(rows) if flips is None else flips.tolist()
        if flips is not None:
            views = torch.where(flips.to(device)[:, None, None, None], views.flip(3), views)

        def read(place: int, boxes: Tensor) -> Tensor:
            width = int(sizes[place, 0])
            boxes = mirrored(boxes, width) if turned[place] else boxes
            patches = readers.patches(rows[place], boxes, self.patch_size[0], self.shape[0]).to(device)
            return self._normalised(patches.flip(3) if turned[place] else patches)

        return Scenes(self._normalised(views), sizes, read)

    def blank(self, count: int, device: torch.device, sizes: Tensor | None = None) -> Scenes:
        """A batch of nothing but zeros, to count by; of images like these, [count, 2], if given."""
        channels, height, width = self.shape
        side = self.patch_size[0]
        read: Read = lambda row, boxes: torch.zeros(len(boxes), channels, side, side, device=device)  # noqa: E731
        sizes = torch.tensor([[width, height]] * count) if sizes is None else sizes
        return Scenes(torch.zeros(count, *self.shape, device=device), sizes, read)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return normalise(pixels, self.mean, self.std).contiguous(memory_format=torch.channels_last)

    def _build(self, pretrained: bool) -> nn.Module:
        channels, side = self.shape[0], self.patch_size[0]
        seen = (self.shape[1], self.shape[2]) if self.method == "whole" else (side, side)
        size = seen[0] if seen[0] == seen[1] else seen
        features = make_features(self.features, channels, size, pretrained=pretrained)
        width, outputs = width_of(features, channels, size), self.target.outputs
        if self.method == "whole":
            return WholeNet(features, nn.Linear(width, outputs))
        if self.method == "abmil":
            classifier = nn.Linear(width, outputs)
            return AbmilNet(features, classifier, dim=width, patch=side, shown=self.patches)
        attention = make_attention(
            self.attention, channels, self.maps, level=self.attention_level, pretrained=pretrained
        )
        return ZoomNet(
            attention,
            features,
            nn.Linear(width * self.maps * len(self.patch_size), outputs),
            patch=self.patch_size,
            budget=self.patches,
            smooth=self.smooth,
            replacement=self.replacement,
            control=self.control,
        )


def plan_of(config: ZoomTrainConfig, data: ZoomData) -> Plan:
    """The plan that a configuration and its data make.

    Raises:
        InputError: patches larger than an image.
    """
    least = min(int(part.sizes.min()) for part in (data.train, data.test))
    if config.method != "whole" and config.patch_size[0] > least:
        wanted = f"--patch-size of at most {least}, the least side of an image"
        raise InputError(wanted, f"{config.patch_size[0]}", "lower it, or leave small images out")
    names = {item.name for item in fields(Plan)} & {item.name for item in fields(ZoomTrainConfig)}
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    return Plan(**settings, shape=data.train.shape, mean=data.mean, std=data.std, target=data.target)


def plan_metadata(plan: Plan) -> dict[str, str]:
    """The plan as safetensors keeps it."""
    return {"format": "pt", "model": plan.method, "classes": "\n".join(plan.target.classes), _KEY: _dumped(plan)}


def load_plan(path: Path) -> tuple[Plan, Looking]:
    """Plan and model, in eval mode on the CPU, of a run folder or a weights file.

    Raises:
        InputError: it is none of `scrimp zoom train`, is not finished, or is damaged.
    """
    file = path.expanduser()
    file = file / WEIGHTS if file.is_dir() else file
    remedy = "pass a run folder of scrimp zoom train"
    if not file.is_file():
        raise InputError("a finished run of scrimp zoom train", f"{path} without {WEIGHTS}", remedy)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors' own error class has no stable home
        raise InputError("a whole .safetensors file", f"{file} ({error})", "copy it again") from error
    if _KEY not in metadata:
        raise InputError("weights of scrimp zoom train", f"{file} of another job", remedy)
    try:
        plan = _loaded(metadata[_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("weights that say what they are of", f"{file} ({error!r})", remedy) from error
    model = plan.build()
    if load_weights_(model, file):
        raise InputError("weights of this plan", f"others in {file}", remedy)
    return plan, cast(Looking, model.eval())


def _dumped(plan: Plan) -> str:
    return json.dumps(asdict(plan), sort_keys=True)


def _loaded(text: str) -> Plan:
    content = json.loads(text)
    target = content.pop("target")
    target = Target(**{**target, "classes": tuple(target["classes"])})
    lists = {name: tuple(value) for name, value in content.items() if isinstance(value, list)}
    return Plan(**{**content, **lists}, target=target)
