"""The acceptance lines of attacks on the cost, for benchmarks/readme.py."""

from __future__ import annotations

import attack_tables as attack
from acceptance import Line

_RECEIPTS = "attack/*/*.json"

ATTACK_LINES = (
    Line(
        "1",
        "Attack Success of one patch on 8 % of the area, and of its controls",
        "attack_runs.py run",
        _RECEIPTS,
        attack.success,
        "halting at least 95 %, sampling 40 %, gating 45 % of the reachable ceiling; controls within 2 %; static "
        "models exactly 0; keeping answers at least 85 % at 5 points or less",
        together=True,
    ),
    Line(
        "2",
        "time, batch poisoning and energy under attack",
        "attack_runs.py run",
        _RECEIPTS,
        attack.real_cost,
        "percentiles of masked, padded, ragged and dense execution; the factor of one bad image; joules where there is "
        "a meter",
        together=True,
    ),
    Line(
        "3",
        "Attack Success of the patch before and after training against patches, made anew on each; the hard budget",
        "attack_runs.py run",
        _RECEIPTS,
        attack.defence,
        "under 35 % at 2 points of clean accuracy or less; every image within the budget",
        together=True,
    ),
    Line(
        "4",
        "a full audit of the small transformer",
        "attack_runs.py run",
        _RECEIPTS,
        attack.duration,
        "under 15 minutes on 2 cores; resumes; the same verdict with the same seed",
        together=True,
    ),
)
