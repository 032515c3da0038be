"""When the deep part of a denoiser may answer with what it gave before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from scrimp.primitives.errors import InputError


@dataclass(frozen=True)
class Step:
    """One call of a model whose deep features are reused.

    Attributes:
        refreshed: whether all of it ran.
        estimate: estimated relative error of the output, had it been reused: [batch]; None where nothing was estimated,
            because the rule asks for no estimate or there was nothing to reuse.
    """

    refreshed: bool
    estimate: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The modules of one model that a reused step leaves out.

    Attributes:
        skipped: in the order they run. What the first is given is the shallow feature that a rule judges by; the last
            one's output is what later modules go on from.
        last_depth: the largest ``depth`` the model allows.
        residual: keep the last one's output less the first one's input, in place of the output.
        hidden: which entry of the last one's output that is, where the output is a tuple.
    """

    skipped: tuple[nn.Module, ...]
    last_depth: int
    residual: bool = False
    hidden: int = 0


class Rule(Protocol):
    """Decides, step by step, whether the deep features of the last refresh will do."""

    @property
    def measures(self) -> bool:
        """Whether it needs an estimate; measuring costs one pass over the shallow features."""

    def reuses(self, since: int, estimate: Tensor | None) -> bool:
        """Whether to reuse, ``since`` steps after the last refresh, at an estimated error of [batch]."""

    def factor(self, timestep: float | None) -> float:
        """What the relative change of the shallow features is multiplied by to estimate the output's relative error."""


@dataclass(frozen=True)
class Every:
    """See `every`."""

    steps: int
    scale: Callable[[float | None], float] | None = None

    @property
    def measures(self) -> bool:
        return self.scale is not None

    def reuses(self, since: int, estimate: Tensor | None) -> bool:
        return since < self.steps

    def factor(self, timestep: float | None) -> float:
        return 1.0 if self.scale is None else self.scale(timestep)


@dataclass(frozen=True)
class Below:
    """See `below`."""

    tolerance: float
    scale: Callable[[float | None], float] | None = None
    most: int | None = None

    @property
    def measures(self) -> bool:
        return True

    def reuses(self, since: int, estimate: Tensor | None) -> bool:
        if estimate is None or (self.most is not None and since > self.most):
            return False
        worst = float(estimate.max())
        if worst != worst:
            raise InputError(
                "finite features in the first blocks of the model",
                "NaN or infinite values",
                "check the input images, the weights and the precision (float16 overflows: use bfloat16 or float32)",
            )
        return worst <= self.tolerance

    def factor(self, timestep: float | None) -> float:
        return 1.0 if self.scale is None else self.scale(timestep)


def every(steps: int, *, scale: Callable[[float | None], float] | None = None) -> Every:
    """Refresh at every ``steps``-th step, as DeepCache does (Ma et al. 2024, arXiv:2312.00858); 1 never reuses.

    Args:
        steps: from one refresh to the next.
        scale: a `Calibration` of `calibrate`; with one, errors are estimated, though nothing is decided by them.

    Raises:
        InputError: fewer than 1.
    """
    if steps < 1:
        raise InputError("a refresh every 1 or more steps", repr(steps), "1 is the plain model")
    return Every(int(steps), scale)


def below(tolerance: float, *, scale: Callable[[float | None], float] | None = None, most: int | None = None) -> Below:
    """Refresh as soon as the estimated relative error of any sample's output exceeds a tolerance.

    The estimate is the relative change (L1) of the shallow features since the last refresh, which always run, times
    ``scale``. Without a scale it is a figure to compare steps by and bounds nothing.

    Args:
        tolerance: the largest estimate at which features are reused; 0 never reuses.
        scale: a `Calibration` of `calibrate`; it makes the estimate a bound for most samples.
        most: most steps in a row that may reuse; None: as long as the estimate allows.

    Raises:
        InputError: a negative or NaN tolerance, or ``most`` under 0.
    """
    if not tolerance >= 0:
        raise InputError("a tolerance of 0 or more", repr(tolerance), "0.1 allows an error of a tenth of the output")
    if most is not None and most < 0:
        raise InputError("0 or more steps in a row", repr(most), "0 never reuses")
    return Below(float(tolerance), scale, most)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """Mean absolute change over the mean absolute value before, by sample.

    Args:
        now, before: [batch, ...] of one shape.

    Returns:
        [batch], float32 at least; where all was zero before, 0 without a change and infinity with one.
    """
    return _over(_norm(now - before, 1), _norm(before, 1))


def relative_error(output: Tensor, reference: Tensor) -> Tensor:
    """Root-mean-square difference from a reference over the root mean square of the reference, by sample: [batch]."""
    return _over(_norm(output - reference, 2), _norm(reference, 2))


def _norm(values: Tensor, order: int) -> Tensor:
    """By sample, summed in float32 at least: sums of half-precision numbers overflow."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values.flatten(1), ord=order, dim=1, dtype=dtype)


def _over(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where((part == 0) & (whole == 0), torch.zeros_like(part), part / whole)
