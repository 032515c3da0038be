"""The error estimate of error-controlled caches: calibrated on noise of its own, and its word tested on more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from scrimp.denoise.calibration import Calibration, calibrate, coverage
from scrimp.denoise.reuse_rules import every
from scrimp.jobs.denoise_sample_attach import rule_of
from scrimp.jobs.denoise_sample_config import AUTO, NONE, DenoiseSampleConfig
from scrimp.jobs.denoise_sample_ways import Subject, Way, asked_way
from scrimp.primitives.errors import InputError

LEVEL = 0.95
_FIRST = 1_000_000_000  # number of the first image whose noise calibrates: none of those that are kept
_BATCHES = 4
_PROBE = ("dpm++", 15)  # how a calibration samples that has to serve many ways
_EVERY = 5


def calibrated(
    subject: Subject, config: DenoiseSampleConfig, each: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Calibrates for the way asked for, or for those that are to be tried; sets the subject's ``scale``.

    A way that is given is calibrated under its own rule. Where ways are tried out one calibration serves them all: it
    refreshes at every fifth step, so the share of samples that it bounds is tested afterwards, see `tested`.

    Returns:
        What the checkpoint keeps: ``calibration``, or ``why`` there is none.

    Raises:
        InputError: a way asked for cannot be calibrated.
    """
    fixed = not config.searches
    solver = config.solver if config.solver != AUTO else _PROBE[0]
    steps = config.steps or _PROBE[1]
    way = asked_way(config, solver, steps, config.cache if fixed else NONE)
    rule = rule_of(way) if fixed else every(_EVERY)
    rows = -(-config.calibrate // (_BATCHES - _BATCHES // 2))
    try:
        found = calibrate(
            subject.network,
            _runs(subject, way, rows, _FIRST, each),
            rule=rule,
            batches=_BATCHES,
            level=LEVEL,
            depth=config.depth,
            order=int(config.extrapolate),
        )
    except InputError as error:
        if config.cache != AUTO:
            raise
        return {"why": str(error)}
    subject.scale = found
    noted = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(found).items()}
    return {"calibration": noted}


def restored(kept: dict[str, Any]) -> Calibration | None:
    """The calibration in a checkpoint."""
    noted = kept.get("calibration")
    return None if noted is None else Calibration(**{**noted, **{k: tuple(noted[k]) for k in ("timesteps", "profile")}})


def tested(subject: Subject, way: Way, config: DenoiseSampleConfig, each: Callable[[], None]) -> dict[str, Any]:
    """For what share of fresh samples the estimate bounded the measured error at every step of the way."""
    rows = -(-config.calibrate // 2)
    runs = _runs(subject, way.with_cache(NONE), rows, 2 * _FIRST, each)
    rule, order = rule_of(way, subject.scale), int(way.extrapolate)
    found = coverage(subject.network, runs, rule=rule, batches=2, depth=way.depth, order=order)
    return asdict(found)


def said(kept: dict[str, Any], way: Way) -> str:
    """In words, what is known of the estimate."""
    scale, fresh = kept["calibration"], kept["tested"]
    wanted = f"relative error of a reused call at most {way.tolerance:g} for {100 * scale['level']:g} % of samples"
    if fresh["share"] is None:
        return f"{wanted}; no step was reused on {fresh['samples']} fresh samples"
    return (
        f"{wanted}; held on {100 * fresh['share']:.3g} % of {fresh['samples']} fresh ones, "
        f"largest error measured {fresh['worst']:.3g}"
    )


def _runs(subject: Subject, way: Way, rows: int, first: int, each: Callable[[], None]) -> Callable[[int], object]:
    plain = way.with_cache(NONE)
    return lambda number: subject.sample(plain, range(first + number * rows, first + (number + 1) * rows), each)
