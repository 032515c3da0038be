"""The detector in an audit: what it catches, and an attacker who knows it and stays below its threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.attack.detector import Detector, fit_detector
from scrimp.attack.pixels import quantise
from scrimp.attack.trials import Bench, Case, Trial, look, stream
from scrimp.attack.victim import Victim, frozen
from scrimp.primitives.errors import InputError

NAME = "detector"
FALSE_ALARMS = 0.05
_MIXED = (0.1, 0.25, 0.5, 0.75)  # how much of an attack the attacker who knows the detector puts in
_TRIED = 4  # attacks that he mixes


@dataclass(frozen=True, eq=False)
class Watch:
    """A detector fitted on the images to learn from, at work on the audited ones.

    An image that raises an alarm is refused: it is not answered rightly, and counts with its clean cost, since its
    sender gets no further. (That one image has been computed all the same: the statistics are of its own forward.)

    Attributes:
        bench: without the detector.
        detector: fitted.
        alarms: of the clean audited images, bool [n].
    """

    bench: Bench
    detector: Detector
    alarms: Tensor

    @property
    def clean(self) -> Trial:
        """The clean images, those with a false alarm not answered."""
        bare = self.bench.clean
        right = None if bare.right is None else bare.right & ~self.alarms
        case = Case(f"{NAME}, clean", "T0", "defended", defence=NAME)
        return Trial(case, bare.costs, right, ~self.alarms, over=len(self.alarms))

    def caught(self, trial: Trial) -> Tensor:
        """Which images of a trial raise an alarm, bool [m]."""
        assert trial.attack is not None
        shown = self.bench.shown(trial.case, trial.attack, trial.over)
        return self.detector.alarms(statistics_of(self.bench.victim, shown, self.bench.batch))

    def unaware(self, trial: Trial, caught: Tensor) -> Trial:
        """A trial as it goes where the detector is on guard."""
        count = len(caught)
        costs = torch.where(caught, self.bench.clean.costs[:count], trial.costs[:count])
        right = None if trial.right is None else trial.right[:count] & ~caught
        same = None if trial.same is None else trial.same[:count] & ~caught
        before = trial.case
        case = Case(f"{NAME}: {before.name}", before.threat, "defended", before.goal, before.area, defence=NAME)
        return Trial(case, costs, right, same, over=count)

    def aware(self, attacks: Sequence[Trial], caught: Mapping[str, Tensor]) -> Trial:
        """Each image becomes the dearest that raises no alarm, of: itself, all attacks, and parts of the dearest ones.

        So an attacker who asks the detector as he likes, with gradients only for the attacks that he has already.

        Args:
            attacks: trials without the detector.
            caught: by name of the trial, its images that raise an alarm.
        """
        bench = self.bench
        clean = self.clean
        best = _Best(clean.costs.clone(), None if clean.right is None else clean.right.clone(), ~self.alarms)
        for trial in attacks:
            best.take_(~caught[trial.case.name], trial.costs, trial.right, trial.same)
        for trial in sorted(attacks, key=lambda one: -one.success(bench.clean, bench.victim.full))[:_TRIED]:
            assert trial.attack is not None
            shown = bench.shown(trial.case, trial.attack, trial.over)
            before = bench.images[: len(shown)]
            for share in _MIXED:
                mixed = quantise(before + share * (shown - before))
                costs, said = look(bench.victim, mixed, bench.batch)
                quiet = ~self.detector.alarms(statistics_of(bench.victim, mixed, bench.batch))
                right = None if bench.labels is None else said == bench.labels[: len(said)].cpu()
                best.take_(quiet, costs, right, said == bench.said[: len(said)])
        case = Case(f"{NAME}: attacker who knows it", "T3", "defended", "ignore", defence=NAME)
        return Trial(case, best.costs, best.right, best.same, over=len(best.costs))


@dataclass(eq=False)
class _Best:
    """The dearest version of each image so far that raises no alarm, [n]."""

    costs: Tensor
    right: Tensor | None
    same: Tensor

    def take_(self, quiet: Tensor, costs: Tensor, right: Tensor | None, same: Tensor | None) -> None:
        """Versions of the first images, [m]: those that are quiet and dearer."""
        rows = torch.nonzero(quiet & (costs > self.costs[: len(quiet)])).flatten()
        self.costs[rows] = costs[rows]
        if self.right is not None and right is not None:
            self.right[rows] = right[rows]
        if same is not None:
            self.same[rows] = same[rows]


def watch_of(bench: Bench) -> Watch | None:
    """Fit a detector; None where the images to learn from are too few for its rate."""
    known = statistics_of(bench.victim, bench.learn, bench.batch)
    try:
        detector = fit_detector(known, generator=stream(bench.seed, NAME), false_alarms=FALSE_ALARMS)
    except InputError:
        return None
    return Watch(bench, detector, detector.alarms(statistics_of(bench.victim, bench.images, bench.batch)))


def statistics_of(victim: Victim, images: Tensor, batch: int) -> Tensor:
    """What the detector sees, float64 [n, k] on the CPU: ``victim.statistics`` where there are such, else the cost."""
    ask: Callable[[Tensor], Tensor] = getattr(victim, "statistics", None) or (lambda part: victim.cost(part)[:, None])
    with frozen(victim.model), torch.no_grad():
        return torch.cat([ask(part).double().cpu() for part in images.split(batch)])
