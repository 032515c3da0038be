"""Vision transformers that spend less: loops over images and tokens as reference, the same network, all tokens, as
baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scrimp.adaptive import (
    Controller,
    gating_,
    image_costs,
    keep_tokens_,
    restore_,
    token_halting_,
    token_merging_,
    token_sampling_,
)
from scrimp.compare import adaptive_loops as loops
from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.primitives.draw import generator_for

Attach = Callable[..., Controller]
Loop = Callable[[Any, Tensor, Any], loops.Outcome]
_IMAGES, _SIDE, _PATCH = 3, 40, 8  # 25 patches: merging deals an odd number out in two
_TOLERANCE = 1e-9  # of float64
_TAU, _THRESHOLDS = 5.0, (0.5, 0.6)
BATCH = 4


def check_merging(*, seed: int = 0, attach: Attach = token_merging_) -> list[Finding]:
    """Hold token merging against edges found one by one and means of whole groups."""
    r = [5, 6, 0, 2]
    return _check(partial(attach, r=r), lambda model, image, _: loops.merging(model, image, r), seed)


def check_keeping(*, seed: int = 0, attach: Attach = keep_tokens_) -> list[Finding]:
    """Hold keeping, with and without the token that the dropped become, against sorted lists."""
    found = []
    for fuse in (True, False):
        way = partial(attach, ratio=0.6, blocks=(0, 2), fuse=fuse)
        loop = partial(loops.keeping, ratio=0.6, blocks=(0, 2), fuse=fuse)
        what = "fused: " if fuse else "dropped: "
        found += _check(way, lambda model, image, _, loop=loop: loop(model, image), seed, what)  # type: ignore[misc]
    return found


def check_sampling(*, seed: int = 0, attach: Attach = token_sampling_) -> list[Finding]:
    """Hold token sampling against the nearest of all values to each point of the grid."""
    way = partial(attach, samples=9, blocks=(0, 2), least=4)
    return _check(way, lambda model, image, _: loops.sampling(model, image, 9, (0, 2), least=4), seed)


def check_halting(*, seed: int = 0, attach: Attach = token_halting_) -> list[Finding]:
    """Hold token halting against scores added up token by token."""
    way = partial(attach, gate_scale=2.0, gate_center=1.5, eps=0.01)
    return _check(way, lambda model, image, _: loops.halting(model, image, 2.0, 1.5, eps=0.01), seed)


def check_gating(*, seed: int = 0, attach: Attach = gating_) -> list[Finding]:
    """Hold gating, straight-through gradients included, against products with gates of 0 and 1."""

    def loop(model: Any, image: Tensor, method: Any) -> loops.Outcome:
        return loops.gating(model, image, method.gates, tau=_TAU, thresholds=_THRESHOLDS)

    return _check(partial(attach, tau=_TAU, thresholds=_THRESHOLDS), loop, seed)


def sides_merging(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """16 pairs a block."""
    return _sides(partial(token_merging_, r=16), seed, device, repeats)


def sides_keeping(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """0.7 of the patches in each block but the first."""
    return _sides(partial(keep_tokens_, ratio=0.7, blocks=(1, 2, 3)), seed, device, repeats)


def sides_sampling(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """At most half of the patches from the second block on."""
    return _sides(partial(token_sampling_, samples=98, blocks=(1, 2, 3)), seed, device, repeats)


def sides_halting(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """Scores around a half: tokens halt from the second block on."""
    return _sides(partial(token_halting_, gate_scale=2.0, gate_center=0.0), seed, device, repeats)


def sides_gating(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """Gates drawn at random, about half of them open."""
    return _sides(gating_, seed, device, repeats)


@dataclass(frozen=True)
class _Seen:
    """What the method gave for some images: in the masked form, with gradients, and in the ragged one."""

    masked: Tensor
    ragged: Tensor
    slopes: list[Tensor]
    kept: Tensor
    costs: tuple[Tensor, Tensor]
    counted: int
    method: Any
    parameters: list[nn.Parameter]


def _check(attach: Attach, loop: Loop, seed: int, what: str = "") -> list[Finding]:
    model, images = network(seed, img_size=_SIDE, patch_size=_PATCH, embed_dim=32, depth=4, num_heads=2), _noise(seed)
    model, images = model.double(), images.double()
    plain, dense = _counted(model, images)
    seen = _seen(model, images, attach, seed)
    restored = float((_counted(model, images)[0] - plain).abs().max())
    outcomes = [loop(model, image, seen.method) for image in images]
    logits = torch.stack([logits for logits, _ in outcomes])
    masked, ragged = seen.costs
    return [
        at_most(f"{what}logits", _far(seen.masked, logits), _TOLERANCE),
        at_most(f"{what}gradients", _slopes_apart(seen, logits), _TOLERANCE),
        at_most(f"{what}places kept or not", _misplaced(seen.kept, [kept for _, kept in outcomes]), 0),
        at_most(f"{what}ragged form, output beside the masked", _far(seen.ragged, seen.masked), _TOLERANCE),
        at_most(f"{what}ragged form, FLOPs beside the masked", int((masked - ragged).abs().max()), 0),
        at_most(f"{what}ledger beside torch's counter, FLOPs", abs(int(ragged.sum()) - seen.counted), 0),
        at_most(f"{what}restored, output beside the first", restored, 0),
        at_most(f"{what}a budget's largest part spent", _spent(model, images, attach, 3 * dense // (5 * _IMAGES)), 1),
    ]


def _seen(model: nn.Module, images: Tensor, attach: Attach, seed: int) -> _Seen:
    control = attach(model)
    scatter(control, seed)
    control.form = "masked"
    masked = model(images)
    kept, costs = control.kept, control.costs
    parameters = [*control.parameters(), *model.blocks.parameters()]  # type: ignore[union-attr, operator]
    slopes = _slopes(masked, parameters)
    control.form = "ragged"
    ragged, counted = _counted(model, images)
    after = control.costs
    restore_(model)
    assert kept is not None
    assert costs is not None
    assert after is not None
    return _Seen(masked.detach(), ragged, slopes, kept, (costs, after), counted, control.method, parameters)


def network(seed: int, **options: Any) -> nn.Module:
    """An untrained ViT of which every part matters, in evaluation mode."""
    import timm

    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    generator = generator_for(seed, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + ("norm" in name and "w" in name))
    return model.eval()


def _noise(seed: int, images: int = _IMAGES, side: int = _SIDE) -> Tensor:
    """Images [images, 3, side, side] of unlike contrast, so that they need unlike numbers of tokens."""
    noise = torch.randn(images, 3, side, side, generator=generator_for(seed, 2))
    return noise * torch.linspace(0.2, 2, images)[:, None, None, None]


def scatter(control: Controller, seed: int) -> None:
    """Gates, if there are any, that differ by image, block, head and token; more are open than not."""
    generator = generator_for(seed, 3)
    with torch.no_grad():
        for parameter in control.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise + 2 * (parameter.ndim == 1))


def _counted(model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """Logits without gradients, and FLOPs by torch: attention written out, as its fused kernels have no formula."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        logits: Tensor = model(images)
    return logits, int(counter.get_total_flops())


