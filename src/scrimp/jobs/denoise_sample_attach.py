"""What a way attaches to a network for one trajectory: merged tokens, another attention, reuse between steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from scrimp.denoise.calibration import Calibration
from scrimp.denoise.merging import merge_tokens
from scrimp.denoise.reuse import Reuse, reuse
from scrimp.denoise.reuse_rules import Below, Every, below, every
from scrimp.jobs.denoise_models import routed
from scrimp.jobs.denoise_sample_config import NONE
from scrimp.jobs.denoise_sample_ways import Way
from scrimp.primitives.errors import InputError


@contextmanager
def attached(model: nn.Module, way: Way, attention: str, scale: Calibration | None) -> Iterator[Reuse | None]:
    """The network with what the way says, taken off again afterwards; yields the reuse, if there is one.

    Args:
        model: the network.
        way: what to attach.
        attention: softmax, linear or clustered.
        scale: of the error estimate.

    Raises:
        InputError: the network does not allow it.
    """
    with ExitStack() as stack:
        stack.enter_context(routed(attention, model))
        if way.merge:
            stack.callback(merge_tokens(model, way.merge).remove)
        handle = None
        if way.cache != NONE:
            handle = stack.enter_context(reuse(model, rule_of(way, scale), depth=way.depth, order=int(way.extrapolate)))
            handle.reset()
        yield handle


def rule_of(way: Way, scale: Calibration | None = None) -> Every | Below:
    """The refresh rule of a way that has a cache."""
    if way.every is not None:
        return every(way.every)
    if way.tolerance is None:
        raise InputError("a way with a cache", way.name, "give it one")
    return below(way.tolerance, scale=scale)


def counted(handle: Reuse | None, calls: int) -> tuple[int, int]:
    """Calls computed whole, and calls that reused."""
    if handle is None:
        return calls, 0
    full = sum(step.refreshed for step in handle.steps)
    return full, len(handle.steps) - full


def check_merge(model: nn.Module, share: float) -> None:
    """Refuse early to merge tokens of a network that does not allow it.

    Raises:
        InputError: it does not.
    """
    if share:
        merge_tokens(model, share).remove()


def why_not_reusable(model: nn.Module, depth: int) -> str | None:
    """Why its deep features cannot be reused; None: they can."""
    try:
        with reuse(model, every(1), depth=depth):
            return None
    except InputError as error:
        return str(error)
