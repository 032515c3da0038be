"""The FLOP counter on ViT-Ti/16 at 224 pixels, forward and with backward, against the products in its dimensions.

python benchmarks/flop_counter.py        # seconds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from common import RECEIPTS, keep
from scrimp.compare import flops
from scrimp.meter import Cost, Reading, count_flops
from scrimp.receipts import Receipt


@dataclass(frozen=True)
class FlopCounter:
    """Counted FLOPs of ViT-Ti/16 against the analytic figure, forward and with backward, on the CPU."""

    out: Path = RECEIPTS / "flop-counter.json"


def run() -> Receipt:
    torch.set_num_threads(1)
    readings: list[Reading] = []

    def count(call: Callable[[], Any]) -> Reading:
        readings.append(count_flops(call))
        return readings[-1]

    findings = flops.check(count=count)
    forward, training = readings
    ours, torchs = flops.sides().quality["share_counted"]
    return Receipt(
        kind="benchmark",
        name="flop-counter",
        way="scrimp.meter.count_flops",
        quality={
            "forward_error": findings[0].figure,
            "training_error": findings[1].figure,
            "share_counted": ours,
            "share_counted_by_torch": torchs,
        },
        cost=Cost(flops=training),
        notes={
            "model": "vit_tiny_patch16_224, one image",
            "forward flops": forward.value,
            "forward and backward flops": training.value,
            "findings": [item.to_dict() for item in findings],
        },
    )


def main() -> None:
    order = tyro.cli(FlopCounter)
    keep(run(), order.out)


if __name__ == "__main__":
    main()
