"""What leaving tokens out costs in accuracy: every method beside all tokens, fine-tuned and as it comes.

    python benchmarks/adaptive_accuracy.py run                    # about two hours of one core; stop and start at will
    python benchmarks/adaptive_accuracy.py run --tasks cifar10 --methods ats tome --seeds 0
    python benchmarks/adaptive_accuracy.py table                  # from those there are in receipts/adaptive-accuracy

cifar10: a small transformer of patches of 4, trained from nothing by `scrimp train`; then `scrimp thin`, each method
fine-tuned with the same FLOPs as the model with all tokens beside it, and those that need no training also as they
come, in several settings. How much each leaves out was chosen by FLOPs, the blocks of token sampling after a look at
200 training images, the rate of fine-tuning by one pilot with all tokens. A seed fixes weights, order and crops.

vit-s14: a packaged ViT-S/14 in DINOv2's layout, frozen, on images of CIFAR-10 made larger, under a linear classifier.
A seed draws the labelled images. As it comes: the classifier of all tokens' features. Trained: a classifier of the
thinned features, on the same images; the transformer stays frozen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from adaptive_accuracy_tables import DENSE, NAME, card
from scrimp.adaptive import (
    Controller,
    image_costs,
    keep_tokens_,
    restore_,
    token_merging_,
    token_sampling_,
)
from scrimp.data import ImageData, load_images, normalise
from scrimp.data.images import Images
from scrimp.data.packed import cache_folder
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.folder import CONFIG, RECEIPT
from scrimp.jobs.thin import Slimmed, thin
from scrimp.jobs.thin_config import ThinConfig
from scrimp.jobs.thin_measure import Answers
from scrimp.jobs.train import train
from scrimp.meter import Cost, Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.linear import LinearProbe, fit_linear_probe

RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "batch_size": 64,
    "augment": "crop",
    "evaluations": 1,
    "precision": "fp32",
    "device": "cpu",
    "json": True,
}
BASE: dict[str, Any] = {"model": "small-vit-64", "epochs": 4, "lr": 1e-3, "warmup": 0.1, "probe": 1000, **RECIPE}
TUNING: dict[str, Any] = {"lr": 5e-4, "warmup": 0.05, "probe": 500, "repeats": 0, "pictures": 0, **RECIPE}
SHARE = 0.1  # of the FLOPs of the training from nothing, for each fine-tuning


@dataclass(frozen=True)
class Method:
    """Settings of `scrimp thin`: one that is fine-tuned, and those that are tried as they come."""

    trained: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)


LATE: dict[str, Any] = {"blocks": (2, 3, 4, 5)}  # with the second block as well an image is left half its FLOPs
METHODS = {
    "tome": Method({"r": (7,)}, {"r": (5, 7, 9)}),
    "ats": Method({"samples": (64,), **LATE}, {"samples": (64, 48, 32, 16), **LATE}),
    "keep": Method({"ratio": (0.7,)}, {"ratio": (0.8, 0.7, 0.6)}),
    "avit": Method({"ponder": (5e-4,), "gate_scale": 1.0, "gate_center": 0.9}),
    "adavit": Method({"usage": (0.8,)}),
}
TASKS = ("cifar10", "vit-s14")

SIDE, LABELLED, SHOWN = 98, 2000, 3000  # pixels; training images of a seed; test images of all
ROWS = 50
L2 = 30.0  # of the classifiers: better than 1 on training images held out, with all tokens


@dataclass(frozen=True)
class Ladder:
    """Values of a method on the packaged transformer, and the one that a classifier is fitted for."""

    attach: Callable[[nn.Module, Any, Tensor], Controller]
    values: tuple[float, ...]
    fitted: float


LADDERS = {
    "tome": Ladder(lambda model, r, example: token_merging_(model, r, example=example), (2, 3, 4), 3),
    "ats": Ladder(lambda model, n, example: token_sampling_(model, n, example=example), (49, 37, 25, 16), 49),
    "keep": Ladder(
        lambda model, share, example: keep_tokens_(model, share, blocks=(3, 6, 9), example=example),
        (0.8, 0.7, 0.6),
        0.7,
    ),
}


@dataclass(frozen=True)
class Run:
    """Measure what is missing; every method and seed leaves its receipt, an unfinished one run folders in --work."""

    tasks: tuple[str, ...] = TASKS
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    out: Path = RECEIPTS
    work: Path = cache_folder() / NAME


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


def path_of(order: Run, task: str, method: str, seed: int) -> Path:
    return order.out / task / f"{method}-s{seed}.json"


def run(order: Run) -> None:
    strange = [*set(order.tasks).difference(TASKS), *set(order.methods).difference(METHODS)]
    if strange:
        known = f"tasks out of {', '.join(TASKS)} and methods out of {', '.join(METHODS)}"
        raise InputError(known, strange[0], "correct it")
    torch.set_num_threads(order.threads)
    for task in order.tasks:
        measure = small if task == "cifar10" else Large().measure
        for seed in order.seeds:
            for method in order.methods if task == "cifar10" else [name for name in order.methods if name in LADDERS]:
                if not path_of(order, task, method, seed).is_file():
                    measure(order, method, seed)


def small(order: Run, method: str, seed: int, data: Any = "cifar10") -> None:
    """One method on the small transformer, fine-tuned and as it comes; with the first of a seed, all tokens too."""
    folder = order.work / "cifar10" / f"s{seed}"
    base = trained(folder / "dense", seed, data)
    alone = not path_of(order, "cifar10", DENSE, seed).is_file()
    flops = SHARE * base.config["budget_flops"]
    settings = METHODS[method]
    job: dict[str, Any] = {"model": str(folder / "dense"), "method": method, "seed": seed}
    tuned = thinned(
        {**job, **TUNING, **settings.trained, "flops": flops, "baseline": "tuned" if alone else "given"},
        folder / f"{method}-tuned",
        data,
    ).receipts
    given = thinned({**job, **TUNING, **settings.given}, folder / method, data).receipts if settings.given else []
    whole = tuned[0].notes["flops_an_image"]["mean"]
    points = [point(item, whole) for item in [*tuned[1:], *given[1:]]]
    config = {"base": BASE, "fine-tuning": {**TUNING, "flops": flops}, "settings": plain(settings)}
    if alone:
        before = {**point(tuned[0], whole), "trained": False, "accuracy": base.quality["test_accuracy"]}
        publish(order, DENSE, [point(tuned[0], whole), before], tuned[0], config)
    publish(order, method, points, tuned[1], config)


def trained(folder: Path, seed: int, data: Any) -> Receipt:
    """The small transformer, trained once for all methods of a seed."""
    if (folder / RECEIPT).is_file():
        return load_receipt(folder / RECEIPT)
    config = TrainConfig(data="cifar10", seed=seed, out=folder, resume=(folder / CONFIG).is_file(), **BASE)
    return train(config, data=data)


def thinned(settings: dict[str, Any], folder: Path, data: Any) -> Slimmed:
    config = ThinConfig(data="cifar10", out=folder, resume=(folder / CONFIG).is_file(), **settings)
    return thin(config, data=data)


def plain(settings: Method) -> dict[str, Any]:
    return {"trained": settings.trained, "as they come": settings.given}


def point(receipt: Receipt, whole: float) -> dict[str, Any]:
    """What a way gave, and its FLOPs as a share of those with all tokens."""
    flops = receipt.notes["flops_an_image"]
    return {
        "way": receipt.way,
        "trained": receipt.notes["fine-tuning"] is not None,
        "accuracy": receipt.quality["test_accuracy"],
        "flops": flops,
        "share": flops["mean"] / whole,
        "tokens after each block, mean": receipt.notes["tokens after each block, mean"],
    }


def publish(order: Run, method: str, points: list[dict[str, Any]], source: Receipt, config: dict[str, Any]) -> None:
    """A receipt of one method on the small transformer."""
    notes = {key: source.notes[key] for key in ("data", "test images", "precision", "fine-tuning")}
    leave(order, "cifar10", method, source.seed or 0, points=points, config=config, notes=notes)


def leave(
    order: Run,
    task: str,
    method: str,
    seed: int,
    *,
    points: list[dict[str, Any]],
    config: dict[str, Any],
    notes: dict[str, Any],
) -> None:
    """Write a receipt; its figures are those of the trained setting, the first of the points."""
    first = points[0]
    receipt = Receipt(
        kind="benchmark",
        name=f"{NAME}/{task}",
        way=method,
        seed=seed,
        baseline=method == DENSE,
        quality={"test_accuracy": first["accuracy"], "flops_share": first["share"]},
        cost=Cost(flops=Reading(first["flops"]["mean"], "of an image, mean over the test images, counted")),
        config=config,
        notes={**notes, "points": points},
    )
    save_receipt(receipt, path_of(order, task, method, seed))
    print(f"{task} {method} seed {seed}: {receipt.quality}", flush=True)


class Large:
    """The packaged transformer; features and FLOPs of the images are found once for all seeds."""

    def __init__(self, data: ImageData | None = None, model: nn.Module | None = None) -> None:
        self.data, self.model = data, model
        self._seen: dict[tuple[str, float, int | None], tuple[Tensor, Tensor]] = {}

    def measure(self, order: Run, method: str, seed: int) -> None:
        """One method under the classifier of a seed; with the first, all tokens too."""
        self._load()
        ladder = LADDERS[method]
        probe = self._probe(DENSE, 0, seed)
        whole = float(self._features(DENSE, 0, None)[1].double().mean())
        about = {"pixels": SIDE, "labelled images": LABELLED, "precision": "bf16", "l2": L2}
        notes = {"data": "CIFAR-10", "test images": len(self._rows(None))}
        if not path_of(order, "vit-s14", DENSE, seed).is_file():
            points = [self._point(DENSE, 0, probe, whole, trained=known) for known in (True, False)]
            leave(order, "vit-s14", DENSE, seed, points=points, config=about, notes=notes)
        points = [self._point(method, ladder.fitted, self._probe(method, ladder.fitted, seed), whole, trained=True)]
        points += [self._point(method, value, probe, whole, trained=False) for value in ladder.values]
        settings = {"fitted": ladder.fitted, "as they come": list(ladder.values)}
        leave(order, "vit-s14", method, seed, points=points, config={**about, "settings": settings}, notes=notes)

    def _load(self) -> None:
        if self.model is None:
            from pretrained.saliency import MEAN, STD, load_saliency

            self.model = load_saliency().backbone
            self.data = replace(load_images("cifar10"), mean=MEAN, std=STD)

    def _point(self, method: str, value: float, probe: LinearProbe, whole: float, *, trained: bool) -> dict[str, Any]:
        features, costs = self._features(method, value, None)
        logits, labels = probe.logits(features), self._part(None).labels[self._rows(None)]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        flops = Answers(losses, logits.argmax(1) == labels, costs, None).flops()
        way = DENSE if method == DENSE else f"{method}-{value:g}"
        accuracy = float((logits.argmax(1) == labels).double().mean())
        share = flops["mean"] / whole
        return {"way": way, "trained": trained, "accuracy": accuracy, "flops": flops, "share": share}

    def _probe(self, method: str, value: float, seed: int) -> LinearProbe:
        labels = self._part(seed).labels[self._rows(seed)]
        return fit_linear_probe(self._features(method, value, seed)[0], labels, classes=len(self.data.classes), l2=L2)

    def _part(self, seed: int | None) -> Images:
        return self.data.test if seed is None else self.data.train

    def _rows(self, seed: int | None) -> Tensor:
        """The labelled images of a seed, or the test images of all."""
        count, draw = (SHOWN, generator_for(2)) if seed is None else (LABELLED, generator_for(3, seed))
        return torch.randperm(len(self._part(seed)), generator=draw)[:count]

    def _features(self, method: str, value: float, seed: int | None) -> tuple[Tensor, Tensor]:
        """Features [n, dim] and FLOPs [n] of the images of a seed, or of the test images."""
        key = (method, value, seed)
        if key not in self._seen:
            self._seen[key] = self._run(method, value, seed)
        return self._seen[key]

    @torch.no_grad()
    def _run(self, method: str, value: float, seed: int | None) -> tuple[Tensor, Tensor]:
        example = self._images(None, self._rows(None)[:2])
        attached = token_merging_(self.model, 0, example=example)
        plain = image_costs(self.model, example)[:1]
        restore_(self.model)
        if method != DENSE:
            attached = LADDERS[method].attach(self.model, value, example)
        found = []
        for rows in self._rows(seed).split(ROWS):
            with torch.autocast("cpu", torch.bfloat16):
                features = self.model(self._images(seed, rows)).float()
            found.append((features, plain.expand(len(rows)) if method == DENSE else attached.costs))
        if method != DENSE:
            restore_(self.model)
        features, costs = (torch.cat(column) for column in zip(*found, strict=True))
        return features, costs

    def _images(self, seed: int | None, rows: Tensor) -> Tensor:
        images = normalise(self._part(seed).batch(rows), self.data.mean, self.data.std)
        return functional.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)


def main() -> None:
    order: Any = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    if isinstance(order, Run):
        run(order)
    else:
        print(card(order.out.parent))


if __name__ == "__main__":
    main()
