"""What `attack_runs.py` attacks: a packaged ViT-S/14 under a classifier of CIFAR-10."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from scrimp.adaptive import token_halting_, token_sampling_
from scrimp.attack import AdaptiveVictim, victim_of
from scrimp.data import ImageData, TensorImages, load_images, normalise
from scrimp.jobs.folder import CONFIG, RECEIPT, WEIGHTS
from scrimp.jobs.thin import thin
from scrimp.jobs.thin_config import ThinConfig
from scrimp.primitives.draw import generator_for
from scrimp.represent.knn import unit_rows
from scrimp.represent.linear import LinearProbe, fit_linear_probe

SIDE, LABELLED, SHOWN = 98, 2000, 500  # pixels; training images of a seed; test images of all
L2 = 30.0  # of the classifier, as in adaptive_accuracy.py
HALTING: dict[str, Any] = {"gate_scale": 10.0, "gate_center": 2.0}
"""Scores of this model's first number start at about an eighth."""
TUNING: dict[str, Any] = {
    "method": "avit",
    "ponder": (5e-4,),
    "epochs": 1,
    "lr": 3e-5,
    "batch_size": 32,
    "baseline": "given",
    "repeats": 0,
    "pictures": 0,
    "evaluations": 1,
    "probe": 64,
    "precision": "fp32",
    "device": "cpu",
    "json": True,
}
_ROWS = 50


@dataclass(frozen=True, eq=False)
class Budgeted(AdaptiveVictim):
    """A victim that can be had with a hard budget too.

    Attributes:
        kind: ``avit`` or ``ats``; ``bare``: the network without it.
    """

    kind: str = "ats"
    bare: nn.Module | None = None

    def capped(self, max_flops: int) -> AdaptiveVictim:
        assert self.bare is not None
        return _attached(self.bare, self.kind, max_flops)


class Large:
    """The packaged transformer under the classifier of a seed.

    Args:
        seed: draws the labelled images and their order.
        home: folder of the fine-tuning, which is done once.
    """

    def __init__(self, seed: int, home: Path) -> None:
        self.seed, self.home = seed, home
        self.data = images_of(seed)

    def victim(self, method: str) -> dict[str, Any]:
        """What `scrimp.jobs.audit.audit` is to be given beside the configuration."""
        bare = classifier(self.data)
        if method == "avit":
            self._tune(bare)
        found = _attached(bare, method, None)
        return {"victim": Budgeted(**vars(found), kind=method, bare=bare), "data": self.data}

    def _tune(self, bare: nn.Module) -> None:
        out = self.home / "avit-training"
        way = out / f"avit-{TUNING['ponder'][0]:g}"
        if not (way / RECEIPT).is_file():
            settings = {**TUNING, **HALTING, "seed": self.seed, "size": SIDE}
            config = ThinConfig(model="vit-s14", data="cifar10", out=out, resume=(out / CONFIG).is_file(), **settings)
            thin(config, model=bare, data=self.data)
        bare.load_state_dict(load_file(way / WEIGHTS))


def _attached(bare: nn.Module, method: str, max_flops: int | None) -> AdaptiveVictim:
    model, limits = copy.deepcopy(bare), {"max_flops": max_flops, "example": torch.zeros(2, 3, SIDE, SIDE)}
    if method == "avit":
        token_halting_(model, **HALTING, **limits)
    else:
        token_sampling_(model, **limits)
    from pretrained.saliency import MEAN, STD

    return victim_of(model, mean=MEAN, std=STD)


class Head(nn.Module):
    """A `LinearProbe` as a module: features [n, dim] to logits [n, classes]."""

    def __init__(self, probe: LinearProbe) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, len(probe.mean), len(probe.bias))
        scale = probe.std.reciprocal()
        weight = (probe.weight.to(scale.dtype) * scale).float()
        self.linear.weight.data.copy_(weight)
        self.linear.bias.data.copy_((probe.bias - weight.double() @ probe.mean.double()).float())

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(unit_rows(features))
        return logits


def images_of(seed: int) -> ImageData:
    """The labelled images of a seed, and the test images of all seeds, enlarged; normalised as the model takes them."""
    from pretrained.saliency import MEAN, STD

    whole = load_images("cifar10")
    train = _enlarged(whole.train, LABELLED, generator_for(3, seed))
    return replace(whole, train=train, test=_enlarged(whole.test, SHOWN, generator_for(2)), mean=MEAN, std=STD)


@torch.no_grad()
def classifier(data: ImageData) -> nn.Module:
    """The packaged transformer, frozen, with a linear classifier fitted to its features of the labelled images."""
    from pretrained.saliency import load_saliency

    model: Any = load_saliency().backbone
    features = []
    for rows in torch.arange(len(data.train)).split(_ROWS):
        with torch.autocast("cpu", torch.bfloat16):
            features.append(model(normalise(data.train.batch(rows), data.mean, data.std)).float())
    probe = fit_linear_probe(torch.cat(features), data.train.labels, classes=len(data.classes), l2=L2)
    model.head = Head(probe)
    model.num_classes = len(data.classes)
    return model.requires_grad_(True).eval()


def _enlarged(images: Any, count: int, generator: torch.Generator) -> TensorImages:
    rows = torch.randperm(len(images), generator=generator)[:count]
    parts = []
    for part in rows.split(500):
        wide = functional.interpolate(images.batch(part).float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        parts.append(wide.round().clamp(0, 255).to(torch.uint8))
    return TensorImages(torch.cat(parts), images.labels[rows])
