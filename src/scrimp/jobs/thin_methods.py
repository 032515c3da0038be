"""The settings that `scrimp thin` tries: each attaches a method, and says what its training adds to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scrimp.adaptive import (
    Controller,
    depth_prior_loss,
    gating_,
    image_costs,
    keep_tokens_,
    ponder_loss,
    restore_,
    token_halting_,
    token_merging_,
    token_sampling_,
    usage_loss,
)
from scrimp.jobs.thin_config import VALUES, ThinConfig
from scrimp.jobs.thin_models import ThinSubject

DENSE = "dense"
"""The way that keeps all tokens."""
_MERGED = (4 / 196, 8 / 196, 13 / 196, 16 / 196)  # pairs a block, as a share of the patches, of twelve blocks
_LEAST = 8  # patches that ats leaves to every image, where that many are asked for
_PRIOR = 1e-3  # weight of the depth prior, as published


@dataclass(frozen=True)
class Build:
    """What the settings are made for.

    Attributes:
        patches: tokens of an image, the prefix left out; ``prefix`` those.
        grid: rows and columns of the patches, where they make such.
        depth: blocks.
        flops: of an image with all tokens.
    """

    patches: int
    prefix: int
    grid: tuple[int, int] | None
    depth: int
    flops: int


@dataclass(frozen=True)
class Setting:
    """One way of leaving tokens out.

    Attributes:
        way: what receipts call it.
        options: of the method, as receipts and weights files keep them.
    """

    way: str
    options: dict[str, Any]

    def attach_(self, model: nn.Module, subject: ThinSubject, config: ThinConfig, *, seed: int = 0) -> Controller:
        """Put the method on a model in place; ``seed`` is of what it draws while it trains.

        Raises:
            InputError: a model of another build, settings that do not fit it, or a budget that cannot be kept.
        """
        limits = {"max_flops": config.max_flops, "max_tokens": config.max_tokens, "example": subject.example()}
        return _ATTACH[self.options["method"]](model, {**self.options, "seed": seed}, limits)

    def penalty(self, controller: Controller) -> Tensor | None:
        """What is added to the loss of the forward just made, a scalar; ``None`` for nothing."""
        if self.options["method"] == "avit":
            prior = depth_prior_loss(controller, depth=self.options["depth"])
            return self.options["ponder"] * ponder_loss(controller) + _PRIOR * prior
        if self.options["method"] == "adavit":
            return usage_loss(controller, (self.options["usage"],) * 3)
        return None


def build_of(subject: ThinSubject) -> Build:
    """What a model is like, by attaching to it what changes nothing.

    Raises:
        InputError: a model that no method can be attached to.
    """
    model, example = subject.build(), subject.example()
    controller = token_merging_(model, 0, example=example)
    cost = int(image_costs(model, example)[0])
    restore_(model)
    host = controller.host
    patches = host.tokens - host.prefix
    return Build(patches, host.prefix, _grid(model, patches), len(host.blocks), cost)


def settings_of(config: ThinConfig, build: Build) -> list[Setting]:
    """The settings asked for; else one where there is training, or a ladder."""
    values = config.values or _usual(config, build)
    found = []
    for value in values:
        options: dict[str, Any] = {"method": config.method, VALUES[config.method]: value}
        if config.method in ("keep", "ats"):
            options["blocks"] = list(config.blocks) or _usual_blocks(config.method, build.depth)
        if config.method == "avit":
            options |= {"gate_scale": config.gate_scale, "gate_center": config.gate_center, "depth": config.depth}
        found.append(Setting(f"{config.method}-{value:g}", options))
    return found


def _usual(config: ThinConfig, build: Build) -> list[float]:
    ladders: dict[str, list[float]] = {
        "tome": [max(1, round(share * build.patches * 12 / build.depth)) for share in _MERGED],
        "keep": [0.9, 0.7, 0.5],
        "ats": [max(1, math.ceil(share * build.patches)) for share in (1, 0.75, 0.5, 0.25)],
        "avit": [5e-4],
        "adavit": [0.5],
    }
    ladder = list(dict.fromkeys(ladders[config.method]))
    best = {"tome": -2, "keep": 1, "ats": 0}.get(config.method, 0)
    return [ladder[best if len(ladder) > 2 else 0]] if config.trains else ladder


def _usual_blocks(method: str, depth: int) -> list[int]:
    if method == "ats":
        return list(range(depth // 4, depth))
    return sorted({quarter * depth // 4 for quarter in (1, 2, 3)})


def _grid(model: nn.Module, patches: int) -> tuple[int, int] | None:
    told = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if told is not None and math.prod(told) == patches:
        return int(told[0]), int(told[1])
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def _tome(model: nn.Module, options: dict[str, Any], limits: dict[str, Any]) -> Controller:
    return token_merging_(model, options["r"], **limits)


def _keep(model: nn.Module, options: dict[str, Any], limits: dict[str, Any]) -> Controller:
    return keep_tokens_(model, options["ratio"], blocks=options["blocks"], **limits)


def _ats(model: nn.Module, options: dict[str, Any], limits: dict[str, Any]) -> Controller:
    samples = options["samples"]
    return token_sampling_(model, samples, blocks=options["blocks"], least=min(_LEAST, samples), **limits)


def _avit(model: nn.Module, options: dict[str, Any], limits: dict[str, Any]) -> Controller:
    scale, center = options["gate_scale"], options["gate_center"]
    return token_halting_(model, gate_scale=scale, gate_center=center, **limits)


def _adavit(model: nn.Module, options: dict[str, Any], limits: dict[str, Any]) -> Controller:
    return gating_(model, seed=options["seed"], **limits)


_ATTACH: dict[str, Callable[[nn.Module, dict[str, Any], dict[str, Any]], Controller]] = {
    "tome": _tome,
    "keep": _keep,
    "ats": _ats,
    "avit": _avit,
    "adavit": _adavit,
}


def gates_of(controller: Controller) -> nn.Module | None:
    """What a method learns itself; ``None`` for methods without."""
    found = getattr(controller.method, "gates", None)
    return found if isinstance(found, nn.Module) else None
