"""Distilling frozen teachers into a small network: heads, kept features, two teachers, and labels alone.

    python benchmarks/distillation.py run                # an hour of one core; stop and start it at will
    python benchmarks/distillation.py run --ways head-4 live --seeds 0
    python benchmarks/distillation.py run --settings cifar10-10k-long      # four times as long
    python benchmarks/distillation.py table              # from the receipts there are

Every way is one call of `scrimp.jobs.distill` with the same student, batches, views, schedule and seeds; none was tuned
by itself. All see the images equally often, but for the students of labels alone, who get the FLOPs of the one with a
4-layer head instead. Ways of one seed share their teachers' kept features, yet each is charged for all that it uses.
Features are judged as `scrimp probe` judges them, from the weights file.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from distillation_teachers import TEACHERS
from representations import few, spread
from scrimp.data import ImageData
from scrimp.jobs.distill import distill
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.encoders import Encoder, features_of, load_encoder
from scrimp.jobs.folder import CONFIG
from scrimp.meter import Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.knn import knn_accuracies
from scrimp.represent.linear import few_label_rows, linear_accuracy

NAME = "distillation"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
FEW, DRAWS = 0.01, 3  # share of the labels, and how often it is drawn
RECIPE: dict[str, Any] = {
    "model": "small-resnet18-8",
    "batch_size": 64,
    "lr": 0.002,
    "evaluations": 1,
    "probe": 1000,
    "device": "cpu",
    "json": True,
}


@dataclass(frozen=True)
class Way:
    """What is told apart from the other ways.

    Attributes:
        about: in the table.
        settings: of `DistillConfig`, beside `RECIPE`.
        teachers: names in `TEACHERS`.
        like: the way whose FLOPs this one gets, instead of the passes of the setting.
    """

    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    teachers: tuple[str, ...] = ("lite0",)
    like: str | None = None


WAYS = {
    "head-4": Way("regression, 4-layer head, kept features"),
    "head-1": Way("regression, linear head, kept features", {"head_layers": 1}),
    "scratch-1pct": Way(
        "student alone, 1 % of the labels, equal FLOPs", {"method": "scratch", "labelled": FEW}, (), like="head-4"
    ),
    "live": Way("regression, 4-layer head, a new view and the teacher in every step", {"cache": "none"}),
    "head-2": Way("regression, 2-layer head, kept features", {"head_layers": 2}),
    "two-teachers": Way("regression, 4-layer heads onto two teachers, kept features", teachers=("lite0", "vit-s14")),
    "logits-1pct": Way(
        "logits of a linear classifier on the teacher, 1 % of the labels", {"method": "logits", "labelled": FEW}
    ),
}


@dataclass(frozen=True)
class Setting:
    """Images, passes over them, and views of each whose features are kept."""

    about: str
    data: Callable[[], ImageData]
    passes: int
    views: int


TEN_THOUSAND = functools.partial(few, "cifar10", 10_000)
SETTINGS = {
    "cifar10-10k": Setting("CIFAR-10, 10,000 images, 6 passes, 2 views kept", TEN_THOUSAND, 6, 2),
    "cifar10-10k-long": Setting("CIFAR-10, 10,000 images, 24 passes, 8 views kept", TEN_THOUSAND, 24, 8),
}


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished run leaves its receipt, an unfinished one its checkpoint in --folder."""

    settings: tuple[str, ...] = ("cifar10-10k",)
    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    folder: Path | None = None


@dataclass(frozen=True)
class Table:
    """Print the table of the receipts there are."""


def path_of(setting: str, way: str, seed: int) -> Path:
    return RECEIPTS / setting / f"{way}-seed{seed}.json"


def run(order: Run) -> None:
    torch.set_num_threads(order.threads)
    teachers = functools.cache(lambda name: TEACHERS[name]())
    with tempfile.TemporaryDirectory() as scratch:
        for seed in order.seeds:
            for setting in order.settings:
                missing = [way for way in order.ways if not path_of(setting, way, seed).is_file()]
                data = SETTINGS[setting].data() if missing else None
                for way in missing:
                    folder = (order.folder or Path(scratch)) / setting
                    found = [teachers(name) for name in WAYS[way].teachers]
                    run_one(setting, way, seed, data=data, teachers=found, folder=folder)


def run_one(setting: str, way: str, seed: int, *, data: ImageData, teachers: list[Encoder], folder: Path) -> None:
    """One run, from its fresh student to its published receipt."""
    out = folder / f"{way}-seed{seed}"
    config = config_of(setting, way, seed, kept=folder / "kept")
    config = replace(config, out=out, resume=(out / CONFIG).is_file())
    receipt = distill(config, data=data, teachers=teachers or None)
    published = charged(receipt, name=f"{NAME}/{setting}", way=way, quality=worth(out, data, seed))
    save_receipt(published, path_of(setting, way, seed))
    print(f"{setting} {way} seed {seed}: {published.quality}", flush=True)


