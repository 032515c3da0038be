"""What an audit adds to its trials: times and energy, pictures, the static model to beat, receipts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.adaptive import image_costs
from scrimp.attack import AdaptiveVictim, AuditReport, Trial
from scrimp.jobs.audit_config import AuditConfig
from scrimp.jobs.audit_pictures import KEPT, write_attack_picture
from scrimp.jobs.audit_speed import CLEAN, energies, speeds
from scrimp.jobs.audit_subject import Subject
from scrimp.jobs.folder import plain
from scrimp.jobs.thin_methods import settings_of
from scrimp.meter import Cost, Reading
from scrimp.primitives.files import write_json
from scrimp.receipts import Receipt

_SPEED = "speed.json"  # times are measured once: a resumed audit takes them as they are
_PICTURES = 3  # images that the page shows with and without the patch


def measured(
    config: AuditConfig,
    subject: Subject,
    report: AuditReport,
    images: Tensor,
    folder: Path,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """``speed`` and ``energy`` of the audit's JSON, under the attack that goes furthest on all images.

    Raises:
        Interrupted: a stop was asked for.
    """
    victim, file = subject.victim, folder / _SPEED
    if not isinstance(victim, AdaptiveVictim) or subject.setup is None or not config.calls:
        why = "not measured: no calls were asked for" if not config.calls else "not measured: a victim of another kind"
        return {"speed": [], "energy": {"clean_joules": None, "attacked_joules": None, "how": why}}
    if config.resume and file.is_file():
        known: dict[str, Any] = json.loads(file.read_bytes())
        return known
    trial = _furthest(report)
    shown = report.shown(trial, images)
    inputs = {CLEAN: images[: len(shown)], trial.case.name: shown}
    options: dict[str, Any] = {"batches": config.batches, "calls": config.calls, "stop": stop}
    dense = subject.model(None)
    found = {"speed": speeds(victim, dense, inputs, **options), "energy": energies(victim, inputs, stop=stop)}
    write_json(file, found)
    return found


def pictured(subject: Subject, report: AuditReport, images: Tensor, folder: Path) -> None:
    """Draw some images with and without the largest patch, and what is kept of them; once."""
    victim = subject.victim
    if not isinstance(victim, AdaptiveVictim) or images.shape[1] not in (1, 3) or (folder / KEPT).is_file():
        return
    patches = [trial for trial in report.trials if trial.case.area and trial.case.goal == "ignore"]
    trial = max(patches, key=lambda one: one.success(report.clean, report.full))
    assert trial.attack is not None
    order = report.clean.costs.argsort(stable=True)
    rows = order[torch.linspace(0, len(order) - 1, min(_PICTURES, len(order))).round().long()]
    write_attack_picture(victim, images[rows.to(images.device)], trial.attack, folder)


def break_even(subject: Subject, report: AuditReport, images: Tensor, labels: Tensor | None) -> dict[str, Any] | None:
    """The cheapest static model of the same weights that is as often right, and when it is the cheaper one.

    Of token merging and keeping tokens at a few settings, as they come, and all tokens; None without labels, or where
    none is as good.
    """
    accuracy = report.clean.accuracy
    if subject.setup is None or subject.build is None or labels is None or accuracy is None:
        return None
    ways = {"dense": (_accuracy(subject, None, images, labels)[0], float(subject.build.flops))}
    free = replace(subject.setup.config, max_flops=None, max_tokens=None, blocks=(), r=(), ratio=(), samples=())
    bare = replace(subject, setup=replace(subject.setup, config=free))
    for method in ("tome", "keep"):
        for setting in settings_of(replace(free, method=method), subject.build):
            ways[setting.way] = _accuracy(bare, setting, images, labels)
    equal = [(flops, name) for name, (right, flops) in ways.items() if right >= accuracy]
    if not equal:
        return None
    flops, name = min(equal)
    clean, attacked = report.clean.mean, _furthest(report).mean
    return {
        "static": name,
        "static_flops": flops,
        "static_accuracy": ways[name][0],
        "clean_flops": clean,
        "attacked_flops": attacked,
        "share": share_from(flops, clean, attacked),
    }


def share_from(static: float, clean: float, attacked: float) -> float | None:
    """The share of attacked images from which on a static cost is the lower one; None: never."""
    if static <= clean:
        return 0.0
    return None if attacked < static else (static - clean) / (attacked - clean)


def receipts_of(config: AuditConfig, subject: Subject, report: AuditReport) -> list[Receipt]:
    """One for the clean images, the baseline, and one a trial."""
    found = [_receipt(config, subject, report, report.clean, report.clean)]
    return found + [_receipt(config, subject, report, trial, clean) for trial, clean in report.entries()]


def _receipt(config: AuditConfig, subject: Subject, report: AuditReport, trial: Trial, clean: Trial) -> Receipt:
    how = "of an image, mean over the trial's images, counted by the parts it used"
    spent = Reading(float(trial.spent), "images through forward and backward; three only asked the cost of as one")
    success = trial.success(clean, report.full)
    about = {"model": subject.name, "method": subject.method, "data": subject.data.name, "threat": trial.case.threat}
    return Receipt(
        kind="run",
        name=f"audit of {subject.name}, {subject.method}",
        way=trial.case.name,
        seed=config.seed,
        baseline=trial is report.clean,
        quality={"test_accuracy": trial.accuracy, "attack_success": success},
        cost=Cost(flops=Reading(trial.mean, how), samples=spent),
        config=plain(config),
        notes={**about, "images": len(trial.costs), "audit": trial.case.kind, "verdict": report.verdict.kind},
    )


def _furthest(report: AuditReport) -> Trial:
    """The attack of most success on all images, or on as many as any."""
    made = [trial for trial in report.trials if trial.attack is not None and trial.case.kind == "attack"]
    most = max(trial.over or 0 for trial in made)
    whole = [trial for trial in made if trial.over == most]
    return max(whole, key=lambda trial: trial.success(report.clean, report.full))


def _accuracy(subject: Subject, setting: Any, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of right answers, and FLOPs an image, of a static way."""
    model, right, flops = subject.model(setting).eval(), 0, 0.0
    with torch.no_grad():
        for part, known in zip(images.split(64), labels.split(64), strict=True):
            right += int((model(part).argmax(1) == known).sum())
        if setting is not None:
            shift = (images[:1] - model.mean.to(images)) / model.std.to(images)
            flops = float(image_costs(model.model, shift)[0])
    return right / len(images), flops
