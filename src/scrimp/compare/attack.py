"""The patch that raises what adaptive models spend: slopes by finite differences, pixels and optimiser by hand as
reference; a random patch of the same size as baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adaptive import gating_, token_halting_, token_sampling_
from scrimp.attack import (
    AdaptiveVictim,
    Patch,
    attack_success,
    attention,
    ponder,
    random_patch,
    scores,
    significance,
    universal_patch,
    usage,
    victim_of,
)
from scrimp.compare.adaptive import network, scatter
from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.primitives.draw import generator_for

Make = Callable[..., Patch]
Show = Callable[..., Tensor]
Target = Callable[..., AdaptiveVictim]
_SIDE, _IMAGES, _SIZE = 40, 3, (6, 7)
_STEPS, _RATE = 30, 0.3 / 255
_STEP, _SLOPES, _TOLERANCE = 1e-6, 1e-5, 1e-9  # of finite differences; of what they may be apart; of float64
_MEAN, _STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
_NORMS: dict[str, Any] = {"mean": _MEAN, "std": _STD}


def check(
    *, seed: int = 0, make: Make = universal_patch, show: Show = Patch.on, target: Target = victim_of
) -> list[Finding]:
    """Hold losses, counts, pasting and the making of patches against what is computed one number at a time."""
    models = {kind: _model(kind, seed) for kind in ("halting", "sampling", "gating")}
    return [
        *_slopes(models, seed, target),
        at_most(
            "gating: loss beside gates counted one by one", _usage_apart(models["gating"], seed, target), _TOLERANCE
        ),
        at_most("FLOPs of attacked images, masked beside ragged", _forms_apart(models, seed, target, show), 0),
        *_pasted(seed, show),
        *_made(seed, make),
        at_most("loss of the patch kept above the lowest seen", _excess(models["halting"], seed, make), _TOLERANCE),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 50, repeats: int = 5) -> Sides:
    """A patch on 8 % of 16 images, made in ``steps``, or drawn; what each undoes of the saving on 16 others."""
    model = network(seed, img_size=64, patch_size=8, embed_dim=64, depth=4, num_heads=2).to(device)
    token_halting_(model, gate_scale=4.0, gate_center=0.0)
    victim, (seen, fresh) = victim_of(model), _pixels(seed, 32, 64).float().to(device).split(16)

    def made() -> Patch:
        return universal_patch(victim, seen, size=18, steps=steps, generator=generator_for(seed, 5))

    def drawn() -> Patch:
        return random_patch(seen, size=18, generator=generator_for(seed, 5))

    clean = victim.cost(fresh)
    ours, theirs = (attack_success(victim.cost(one.on(fresh)), clean, victim.full) for one in (made(), drawn()))
    return Sides(method=made, baseline=drawn, quality={"attack_success": (ours, theirs)}, repeats=repeats)


def _pixels(seed: int, images: int, side: int) -> Tensor:
    """Images [images, 3, side, side] on the 256 levels, of unlike contrast, float64."""
    noise = torch.rand(images, 3, side, side, generator=generator_for(seed, 2), dtype=torch.float64)
    contrast = torch.linspace(0.2, 1, images, dtype=torch.float64)[:, None, None, None]
    return ((0.5 + (noise - 0.5) * contrast) * 255).round() / 255


def _model(kind: str, seed: int) -> nn.Module:
    """A small network of normalised images, float64, that spends unlike amounts on unlike images."""
    model = network(seed, img_size=_SIDE, patch_size=8, embed_dim=32, depth=3, num_heads=2).double()
    if kind == "halting":
        token_halting_(model, gate_scale=4.0, gate_center=1.5)
    elif kind == "sampling":
        token_sampling_(model, 9, blocks=(1, 2), least=4)
    else:
        scatter(gating_(model), seed)
    return model


def _slopes(models: dict[str, nn.Module], seed: int, target: Target) -> list[Finding]:
    """Each loss's gradient along a direction of pixels, beside its central difference."""
    found, way = [], torch.randn(_IMAGES, 3, _SIDE, _SIDE, generator=generator_for(seed, 4), dtype=torch.float64)
    for kind, loss in (("halting", ponder), ("halting", scores), ("sampling", attention), ("sampling", significance)):
        victim, images = target(models[kind], surrogate=loss, **_NORMS), _pixels(seed, _IMAGES, _SIDE).requires_grad_()
        (slope,) = torch.autograd.grad(victim.policy_loss(images).sum(), images)
        with torch.no_grad():
            up, down = (victim.policy_loss(images + step * way) for step in (_STEP, -_STEP))
        differences = (up - down) / (2 * _STEP)
        slopes = (slope * way).sum((1, 2, 3))
        apart = float((slopes - differences).abs().max() / differences.abs().max())
        found.append(at_most(f"{kind}, {loss.__name__}: gradients beside differences", apart, _SLOPES))
    return found


