"""Settings tried out on a few images: the reference samples, the baseline, and the search for the cheapest way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from scrimp.denoise.quality import paired_error
from scrimp.denoise.solvers import baseline
from scrimp.jobs.denoise_sample_config import AUTO, NONE, DenoiseSampleConfig
from scrimp.jobs.denoise_sample_ways import CallCost, Subject, Way, asked_way
from scrimp.meter.device import synchronise
from scrimp.primitives.errors import InputError

LADDER = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 25, 30, 40, 50)
"""Steps that are tried, few to many."""
CACHES = ("every:3", "every:2", "0.4", "0.3", "0.2", "0.15", "0.1")
"""Refresh rules that are tried, from cheap to dear of either kind."""
_FAR = 1.5  # a solver whose error is so many times the best one's of as many calls is not followed further
_FURTHER = 4  # steps of the ladder, above those the solver needs, that are tried with a cache


@dataclass(frozen=True)
class Trial:
    """What one way gave and cost on the pilot's images.

    Attributes:
        error: mean paired error to the reference samples; None: it gave none, see ``note``.
        full, reused: network calls of each kind.
        flops: of one image; None: not counted.
        seconds, cpu_seconds: of all pilot images.
    """

    way: Way
    error: float | None
    full: int
    reused: int
    flops: float | None
    seconds: float
    cpu_seconds: float
    note: str = ""

    @property
    def price(self) -> float:
        """What ways are ranked by: FLOPs, or calls where they cannot be counted."""
        return float(self.full) if self.flops is None else self.flops


class Pilot:
    """Tries ways on the first images of the job; each way once.

    Args:
        subject: the model.
        config: of the job.
        kept: what an interrupted pilot had found; filled in place, for the checkpoint.
        each: called after every network call.
        after: called after every way.
    """

    def __init__(
        self,
        subject: Subject,
        config: DenoiseSampleConfig,
        kept: dict[str, Any],
        *,
        each: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.subject, self.config, self.kept = subject, config, kept
        self.numbers = range(min(config.pilot, config.count, config.batch))
        self._each, self._after = each, after
        self._costs: dict[tuple[bool, float, str | None], CallCost] = {}

    @property
    def trials(self) -> list[Trial]:
        """All so far, in the order they were made."""
        return [Trial(**{**item, "way": Way(**item["way"])}) for item in self.kept.get("trials", [])]

    def baseline(self) -> Trial:
        """The sampler that is used without any of this."""
        return self.try_out(baseline_way(self.subject.prediction, self.config.baseline_steps))

    def try_out(self, way: Way) -> Trial:
        """The images of a way beside the reference samples."""
        for trial in self.trials:
            if trial.way == way:
                return trial
        reference = self._reference()
        trial = self._tried(way, reference)
        self.kept.setdefault("trials", []).append(asdict(trial))
        self._after()
        return trial

    def cost(self, way: Way) -> CallCost:
        """FLOPs of its calls, counted once for all ways whose calls are alike."""
        key = (way.cache != NONE, way.merge, way.attention)
        if key not in self._costs:
            self._costs[key] = self.subject.call_cost(way)
        return self._costs[key]

    def seconds(self, trial: Trial) -> float:
        """Predicted for all images of the job."""
        return trial.seconds * self.config.count / len(self.numbers)

    def least_price(self, way: Way) -> float:
        """The price if only the steps that must be are computed whole; exact but for error-controlled caches."""
        full = 1 if way.tolerance else math.ceil(way.nfe / (way.every or 1))
        flops = self.cost(way).of(full, way.nfe - full, 1).value
        return float(full) if flops is None else flops

    def _tried(self, way: Way, reference: Tensor) -> Trial:
        begin, cpu = time.perf_counter(), time.process_time()
        try:
            drawn = self.subject.sample(way, self.numbers, self._each)
        except InputError as failure:
            if not self.config.searches:
                raise
            return Trial(way, None, 0, 0, None, 0.0, 0.0, str(failure))  # a solver may fail at very few steps
        synchronise()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        error = float(paired_error(drawn.images, reference).mean())
        flops = self.cost(way).of(drawn.full, drawn.reused, 1).value
        return Trial(way, error, drawn.full, drawn.reused, flops, seconds, cpu_seconds)

    def _reference(self) -> Tensor:
        if "reference" not in self.kept:
            way = reference_way(self.subject.prediction, self.config.reference_steps)
            # The first call of a process is slow; the reference, which is not timed, takes that on itself.
            self.kept["reference"] = self.subject.sample(way, self.numbers, self._each).images
            self._after()
        found: Tensor = self.kept["reference"]
        return found


def baseline_way(prediction: str, steps: int) -> Way:
    """Plain DDIM, or Euler for flow-matching models."""
    return Way(baseline(prediction)[0], steps)


def reference_way(prediction: str, steps: int) -> Way:
    """The sampler that stands for the model's own exact samples."""
    # Of second order, 100 steps of it agree with Heun's; 100 of DDIM are still half as far off as 50.
    return Way("dpm++", steps)


