"""A way to sample, and what a batch sampled by it cost: the words that all parts of `scrimp denoise sample` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from scrimp.denoise.calibration import Calibration
from scrimp.denoise.solvers import SOLVERS, calls
from scrimp.jobs.denoise_sample_config import NONE, DenoiseSampleConfig, parse_cache
from scrimp.meter import Reading
from scrimp.primitives.errors import InputError


@dataclass(frozen=True)
class Way:
    """Solver, steps and what makes a step cheaper; by default nothing does.

    Attributes:
        solver: key of `scrimp.denoise.solvers.SOLVERS`.
        steps: of the solver.
        cache: ``none``, ``every:N``, or the tolerance as text.
        merge: share of the tokens merged before each self-attention.
        attention: softmax, linear or clustered; None: the model's own.
        depth: how much runs always, see `scrimp.denoise.reuse`.
        extrapolate: reuse features from the line through the last two refreshes; without a cache it means nothing.
    """

    solver: str
    steps: int
    cache: str = NONE
    merge: float = 0.0
    attention: str | None = None
    depth: int = 1
    extrapolate: bool = False

    @property
    def name(self) -> str:
        """Such as ``dpm++, 15 steps, extrapolate 0.1, merge 25 %``."""
        said = [self.solver, f"{self.steps} step{'s' * (self.steps > 1)}"]
        if self.cache != NONE:
            kind = "extrapolate" if self.extrapolate else "reuse"
            said += [f"{kind} {self.cache}" + (f" depth {self.depth}" if self.depth > 1 else "")]
        said += [f"merge {100 * self.merge:.3g} %"] if self.merge else []
        said += [f"{self.attention} attention"] if self.attention else []
        return ", ".join(said)

    @property
    def nfe(self) -> int:
        """Network calls an image, reused ones included."""
        return calls(self.solver, self.steps)

    @property
    def every(self) -> int | None:
        """N of a refresh at every N-th call; None: no such rule."""
        parsed = parse_cache(self.cache)
        return parsed if isinstance(parsed, int) else None

    @property
    def tolerance(self) -> float | None:
        """Of the estimated error; None: no such rule."""
        parsed = parse_cache(self.cache)
        return parsed if isinstance(parsed, float) else None

    @property
    def plain(self) -> Way:
        """The same solver and steps with nothing that makes a step cheaper."""
        return Way(self.solver, self.steps)

    def with_cache(self, cache: str) -> Way:
        return replace(self, cache=cache, extrapolate=self.extrapolate and cache != NONE)


@dataclass(frozen=True)
class Drawn:
    """Images [batch, channels, height, width] in [-1, 1], float32 on the CPU, and the network's calls behind them."""

    images: Tensor
    full: int
    reused: int = 0


@dataclass(frozen=True)
class CallCost:
    """FLOPs of one call for one image: with every block computed, and with the deep features reused."""

    full: Reading
    reused: Reading

    def of(self, full: int, reused: int, images: int) -> Reading:
        """FLOPs of so many calls of each kind, for each of so many images."""
        if self.full.value is None or (reused and self.reused.value is None):
            return Reading(None, self.full.how, self.full.missed)
        value = full * self.full.value + (reused * self.reused.value if reused and self.reused.value else 0)
        missed = tuple(sorted({*self.full.missed, *self.reused.missed}))
        how = "one call of each kind counted by torch operator, times the calls made; 1 multiply-add = 2 FLOPs"
        return Reading(images * value, f"{how}; lower bound" if missed else how, missed)


class Subject(Protocol):
    """A model that can be sampled, of whatever kind."""

    name: str
    kind: str
    prediction: str
    reusable: bool
    """Whether its deep features can be reused between steps."""
    network: nn.Module
    scale: Calibration | None
    """Of the error estimate of error-controlled caches; None: it is the plain change of the shallow features."""

    def sample(self, way: Way, numbers: range, each: Callable[[], None] = ...) -> Drawn:
        """Images of these numbers; the noise of each depends on its number and the seed alone.

        Raises:
            InputError: a way that does not fit the model, or outputs that are not finite.
        """
        ...

    def call_cost(self, way: Way) -> CallCost:
        """FLOPs of a call for one image."""
        ...

    def solvers(self) -> tuple[str, ...]:
        """Those worth trying, the plain one last."""
        ...

    def notes(self) -> dict[str, Any]:
        """What the receipt says of it."""
        ...


def fitting_solvers(prediction: str) -> tuple[str, ...]:
    """Those worth trying for models of this prediction: of higher order first, none that draws noise on the way."""
    return ("dpm++", "unipc", "heun", "euler") if prediction == "flow" else ("dpm++", "unipc", "deis", "ddim")


def check_solver(name: str, prediction: str) -> None:
    """Refuse a solver that is unknown or of the other kind of model.

    Raises:
        InputError: naming those that fit.
    """
    field = "flow" if prediction == "flow" else "betas"
    fitting = [solver.name for solver in SOLVERS.values() if getattr(solver, field) is not None]
    if name not in fitting:
        raise InputError(f"a solver for a model of {prediction} prediction", repr(name), f"use {', '.join(fitting)}")


def asked_way(config: DenoiseSampleConfig, solver: str, steps: int, cache: str) -> Way:
    """A way with the merging and attention of the configuration."""
    extrapolate = config.extrapolate and cache != NONE
    return Way(solver, steps, cache, config.merge, config.attention, config.depth, extrapolate)
