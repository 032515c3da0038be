"""`audit`: the standard battery of attacks, controls and defences on one model, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scrimp.attack.alarms import watch_of
from scrimp.attack.attached import AdaptiveVictim, Victims, as_list
from scrimp.attack.audit_report import AuditReport
from scrimp.attack.battery import Entry, standard, untouched
from scrimp.attack.defended import (
    HARD_BUDGET,
    WEIGHT,
    Tried,
    all_costs,
    aware_entries,
    clean_case,
    recommended,
    unaware,
    watched,
)
from scrimp.attack.pilot import candidates, choose, pilot_cases, pilot_trial, with_loss_of
from scrimp.attack.pixels import check_epsilon, check_images, check_labels
from scrimp.attack.smoothing import Filtered, gaussian_filter, median_filter
from scrimp.attack.success import Poisoning, attack_success, batch_poisoning
from scrimp.attack.trials import Bench, Case, Remember, Trial, bench_of, stream
from scrimp.attack.verdict import judge
from scrimp.attack.victim import Victim, costs_of, frozen
from scrimp.primitives.errors import InputError

Filter = Callable[[Tensor], Tensor]
FILTERS: Mapping[str, Filter] = {"median filter": median_filter, "gaussian filter": gaussian_filter}
"""The defences before the model that are tried as a rule, at the settings that these functions have."""
LEAST = 100
"""Smallest budget of an audit."""
_PILOT = 18  # weight of all pilots together: with less the noise of small batches chooses
_USUAL = 136  # all weights of an audit as it is by default: what is left out of it leaves the other shares alone
_STATIC = 20  # a model that is static by construction gets this part of the budget
_POISONED = (16, 64)


def audit(
    victim: Victims,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    learn: Tensor | None = None,
    budget: int = 40_000,
    seed: int = 0,
    sizes: Sequence[float] = (0.005, 0.02, 0.05, 0.08),
    epsilons: Sequence[float] = (8 / 255, 16 / 255),
    others: Mapping[str, Victim] | None = None,
    capped: Callable[[int], Victim] | None = None,
    defend: Mapping[str, Filter] | None = None,
    remember: Remember | None = None,
    report: Callable[[str, float], None] | None = None,
    batch: int = 64,
) -> AuditReport:
    """Attack what a model saves, with all that this package has, and judge it.

    Natural tail, flat colours and noise (T0); one patch for all images by size, goal and place (T1); one l-infinity
    perturbation for all (T2), one for each image (T3); transfer (T4); one bad image in a batch (T5); and attacks that
    only ask costs. Beside them a random patch and one against accuracy alone, and defences: a hard budget, filters, a
    detector, each attacked anew by one who knows it. Which of the losses known for a method is used, a pilot finds
    out. Every trial draws by the seed and its own name, and gets a fixed share of the budget.

    Args:
        victim: one; a model that `scrimp.adaptive` is attached to, or anything that is a `Victim`. If it has
            ``statistics`` the detector looks at these, else at costs; if it has ``parts`` batches are padded by part.
        images: audited on, [n, channels, height, width], from 0 to 1, n >= 1.
        labels: [n], int64; None: accuracies stay unknown. Attacks never see them.
        learn: images that attacks for all images, the surrogate and the detector learn from; None: the first half of
            ``images``, and the rest is audited.
        budget: images through forward and backward in all, at least 100; where only costs are asked three count as
            one. What it takes to measure is not in it. A model that is static by construction gets a twentieth.
        seed: of all draws.
        sizes: of patches, shares of the image.
        epsilons: radii, from 1/255.
        others: models, by name, that the attacks are tried on too.
        capped: gives the same model with a hard budget of so many FLOPs an image, or raises InputError where it cannot
            keep that one; None: this defence is not tried.
        defend: filters before the model, by name; None: `FILTERS`.
        remember: keeps finished trials: called with a name and what makes the trial. None: made each time.
        report: called after each trial with its name and the share of the audit that is done.
        batch: images at a time where nothing is learnt.

    Raises:
        InputError: arguments out of range, or a victim that is none.
    """
    found = _one(victim)
    images, labels, learn = _split(images, labels, learn)
    _check(budget, sizes, epsilons)
    static = isinstance(found, AdaptiveVictim) and not found.controller.method.adaptive
    spend = max(LEAST, budget // _STATIC) if static else budget
    filters, capped = FILTERS if defend is None else defend, None if static else capped
    bench = bench_of(found, images, labels, learn, seed=seed, batch=batch)
    job = _Audit(bench, spend, tuple(sizes), tuple(epsilons), len(filters) + (capped is not None))
    job.watch(remember, report, len(others or {}))
    return job.run(others or {}, capped, filters)


@dataclass(eq=False)
class _Audit:
    bench: Bench
    budget: int
    sizes: tuple[float, ...]
    epsilons: tuple[float, ...]
    defences: int
    remember: Remember = field(default=lambda name, make: make())
    entries: list[Entry] = field(default_factory=list)
    total: int = _USUAL

    def __post_init__(self) -> None:
        self.entries = standard(self.bench.images.shape[1:], self.sizes, self.epsilons)
        weights = sum(entry.weight for entry in self.entries) + _PILOT + 2 * WEIGHT * self.defences
        self.total = max(_USUAL, weights)

    def watch(self, keep: Remember | None, report: Callable[[str, float], None] | None, others: int) -> None:
        """Keep each trial, and tell of it when it is there; of about so many with ``others`` models."""
        steps = (1 + others) * len(self.entries) + len(untouched()) + 5 * self.defences + 3
        done = 0

        def remember(name: str, make: Callable[[], Trial]) -> Trial:
            nonlocal done
            trial = make() if keep is None else keep(name, make)
            done += 1
            if report is not None:
                report(name, min(1.0, done / steps))
            return trial

        self.remember = remember

    def run(
        self, others: Mapping[str, Victim], capped: Callable[[int], Victim] | None, defend: Mapping[str, Filter]
    ) -> AuditReport:
        clean, full = self.bench.clean, self.bench.victim.full
        surrogate, pilot = self._pilot()
        trials = [self._trial(self.bench, entry) for entry in [*untouched(), *self.entries]]
        attacks = [trial for trial in trials if trial.case.kind == "attack" and trial.attack is not None]
        bound, model = recommended(clean.costs, full, capped)
        tried, caught = self._defences(trials, attacks, bound, model, defend)
        costs = {trial.case.name: trial.costs for trial in [clean, *trials]}
        verdict = judge(costs, full=full, ceiling=self.bench.victim.ceiling, recommended=bound)
        dearest = self._dearest(attacks)
        return AuditReport(
            seed=self.bench.seed,
            learnt_from=len(self.bench.learn),
            budget=self.budget,
            full=full,
            ceiling=self.bench.victim.ceiling,
            surrogate=surrogate,
            pilot=pilot,
            clean=clean,
            trials=trials,
            defences=tried,
            detector=caught,
            dearest=dearest,
            poisoning=self._poisoning(dearest),
            transfer=[row for name, other in others.items() for row in self._transfer(name, other, attacks)],
            verdict=verdict,
        )

    def _trial(self, bench: Bench, entry: Entry) -> Trial:
        name = entry.case.name
        share = max(1, self.budget * entry.weight // self.total)
        return self.remember(name, lambda: entry.make(bench, entry.case, share, stream(bench.seed, name)))

    def _pilot(self) -> tuple[str, dict[str, Trial]]:
        """Choose the loss; the bench has it from then on."""
        known = candidates(self.bench.victim)
        cases = pilot_cases(list(known), max(self.sizes), self.bench.images.shape[1:])
        share, found = max(1, self.budget * _PILOT // self.total // max(len(cases), 1)), {}
        for name, case in cases.items():
            bench = replace(self.bench, victim=known[name])
            found[name] = self.remember(case.name, partial(pilot_trial, bench, case, share))
        chosen = choose({name: trial.mean for name, trial in found.items()}, list(known))
        self.bench = replace(self.bench, victim=known[chosen])
        return chosen, found

    def _defences(
        self,
        trials: list[Trial],
        attacks: list[Trial],
        bound: int | None,
        model: Victim | None,
        defend: Mapping[str, Filter],
    ) -> tuple[list[Tried], dict[str, Any] | None]:
        main, tried = self._main(attacks), []
        if model is not None:
            victim = with_loss_of(self.bench.victim)(model)
            first = self._defended(HARD_BUDGET, victim, main)
            seen = all_costs(first[0], self.entries, trials)
            after = [trial.costs for trial in (*first[1].unaware, *first[1].aware)]
            kept = bool((torch.cat([seen, *after]) <= (bound or 0)).all())
            tried.append(replace(first[1], bound=bound, kept=kept))
        tried += [self._defended(name, Filtered(self.bench.victim, keep), main)[1] for name, keep in defend.items()]
        guard = watch_of(self.bench)
        if guard is None:
            return tried, None
        detector, caught = watched(guard, trials, main, self.remember)
        return [*tried, detector], caught

    def _main(self, attacks: list[Trial]) -> list[Trial]:
        """What defences are tried with: largest patch, widest perturbation by image, and what succeeded most."""
        patches = [one for one in attacks if one.case.threat == "T1" and one.case.goal == "ignore"]
        own = [one for one in attacks if one.case.threat == "T3" and one.case.goal == "ignore"]
        largest = max(one.case.area or 0.0 for one in patches)
        widest = max(one.case.epsilon or 0.0 for one in own)
        first = next(one for one in patches if one.case.area == largest)
        second = next(one for one in own if one.case.epsilon == widest)
        return list(dict.fromkeys([first, second, self._dearest(attacks)]))

    def _dearest(self, attacks: list[Trial]) -> Trial:
        return max(attacks, key=lambda one: one.success(self.bench.clean, self.bench.victim.full))

    def _defended(self, name: str, victim: Victim, main: list[Trial]) -> tuple[Bench, Tried]:
        bare = self.bench
        bench = bench_of(
            victim, bare.images, bare.labels, bare.learn, seed=bare.seed, batch=bare.batch, case=clean_case(name)
        )
        blind = [self.remember(f"{name}: {one.case.name}", partial(unaware, bench, name, one)) for one in main]
        entries = aware_entries(name, max(self.sizes), max(self.epsilons), bare.images.shape[1:])
        return bench, Tried(name, bench.clean, blind, [self._trial(bench, entry) for entry in entries])

    def _poisoning(self, dearest: Trial) -> list[tuple[int, str, Poisoning]]:
        bench = self.bench
        assert dearest.attack is not None
        ask = getattr(bench.victim, "parts", None) or bench.victim.cost
        shown = bench.shown(dearest.case, dearest.attack, dearest.over)
        with frozen(bench.victim.model), torch.no_grad():
            clean, bad = (torch.cat([ask(part) for part in some.split(bench.batch)]) for some in (bench.images, shown))
        sizes = [size for size in _POISONED if size <= len(bench.images)]
        return [(size, dearest.case.name, batch_poisoning(clean, bad, size)) for size in sizes]

    def _transfer(self, name: str, other: Victim, attacks: list[Trial]) -> list[tuple[str, str, float]]:
        def costs(images: Tensor) -> Trial:
            with frozen(other.model):
                return Trial(Case(name, "T4", "attack"), costs_of(other.cost, images, batch=self.bench.batch).long())

        def attacked(trial: Trial) -> Trial:
            assert trial.attack is not None
            return costs(self.bench.shown(trial.case, trial.attack, trial.over))

        clean = self.remember(f"clean, on {name}", lambda: costs(self.bench.images)).costs
        rows = []
        for trial in attacks:
            after = self.remember(f"{trial.case.name}, on {name}", partial(attacked, trial)).costs
            rows.append((name, trial.case.name, attack_success(after, clean[: trial.over], other.full)))
        return rows


def _one(victim: Victims) -> Victim:
    found = as_list(victim)
    if len(found) != 1:
        raise InputError("one victim to audit", f"{len(found)}", "audit them one by one")
    return found[0]


def _split(images: Tensor, labels: Tensor | None, learn: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    check_images(images)
    least = 1 if learn is not None else 2
    if len(images) < least or (learn is not None and not len(learn)):
        raise InputError(f"{least} images or more, and some to learn from", f"{len(images)}", "pass more images")
    if labels is not None:
        check_labels("labels", labels, len(images))
    if learn is None:
        half = len(images) // 2
        return images[half:], None if labels is None else labels[half:], images[:half]
    check_images(learn, name="learn")
    if learn.shape[1:] != images.shape[1:]:
        raise InputError(f"learn [m, {list(images.shape[1:])}]", str(list(learn.shape)), "resize them")
    return images, labels, learn


def _check(budget: int, sizes: Sequence[float], epsilons: Sequence[float]) -> None:
    if budget < LEAST:
        raise InputError(f"a budget of at least {LEAST} images", str(budget), "allow more")
    if not sizes or not all(0 < size <= 1 for size in sizes) or len(set(sizes)) < len(sizes):
        raise InputError("different sizes above 0 and up to 1", str(list(sizes)), "correct them")
    if not epsilons or len(set(epsilons)) < len(epsilons):
        raise InputError("different epsilons", str(list(epsilons)), "correct them")
    for epsilon in epsilons:
        check_epsilon(epsilon)
