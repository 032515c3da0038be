"""What a labelling cost and gave, as its receipt says it."""

from __future__ import annotations

from typing import Any

from scrimp.jobs.label_features import Features
from scrimp.jobs.label_learner import Learner
from scrimp.jobs.label_report import SHARE, labels_to
from scrimp.jobs.label_session import Session
from scrimp.meter import Cost, Reading

_HOW = "features, choosing and fitting; waiting for labels and measuring left out"


def quality_of(learner: Learner) -> dict[str, float | None]:
    """The last accuracy, measured on test images or estimated."""
    last = learner.curve[-1] if learner.curve else {}
    kind = "test_accuracy" if learner.test is not None else "estimated_accuracy"
    return {kind: last.get(kind)}


def cost_of(session: Session, learner: Learner, features: Features, stored: int) -> Cost:
    """Seconds, FLOPs, labels and the ``stored`` bytes of the classifier's file."""
    return Cost(
        seconds=Reading(features.seconds + learner.seconds, f"wall clock: {_HOW}"),
        cpu_seconds=Reading(features.cpu_seconds + learner.cpu_seconds, f"process CPU time: {_HOW}"),
        flops=features.flops,
        stored_bytes=Reading(float(stored), "size of the linear classifier's file"),
        labels=Reading(float(session.status()["labels"]), "labels given; images skipped are not counted"),
    )


def notes_of(
    session: Session, learner: Learner, features: Features, classes: tuple[str, ...], *, ceiling: float | None
) -> dict[str, Any]:
    """Facts of the labelling; ``ceiling`` is the accuracy with all labels."""
    status = session.status()
    notes: dict[str, Any] = {
        "features made by an earlier run": features.reused,
        "seconds of features": features.seconds,
        "seconds of choosing and fitting": learner.seconds,
        "rounds": status["rounds"],
        "skipped while labelling": status["skipped"],
        "stopped early": status["ended"] or None,
        "labels a class": dict(zip(classes, status["counts"], strict=True)),
        "annotators": len({row["who"] for row in session.rows()}),
        "audit": learner.audit,
        "estimate": None if learner.estimate is None else vars(learner.estimate),
        "gain left": None if learner.gain is None else vars(learner.gain),
    }
    if learner.test is not None:
        notes["test images"] = len(learner.test[1])
    if ceiling is not None:
        notes["accuracy with all labels"] = ceiling
        notes["labels to 90 % of it"] = labels_to(learner.curve, SHARE * ceiling)
    return notes
