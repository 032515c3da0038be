"""What an estimate of the error of reused features must be multiplied by to be a bound: measured, by split conformal.

Every reused step of a number of trajectories is computed in full as well. The ratio of the output's error to the change
of the shallow features differs with the noise level, so a first half of the batches gives that profile. In the second
half each sample's score is the most, over its reused steps, that its error is to the profiled estimate; the scale is
the ceil((n + 1) level)-th smallest of n scores (Vovk et al. 2005; Angelopoulos and Bates 2023, arXiv:2107.07511). It
bounds the error of a new sample at all its steps with probability ``level``, as far as samples are exchangeable: drawn
alike, with the same solver, steps, guidance and batch size.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scrimp.denoise.reuse import Reuse, reuse
from scrimp.denoise.reuse_rules import Below, Every
from scrimp.primitives.errors import InputError

PROBE = 5
ROUNDS, MOST_ROUNDS = 5, 12
ENOUGH = 1.25  # a scale this much over the one needed is near enough


@dataclass(frozen=True)
class Calibration:
    """Turns the relative change of shallow features into a bound of the relative error of the output.

    Called with a timestep, it gives the factor: what `every` and `below` take as their ``scale``.

    Attributes:
        scale: the conformal factor on top of the profile.
        level: the share of samples that the bound should hold for.
        samples: how many the scale rests on.
        timesteps: where the profile was measured, rising.
        profile: mean ratio of error to change there; between them it is interpolated, past the ends it stays level.
    """

    scale: float
    level: float
    samples: int
    timesteps: tuple[float, ...]
    profile: tuple[float, ...]

    def __call__(self, timestep: float | None) -> float:
        return self.scale * _along(self.timesteps, self.profile, timestep)


@dataclass(frozen=True)
class Coverage:
    """How estimates did on fresh samples.

    Attributes:
        share: of the samples, those whose every reused step had an error no larger than estimated; None: no step of
            any sample was reused.
        samples: how many were looked at.
        reused: share of the steps that were reused.
        worst: largest relative error of any reused step; None as above.
    """

    share: float | None
    samples: int
    reused: float
    worst: float | None


def calibrate(
    model: nn.Module,
    run: Callable[[int], object],
    *,
    rule: Every | Below,
    batches: int = 4,
    level: float = 0.95,
    depth: int = 1,
    order: int = 0,
) -> Calibration:
    """Measures the scale that makes a rule's estimate bound the error of ``level`` of the samples.

    For `below`, which steps are reused hangs on the scale itself: from a first scale by ``every(5)``, further batches
    are drawn under the rule until the scale it has is as large as the one it needs, and not much larger. That looks
    more than once, so that the level holds a little less surely than for `every`.

    Args:
        model: as for `reuse`; without reuse attached. Gets its own calls back.
        run: makes one batch of images with the model, from noise to the end; told a number that is new each time, to
            draw other noise by.
        rule: for which to calibrate; its own scale is left aside.
        batches: in each round, half of them (of the first round) for the profile. At least 2.
        level: share of samples, between 0 and 1.
        depth, order: as for `reuse`.

    Raises:
        InputError: too few samples for the level, nothing to measure, or errors that are not finite.
    """
    if not 0 < level < 1 or batches < 2:
        raise InputError(
            "a level between 0 and 1 and 2 or more batches", f"{level} and {batches}", "take 0.95 and 4, say"
        )
    if isinstance(rule, Every) and rule.steps == 1:
        raise InputError("a rule that reuses", "every(1)", "calibrate every(2) or more, or below(tolerance)")
    first = Every(PROBE if isinstance(rule, Below) else rule.steps)
    with reuse(model, first, depth=depth, order=order) as attached:
        drawn = _trajectories(attached, run, range(batches))
        half = batches // 2
        timesteps, profile = _profile(drawn[:half])
        scale, samples = _scale(drawn[half:], timesteps, profile, level)
        found = Calibration(scale, level, samples, timesteps, profile)
        if isinstance(rule, Below):
            found = _settled(attached, run, replace(rule, scale=found), batches)
    return found


def _settled(attached: Reuse, run: Callable[[int], object], rule: Below, batches: int) -> Calibration:
    """The least scale found that is as large as the scale needed under the very rule it makes.

    A larger scale reuses less, down to nothing, where any bound holds: so there is one. Between one that was too small
    and one that held, the geometric mean is tried.
    """
    guess, least, held = rule.scale, 0.0, None
    assert isinstance(guess, Calibration)
    for turn in range(1, MOST_ROUNDS + 1):
        attached.rule = replace(rule, scale=guess)
        drawn = _trajectories(attached, run, range(turn * batches, (turn + 1) * batches))
        needed, samples = 0.0, sum(batch.samples for batch in drawn)
        if any(batch.steps for batch in drawn):
            needed, samples = _scale(drawn, guess.timesteps, guess.profile, guess.level)
        if needed <= guess.scale:
            held = replace(guess, samples=samples)
            if guess.scale <= ENOUGH * max(needed, least):
                break
            following = max(needed, math.sqrt(least * guess.scale)) or guess.scale / 2
        else:
            least = guess.scale
            following = needed if held is None else math.sqrt(least * held.scale)
        if held is not None and turn >= ROUNDS:
            break
        guess = replace(guess, scale=following)
    if held is None:
        raise InputError(
            "an error that more refreshes bound", f"none within {MOST_ROUNDS} rounds", "take a lower tolerance"
        )
    return held


def coverage(
    model: nn.Module,
    run: Callable[[int], object],
    *,
    rule: Every | Below,
    batches: int = 4,
    depth: int = 1,
    order: int = 0,
) -> Coverage:
    """Measures, on fresh samples, for what share of them a calibrated rule's estimate bounds the error.

    Args:
        model, run, depth, order: as for `calibrate`; ``run`` is told numbers from 0 and should draw other noise than
            it did there.
        rule: with its scale.
        batches: how many.

    Raises:
        InputError: errors that are not finite.
    """
    with reuse(model, rule, depth=depth, order=order) as attached:
        drawn = _trajectories(attached, run, range(batches))
    samples = sum(batch.samples for batch in drawn)
    calls = sum(batch.calls for batch in drawn)
    if not any(batch.steps for batch in drawn):
        return Coverage(None, samples, 0.0, None)
    bounded = sum(batch.samples if not batch.steps else int((batch.worst(rule.factor) <= 1).sum()) for batch in drawn)
    largest = max(float(error.max()) for batch in drawn for _, _, error in batch.steps)
    return Coverage(bounded / samples, samples, sum(len(batch.steps) for batch in drawn) / calls, largest)


@dataclass(frozen=True)
class _Batch:
    """Reused steps of one batch: (timestep, change of the shallow features [samples], error [samples])."""

    steps: list[tuple[float | None, Tensor, Tensor]]
    samples: int
    calls: int

    def worst(self, factor: Callable[[float | None], float]) -> Tensor:
        """By sample, the most that its error is to its estimate: [samples]."""
        if not self.steps:
            return torch.zeros(self.samples)
        return torch.stack([_ratio(error, change * factor(at)) for at, change, error in self.steps]).amax(0)


def _trajectories(attached: Reuse, run: Callable[[int], object], numbers: range) -> list[_Batch]:
    attached.shadow = True
    drawn = []
    for number in numbers:
        attached.reset()
        attached.measured.clear()
        run(number)
        factor = attached.rule.factor
        steps = [(at, estimate.cpu() / factor(at), error.cpu()) for at, estimate, error in attached.measured]
        if not attached.steps or len({len(error) for _, _, error in steps}) > 1:
            raise InputError(
                "a run that samples one batch of images with this model",
                "no call of it" if not attached.steps else "batches of several sizes",
                "let run(number) sample one batch by the model that was passed",
            )
        if not all(bool(torch.isfinite(error).all()) for _, _, error in steps):
            raise InputError("finite outputs", "NaN or infinite ones", "check the weights and the precision")
        drawn.append(_Batch(steps, attached.batch, len(attached.steps)))
    attached.reset()
    return drawn


def _profile(drawn: list[_Batch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    found: dict[float, list[Tensor]] = {}
    for batch in drawn:
        for at, change, error in batch.steps:
            found.setdefault(0.0 if at is None else at, []).append(_ratio(error, change))
    means = {at: float(torch.cat(ratios).double().mean()) for at, ratios in found.items()}
    usable = {at: mean for at, mean in sorted(means.items()) if 0 < mean < math.inf}
    if not usable:
        raise InputError(
            "reused steps at which features and outputs change",
            f"none of {len(means)}",
            "sample with more steps than the rule refreshes at, or a trained model",
        )
    return tuple(usable), tuple(usable.values())


def _scale(
    drawn: list[_Batch], timesteps: tuple[float, ...], profile: tuple[float, ...], level: float
) -> tuple[float, int]:
    scores = (
        torch.cat([batch.worst(lambda at: _along(timesteps, profile, at)) for batch in drawn]).double().sort().values
    )
    rank = math.ceil((len(scores) + 1) * level)
    if rank > len(scores):
        needed = math.ceil(level / (1 - level))
        raise InputError(
            f"{needed} or more samples for a level of {level}", str(len(scores)), "draw more or larger batches"
        )
    scale = float(scores[rank - 1])
    if not 0 < scale < math.inf:
        raise InputError(
            "errors that come with a change of the shallow features",
            f"a scale of {scale}",
            "take a larger depth, which judges by deeper features",
        )
    return scale, len(scores)


def _ratio(error: Tensor, estimate: Tensor) -> Tensor:
    return torch.where(error == 0, torch.zeros_like(error), error / estimate)


def _along(timesteps: tuple[float, ...], profile: tuple[float, ...], timestep: float | None) -> float:
    at = 0.0 if timestep is None else timestep
    right = bisect.bisect_left(timesteps, at)
    if right in (0, len(timesteps)):
        return profile[min(right, len(profile) - 1)]
    share = (at - timesteps[right - 1]) / (timesteps[right] - timesteps[right - 1])
    return profile[right - 1] + share * (profile[right] - profile[right - 1])
