"""Which of a method's losses to attack with: each tried a little, on the images to learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from scrimp.adaptive.gating import Gating
from scrimp.adaptive.token_halting import Halting
from scrimp.adaptive.token_sampling import Sampling
from scrimp.attack.attached import (
    AdaptiveVictim,
    Surrogate,
    attention,
    ponder_and_prior,
    running,
    samples,
    scores,
    significance,
    usage,
)
from scrimp.attack.battery import patch_case, patch_for
from scrimp.attack.trials import Bench, Case, Trial, stream
from scrimp.attack.victim import Victim, costs_of

OWN = "own"
"""What a victim's loss is called that is none of this package's."""
_KNOWN: dict[type, dict[str, Surrogate]] = {
    Halting: {"running": running, "scores": scores, "ponder_and_prior": ponder_and_prior},
    Sampling: {"samples": samples, "significance": significance, "attention": attention},
    Gating: {"usage": usage},
}


def candidates(victim: Victim) -> dict[str, Victim]:
    """The victim with each loss that its method has; a victim of another kind, or with another loss, as it is."""
    if not isinstance(victim, AdaptiveVictim):
        return {OWN: victim}
    known = next((found for kind, found in _KNOWN.items() if isinstance(victim.controller.method, kind)), {})
    if victim.surrogate not in known.values():
        return {OWN: victim}
    return {name: replace(victim, surrogate=loss) for name, loss in known.items()}


def pilot_cases(names: list[str], area: float, shape: torch.Size) -> dict[str, Case]:
    """A short patch attack for each loss; none where there is no choice."""
    if len(names) < 2:
        return {}
    return {name: patch_case(f"pilot: {name}", area, shape, kind="pilot") for name in names}


def pilot_trial(bench: Bench, case: Case, share: int) -> Trial:
    """A patch, and what the images that it was made on cost with it."""
    patch, spent = patch_for(bench, case, share, stream(bench.seed, case.name))
    costs = costs_of(bench.victim.cost, patch.on(bench.learn), batch=bench.batch).long()
    return Trial(case, costs, attack=patch, spent=spent)


def choose(found: dict[str, float], names: list[str]) -> str:
    """The loss that reached the highest mean cost; the first of equals, or the only one."""
    return max(names, key=lambda name: found.get(name, 0.0))


def with_loss_of(chosen: Victim) -> Callable[[Victim], Victim]:
    """Gives other victims of the same method the loss that was chosen."""

    def give(victim: Victim) -> Victim:
        if isinstance(victim, AdaptiveVictim) and isinstance(chosen, AdaptiveVictim):
            return replace(victim, surrogate=chosen.surrogate)
        return victim

    return give
