"""Budgets in FLOPs: what a step costs by count, and how many FLOPs fit in the minutes a person has."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.meter import count_flops
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError


@dataclass(frozen=True)
class StepCost:
    """Counted FLOPs of one image, and the operations the counter could not see.

    Attributes:
        train: forward and backward.
        score: forward alone, without gradient.
        missed: names of operations neither counted nor negligible.
    """

    train: float
    score: float
    missed: tuple[str, ...] = ()


def count_step(model: nn.Module, images: Tensor, labels: Tensor) -> StepCost:
    """Count one training step and one scoring pass on a copy of ``model``, which stays untouched.

    Args:
        images: [batch, channels, height, width], as the model takes them.
        labels: [batch], class indices.
    """
    twin = copy.deepcopy(model)
    with torch.random.fork_rng(_cuda_devices(images)):
        trained = count_flops(lambda: functional.cross_entropy(twin.train()(images), labels).backward())
        with torch.no_grad():
            scored = count_flops(lambda: twin.eval()(images))
    if trained.value is None or scored.value is None:
        raise InputError("a model whose FLOPs can be counted", type(model).__name__, "choose another --model")
    return StepCost(trained.value / len(images), scored.value / len(images), trained.missed)


def seconds_a_step(step: Callable[[], object], *, repeats: int = 12) -> float:
    """Median wall seconds of ``step()`` after three unmeasured calls."""
    times = []
    for turn in range(repeats + 3):
        begin = time.perf_counter()
        step()
        synchronise()
        if turn >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def time_step(model: nn.Module, images: Tensor, labels: Tensor, *, shown: Tensor) -> tuple[float, float]:
    """Wall seconds of a training step on ``images`` and of an evaluation of ``shown``, on a copy of ``model``."""
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(twin(images), labels).backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            twin(shown)

    with torch.random.fork_rng(_cuda_devices(images)):
        return seconds_a_step(train), seconds_a_step(evaluate)


def flops_in(seconds: float, batch_flops: float, *, train_seconds: float, extra_seconds: float) -> float:
    """FLOPs of training that fit in ``seconds`` of one run.

    Args:
        seconds: wall time of the whole run.
        batch_flops: counted FLOPs of one training step.
        train_seconds: wall time of one training step.
        extra_seconds: wall time of everything else, such as evaluation.

    Raises:
        InputError: not even ten steps fit.
    """
    steps = math.floor((seconds - extra_seconds) / train_seconds)
    if steps < 10:
        raise InputError(
            f"a budget of at least {10 * train_seconds + extra_seconds:.0f} seconds a run for this model",
            f"{seconds:.0f}",
            "raise --minutes, lower --seeds, or choose a smaller --model",
        )
    return steps * batch_flops


def checked_budget(flops: float, batch_flops: float) -> float:
    """``flops``, if it pays for one training step at least.

    Raises:
        InputError: it does not.
    """
    if not flops >= batch_flops:
        raise InputError(f"a budget of at least one step, {batch_flops:.3g} FLOPs", f"{flops:.3g}", "raise the budget")
    return flops


def _cuda_devices(images: Tensor) -> list[int]:
    return [images.device.index or 0] if images.is_cuda else []
