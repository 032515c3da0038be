"""What the receipts of label_accuracy.py say: accuracy by the number of labels, and how many reach 90 %."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from scrimp.jobs.label_report import SHARE
from scrimp.receipts import Receipt, load_receipt
from scrimp.report.student import t_quantile
from scrimp.report.summary import CONFIDENCE

NAME, SPEED = "label-accuracy", "label-speed"
PEER = "scikit-activeml "
"""Before the names of ways that are not ours."""
RANDOM = "random"
SHOWN = (10, 20, 50, 100, 200, 500)
TITLES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "solar-cells": "solar cells, whole or broken"}
UNMEASURED = "Not measured yet."
NOTE = (
    "Accuracy in % on the test images, mean over the seeds ± half of the 95 % interval (Student's t). Labels to 90 %: "
    "how many reach 90 % of the accuracy that all labels of the pool give, read off between rounds (straight in the "
    "logarithm of the labels), mean over the seeds; in brackets as a ratio to random labels of the same seed, "
    "geometric mean. Who did not come so far counts with the last round: > and < say which way that errs, and ? that "
    "it errs both ways. CPU: seconds of choosing, all rounds."
)

Curve = Sequence[dict[str, float]]


def labels_to(curve: Curve, accuracy: float) -> float | None:
    """Labels at which a curve first comes to an accuracy, between rounds straight in their logarithm."""
    before: dict[str, float] | None = None
    for point in curve:
        if point["accuracy"] >= accuracy:
            if before is None:
                return point["labels"]
            share = (accuracy - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return math.exp(math.log(before["labels"]) + share * math.log(point["labels"] / before["labels"]))
        before = point
    return None


def figures(receipts: Sequence[Receipt]) -> str:
    """The acceptance line: the default's labels to 90 % beside random's, and how it stands beside the best other."""
    parts = []
    for task in _tasks(receipts):
        found = _of(receipts, task)
        default, seeds = found[0].way, f"{len(found)} seed{'s' * (len(found) != 1)}"
        row = Reach(found, default)
        behind = [f"{budget} labels" for budget in SHOWN if _behind(found, default, budget)]
        stands = f"worse than the best of scikit-activeml at {', '.join(behind)}" if behind else ""
        known = any(way.startswith(PEER) for way in found[0].notes["curves"])
        stands = stands or (
            "nowhere told to be worse than the best of scikit-activeml" if known else "others not measured"
        )
        parts.append(
            f"{TITLES[task]}, {seeds}: {default} {row.told()} labels to 90 % of all labels' accuracy, {stands}"
        )
    return "; ".join(parts) or UNMEASURED


def card(folder: Path) -> str:
    """A table a task; ``folder`` is that of all receipts."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*/*.json"))]
    tables = [table_text(_of(receipts, task), task) for task in _tasks(receipts)]
    return "\n\n".join([*tables, NOTE]) if tables else UNMEASURED


def table_text(receipts: Sequence[Receipt], task: str) -> str:
    """A row for each way, ours first."""
    first = receipts[0].notes
    ceiling = statistics.fmean(item.notes["accuracy with all labels"] for item in receipts)
    rows = [
        f"{TITLES[task]}, {first['pool']:,} images to choose from, {first['test images']:,} test images, "
        f"{len(receipts)} seeds; all labels give {100 * ceiling:.1f} %.",
        "",
        f"| choice | {' | '.join(map(str, SHOWN))} | labels to 90 % | CPU |",
        f"|---|{'---|' * len(SHOWN)}---|---|",
    ]
    for way in ways_of(receipts):
        cells = [spread(accuracies(receipts, way, budget)) for budget in SHOWN]
        spent = statistics.fmean(
            sum(point["cpu_seconds"] for point in item.notes["curves"][way])
            for item in receipts
            if way in item.notes["curves"]
        )
        rows.append(f"| {way} | {' | '.join(cells)} | {Reach(receipts, way).told()} | {spent:.1f} |")
    return "\n".join(rows)


def ways_of(receipts: Sequence[Receipt]) -> list[str]:
    return list(dict.fromkeys(way for item in receipts for way in item.notes["curves"]))


def accuracies(receipts: Sequence[Receipt], way: str, budget: int) -> list[float]:
    """In %, of each seed that has it."""
    return [
        100 * point["accuracy"]
        for item in receipts
        for point in item.notes["curves"].get(way, ())
        if point["labels"] == budget
    ]


