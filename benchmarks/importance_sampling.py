"""Sampling policies at equal FLOPs in five settings: training loss, test accuracy, FLOPs to uniform's final loss.

    python benchmarks/importance_sampling.py run                    # hours on two cores; stop and start it at will
    python benchmarks/importance_sampling.py run --settings tail --seeds 0
    python benchmarks/importance_sampling.py table                  # from the receipts there are

Every run is fully decayed: a policy is trained anew at smaller shares of the budget, rather than read off in the middle
of a longer run. The FLOPs to uniform's final loss are interpolated (log loss, linear in FLOPs) between two such runs of
one seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from scrimp.data import ImageData, load_images
from scrimp.data.variants import duplicate, long_tail
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.engine import start
from scrimp.jobs.once import Task, run_task
from scrimp.jobs.setup import Setup, prepare
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt, load_receipt, save_receipt

NAME = "importance-sampling"
RECEIPTS = Path(__file__).parent.parent / "receipts" / NAME
POLICIES = ("uniform", "history", "prune", "presample")
SHARES = (1.0, 0.7, 0.5)  # of the budget; the smaller ones only where the larger one beat uniform
PLAIN = TrainConfig(evaluations=2, probe=10_000, device="cpu", json=True)


@dataclass(frozen=True)
class Setting:
    """A training problem: what it is, how its data and its starting weights are made, passes of plain training."""

    about: str
    data: Callable[[], ImageData]
    passes: float
    config: TrainConfig = PLAIN
    pretrain: Callable[[], ImageData] | None = None


def fashion() -> ImageData:
    return load_images("fashion-mnist")


def redundant() -> ImageData:
    """12,000 images, of which the 6,000 easiest stand there ten times, as popular pictures do in a crawl.

    Easy: far nearer to the mean image of the own class than to any other.
    """
    data = load_images("fashion-mnist")
    train = data.train.take(torch.randperm(len(data.train), generator=generator_for(1))[:12_000])
    pixels, labels = train.batch(torch.arange(len(train))).flatten(1).float(), train.labels
    means = torch.stack([pixels[labels == number].mean(0) for number in range(len(data.classes))])
    distances = torch.cdist(pixels, means)
    own = distances.gather(1, labels[:, None])[:, 0]
    other = distances.scatter(1, labels[:, None], math.inf).min(1).values
    easy = (other / own).argsort(descending=True)[:6_000]
    many = duplicate(train, copies=10, indices=easy, generator=generator_for(2))
    return dataclasses.replace(data, train=many, name="fashion-mnist, 6,000 easy images ten times")


def tail() -> ImageData:
    data = load_images("fashion-mnist")
    few = long_tail(data.train, ratio=100, generator=generator_for(3))
    return dataclasses.replace(data, train=few, name="fashion-mnist, long tail 100:1")


def half(first: int) -> ImageData:
    """Five of the ten classes of Fashion-MNIST, from number ``first`` on."""
    data = load_images("fashion-mnist")

    def part(images):
        chosen = images.take(((images.labels >= first) & (images.labels < first + 5)).nonzero()[:, 0])
        return type(chosen)(chosen.batch(torch.arange(len(chosen))), chosen.labels - first)

    name = f"fashion-mnist, classes {first} to {first + 4}"
    classes = data.classes[first : first + 5]
    return dataclasses.replace(data, train=part(data.train), test=part(data.test), classes=classes, name=name)


SETTINGS = {
    "fashion-mnist": Setting("Fashion-MNIST, 60,000 images", fashion, 5),
    "cifar10": Setting(
        "CIFAR-10, 50,000 images, random crops and mirror images",
        lambda: load_images("cifar10"),
        3,
        dataclasses.replace(PLAIN, augment="crop"),
    ),
    "redundant": Setting("Fashion-MNIST, easy half ten times over", redundant, 4),
    "tail": Setting("Fashion-MNIST, classes from 6,000 down to 60", tail, 10),
    "fine-tune": Setting(
        "network pretrained on half the classes of Fashion-MNIST, fine-tuned on the others",
        lambda: half(5),
        3,
        dataclasses.replace(PLAIN, lr=0.02),
        pretrain=lambda: half(0),
    ),
}


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished run leaves its receipt."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2


@dataclass(frozen=True)
class Table:
    """Print the table of the receipts there are."""


def path_of(setting: str, policy: str, share: float, seed: int) -> Path:
    return RECEIPTS / setting / f"{policy}-{share:g}-seed{seed}.json"


def run(order: Run) -> None:
    torch.set_num_threads(order.threads)
    for name in order.settings:
        setting = SETTINGS[name]
        with tempfile.TemporaryDirectory() as folder:
            setup = None
            for seed in order.seeds:
                for policy in POLICIES:
                    for share in SHARES:
                        if path_of(name, policy, share, seed).is_file():
                            continue
                        if share < 1 and not worth_less(name, policy, share, seed):
                            continue
                        setup = setup or prepared(setting, Path(folder))
                        run_one(setup, name, policy, share, seed, Path(folder))


def worth_less(name: str, policy: str, share: float, seed: int) -> bool:
    """Whether the next larger share of the budget still beat uniform."""
    larger = SHARES[SHARES.index(share) - 1]
    before, target = (load(name, policy, larger, seed), load(name, "uniform", 1.0, seed))
    return policy != "uniform" and before is not None and target is not None and loss_of(before) < loss_of(target)


def prepared(setting: Setting, folder: Path) -> Setup:
    config = setting.config
    accelerator = start(config, "cpu")
    if setting.pretrain is not None:
        first = prepare(config, setting.pretrain(), accelerator)
        budget = 3 * first.cost.train * len(first.data.train)
        task = Task("pretrain", "uniform", "uniform", budget, folder / "pretrain")
        run_task(first, task, lambda spent: None, resume=False)
        config = dataclasses.replace(config, weights=folder / "pretrain" / "weights.safetensors")
    return prepare(config, setting.data(), accelerator)


def run_one(setup: Setup, name: str, policy: str, share: float, seed: int, folder: Path) -> None:
    budget = share * SETTINGS[name].passes * setup.cost.train * len(setup.data.train)
    way = policy if share == 1 else f"{policy} at {share:g}x"
    task = Task(f"{NAME}/{name}", way, policy, budget, folder / f"{policy}-{share:g}-{seed}", seed, policy == "uniform")
    receipt = run_task(setup, task, lambda spent: None, resume=False)
    config = {**receipt.config, "weights": "pretrained" if SETTINGS[name].pretrain else None}
    save_receipt(dataclasses.replace(receipt, kind="benchmark", config=config), path_of(name, policy, share, seed))
    print(f"{name} {way} seed {seed}: {receipt.quality}", flush=True)


def load(name: str, policy: str, share: float, seed: int) -> Receipt | None:
    path = path_of(name, policy, share, seed)
    return load_receipt(path) if path.is_file() else None


def loss_of(receipt: Receipt) -> float:
    return float(receipt.quality["train_loss"] or math.nan)


def share_to_target(name: str, policy: str, seed: int) -> float | None:
    """Share of uniform's FLOPs at which the policy's fully decayed run reaches uniform's final training loss.

    ``inf`` where it does not within the budget; interpolated between runs; the smallest run's share, an upper bound,
    where even that one reaches it.
    """
    target = load(name, "uniform", 1.0, seed)
    runs = [(share, load(name, policy, share, seed)) for share in SHARES]
    points = [(share, loss_of(item)) for share, item in runs if item is not None]
    if target is None or not points:
        return None
    goal = loss_of(target)
    if points[0][1] > goal:
        return math.inf
    for (more, low), (less, high) in itertools.pairwise(points):
        if high > goal:
            return less + (more - less) * (math.log(high) - math.log(goal)) / (math.log(high) - math.log(low))
    return points[-1][0]


@dataclass(frozen=True)
class Pair:
    """A policy beside uniform, one seed: share of FLOPs to uniform's loss; test accuracy minus uniform's, in points."""

    seed: int
    share: float
    accuracy: float


def paired_with_uniform(name: str, policy: str) -> list[Pair]:
    """Every seed for which both runs at the full budget have left a receipt."""
    pairs = []
    for seed in range(9):
        ours, plain = (load(name, each, 1.0, seed) for each in (policy, "uniform"))
        share = share_to_target(name, policy, seed)
        if ours is not None and plain is not None and share is not None:
            pairs.append(Pair(seed, share, 100 * (accuracy_of(ours) - accuracy_of(plain))))
    return pairs


def accuracy_of(receipt: Receipt) -> float:
    return float(receipt.quality["test_accuracy"] or math.nan)


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (1 seed)" if values else "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def rows() -> list[list[str]]:
    """Setting, policy, training loss, test accuracy, share of FLOPs to uniform's loss, seeds."""
    found = []
    for name in SETTINGS:
        for policy in POLICIES:
            runs = [item for seed in range(9) if (item := load(name, policy, 1.0, seed)) is not None]
            if not runs:
                continue
            seeds = [item.seed or 0 for item in runs]
            shares = [value for seed in seeds if (value := share_to_target(name, policy, seed)) is not None]
            reached = [value for value in shares if math.isfinite(value)]
            to_target = (
                spread(reached, 2)
                if len(reached) == len(shares)
                else f"not reached ({len(shares) - len(reached)} of {len(shares)})"
            )
            losses = [loss_of(item) for item in runs]
            accuracies = [100 * float(item.quality["test_accuracy"] or math.nan) for item in runs]
            found.append([name, policy, spread(losses, 4), spread(accuracies, 2), to_target, str(len(runs))])
    return found


def table_text() -> str:
    """The table in markdown."""
    head = "| setting | policy | training loss | test accuracy, % | FLOPs to uniform's final training loss | seeds |"
    body = ["| " + " | ".join([SETTINGS[name].about, *others]) + " |" for name, *others in rows()]
    return "\n".join([head, "|---|---|---|---|---|---|", *body])


def table(_: Table) -> None:
    print(table_text())


def main() -> None:
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    run(order) if isinstance(order, Run) else table(order)


if __name__ == "__main__":
    main()
