"""Attacks on what adaptive models save, controls, and defences: ``(victim, images) -> Patch | Perturbation``.

A `Victim` tells the FLOPs of every image, counted, and gives a differentiable loss that falls where they rise. On it:
`universal_patch` (one patch, every image), `perturb` (l-infinity: by image, universal, by class), and, asking for
costs alone, `query_patch` and `query_perturb`. Controls: `random_patch` (baseline), goal ``accuracy``, `flat_colours`,
`noise_images`. `attack_success`, `transfer` and `batch_poisoning` say how far it went. Defences: `PatchSet` to train
with, `median_filter` and `gaussian_filter` before the model (`Filtered`), `fit_detector` on what the policy did; and
the hard budget that an adaptive model's controller holds by itself. `audit` runs all of it under a budget and judges.
"""

from scrimp.attack.attached import (
    AdaptiveVictim,
    Victims,
    attention,
    ponder,
    ponder_and_prior,
    running,
    samples,
    scores,
    significance,
    usage,
    victim_of,
)
from scrimp.attack.audit import FILTERS, audit
from scrimp.attack.audit_report import AuditReport
from scrimp.attack.controls import flat_colours, noise_images
from scrimp.attack.detector import Detector, fit_detector
from scrimp.attack.exits import MultiExit
from scrimp.attack.objective import Goal, PolicyLoss
from scrimp.attack.patch import Patch, random_patch, universal_patch
from scrimp.attack.patch_set import PatchSet
from scrimp.attack.perturbation import Perturbation, perturb
from scrimp.attack.pixels import Normalised
from scrimp.attack.query import query_patch, query_perturb
from scrimp.attack.smoothing import Filtered, gaussian_filter, median_filter
from scrimp.attack.success import Poisoning, attack_success, batch_poisoning, transfer
from scrimp.attack.surrogates import (
    attention_surrogate,
    exits_surrogate,
    ponder_surrogate,
    prior_surrogate,
    running_surrogate,
    samples_surrogate,
    scores_surrogate,
    significance_surrogate,
    usage_surrogate,
)
from scrimp.attack.trials import Case, Trial
from scrimp.attack.verdict import Verdict, judge
from scrimp.attack.victim import Victim, costs_of, frozen

__all__ = [
    "FILTERS",
    "AdaptiveVictim",
    "AuditReport",
    "Case",
    "Detector",
    "Filtered",
    "Goal",
    "MultiExit",
    "Normalised",
    "Patch",
    "PatchSet",
    "Perturbation",
    "Poisoning",
    "PolicyLoss",
    "Trial",
    "Verdict",
    "Victim",
    "Victims",
    "attack_success",
    "attention",
    "attention_surrogate",
    "audit",
    "batch_poisoning",
    "costs_of",
    "exits_surrogate",
    "fit_detector",
    "flat_colours",
    "frozen",
    "gaussian_filter",
    "judge",
    "median_filter",
    "noise_images",
    "perturb",
    "ponder",
    "ponder_and_prior",
    "ponder_surrogate",
    "prior_surrogate",
    "query_patch",
    "query_perturb",
    "random_patch",
    "running",
    "running_surrogate",
    "samples",
    "samples_surrogate",
    "scores",
    "scores_surrogate",
    "significance",
    "significance_surrogate",
    "transfer",
    "universal_patch",
    "usage",
    "usage_surrogate",
    "victim_of",
]
