"""What adapters take: peak memory of training with them, and the time to switch between a thousand of them.

    python benchmarks/adapter_memory.py      # ten minutes and 4 GB

Peak resident memory of a fresh process that makes a stack of frozen linear layers and trains its adapters for a few
steps (AdamW): LoRA, and NOLA with its bases made anew in every pass; beside one that only runs the same stack forwards.
Two stacks: the perceptrons of a ViT-B, and 1.0 billion weights in bfloat16. Then 1,000 adapters stored on one ViT-Ti:
CPU time of ``use_``, and whether every number comes back.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import nn

from common import RECEIPTS, keep
from scrimp.adapt import attach_, independent, lora, nola, use_
from scrimp.adapt.install import numbers_of, state_of
from scrimp.meter import Cost, Reading
from scrimp.meter.resident import peak_resident
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt

STACKS = {
    "vit-b": {"width": 768, "depth": 24, "dtype": "float32", "tokens": 1576},
    "1b": {"width": 4096, "depth": 60, "dtype": "bfloat16", "tokens": 64},
}
WAYS = ("bare", "lora-4", "nola-4", "nola-4-independent")


@dataclass(frozen=True)
class AdapterMemory:
    """Peaks of training, and switching."""

    stacks: tuple[str, ...] = tuple(STACKS)
    steps: int = 3
    repeats: int = 3
    """Processes of each way; their median counts."""
    adapters: int = 1000
    """Stored on the ViT-Ti."""
    threads: int = 1
    out: Path = RECEIPTS / "adapter-memory.json"


def train(stack: str, way: str, steps: int, threads: int) -> None:
    """A fresh process's work: the stack of frozen layers, with adapters trained or without."""
    torch.set_num_threads(threads)
    shape = STACKS[stack]
    kind = getattr(torch, str(shape["dtype"]))
    layers = [frozen(int(shape["width"]), kind) for _ in range(int(shape["depth"]))]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.GELU())])
    tokens = torch.randn(int(shape["tokens"]), int(shape["width"]), generator=generator_for(0)).to(kind)
    if way == "bare":
        with torch.no_grad():
            model(tokens)
        return
    attach_(model, method_of(way))
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-3)
    for _ in range(steps):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def frozen(width: int, kind: torch.dtype) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, width, width, dtype=kind)
    with torch.no_grad():
        layer.weight.fill_(width**-1.0)
        layer.bias.zero_()
    return layer


def method_of(way: str) -> Any:
    if way == "lora-4":
        return lora(4)
    options = {"combine": independent} if way.endswith("independent") else {}
    return nola(4, 64, cache_bytes=0, **options)


def peaks(order: AdapterMemory, stack: str) -> dict[str, float]:
    """Median peak of each way, bytes, the ways taking turns."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(order.repeats):
        for way in WAYS:
            reading = peak_resident("adapter_memory:train", stack, way, order.steps, order.threads)
            found[way].append(float(reading.value or 0))
    return {way: statistics.median(values) for way, values in found.items()}


def switching(order: AdapterMemory) -> dict[str, float]:
    """CPU milliseconds of ``use_`` among stored adapters of a ViT-Ti, and how many numbers came back changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224").eval()
    expected, lost, taken = {}, 0, []
    for number in range(order.adapters):
        attach_(model, nola(4, 64), name=str(number))
        with torch.no_grad():
            for place, values in enumerate(numbers_of(state_of(model))):
                values.copy_(torch.randn(values.shape, generator=generator_for(number, place)))
        expected[number] = checksum(model)
    for number in torch.randperm(order.adapters, generator=generator_for(1)).tolist():
        begin = time.process_time()
        use_(model, str(number))
        taken.append(1e3 * (time.process_time() - begin))
        lost += expected[number] != checksum(model)
    return {"median ms": statistics.median(taken), "95th percentile ms": sorted(taken)[int(0.95 * len(taken))],
            "adapters changed": float(lost), "weights": float(len(state_of(model).pairs))}  # fmt: skip


def checksum(model: nn.Module) -> str:
    """Of the live adapter's numbers, bit for bit."""
    digest = hashlib.sha256()
    for values in numbers_of(state_of(model)):
        digest.update(values.detach().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    order = tyro.cli(AdapterMemory)
    torch.set_num_threads(order.threads)
    found = {stack: peaks(order, stack) for stack in order.stacks}
    switched = switching(order)
    quality = {
        f"{stack}_{way}_peak_to_lora": values[way] / values["lora-4"]
        for stack, values in found.items()
        for way in WAYS
        if way.startswith("nola")
    }
    quality |= {"switch_ms": switched["median ms"], "adapters_changed": switched["adapters changed"]}
    receipt = Receipt(
        kind="benchmark",
        name="adapter-memory",
        way="measured",
        quality=quality,
        cost=Cost(peak_bytes=Reading(found[order.stacks[-1]]["nola-4"], "peak resident set of a fresh process")),
        notes={"peak bytes": found, "stacks": {name: STACKS[name] for name in order.stacks}, "switching": switched,
               "steps": order.steps, "repeats": order.repeats, "threads": order.threads},
    )  # fmt: skip
    keep(receipt, order.out)


if __name__ == "__main__":
    main()
