"""What a step of pretraining costs by count: mean shift and constrained mean shift beside BYOL, ResNet-18 on 32 pixels.

    python benchmarks/represent_cost.py      # a quarter of an hour on two cores

Counted: FLOPs and bytes of saved activations of an image, forward and backward of everything a step does (target
network, heads, neighbour search). Timed, in turn: the neighbour search alone at a memory of 131,072 beside the whole
step, process CPU time, batches of 256.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from common import RECEIPTS, keep
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.encoder_run import new_encoder
from scrimp.jobs.learner import Objective, embedding_width, make_online, make_target
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.pretrain_fit import random_views, step_losses
from scrimp.meter import Cost, Reading, count_flops, paired, saved_bytes
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.represent import Memory

WAYS: dict[str, dict[str, Any]] = {
    "byol": {"method": "byol"},
    "mean-shift": {"method": "mean-shift"},
    "constrained": {"method": "constrained"},
}


@dataclass(frozen=True)
class RepresentCost:
    """FLOPs, saved bytes and search time of a pretraining step."""

    memory: int = 131_072
    """Embeddings searched."""
    counted: int = 32
    """Images a counted step."""
    batch: int = 256
    """Images a timed step."""
    pairs: int = 3
    """Alternating pairs of search and step."""
    threads: int = 2
    out: Path = RECEIPTS / "represent-cost.json"


def noise_images(count: int) -> ImageData:
    """Images of the right size: what they show changes no count."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator_for(0), dtype=torch.uint8)
    part = TensorImages(pixels, torch.arange(count) % 10)
    return ImageData(part, part, tuple("abcdefghij"), "noise", (0.5,) * 3, (0.25,) * 3)


def one_step(way: str, order: RepresentCost, images: int) -> Any:
    """A training step of ``images`` images, its memories full."""
    config = PretrainConfig(model="small-resnet18", memory=order.memory, batch_size=images, **WAYS[way])
    data = noise_images(images)
    online = make_online(*new_encoder(config, data), config).to(memory_format=torch.channels_last).train()
    target, width = make_target(online), embedding_width(online)
    objective = Objective(config, torch.full((images,), -1), width, device=torch.device("cpu"))
    for memory in (objective.memory, objective.earlier):
        if memory is not None:
            memory.push_(torch.randn(order.memory, width, generator=generator_for(1)))
    views = random_views(config, data)(data.train.pixels, 0, slice(0, images))

    def step() -> None:
        rows = torch.arange(images)
        step_losses(online, target, objective, views, rows, autocast=nullcontext).mean().backward()
        online.zero_grad()

    step()  # the first finds no earlier view
    return step


def search_beside_step(order: RepresentCost) -> dict[str, Any]:
    """CPU time of one search of a batch beside that of the whole step of mean shift."""
    memory = Memory(order.memory, 128)
    memory.push_(torch.randn(order.memory, 128, generator=generator_for(1)))
    targets = torch.randn(order.batch, 128, generator=generator_for(2))
    timing = paired(lambda: memory.search(targets, 5), one_step("mean-shift", order, order.batch), order.pairs)
    return asdict(timing.cpu_ratio)


def main() -> None:
    order = tyro.cli(RepresentCost)
    torch.set_num_threads(order.threads)
    counts, saved, missed = {}, {}, set()
    for way in WAYS:
        step = one_step(way, order, order.counted)
        flops, kept = count_flops(step), saved_bytes(step)
        counts[way], saved[way] = (flops.value or 0.0) / order.counted, (kept.value or 0.0) / order.counted
        missed |= set(flops.missed)
    share = search_beside_step(order)
    quality = {
        "mean_shift_flops_to_byol": counts["mean-shift"] / counts["byol"],
        "mean_shift_saved_to_byol": saved["mean-shift"] / saved["byol"],
        "constrained_flops_to_mean_shift": counts["constrained"] / counts["mean-shift"],
        "search_flops_to_step": 2 * order.memory * 128 / counts["mean-shift"],
        "search_time_to_step": share["median"],
    }
    receipt = Receipt(
        kind="benchmark",
        name="represent-cost",
        way="counted",
        quality=quality,
        cost=Cost(flops=Reading(counts["mean-shift"], "mean shift, one image", tuple(sorted(missed)))),
        notes={
            "FLOPs an image": counts,
            "saved bytes an image": saved,
            "search time to step time": share,
            "memory": order.memory,
            "batch": order.batch,
            "threads": order.threads,
        },
    )
    keep(receipt, order.out)


if __name__ == "__main__":
    main()
