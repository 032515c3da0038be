"""What the benchmarks share: where receipts go, and the built-in network with the built-in images."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from scrimp.data import ImageData
from scrimp.jobs.evaluate import ready
from scrimp.jobs.models import create_model
from scrimp.receipts import Receipt, save_receipt

RECEIPTS = Path(__file__).resolve().parent.parent / "receipts"


def keep(receipt: Receipt, path: Path) -> None:
    """Write the receipt and print what it found."""
    save_receipt(receipt, path)
    found = receipt.to_dict()
    print(json.dumps({"quality": found["quality"], "notes": found["notes"]}, indent=2))
    print(f"receipt: {path}")


def built_in_network(data: ImageData, *, seed: int) -> nn.Module:
    """The convnet that `scrimp train` takes by default, with fresh weights, laid out as there."""
    channels, size, _ = data.train.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model("convnet", classes=len(data.classes), channels=channels, size=size)
    return model.to(memory_format=torch.channels_last)


def as_input(data: ImageData, rows: Tensor, *, test: bool = False) -> tuple[Tensor, Tensor]:
    """Normalised images [n, C, H, W] and labels [n] at ``rows`` of the training (or test) set."""
    images = data.test if test else data.train
    return ready(images.batch(rows), data, torch.device("cpu")), images.labels[rows]
