"""One round of choosing labels at the size of a real pool: seconds and memory of every strategy, one receipt each.

    python benchmarks/label_speed.py                                   # all of them, a minute or two on two idle cores
    python benchmarks/label_speed.py --strategies typicality centres --threads 1

50,000 made-up images in 100 overlapping classes, features of 512 numbers and unit length, 400 labels there already,
100 wanted. Wall and process CPU time are medians of `--repeats` rounds after one to warm up; beside them stands how
busy the machine was (load average). The memory is what a round adds to the highest resident set of a fresh process,
features (102 MB) and probabilities (20 MB) apart.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from common import RECEIPTS, keep
from scrimp.jobs.label_config import LabelConfig, Name
from scrimp.jobs.label_learner import strategy_named
from scrimp.meter import Cost, Reading, peak_resident
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.select import Strategy

NAME = "label-speed"


@dataclass(frozen=True)
class LabelSpeed:
    """What is measured."""

    strategies: tuple[Name, ...] = get_args(Name)
    images: int = 50_000
    width: int = 512
    classes: int = 100
    labelled: int = 400
    budget: int = 100
    repeats: int = 5
    threads: int = 2
    seed: int = 0
    folder: Path = RECEIPTS / NAME


def pool_of(order: LabelSpeed) -> tuple[Tensor, Tensor, Tensor]:
    """Features [images, width], probabilities [images, classes] and the labelled rows."""
    generator = generator_for(order.seed)
    centres = torch.randn(order.classes, order.width, generator=generator)
    kinds = torch.randint(order.classes, (order.images,), generator=generator)
    features = torch.randn(order.images, order.width, generator=generator)
    probabilities = torch.empty(order.images, order.classes)
    for rows in torch.arange(order.images).split(4096):  # so that the round's peak is not hidden by this one's
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        features[here] = functional.normalize(features[here] + centres[kinds[here]] / 2)
        probabilities[here] = (features[here] @ centres.T / 3).softmax(1)
    return features, probabilities, torch.randperm(order.images, generator=generator)[: order.labelled]


def measure(order: LabelSpeed, name: Name, strategy: Strategy, pool: tuple[Tensor, Tensor, Tensor]) -> Receipt:
    """The receipt of one strategy."""
    wall, cpu, found = [], [], torch.empty(0)
    for repeat in range(order.repeats + 1):
        clock, spent = time.perf_counter(), time.process_time()
        found = strategy(*pool, order.budget, generator=generator_for(order.seed, repeat)).indices
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() - spent)
    assert len(found) == order.budget
    how = f"median of {order.repeats} rounds, {order.threads} thread(s)"
    seconds, cpu_seconds = statistics.median(wall[1:]), statistics.median(cpu[1:])
    return Receipt(
        kind="benchmark",
        name=NAME,
        way=name,
        seed=order.seed,
        baseline=name == "random",
        quality={"seconds": seconds},
        cost=Cost(
            seconds=Reading(seconds, f"wall clock, {how}"),
            cpu_seconds=Reading(cpu_seconds, f"process CPU time, {how}"),
            peak_bytes=added_bytes(order, name),
        ),
        config={key: value for key, value in asdict(order).items() if key != "folder"},
        notes={"every_seconds": wall[1:], "every_cpu_seconds": cpu[1:], "load": os.getloadavg()[0]},
    )


def added_bytes(order: LabelSpeed, name: Name) -> Reading:
    """What a round adds to the highest resident set of a fresh process that has features and probabilities."""
    settings = {key: getattr(order, key) for key in ("images", "width", "classes", "labelled", "budget", "seed")}
    with_it, without = (peak_resident("label_speed:once", settings, asked) for asked in (name, ""))
    how = "peak resident set of a fresh process, less that of one that makes features and probabilities only"
    if with_it.value is None or without.value is None:
        return Reading(None, with_it.how)
    return Reading(max(0.0, with_it.value - without.value), f"{how}; 0 is within what two processes differ by")


def once(settings: dict[str, Any], name: Name | str) -> None:
    """One round on one thread, or none, in a process of its own."""
    torch.set_num_threads(1)
    order = LabelSpeed(**settings)
    pool = pool_of(order)
    if name:
        strategy = named(order, name)  # type: ignore[arg-type]
        strategy(*pool, order.budget, generator=generator_for(order.seed, 0))


def named(order: LabelSpeed, name: Name) -> Strategy:
    return strategy_named(LabelConfig(data="", strategy=name, until=0), name, order.classes)


def main() -> None:
    order = tyro.cli(LabelSpeed, description=__doc__)
    torch.set_num_threads(order.threads)
    pool = pool_of(order)
    for name in order.strategies:
        strategy = named(order, name)
        keep(measure(order, name, strategy, pool), order.folder / f"{name}.json")


if __name__ == "__main__":
    main()
