"""What a reader must know before comparing the figures: other machines, other versions, other meters, missing runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scrimp.receipts import Receipt
from scrimp.report import units
from scrimp.report.summary import ENERGIES, Study, readings, studies, superseded, ways_measured


def caveats(receipts: Sequence[Receipt]) -> list[str]:
    """Sentences, most important first; none when every figure can be set beside every other."""
    found = [*_replaced(receipts)]
    every = studies(receipts)
    for name, study in every.items():
        where = f" ({name})" if len(every) > 1 else ""
        found += [sentence[:-1] + where + "." for sentence in _of_study(study)]
    return found


def distinct(receipts: Iterable[Receipt], get: Callable[[Receipt], Any]) -> list[Any]:
    """The different values of ``get`` over the receipts, in order of appearance."""
    seen = {json.dumps(value, sort_keys=True, default=str): value for value in map(get, receipts)}
    return list(seen.values())


def partial(runs: Iterable[Receipt], field: str) -> tuple[str, ...]:
    """What a cost field's count is known to have missed, in any of the runs."""
    missed = (part for reading in readings(runs, field) if units.is_known(reading.value) for part in reading.missed)
    return tuple(dict.fromkeys(missed))


def energy_unmeasured(receipts: Iterable[Receipt]) -> str | None:
    """Why no receipt has a joule, such as ``"not measured: no meter"``; ``None`` when at least one has."""
    found = readings(receipts, "joules")
    if any(units.is_known(reading.value) for reading in found):
        return None
    return "; ".join(dict.fromkeys(reading.how for reading in found)) or "not measured: no meter"


def _replaced(receipts: Sequence[Receipt]) -> list[str]:
    count = superseded(receipts)
    if not count:
        return []
    return [f"{count} older receipt{'s' if count > 1 else ''} of the same way and seed left out."]


def _of_study(study: Study) -> list[str]:
    runs = [run for way in study.values() for run in way]
    return [*_machines(runs), *_versions(runs), *_meters(runs), *_partial_counts(study), *_seeds(study)]


def _machines(runs: list[Receipt]) -> list[str]:
    machines = distinct(runs, lambda run: run.machine)
    if len(machines) < 2:
        return []
    keys = dict.fromkeys(key for machine in machines for key in machine)
    differing = [key for key in keys if len({str(machine.get(key)) for machine in machines}) > 1]
    return [
        f"Receipts come from {len(machines)} machines (differing in {', '.join(differing)}): "
        "their times are not comparable."
    ]


def _versions(runs: list[Receipt]) -> list[str]:
    packages = dict.fromkeys(package for run in runs for package in run.versions)
    found = {package: list(dict.fromkeys(run.versions.get(package) for run in runs)) for package in packages}
    differing = [
        f"{package} {' / '.join(version or 'absent' for version in versions)}"
        for package, versions in found.items()
        if len(versions) > 1
    ]
    return [f"Versions differ between receipts: {', '.join(differing)}."] if differing else []


def _meters(runs: list[Receipt]) -> list[str]:
    found = []
    for field, (title, _) in units.COSTS.items():
        ways = ways_measured(runs, field)
        if len(ways) < 2:
            continue
        if field in ENERGIES:
            found.append(f"{title.capitalize()} readings are not mixed ({'; '.join(ways)}).")
        else:
            found.append(f"{_sentence_case(title)} measured in {len(ways)} ways: compare with care.")
    return found


def _partial_counts(study: Study) -> list[str]:
    found = []
    for field, (title, _) in units.COSTS.items():
        missed = dict.fromkeys(part for runs in study.values() for part in partial(runs, field))
        if missed:
            found.append(f"{_sentence_case(title)} counted in part, without {', '.join(missed)}.")
    return found


def _seeds(study: Study) -> list[str]:
    baselines = [way for way, runs in study.items() if any(run.baseline for run in runs)]
    found = [f"Several baselines; compared with {baselines[0]}."] if len(baselines) > 1 else []
    seeds = {way: {run.seed for run in runs} for way, runs in study.items()}
    if len({frozenset(one) for one in seeds.values()}) > 1:
        counts = ", ".join(f"{way} {len(runs)}" for way, runs in study.items())
        found.append(f"Not every way has the same seeds (runs: {counts}): only shared seeds are paired.")
    return found


def _sentence_case(title: str) -> str:
    return title[0].upper() + title[1:]