class Reach:
    """How many labels a way takes to 90 % of the accuracy of all.

    Attributes:
        labels: of each seed; of one that did not come so far, those of its last round.
        missed: seeds that did not.
        ratios: to random labels of the same seed; none for these themselves.
        errs: "<" where random labels of a seed did not come so far, ">" where the way did not.
    """

    def __init__(self, receipts: Sequence[Receipt], way: str) -> None:
        self.labels: list[float] = []
        self.ratios: list[float] = []
        self.missed = 0
        self.errs: set[str] = set()
        for item in receipts:
            curves = item.notes["curves"]
            if way in curves:
                wanted = SHARE * item.notes["accuracy with all labels"]
                mine = labels_to(curves[way], wanted)
                self.missed += mine is None
                self.labels.append(mine or curves[way][-1]["labels"])
                if RANDOM in curves and way != RANDOM:
                    theirs = labels_to(curves[RANDOM], wanted)
                    self.errs |= {">"} if mine is None else set()
                    self.errs |= {"<"} if theirs is None else set()
                    self.ratios.append(self.labels[-1] / (theirs or curves[RANDOM][-1]["labels"]))

    def told(self) -> str:
        if not self.labels:
            return "-"
        sign = "?" if len(self.errs) == 2 else "".join(self.errs)
        ratio = f" ({sign}{statistics.geometric_mean(self.ratios):.2f})" if self.ratios else ""
        return f"{'>' if self.missed else ''}{statistics.fmean(self.labels):.0f}{ratio}"


def spread(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    half = t_quantile(CONFIDENCE, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.1f} ± {half:.1f}"


def _behind(receipts: Sequence[Receipt], way: str, budget: int) -> bool:
    """Whether the best of the others is better, and the interval of the paired differences does not cover zero."""
    others = {other: accuracies(receipts, other, budget) for other in ways_of(receipts) if other.startswith(PEER)}
    mine = accuracies(receipts, way, budget)
    full = [values for values in others.values() if len(values) == len(mine) and len(mine) > 1]
    if not full:
        return False
    gaps = [theirs - own for theirs, own in zip(max(full, key=statistics.fmean), mine, strict=True)]
    half = t_quantile(CONFIDENCE, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps) > half


def _tasks(receipts: Sequence[Receipt]) -> list[str]:
    known = {item.name.removeprefix(f"{NAME}/") for item in receipts}
    return [task for task in TITLES if task in known]


def _of(receipts: Sequence[Receipt], task: str) -> list[Receipt]:
    return [item for item in receipts if item.name == f"{NAME}/{task}"]


def speed(receipts: Sequence[Receipt]) -> str:
    """The slowest of the ways, and the one that adds most memory: a round at the size of a real pool."""
    if not receipts:
        return UNMEASURED
    slow = max(receipts, key=lambda item: item.cost.cpu_seconds.value or 0.0)
    wide = max(receipts, key=lambda item: item.cost.peak_bytes.value or 0.0)
    return (
        f"{slow.cost.cpu_seconds.value:.1f} s of CPU at most ({slow.way}), {slow.cost.seconds.value:.1f} s on the "
        f"clock of a busy machine; {megabytes(wide)} MB more at most ({wide.way}); {len(receipts)} strategies"
    )


def speed_table(folder: Path) -> str:
    """A row for each strategy; ``folder`` is that of all receipts."""
    receipts = [load_receipt(path) for path in sorted((folder / SPEED).glob("*.json"))]
    if not receipts:
        return UNMEASURED
    asked = receipts[0].config
    rows = [
        f"One round: {asked['budget']} of {asked['images']:,} images, {asked['width']} numbers each, "
        f"{asked['classes']} classes, {asked['labelled']} labels there already; {asked['threads']} threads, "
        f"median of {asked['repeats']}.",
        "",
        "| choice | CPU, s | clock, s | memory added, MB |",
        "|---|---|---|---|",
    ]
    for item in receipts:
        spent = [f"{reading.value:.2f}" for reading in (item.cost.cpu_seconds, item.cost.seconds)]
        rows.append(f"| {' | '.join([item.way, *spent, megabytes(item)])} |")
    return "\n".join(rows)


def megabytes(receipt: Receipt) -> str:
    value = receipt.cost.peak_bytes.value
    return "-" if value is None else f"{value / 1e6:.0f}"
