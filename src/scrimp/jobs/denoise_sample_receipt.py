"""The receipt of `scrimp denoise sample`: its own cost, and beside it that of the baseline on the same noise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.jobs.denoise_sample_pilot import Trial, bound_of, reference_way
from scrimp.jobs.denoise_sample_ways import Way
from scrimp.jobs.folder import RECEIPT, plain
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

if TYPE_CHECKING:
    from scrimp.jobs.denoise_sample import Sampling


def sample_receipt(sampling: Sampling, peak: Reading, energy: Reading) -> Receipt:
    """Of a job that is done."""
    config, done, way = sampling.config, sampling.done, sampling.way
    compared = sampling.compared
    return Receipt(
        kind="run",
        name=f"denoise-sample-{sampling.subject.name}",
        way=way.name,
        seed=config.seed,
        quality=_quality(sampling, compared),
        cost=Cost(
            seconds=Reading(done.seconds, "wall clock: all images; trying settings out is not in it"),
            cpu_seconds=Reading(done.cpu_seconds, "process CPU time: the same"),
            flops=sampling.pilot.cost(way).of(done.full, done.reused, 1),
            peak_bytes=peak,
            joules=energy,
            samples=Reading(float(config.count), "images generated"),
        ),
        config=plain(config),
        notes=_notes(sampling, compared),
    )


def _quality(sampling: Sampling, compared: tuple[Trial, Trial] | None) -> dict[str, float | None]:
    done, count = sampling.done, sampling.config.count
    found: dict[str, float | None] = {
        "nfe": float(sampling.way.nfe),
        "calls_computed": done.full / count,
        "images_a_second": count / done.seconds,
    }
    if compared is None:
        return found
    chosen, base = compared
    return found | {
        "paired_error": chosen.error,
        "baseline_paired_error": base.error,
        "flops_ratio": _ratio(base.flops, chosen.flops),
        "seconds_ratio": _ratio(base.seconds, chosen.seconds),
        "cpu_ratio": _ratio(base.cpu_seconds, chosen.cpu_seconds),
    }


def _notes(sampling: Sampling, compared: tuple[Trial, Trial] | None) -> dict[str, Any]:
    config, done, images = sampling.config, sampling.done, len(sampling.pilot.numbers)
    notes: dict[str, Any] = {
        **sampling.subject.notes(),
        "way": asdict(sampling.way),
        "batch": min(config.batch, config.count),
        "seconds trying out": done.pilot_seconds,
        "resumed": done.resumes,
    }
    if done.calibration:
        notes["calibration"] = done.calibration
    if compared is None:
        return notes
    notes["pilot images"] = images
    notes["reference"] = reference_way(sampling.subject.prediction, config.reference_steps).name
    if config.seconds is None:
        notes["largest paired error"] = bound_of(sampling.pilot, config) if config.searches else None
    notes["ways"] = [record(trial, images) for trial in sampling.pilot.trials]
    notes["taken"], notes["baseline"] = (record(trial, images) for trial in compared)
    return notes


def record(trial: Trial, images: int) -> dict[str, Any]:
    """A trial as plain values; seconds are those of one image."""
    return {
        "way": trial.way.name,
        "nfe": trial.way.nfe,
        "calls computed": trial.full,
        "calls reused": trial.reused,
        "flops": trial.flops,
        "seconds": trial.seconds / images if trial.error is not None else None,
        "cpu_seconds": trial.cpu_seconds / images if trial.error is not None else None,
        "paired error": trial.error,
        **({"note": trial.note} if trial.note else {}),
    }


def earlier(run: Path) -> tuple[Way, dict[str, Any]]:
    """The way that an earlier run took, and its calibration.

    Raises:
        InputError: the folder holds no finished run of this job.
    """
    notes = load_receipt(run / RECEIPT).notes
    try:
        return Way(**notes["way"]), notes.get("calibration", {})
    except (KeyError, TypeError) as error:
        raise InputError(
            "a finished run of scrimp denoise sample for --like", f"another in {run}", "pass its run folder"
        ) from error


def _ratio(base: float | None, other: float | None) -> float | None:
    return base / other if base and other else None