def config_of(setting: str, way: str, seed: int, *, kept: Path) -> DistillConfig:
    """How a way is trained; ``kept``: folder of the teachers' features.

    Raises:
        InputError: its budget is that of a run which has left no receipt.
    """
    chosen, about = WAYS[way], SETTINGS[setting]
    lengths = {"epochs": about.passes, "cache_views": about.views}
    config = DistillConfig(seed=seed, **{**RECIPE, **lengths, **chosen.settings})
    if config.cache == "disk" and chosen.teachers:
        config = replace(config, cache_folder=kept)
    if chosen.like is None:
        return config
    path = path_of(setting, chosen.like, seed)
    if not path.is_file():
        raise InputError(f"the receipt of {chosen.like}, seed {seed}", "none", f"run --ways {chosen.like} first")
    return replace(config, epochs=None, flops=load_receipt(path).cost.flops.value)


def charged(receipt: Receipt, *, name: str, way: str, quality: dict[str, float | None]) -> Receipt:
    """The receipt to publish: all teachers' passes are in its FLOPs, whoever made them, and it names no folder."""
    notes, cost = receipt.notes, receipt.cost
    spent, images = cost.flops.value or 0.0, cost.samples.value or 0.0
    steps = spent * (1 - notes["teacher FLOPs share"])
    whole = steps + notes["teacher FLOPs if no features were found"]
    how = cost.flops.how
    if whole > spent * 1.001:
        how += "; with all of the kept features, which an earlier run of the seed made (seconds are without)"
    facts = {
        "passes": images / notes["training images"],
        "threads": torch.get_num_threads(),
        "student FLOPs an image": steps / images,
        "teacher FLOPs share": 1 - steps / whole,
        "neighbours sought among": notes["training images"],
        "features": "of the weights file, float32, images as they are",
        "few-label draws": DRAWS,
    }
    return replace(
        receipt,
        kind="benchmark",
        name=name,
        way=way,
        baseline=way == "scratch-1pct",
        quality={**receipt.quality, **quality},
        cost=replace(cost, flops=Reading(whole, how, cost.flops.missed)),
        curve=[],
        config={**receipt.config, "data": notes["data"], "out": None, "cache_folder": None},
        notes={**notes, **facts},
    )


def worth(folder: Path, data: ImageData, seed: int) -> dict[str, float | None]:
    """What the student's features give to neighbours and to linear classifiers, of all labels and of few."""
    encoder = load_encoder(folder)
    train, test = (features_of(encoder, images, device="cpu") for images in (data.train, data.test))
    labels, truth = data.train.labels, data.test.labels
    near = knn_accuracies(train, labels, test, truth, ks=(1, 20))

    def from_few(draw: int) -> float:
        rows = few_label_rows(labels, fraction=FEW, generator=generator_for(seed, draw))
        return linear_accuracy(train[rows], labels[rows], test, truth, unlabelled=train)

    return {
        "knn1_accuracy": near[1],
        "knn20_accuracy": near[20],
        "linear_accuracy": linear_accuracy(train, labels, test, truth),
        "linear_1pct_accuracy": statistics.fmean(map(from_few, range(DRAWS))),
    }


def load(setting: str, way: str) -> list[Receipt]:
    """The receipts there are, seed by seed."""
    paths = [path_of(setting, way, seed) for seed in range(9)]
    return [load_receipt(path) for path in paths if path.is_file()]


COLUMNS = {
    "knn1_accuracy": "1-NN, %",
    "knn20_accuracy": "20-NN, %",
    "linear_accuracy": "linear, %",
    "linear_1pct_accuracy": "linear of 1 % of the labels, %",
    "test_accuracy": "own classifier, %",
}


def table_text() -> str:
    """The table in markdown."""
    head = ["setting", "way", "TFLOP", "passes", *COLUMNS.values(), "seeds"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for setting, about in SETTINGS.items():
        for way, chosen in WAYS.items():
            found = load(setting, way)
            if not found:
                continue
            flops = statistics.fmean(item.cost.flops.value or 0.0 for item in found) / 1e12
            passes = statistics.fmean(item.notes["passes"] for item in found)
            figures = [spread(found, name) for name in COLUMNS]
            cells = [about.about, chosen.about, f"{flops:.1f}", f"{passes:.1f}", *figures, str(len(found))]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    if isinstance(order, Run):
        run(order)
    else:
        print(table_text())


if __name__ == "__main__":
    main()
