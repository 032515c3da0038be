"""What an audit found, and its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scrimp.attack.defended import Tried
from scrimp.attack.success import Poisoning
from scrimp.attack.trials import Trial, shown, spread
from scrimp.attack.verdict import Verdict
from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What `scrimp.attack.audit` found.

    Attributes:
        seed: of all draws.
        learnt_from: images that attacks for all images were made on.
        budget: images through forward and backward that the battery was given.
        full: the dense cost; ``ceiling``: the highest by construction, None where it is not known.
        surrogate: name of the loss that the attacks used; ``pilot``: trials of those there were to choose from.
        clean: the audited images as they are.
        trials: on the bare model, in order.
        defences: each with its trials.
        detector: ``false_alarms`` asked, ``clean_alarms`` measured, ``caught`` by trial; None: too few images to fit.
        dearest: the attack of most success.
        poisoning: batch, name of the attack, what one such image does to it.
        transfer: name of the other model, of the attack, and its success there.
        verdict: see `scrimp.attack.judge`.
        about: what else is known, as the JSON has it, such as ``model`` and ``data``.
    """

    seed: int
    learnt_from: int
    budget: int
    full: int
    ceiling: int | None
    surrogate: str
    pilot: Mapping[str, Trial]
    clean: Trial
    trials: Sequence[Trial]
    defences: Sequence[Tried]
    detector: dict[str, Any] | None
    dearest: Trial
    poisoning: Sequence[tuple[int, str, Poisoning]]
    transfer: Sequence[tuple[str, str, float]]
    verdict: Verdict
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many were audited."""
        return len(self.clean.costs)

    @property
    def spent(self) -> int:
        """Images through forward and backward; of those only asked the cost of, three count as one."""
        made = [*self.pilot.values(), *self.trials, *(one for item in self.defences for one in item.aware)]
        return sum(trial.spent for trial in made)

    def shown(self, trial: Trial, images: Tensor) -> Tensor:
        """The audited images as a trial that made an attack had them: as many of them as it took, the first ones."""
        if trial.attack is None:
            raise InputError("a trial that made an attack", trial.case.name, "choose another")
        return shown(trial.case, trial.attack, images[: trial.over], self.seed)

    def entries(self) -> list[tuple[Trial, Trial]]:
        """All trials but pilots, each with the clean one that it is held against: the bare model's first."""
        found = [(trial, self.clean) for trial in self.trials]
        for item in self.defences:
            found += [(trial, item.clean) for trial in (item.clean, *item.unaware, *item.aware)]
        return found

    def to_dict(self, files: Mapping[str, str] | None = None) -> dict[str, Any]:
        """JSON of the audit; ``files``: of the trials' attacks, by name. What is not known is None."""
        unknown: dict[str, Any] = {"model": None, "method": None, "data": None}
        measured: dict[str, Any] = {"speed": [], "energy": _NO_ENERGY, "break_even": None}
        trials = [trial.to_dict(clean, self.full, self.ceiling) for trial, clean in self.entries()]
        for trial in trials:
            trial["file"] = (files or {}).get(trial["name"])
        numbers = {
            "seed": self.seed,
            "images": self.images,
            "learnt_from": self.learnt_from,
            "budget": self.budget,
            "spent": self.spent,
            "surrogate": self.surrogate,
            "pilot": {name: trial.mean for name, trial in self.pilot.items()},
            "full": self.full,
            "ceiling": self.ceiling,
            "clean": {
                "costs": self.clean.costs.tolist(),
                "flops": spread(self.clean.costs),
                "accuracy": self.clean.accuracy,
            },
            "trials": trials,
            "poisoning": [_poisoning(*item) for item in self.poisoning],
            "transfer": [{"to": to, "by": by, "success": success} for to, by, success in self.transfer],
            "detector": self.detector,
            "defences": [item.to_dict(self.full) for item in self.defences],
        }
        return {**unknown, **numbers, **measured, **self.about, "verdict": _verdict(self.verdict)}


_NO_ENERGY = {"clean_joules": None, "attacked_joules": None, "how": "not measured"}


def _poisoning(batch: int, by: str, found: Poisoning) -> dict[str, Any]:
    figures = {"own": found.own, "clean": found.clean, "poisoned": found.poisoned}
    return {"batch": batch, "by": by, **figures, "factor": found.factor, "padding": found.padding}


def _verdict(found: Verdict) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "worst": found.worst,
        "worst_by": found.worst_by,
        "recommended_budget": found.recommended,
        "text": found.text,
    }
