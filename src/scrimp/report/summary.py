"""Receipts of one study side by side: means, spreads, and the verdict on each way against the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scrimp.meter.cost import Reading
from scrimp.receipts import Receipt
from scrimp.report import units
from scrimp.report.student import t_quantile

DIRECTIONS = {
    "accuracy": 1,
    "agreement": 1,
    "loss": -1,
    "error": -1,
    "kl": -1,
    "bits": -1,
    "perplexity": -1,
    "precision": 1,
    "psnr": 1,
    "ssim": 1,
}
"""The last word of a quality's name to its good direction; a quality that is not here is called higher or lower."""

CONFIDENCE = 0.95
ENERGIES = ("joules", "energy_modelled")
_LEADING_QUALITIES = ("test_accuracy", "train_loss")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of the ``count`` known values; ``None`` where there is none."""

    mean: float | None = None
    deviation: float | None = None
    count: int = 0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        known = [value for value in values if units.is_known(value)]
        if not known:
            return cls()
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class WayRow:
    """One way of one study over its seeds. ``quality`` and ``cost`` hold a `Spread` for each name or cost field."""

    name: str
    way: str
    baseline: bool
    runs: int
    quality: dict[str, Spread]
    cost: dict[str, Spread]


@dataclass(frozen=True)
class Verdict:
    """One way against the baseline in one quality.

    Attributes:
        outcome: ``"tie"``, ``"better"``, ``"worse"``, for a quality of unknown direction ``"higher"`` or
            ``"lower"``, else why there is none, such as ``"one seed: no verdict"``.
        difference: mean over the ``pairs`` of the way's figure minus the baseline's.
        low, high: the 95 % interval of that difference; ``None`` with fewer than two pairs.
    """

    name: str
    way: str
    quality: str
    outcome: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0

    @property
    def decided(self) -> bool:
        """Whether there were enough pairs to say anything, a tie included."""
        return self.low is not None


Study = dict[str, list[Receipt]]
"""Way to its runs, the baseline first, then in order of appearance."""


def studies(receipts: Iterable[Receipt]) -> dict[str, Study]:
    """Study name to its ways. Of two runs of one way with one seed only the newest counts (see `superseded`)."""
    grouped: dict[str, dict[str, dict[object, Receipt]]] = {}
    for position, receipt in enumerate(receipts):
        runs = grouped.setdefault(receipt.name, {}).setdefault(receipt.way, {})
        key: object = ("unseeded", position) if receipt.seed is None else receipt.seed
        if key not in runs or receipt.created >= runs[key].created:
            runs[key] = receipt
    return {
        name: _baseline_first({way: list(runs.values()) for way, runs in ways.items()})
        for name, ways in grouped.items()
    }


def superseded(receipts: Sequence[Receipt]) -> int:
    """How many receipts a newer run of the same way and seed replaces; the same receipt twice is one receipt."""
    distinct = {str(receipt.to_dict()) for receipt in receipts if receipt.seed is not None}
    return len(distinct) - len({(run.name, run.way, run.seed) for run in receipts if run.seed is not None})


def summarise(receipts: Iterable[Receipt]) -> list[WayRow]:
    """One row a way: mean and spread over seeds of every quality and cost field.

    Energies read in different ways are not averaged or set side by side: their spreads are empty.
    """
    return [_row(way, runs, study) for study in studies(receipts).values() for way, runs in study.items()]


def verdict(receipts: Iterable[Receipt], quality: str) -> list[Verdict]:
    """Every way that is no baseline against its study's baseline in ``quality``, paired by seed.

    The interval is mean ± t s / sqrt(n) over the n paired differences (Student, "The probable error of a mean",
    Biometrika 6, 1908); a tie is an interval that covers zero.
    """
    return [
        _judge(base, runs, quality) if base else Verdict(name, way, quality, "no baseline: no verdict")
        for name, study in studies(receipts).items()
        for base in [baseline_of(study)]
        for way, runs in study.items()
        if runs is not base
    ]


def quality_names(receipts: Iterable[Receipt]) -> list[str]:
    """The qualities of the receipts: test accuracy and training loss first, then in order of appearance."""
    found = dict.fromkeys(name for receipt in receipts for name in receipt.quality)
    return [name for name in _LEADING_QUALITIES if name in found] + [
        name for name in found if name not in _LEADING_QUALITIES
    ]


def baseline_of(study: Study) -> list[Receipt] | None:
    """The runs of the first way marked as the baseline."""
    return next((runs for runs in study.values() if _is_baseline(runs)), None)


def readings(runs: Iterable[Receipt], field: str) -> list[Reading]:
    """The readings of one cost field, one a run."""
    return [getattr(run.cost, field) for run in runs]


def ways_measured(runs: Iterable[Receipt], field: str) -> list[str]:
    """In how many ways, and which, the known figures of a cost field were obtained."""
    return list(dict.fromkeys(item.how for item in readings(runs, field) if units.is_known(item.value)))


def _row(way: str, runs: list[Receipt], study: Study) -> WayRow:
    everyone = [run for others in study.values() for run in others]
    cost = {field: Spread.of(item.value for item in readings(runs, field)) for field in units.COSTS}
    for field in ENERGIES:
        if len(ways_measured(everyone, field)) > 1:
            cost[field] = Spread()
    quality = {name: Spread.of(run.quality.get(name) for run in runs) for name in quality_names(everyone)}
    return WayRow(runs[0].name, way, any(run.baseline for run in runs), len(runs), quality, cost)


def _judge(base: list[Receipt], runs: list[Receipt], quality: str) -> Verdict:
    differences = _paired(base, runs, quality)
    name, way = runs[0].name, runs[0].way
    if not differences:
        return Verdict(name, way, quality, f"{_no_pair(base, runs, quality)}: no verdict")
    spread = Spread.of(differences)
    if spread.mean is None or spread.deviation is None:
        return Verdict(name, way, quality, "one seed: no verdict", spread.mean, pairs=spread.count)
    reach = t_quantile(CONFIDENCE, spread.count - 1) * spread.deviation / spread.count**0.5
    low, high = spread.mean - reach, spread.mean + reach
    return Verdict(name, way, quality, _outcome(quality, low, high), spread.mean, low, high, spread.count)


def _paired(base: list[Receipt], runs: list[Receipt], quality: str) -> list[float]:
    reference: dict[int | None, float | None] = {
        run.seed: run.quality.get(quality) for run in base if run.seed is not None
    }
    differences = []
    for run in runs:
        ours, theirs = run.quality.get(quality), reference.get(run.seed)
        if units.is_known(ours) and units.is_known(theirs):
            differences.append(ours - theirs)
    return differences


def _no_pair(base: list[Receipt], runs: list[Receipt], quality: str) -> str:
    if not all(any(units.is_known(run.quality.get(quality)) for run in side) for side in (base, runs)):
        return "not measured"
    return "one seed" if len(base) == len(runs) == 1 else "no shared seed"


def _outcome(quality: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return "tie"
    direction = DIRECTIONS.get(quality.rpartition("_")[2])
    if direction is None:
        return "higher" if low > 0 else "lower"
    return "better" if direction * low > 0 else "worse"


def _baseline_first(study: Study) -> Study:
    return dict(sorted(study.items(), key=lambda item: not _is_baseline(item[1])))


def _is_baseline(runs: Iterable[Receipt]) -> bool:
    return any(run.baseline for run in runs)
