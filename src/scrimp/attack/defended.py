"""Defences in an audit, each one clean and attacked, by one who does not know of it and by one who does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scrimp.attack.alarms import NAME as DETECTOR
from scrimp.attack.alarms import Watch
from scrimp.attack.battery import Entry, make_own, make_patch, own_case, patch_case, untouched
from scrimp.attack.trials import Bench, Case, Remember, Trial, quantile, stream
from scrimp.attack.victim import Victim, costs_of
from scrimp.primitives.errors import InputError

HARD_BUDGET = "hard budget"
WEIGHT = 6
"""Of each of the two attacks by one who knows a defence."""
_EIGHTHS = range(8)


@dataclass(frozen=True, eq=False)
class Tried:
    """A defence and the trials against it.

    Attributes:
        name: of the defence.
        clean: behind it, without an attack.
        unaware: attacks made on the bare model; ``aware``: made on the defended one.
        bound: FLOPs that no image may exceed; ``kept``: whether none did, None without a bound.
    """

    name: str
    clean: Trial
    unaware: Sequence[Trial]
    aware: Sequence[Trial]
    bound: int | None = None
    kept: bool | None = None

    def to_dict(self, full: int) -> dict[str, Any]:
        """As the audit's JSON has it: of each attacker what succeeds most; who knows the defence can do all of it."""
        worst = max(self.unaware, key=lambda trial: trial.success(self.clean, full))
        every = [*self.unaware, *self.aware]
        return {
            "name": self.name,
            "clean_accuracy": self.clean.accuracy,
            "clean_flops": self.clean.mean,
            "attacked_accuracy": worst.accuracy,
            "attacked_flops": worst.mean,
            "success": worst.success(self.clean, full),
            "adaptive_success": max(trial.success(self.clean, full) for trial in every),
            "bound": self.bound,
            "kept": self.kept,
        }


def unaware(bench: Bench, name: str, attack: Trial) -> Trial:
    """An attack made on the bare model, tried on the defended one that ``bench`` has."""
    assert attack.attack is not None
    case = replace(attack.case, name=f"{name}: {attack.case.name}", kind="defended", defence=name)
    return replace(bench.measure(case, attack.attack, attack.over), attack=None)  # the bare trial has it


def aware_entries(name: str, area: float, epsilon: float, shape: Any) -> list[Entry]:
    """A patch and perturbations by image, made by one who optimises through the defence."""
    more: dict[str, Any] = {"kind": "defended", "defence": name}
    patch = patch_case(f"{name}: patch that knows it", area, shape, **more)
    own = replace(own_case(f"{name}: per image that knows it", epsilon), **more)
    return [Entry(patch, WEIGHT, make_patch), Entry(own, WEIGHT, make_own)]


def clean_case(name: str) -> Case:
    """Clean images behind a defence."""
    return Case(f"{name}, clean", "T0", "defended", defence=name)


def recommended(
    clean: Tensor, full: int, capped: Callable[[int], Victim] | None, *, share: float = 0.99
) -> tuple[int | None, Victim | None]:
    """A budget that ``share`` of the clean images do not reach beyond, and the model that keeps it.

    Where the model cannot keep that one, the first that it can of seven even steps from there towards the dense cost.

    Returns:
        FLOPs and the model; None twice where every budget is refused or so many images cost as much as dense, which
        no budget would cap, and no model without ``capped``.
    """
    least = quantile(clean, share)
    if least >= full:
        return None, None
    if capped is None:
        return least, None
    for step in _EIGHTHS:
        bound = least + (full - least) * step // 8
        try:
            return bound, capped(bound)
        except InputError:
            continue
    return None, None


def all_costs(bench: Bench, entries: Sequence[Entry], trials: Sequence[Trial]) -> Tensor:
    """What every image of every trial on the bare model costs on the one of ``bench``, [all of them].

    Args:
        bench: of the defended model, on the same images.
        entries: of the battery; those without a budget are drawn once more, as before.
        trials: on the bare model.
    """
    drawn = [entry for entry in [*untouched(), *entries] if not entry.weight]
    names = {entry.case.name for entry in drawn}
    found = [bench.clean.costs]
    found += [entry.make(bench, entry.case, 0, stream(bench.seed, entry.case.name)).costs for entry in drawn]
    for trial in trials:
        if trial.attack is not None and trial.case.name not in names:
            shown = bench.shown(trial.case, trial.attack, trial.over)
            found.append(costs_of(bench.victim.cost, shown, batch=bench.batch).long())
    return torch.cat(found)


def watched(
    watch: Watch, trials: Sequence[Trial], main: Sequence[Trial], remember: Remember
) -> tuple[Tried, dict[str, Any]]:
    """The detector as a defence against the ``main`` ones of the trials, and what it caught of each."""
    caught = {trial.case.name: watch.caught(trial) for trial in trials if trial.attack is not None}
    before = [watch.unaware(trial, caught[trial.case.name]) for trial in main]
    attacks = [trial for trial in trials if trial.case.kind == "attack" and trial.attack is not None]
    known = remember(f"{DETECTOR}: attacker who knows it", lambda: watch.aware(attacks, caught))
    told = {
        "false_alarms": watch.detector.false_alarms,
        "clean_alarms": float(watch.alarms.double().mean()),
        "caught": {name: float(alarms.double().mean()) for name, alarms in caught.items()},
    }
    return Tried(DETECTOR, watch.clean, before, [known]), told