def _slopes(logits: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of an uneven sum."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return list(torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True, materialize_grads=True))


def _slopes_apart(seen: _Seen, logits: Tensor) -> float:
    theirs = _slopes(logits, seen.parameters)
    return _far(torch.cat([part.flatten() for part in seen.slopes]), torch.cat([part.flatten() for part in theirs]))


def _far(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a part of the largest number."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def _misplaced(kept: Tensor, places: list[list[list[int]]]) -> int:
    """Entries of [images, blocks, tokens] that are not as listed."""
    wanted = torch.zeros_like(kept)
    for image, blocks in enumerate(places):
        for block, rows in enumerate(blocks):
            wanted[image, block, rows] = True
    return int((kept != wanted).sum())


def _spent(model: nn.Module, images: Tensor, attach: Attach, budget: int) -> float:
    """The most that an image costs of a budget, be it noise, blank or not a number."""
    hard = torch.cat([images, torch.zeros_like(images[:1]), torch.full_like(images[:1], torch.nan)])
    attach(model, max_flops=budget)
    most = int(image_costs(model, hard).max())
    restore_(model)
    return most / budget


def _sides(attach: Attach, seed: int, device: str, repeats: int) -> Sides:
    """Four blocks of width 192 on 197 tokens of four images: ragged, or all tokens. Untrained: costs, no accuracy."""
    model, images = network(seed, depth=4).to(device), _noise(seed, BATCH, 224).to(device)
    plain = copy.deepcopy(model)
    scatter(attach(model), seed)
    keep_tokens_(plain, 1.0, blocks=())
    costs = [float(image_costs(item, images).double().mean()) for item in (model, plain)]
    restore_(plain)
    return Sides(
        method=lambda: _run(model, images),
        baseline=lambda: _run(plain, images),
        quality={"flops_an_image": (costs[0], costs[1])},
        repeats=repeats,
    )


def _run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(images)
    return logits
