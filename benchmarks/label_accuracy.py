"""What chosen labels are worth: accuracy against labels, ours beside random ones and beside scikit-activeml's.

    python benchmarks/label_accuracy.py run                    # half an hour of one core; stop and start at will
    python benchmarks/label_accuracy.py run --tasks cifar10 --seeds 0 1
    python benchmarks/label_accuracy.py table                  # from those there are in receipts/label-accuracy

Features of 5,000 images of CIFAR-10, as many of Fashion-MNIST and 1,823 photographs of solar cells, made once by a
packaged EfficientNet-Lite0 (ImageNet) at 128 pixels, without its last convolution. A seed draws the four fifths of them
that are the pool, and all that a strategy draws; every way then chooses labels in rounds of growing size, and the same
linear classifier is fitted on each. Settings of ours are those of `scrimp label`; the one called `herding, then margin`
begins by `herding` instead of `centres`. The others are asked through `scrimp.select.bridge`, in double precision, with
the settings they come with; those that need a classifier begin as ours do, but by their own TypiClust. Its BADGE draws
as ours does and is left out: on a pool of this kind it takes minutes and, at 100 classes, tens of gigabytes. Its
MaxHerding, slower still, is asked for 100 labels.

Without scikit-activeml (`pip install scikit-activeml`) its ways are left out, and are added by a later run.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from torch import Tensor

from label_accuracy_data import SETS, Table, table
from label_accuracy_tables import NAME, PEER, card, labels_to
from scrimp.data.packed import cache_folder
from scrimp.jobs.label_config import LabelConfig, Name
from scrimp.jobs.label_learner import UNTIL, strategy_named
from scrimp.jobs.label_report import SHARE
from scrimp.meter import Cost, Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.knn import unit_rows
from scrimp.represent.linear import fit_linear_probe, linear_accuracy
from scrimp.select import Strategy, bridge, cold_start

RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
BUDGETS = (10, 20, 30, 50, 70, 100, 150, 200, 300, 500)
DRAWN = 0.8  # of the images are the pool of a seed
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "TypiClust": ("TypiClust", {}),
    "ProbCover": ("ProbCover", {}),
    "CoreSet": ("CoreSet", {}),
    "MaxHerding": ("MaxHerding", {}),
    "margin": ("UncertaintySampling", {"method": "margin_sampling"}),
    "Falcun": ("Falcun", {}),
}
DOUBTING = ("margin", "Falcun")  # they ask a classifier
MOST = {"MaxHerding": 100}  # labels; it would take a minute a seed to go on
HERDED = "herding, then margin"
WAYS = (*get_args(Name), HERDED, *(PEER + name for name in PEERS))


@dataclass(frozen=True)
class Run:
    """Measure what is missing; a receipt for each task and seed, written anew with every way, features in --work."""

    tasks: tuple[str, ...] = tuple(SETS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    ways: tuple[str, ...] = WAYS
    threads: int = 1
    out: Path = RECEIPTS
    work: Path = cache_folder() / NAME


@dataclass(frozen=True)
class Tables:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


def run(order: Run) -> None:
    strange = [*set(order.tasks).difference(SETS), *set(order.ways).difference(WAYS)]
    if strange:
        raise InputError(f"tasks out of {', '.join(SETS)} and ways out of {', '.join(WAYS)}", strange[0], "correct it")
    torch.set_num_threads(order.threads)
    ways = [way for way in order.ways if not way.startswith(PEER) or peers() is not None]
    if len(ways) < len(order.ways):
        print("scikit-activeml is not installed: its ways are left out", file=sys.stderr)
    for seed, task in itertools.product(order.seeds, order.tasks):
        path = order.out / task / f"s{seed}.json"
        for way in ways:
            before = load_receipt(path) if path.is_file() else None
            if before is None or way not in before.notes["curves"]:
                save_receipt(measure(task, seed, way, table(task, order.work), before), path)
                print(f"{task} seed {seed}: {way}", flush=True)


def measure(task: str, seed: int, way: str, whole: Table, before: Receipt | None) -> Receipt:
    """The receipt of a task and a seed, with what an earlier one holds and one way more."""
    drawn = torch.randperm(len(whole.pool), generator=generator_for(seed, 0))[: int(DRAWN * len(whole.pool))]
    data = Table(unit_rows(whole.pool[drawn]), whole.pool_labels[drawn], unit_rows(whole.test), whole.test_labels)
    known = {} if before is None else before.notes
    ceiling = known.get("accuracy with all labels")
    if ceiling is None:
        ceiling = linear_accuracy(data.pool, data.pool_labels, data.test, data.test_labels)
    default = LabelConfig(data="").strategy
    curves = {**known.get("curves", {}), way: curve(way, data, seed)}
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/{task}",
        way=default,
        seed=seed,
        quality=quality(curves.get(default), ceiling),
        cost=Cost(labels=Reading(float(BUDGETS[-1]), "labels of the last round")),
        config={"budgets": list(BUDGETS), "share of the images in the pool": DRAWN},
        notes={
            "pool": len(data.pool),
            "test images": len(data.test),
            "classes": int(whole.pool_labels.max()) + 1,
            "accuracy with all labels": ceiling,
            "scikit-activeml": peers().__version__ if peers() is not None else known.get("scikit-activeml"),
            "load": os.getloadavg()[0],
            "curves": {name: curves[name] for name in WAYS if name in curves},
        },
    )


def quality(points: list[dict[str, float]] | None, ceiling: float) -> dict[str, float | None]:
    """Of the default's curve, where it has been measured."""
    if points is None:
        return {"test_accuracy": None, "labels_to_90": None}
    return {"test_accuracy": points[-1]["accuracy"], "labels_to_90": labels_to(points, SHARE * ceiling)}


