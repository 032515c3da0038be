"""What a sampling policy whose gate is shut adds to training: CPU time of the same steps with it and without it.

    python benchmarks/overhead.py            # a few minutes on one core

Two figures, both of process CPU time on one thread, batches of 64, windows with and without a policy in turn:

- paired: the built-in convnet on built-in images, the ratio taken window by window. A window is a whole round of the
  sampler, on 2,048 images, so that planning is in every one. A control, the plain loop against itself, shows what the
  machine's noise makes of no difference at all.
- own work: the same loops over all 12,000 images, but with one pixel of each and a single linear layer, so that little
  is left beside the loop. The seconds a policy adds to a step here, over the convnet's plain step, are the sharper
  figure on a busy machine; what a policy does to the convnet's caches is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from common import RECEIPTS, as_input, built_in_network, keep
from scrimp.compare.history import by_bound, rounds
from scrimp.compare.step import BATCH, Workload, advance
from scrimp.data import ImageData, load_images
from scrimp.meter import Cost, Reading, paired
from scrimp.meter.clock import Paired, Spread
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.select import Gate, Presampler, gradient_norm_bound, history

CONTROL = "plain loop (control)"
PAIRED_IMAGES = 2048


@dataclass(frozen=True)
class Overhead:
    """CPU time of training with a policy whose gate is shut, as a ratio to the plain loop's."""

    pairs: int = 60
    """Alternating pairs of windows for each of the two policies and for the control, of either kind."""
    seed: int = 0
    out: Path = RECEIPTS / "overhead.json"


class RealWorkload(Workload):
    """The built-in convnet on so many of the built-in images."""

    def __init__(self, data: ImageData, count: int, *, seed: int) -> None:
        super().__init__(seed=seed)
        rows = torch.randperm(len(data.train), generator=generator_for(seed))[:count]
        self.images, self.labels = as_input(data, rows)
        self.use(built_in_network(data, seed=seed))

    def use(self, model: nn.Module) -> None:
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    @property
    def round(self) -> int:
        """Steps in a round."""
        return len(self) // BATCH


def bare(data: ImageData, *, seed: int) -> RealWorkload:
    """The same steps over all training images with next to no network."""
    work = RealWorkload(data, len(data.train), seed=seed)
    work.images = work.images[:, :1, :1, :1].contiguous()
    with torch.random.fork_rng(devices=[]):
        work.use(nn.Sequential(nn.Flatten(), nn.Linear(1, len(data.classes))))
    return work


def run(order: Overhead) -> Receipt:
    torch.set_num_threads(1)  # a second thread spins while it waits, and its spinning is CPU time
    data = load_images("builtin")
    work, loop = RealWorkload(data, PAIRED_IMAGES, seed=order.seed), bare(data, seed=order.seed)
    whole, alone = (beside_plain(each, order) for each in (work, loop))
    step = (whole[CONTROL].b.cpu_seconds.median or math.nan) / work.round
    return Receipt(
        kind="benchmark",
        name="overhead",
        way="history and presample, gates shut",
        seed=order.seed,
        cost=cost(whole["history"], work),
        config={**asdict(order), "out": None},
        notes={
            "ratios": {name: {"cpu_seconds": asdict(item.cpu_ratio)} for name, item in whole.items()},
            "own work": {name: own_work(item, loop.round, step) for name, item in alone.items()},
            "cpu seconds of a plain step": step,
            "steps in a window": {"ratios": work.round, "own work": loop.round},
        },
    )


def beside_plain(work: RealWorkload, order: Overhead) -> dict[str, Paired]:
    sides = {
        "history": rounds(work, history(gate=math.inf), by_bound, seed=order.seed),
        "presample": presampled(work),
        CONTROL: work.plain(),
    }
    plain = advance(work.plain(), work.round)
    return {name: paired(advance(side, work.round), plain, order.pairs, warmup=2) for name, side in sides.items()}


def own_work(pair: Paired, steps: int, step: float) -> dict[str, float]:
    """What a policy adds to a step, in CPU seconds and as a share of the convnet's plain step."""
    added = ((pair.cpu_ratio.median or math.nan) - 1) * (pair.b.cpu_seconds.median or math.nan) / steps
    return {"cpu_seconds": added, "share": added / step}


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


def cost(pair: Paired, work: RealWorkload) -> Cost:
    """Of one window with history, from its alternating pairs."""
    return Cost(
        seconds=_median(pair.a.seconds, "wall"),
        cpu_seconds=_median(pair.a.cpu_seconds, "process CPU"),
        samples=Reading(float(work.round * BATCH), "images in a window"),
    )


def _median(spread: Spread, clock: str) -> Reading:
    return Reading(spread.median, f"{clock}, median of {spread.count} windows with history")


def main() -> None:
    order = tyro.cli(Overhead)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
