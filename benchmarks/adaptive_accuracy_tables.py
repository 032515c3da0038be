"""What the receipts of adaptive_accuracy.py say: the figure of the acceptance line, and tables of the method card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt
from scrimp.report.student import t_quantile
from scrimp.report.summary import CONFIDENCE

NAME, DENSE = "adaptive-accuracy", "dense"
LABELS = {
    "cifar10": "small transformer, CIFAR-10",
    "vit-s14": "packaged ViT-S/14, CIFAR-10",
    DENSE: "all tokens",
    "tome": "merging",
    "ats": "sampling (ATS)",
    "keep": "keeping",
    "avit": "halting (A-ViT)",
    "adavit": "gating (AdaViT)",
}
MOST_LOST, LEAST_SAVED = 0.5, 0.3  # points of accuracy and share of the FLOPs, as the acceptance line wants them
UNMEASURED = "Not measured yet."
NOTE = (
    "Points: mean over the seeds of a way's accuracy less that of all tokens with the same seed, ± the standard "
    "deviation of these differences; tie: the 95 % interval of the mean (Student's t) covers zero. FLOPs: of an image, "
    "counted, as a share of those with all tokens; mean over the test images, and of the dearest of them."
)
TRAINED = {
    "cifar10": "fine-tuned, all with the same FLOPs, all tokens among them",
    "vit-s14": "frozen, with a linear classifier fitted on its own features",
}
GIVEN = {
    "cifar10": "no training: the model of all tokens as it is",
    "vit-s14": "no training: the transformer and the classifier of all tokens as they are",
}


def accuracy(receipts: Sequence[Receipt]) -> str:
    """Line 3: points against all tokens and FLOPs saved, trained; how many keep to what was wanted; ATS untrained."""
    parts = [part for task in _tasks(receipts) if (part := _stated([*_of(receipts, task)], task))]
    return "; ".join(parts) or UNMEASURED


def _stated(receipts: Sequence[Receipt], task: str) -> str:
    rows = [(method, row) for method, way, row in _rows(receipts, trained=True) if method != DENSE and row.points]
    if not rows:
        return ""
    cells = [f"{LABELS.get(method, method)} {row.told()} at {row.fewer():.0f} % fewer FLOPs" for method, row in rows]
    kept = [LABELS.get(method, method) for method, row in rows if row.keeps()]
    said = f"{len(kept)} of {len(rows)} within {MOST_LOST} points at {100 * LEAST_SAVED:.0f} % fewer or more"
    curve = [f"{way} {row.told()} at {row.fewer():.0f} %" for method, way, row in _rows(receipts, trained=False)
             if method == "ats" and row.points]  # fmt: skip
    untrained = f"; ATS with no training: {', '.join(curve)}" if curve else ""
    return f"{LABELS.get(task, task)}, {_seeds(receipts)}: {', '.join(cells)}; {said}{untrained}"


def card(folder: Path) -> str:
    """The tables of each task: trained, and as it comes; ``folder`` is that of all receipts."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*/*.json"))]
    tables = [
        table_text([*_of(receipts, task)], task, trained=trained)
        for task in _tasks(receipts)
        for trained in (True, False)
    ]
    found = [table for table in tables if table]
    return "\n\n".join([*found, NOTE]) if found else UNMEASURED


def table_text(receipts: Sequence[Receipt], task: str, *, trained: bool) -> str:
    """A row for each way; empty where none was measured."""
    found = list(_rows(receipts, trained=trained))
    if not found:
        return ""
    about = (TRAINED if trained else GIVEN).get(task, "")
    rows = [f"{LABELS.get(task, task)}, {about}; {_about(receipts)}.", ""]
    rows += [
        "| method | setting | accuracy, % | points | FLOPs | dearest image | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, way, row in found:
        setting = "-" if method == DENSE else way
        points = "-" if method == DENSE or not row.points else row.told()
        dearest = f"{100 * row.dearest:.0f} %"
        cells = (LABELS.get(method, method), setting, row.spread(), points, f"{100 - row.fewer():.0f} %", dearest)
        rows.append(f"| {' | '.join(cells)} | {len(row.accuracies)} |")
    return "\n".join(rows)


class Row:
    """One way over its seeds.

    Attributes:
        accuracies: 0 to 1, of each seed.
        shares: mean FLOPs over those of all tokens, of each seed.
        points: accuracy less that of all tokens of the same seed, in points; of seeds where that is known.
        dearest: FLOPs of the dearest test image of any seed over those of all tokens.
    """

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.shares: list[float] = []
        self.points: list[float] = []
        self.dearest = 0.0

    def add(self, item: dict[str, Any], dense: float | None) -> None:
        self.accuracies.append(item["accuracy"])
        self.shares.append(item["share"])
        self.dearest = max(self.dearest, item["share"] * item["flops"]["worst"] / item["flops"]["mean"])
        if dense is not None:
            self.points.append(100 * (item["accuracy"] - dense))

    def spread(self) -> str:
        return _spread([100 * value for value in self.accuracies], "")

    def fewer(self) -> float:
        """FLOPs saved, %."""
        return 100 * (1 - statistics.mean(self.shares))

    def keeps(self) -> bool:
        """Whether it loses and saves as the acceptance line wants."""
        return statistics.mean(self.points) >= -MOST_LOST and self.fewer() >= 100 * LEAST_SAVED

    def told(self) -> str:
        """Mean and spread of the points, and whether they are told apart from none."""
        count = len(self.points)
        if count < 3:  # of two any interval covers zero
            return _spread(self.points, "+")
        reach = t_quantile(CONFIDENCE, count - 1) * statistics.stdev(self.points) / math.sqrt(count)
        return _spread(self.points, "+") + (" (tie)" if abs(statistics.mean(self.points)) <= reach else "")


def _rows(receipts: Sequence[Receipt], *, trained: bool) -> Iterator[tuple[str, str, Row]]:
    """Method, way and figures over the seeds, all tokens first, in the order of `LABELS` and of the settings."""
    dense = {
        item.seed: one["accuracy"]
        for item in receipts
        if item.way == DENSE
        for one in item.notes["points"]
        if one["trained"] == trained
    }
    for method in LABELS:
        found: dict[str, Row] = {}
        for item in receipts:
            for one in item.notes["points"] if item.way == method else []:
                if one["trained"] == trained:
                    found.setdefault(one["way"], Row()).add(one, dense.get(item.seed))
        yield from ((method, way, row) for way, row in found.items())


def _tasks(receipts: Sequence[Receipt]) -> list[str]:
    known = {item.name.removeprefix(f"{NAME}/") for item in receipts}
    return [task for task in LABELS if task in known]


def _of(receipts: Sequence[Receipt], task: str) -> Iterator[Receipt]:
    return (item for item in receipts if item.name == f"{NAME}/{task}")


def _seeds(receipts: Sequence[Receipt]) -> str:
    count = len({item.seed for item in receipts})
    return f"{count} seed{'s' * (count != 1)}"


def _about(receipts: Sequence[Receipt]) -> str:
    shown = sorted({item.notes["test images"] for item in receipts})
    return f"{' and '.join(f'{count:,}' for count in shown)} test images"


def _spread(values: Sequence[float], sign: str) -> str:
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
