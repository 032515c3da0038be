"""What a sampling policy whose gate is shut adds to training: CPU time of the same steps with it and without it.

    python benchmarks/overhead.py            # a few minutes on one core

The built-in convnet on built-in images, batches of 64, one thread. Windows of a few steps with and without a policy
alternate in one process, and the ratio is taken pair by pair. Beside them a control: the plain loop against itself,
which shows what this machine's noise makes of no difference at all. A window covers a whole round on 512 images, so
that planning, which is done once a round, is in every one of them; on a real set rounds are longer and cost less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from common import RECEIPTS, as_input, built_in_network, keep
from scrimp.compare.history import by_bound, rounds
from scrimp.compare.step import BATCH, ROUND, Workload, advance
from scrimp.data import load_images
from scrimp.meter import Cost, Reading, paired
from scrimp.meter.clock import Paired, Spread
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.select import Gate, Presampler, gradient_norm_bound, history


@dataclass(frozen=True)
class Overhead:
    """CPU time of training with a policy whose gate is shut, as a ratio to the plain loop's."""

    pairs: int = 120
    """Alternating pairs of windows for each of the two policies and for the control."""
    seed: int = 0
    out: Path = RECEIPTS / "overhead.json"


class RealWorkload(Workload):
    """The built-in convnet on 512 of the built-in images."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed)
        data = load_images("builtin")
        rows = torch.randperm(len(data.train), generator=generator_for(seed))[: BATCH * ROUND]
        self.images, self.labels = as_input(data, rows)
        self.model = built_in_network(data, seed=seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)


def run(order: Overhead) -> Receipt:
    torch.set_num_threads(1)  # a second thread spins while it waits, and its spinning is CPU time
    work = RealWorkload(seed=order.seed)
    sides = {
        "history": rounds(work, history(gate=math.inf), by_bound, seed=order.seed),
        "presample": presampled(work),
        "plain loop (control)": work.plain(),
    }
    plain = advance(work.plain(), ROUND)
    found = {name: paired(advance(side, ROUND), plain, order.pairs, warmup=3) for name, side in sides.items()}
    return Receipt(
        kind="benchmark",
        name="overhead",
        way="history and presample, gates shut",
        seed=order.seed,
        cost=cost(found["history"]),
        config={**asdict(order), "out": None},
        notes={
            "ratios": {name: {"cpu_seconds": asdict(item.cpu_ratio)} for name, item in found.items()},
            "cpu_seconds of a plain window": asdict(found["plain loop (control)"].b.cpu_seconds),
            "window": f"{ROUND} steps of {BATCH} images, one round of the sampler",
        },
    )


def presampled(work: Workload) -> Iterator[None]:
    """Training steps through a presampler that never opens, written as a user would write them."""

    def score(images: Tensor, labels: Tensor) -> Tensor:
        return gradient_norm_bound(work.model(images), labels)

    presampler = Presampler(score, gate=Gate(math.inf))
    for images, labels, weights in presampler(work.batches()):
        logits = work.model(images)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        work.learn((weights * losses).mean())
        presampler.observe(gradient_norm_bound(logits, labels))
        yield


def cost(pair: Paired) -> Cost:
    """Of one window with history, from its alternating pairs."""
    return replace(
        Cost(),
        seconds=_median(pair.a.seconds, "wall"),
        cpu_seconds=_median(pair.a.cpu_seconds, "process CPU"),
        samples=Reading(float(BATCH * ROUND), "images in a window"),
    )


def _median(spread: Spread, clock: str) -> Reading:
    return Reading(spread.median, f"{clock}, median of {spread.count} windows with history")


def main() -> None:
    order = tyro.cli(Overhead)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