def curve(way: str, data: Table, seed: int) -> list[dict[str, float]]:
    """Labels, accuracy on the test images, and the CPU seconds of choosing, of every round."""
    classes = int(data.pool_labels.max()) + 1
    strategy = strategy_of(way, classes, data.pool_labels)
    labelled, probabilities = torch.zeros(0, dtype=torch.int64), None
    points: list[dict[str, float]] = []
    most = MOST.get(way.removeprefix(PEER), len(data.pool))
    for budget in [budget for budget in BUDGETS if budget <= most]:
        clock = time.process_time()
        generator = generator_for(seed, 1, budget)
        picked = strategy(data.pool, probabilities, labelled, budget - len(labelled), generator=generator)
        spent = time.process_time() - clock
        labelled = torch.cat([labelled, picked.indices])
        probe = fit_linear_probe(data.pool[labelled], data.pool_labels[labelled], classes=classes, unlabelled=data.pool)
        probabilities = probe.logits(data.pool).softmax(1)
        right = probe.logits(data.test).argmax(1) == data.test_labels
        points.append({"labels": budget, "accuracy": float(right.double().mean()), "cpu_seconds": spent})
    return points


def strategy_of(way: str, classes: int, labels: Tensor) -> Strategy:
    """``labels`` are read at images that have been chosen."""
    if way == HERDED:
        return strategy_named(LabelConfig(data="", first="herding"), "margin", classes)
    if not way.startswith(PEER):
        return strategy_named(LabelConfig(data=""), way, classes)
    name = way.removeprefix(PEER)
    asked = peer(name, classes, labels)
    return cold_start(peer("TypiClust", classes, labels), asked, until=UNTIL * classes) if name in DOUBTING else asked


def peer(name: str, classes: int, labels: Tensor) -> Strategy:
    kind, settings = PEERS[name]
    extra = {"n_classes": classes} if kind == "ProbCover" else {}
    return bridge(getattr(importlib.import_module("skactiveml.pool"), kind)(**settings, **extra), labels=labels)


def peers() -> Any:
    """The package, or ``None``."""
    try:
        return importlib.import_module("skactiveml")
    except ModuleNotFoundError:
        return None


def main() -> None:
    order: Any = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Tables}, args=sys.argv[1:])
    if isinstance(order, Run):
        run(order)
    else:
        print(card(order.out.parent))


if __name__ == "__main__":
    main()