def choose(pilot: Pilot, config: DenoiseSampleConfig) -> Trial:
    """The way to take for all images.

    Without ``--seconds``: the cheapest whose paired error is at most the bound (`bound_of`). With it: the one of least
    error among those whose predicted time fits.

    Raises:
        InputError: nothing fits the time, or nothing keeps the bound; with what would.
    """
    if config.seconds is not None:
        return _nearest_in_time(pilot, config, config.seconds)
    return _cheapest_within(pilot, config, bound_of(pilot, config))


def bound_of(pilot: Pilot, config: DenoiseSampleConfig) -> float:
    """Largest paired error that is let pass: ``--tolerance``, or the baseline's own."""
    if config.tolerance is not None:
        return config.tolerance
    error = pilot.baseline().error
    if error is None:
        raise InputError("a baseline that samples", pilot.baseline().note, "pass --tolerance")
    return error


def _cheapest_within(pilot: Pilot, config: DenoiseSampleConfig, bound: float) -> Trial:
    first, *others = _caches(pilot, config)
    best = _climb(pilot, config, first, bound)
    if best is None:
        made = [trial for trial in pilot.trials if trial.error is not None]
        nearest = min(made, key=lambda trial: trial.error or 0.0)
        raise InputError(
            f"a way with a paired error of at most {bound:.3g}",
            f"{nearest.error:.3g} at best, by {nearest.way.name}",
            "raise --tolerance, or leave --steps, --solver and --cache on auto",
        )
    if others and config.steps is None:
        places = [step for step in LADDER if step >= best.way.steps][: _FURTHER + 1]
    else:
        places = [best.way.steps]
    more = [asked_way(config, best.way.solver, steps, cache) for cache in others for steps in places]
    dear: list[Way] = []
    for way in more:
        if pilot.least_price(way) >= best.price or any(_no_cheaper(way, other) for other in dear):
            continue
        trial = pilot.try_out(way)
        if trial.price >= best.price:
            dear.append(way)
        if _passes(trial, bound) and trial.price < best.price:
            best = trial
    return best


def _no_cheaper(way: Way, other: Way) -> bool:
    """Whether the way takes at least the steps and the refreshes of another."""
    if way.steps < other.steps or (way.tolerance is None) != (other.tolerance is None):
        return False
    if way.tolerance is not None and other.tolerance is not None:
        return way.tolerance <= other.tolerance
    return (way.every or 1) <= (other.every or 1)


def _climb(pilot: Pilot, config: DenoiseSampleConfig, cache: str, bound: float) -> Trial | None:
    """Steps from few to many, all solvers side by side, until one keeps the bound."""
    solvers = _solvers(pilot, config)
    rounds: Iterable[int] = LADDER if config.steps is None else (config.steps,)
    for steps in rounds:
        made = [pilot.try_out(asked_way(config, solver, steps, cache)) for solver in solvers]
        passing = [trial for trial in made if _passes(trial, bound)]
        if passing:
            return min(passing, key=lambda trial: (trial.price, trial.error))
        errors = [trial.error for trial in made if trial.error is not None]
        if steps >= 4 and errors:
            near = {trial.way.solver for trial in made if trial.error is not None and trial.error <= _FAR * min(errors)}
            solvers = [solver for solver in solvers if solver in near]
    return None


def _nearest_in_time(pilot: Pilot, config: DenoiseSampleConfig, seconds: float) -> Trial:
    caches = _caches(pilot, config)
    rounds = LADDER if config.steps is None else (config.steps,)
    solvers = _solvers(pilot, config)
    # What a FLOP takes here: by the cheapest way that samples at all.
    begun = (pilot.try_out(asked_way(config, solvers[0], steps, caches[0])) for steps in rounds)
    first = next((trial for trial in begun if trial.error is not None), None)
    pace = 0.0 if first is None else pilot.seconds(first) / first.price
    fitting: list[Trial] = []
    for cache in caches:
        for solver in solvers:
            ways = [asked_way(config, solver, steps, cache) for steps in rounds]
            within = [way for way in ways if pace * pilot.least_price(way) <= seconds]
            # Few steps are slower a step than many: the largest that should fit and the two below it are tried.
            made = [pilot.try_out(way) for way in reversed(within[-3:])]
            fitting += [trial for trial in made if trial.error is not None and pilot.seconds(trial) <= seconds]
    if not fitting:
        least = min((pilot.seconds(trial) for trial in pilot.trials if trial.error is not None), default=math.nan)
        raise InputError(
            f"--seconds of at least {least:.3g} for {config.count} images here",
            f"{seconds:g}",
            "raise it, or lower --count",
        )
    return min(fitting, key=lambda trial: (trial.error, trial.price))


def _passes(trial: Trial, bound: float) -> bool:
    return trial.error is not None and trial.error <= bound


def _solvers(pilot: Pilot, config: DenoiseSampleConfig) -> list[str]:
    return [*pilot.subject.solvers()] if config.solver == AUTO else [config.solver]


def _caches(pilot: Pilot, config: DenoiseSampleConfig) -> Sequence[str]:
    if config.cache != AUTO:
        return [config.cache]
    if not pilot.subject.reusable:
        return [NONE]
    # A tolerance of an estimate that nobody calibrated means nothing: then only the even rules are tried.
    known = pilot.subject.scale is not None
    return [NONE, *(cache for cache in CACHES if known or cache.startswith("every"))]
