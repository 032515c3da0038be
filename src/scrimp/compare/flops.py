"""The FLOP counter: a vision transformer's dimensions as the reference, torch's own counter as the baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.meter import Reading, count_flops

_MODEL = "vit_tiny_patch16_224"


def check(*, seed: int = 0, count: Callable[[Callable[[], Any]], Reading] = count_flops) -> list[Finding]:
    """Hold the count of ViT-Ti/16 at 224 pixels, forward and backward, against the products in its dimensions."""
    model, (forward, both) = _model(), _products()
    counted, trained = count(lambda: _infer(model)), count(lambda: _train(model))
    return [
        at_most("forward, relative error", _error(counted, forward), 1e-3),
        at_most("forward and backward, relative error", _error(trained, both), 1e-3),
        at_most("operators missed", len(counted.missed) + len(trained.missed), 0),
    ]


def sides(*, seed: int = 0, device: str = "cpu", repeats: int = 5) -> Sides:
    """Count a training step of one image by this library's counter, and by torch's as it comes.

    On the CPU torch's has no formula for the fused attention kernel.
    """
    model, (_, both) = _model().to(device), _products()
    return Sides(
        method=lambda: count_flops(lambda: _train(model)),
        baseline=lambda: _by_torch(model),
        quality={"share_counted": ((count_flops(lambda: _train(model)).value or 0.0) / both, _by_torch(model) / both)},
        repeats=repeats,
    )


def _model() -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):
        model: nn.Module = timm.create_model(_MODEL)
    return model


def _infer(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))


def _train(model: nn.Module) -> None:
    device = next(model.parameters()).device
    logits = model(torch.zeros(1, 3, 224, 224, device=device))
    functional.cross_entropy(logits, torch.tensor([0], device=device)).backward()


def _by_torch(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        _train(model)
    return int(counter.get_total_flops())


def _products() -> tuple[int, int]:
    """FLOPs of the matrix products of one image: forward, and forward with backward.

    Dimensions of ViT-Ti/16 (Touvron et al., ICML 2021, table 1): 12 blocks of width 192 with 3 heads over 14 x 14
    patches and a class token. Each product has two more for its gradients, but nobody asks for the image's.
    """
    width, blocks, heads, hidden, classes = 192, 12, 3, 4 * 192, 1000
    patches, tokens, head_width = 14 * 14, 14 * 14 + 1, 192 // 3
    attention = heads * 2 * tokens * tokens * head_width  # q k^T and a v
    block = tokens * width * 3 * width + attention + tokens * width * width + 2 * tokens * width * hidden
    embedding, rest = 2 * patches * 3 * 16 * 16 * width, 2 * (blocks * block + width * classes)
    return embedding + rest, 2 * embedding + 3 * rest


def _error(counted: Reading, exact: int) -> float:
    return float("nan") if counted.value is None else abs(counted.value - exact) / exact