def _usage_apart(model: nn.Module, seed: int, target: Target) -> float:
    victim, images = target(model, surrogate=usage, **_NORMS), _pixels(seed, _IMAGES, _SIDE)
    given = victim.policy_loss(images).tolist()
    run = victim.controller.run
    assert run is not None
    apart = 0.0
    for image, loss in enumerate(given):
        kinds: list[list[bool]] = [[], [], []]
        for decision in run.memory["decisions"]:
            kinds[0] += decision.tokens[image, run.host.prefix :].tolist()
            kinds[1] += decision.heads[image].tolist()
            kinds[2] += decision.layers[image].tolist()
        apart = max(apart, abs(loss + sum((sum(gates) / len(gates)) ** 2 for gates in kinds)))
    return apart


def _forms_apart(models: dict[str, nn.Module], seed: int, target: Target, show: Show) -> int:
    patch = random_patch(_pixels(seed, 1, _SIDE), size=_SIZE, generator=generator_for(seed, 6))
    images, most = show(patch, _pixels(seed, _IMAGES, _SIDE)), 0
    for model in models.values():
        victim, counts = target(model, **_NORMS), []
        for form in ("masked", "ragged"):
            victim.controller.form = form  # type: ignore[assignment]
            counts.append(victim.cost(images))
        victim.controller.form = "auto"
        most = max(most, int((counts[0] - counts[1]).abs().max()))
    return most


def _pasted(seed: int, show: Show) -> list[Finding]:
    """On images normalised already, off the corner."""
    images, (top, left) = _pixels(seed, 2, 12), (3, 5)
    patch = random_patch(images, size=_SIZE, generator=generator_for(seed, 6), place=(top, left))
    shift, scale = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (_MEAN, _STD))
    given = (images - shift) / scale
    wanted = given.clone()
    for image in wanted:
        for channel in range(3):
            for row in range(_SIZE[0]):
                for column in range(_SIZE[1]):
                    pixel = float(patch.pixels[channel, row, column])
                    image[channel, top + row, left + column] = (pixel - _MEAN[channel]) / _STD[channel]
    before = given.clone()
    shown = show(patch, given, **_NORMS)
    return [
        at_most("pasted, beside one pixel after another", float((shown - wanted).abs().max()), _TOLERANCE),
        at_most("pasting, change of the caller's images", float((given - before).abs().max()), 0),
    ]


class _Bowl:
    """A victim whose loss is the squared distance of the corner's pixels from ``goal`` [channels, h, w]."""

    full, ceiling = 1, None

    def __init__(self, goal: Tensor) -> None:
        self.model, self.goal = nn.Identity(), goal

    def cost(self, images: Tensor) -> Tensor:
        return torch.ones(len(images), dtype=torch.int64)

    def policy_loss(self, images: Tensor) -> Tensor:
        corner = images[:, :, : self.goal.shape[1], : self.goal.shape[2]]
        return (corner - self.goal).square().sum((1, 2, 3))

    def logits(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def _made(seed: int, make: Make) -> list[Finding]:
    """Where the goal lies 0.4 of a level above one pixel and below the next, no side is to be preferred."""
    images = _pixels(seed, 3, 12)
    first = random_patch(images, size=_SIZE, generator=generator_for(seed, 7)).pixels
    signs = 1 - 2 * (torch.arange(first.numel(), dtype=torch.float64) % 2).view_as(first)
    goals = first + 0.4 * signs / 255
    options: dict[str, Any] = {"size": _SIZE, "steps": _STEPS, "lr": _RATE, "batch": 2}  # a batch: the last is kept
    pixels = make(_Bowl(goals), images, generator=generator_for(seed, 7), **options).pixels
    pairs = zip(first.flatten().tolist(), goals.flatten().tolist(), strict=True)
    wanted = torch.tensor([_by_hand(start, goal) for start, goal in pairs], dtype=torch.float64).view_as(first)
    levels = pixels * 255
    return [
        at_most("made, beside AdamW one pixel at a time, levels", float((levels - wanted).abs().max()), _TOLERANCE),
        at_most("made, off the 256 levels", float((levels - levels.round()).abs().max()), _TOLERANCE),
        at_most("made, mean drift of pixels in levels", abs(float((levels - first * 255).mean())), 0.05),
    ]


def _by_hand(start: float, goal: float) -> float:
    """The level that one pixel ends on: the copy between the levels is moved by the slope at its nearest level."""
    pixel, mean, square = start, 0.0, 0.0
    for step in range(1, _STEPS + 1):
        slope = 2 * (round(pixel * 255) / 255 - goal)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope * slope
        size = math.sqrt(square / (1 - 0.999**step)) + 1e-8
        pixel = min(max(pixel - _RATE * mean / (1 - 0.9**step) / size, 0.0), 1.0)
    return float(round(pixel * 255))


def _excess(model: nn.Module, seed: int, make: Make) -> float:
    victim, images = victim_of(model, **_NORMS), _pixels(seed, _IMAGES, _SIDE)
    patch = make(victim, images, size=12, steps=6, lr=0.5, generator=generator_for(seed, 8))
    with torch.no_grad():
        return float(victim.policy_loss(patch.on(images)).mean()) - min(patch.trace)
