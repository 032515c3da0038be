"""Loss and accuracy over a set of images, shared out over the processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from scrimp.data import ImageData, normalise
from scrimp.data.images import Images
from scrimp.primitives.draw import generator_for

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATION_BATCH = 500
"""Images a forward pass, where nothing is kept for a backward one."""


@dataclass(frozen=True)
class Quality:
    """Mean cross-entropy in nats and share of right answers."""

    loss: float
    accuracy: float


def evaluate(
    model: nn.Module,
    images: Images,
    data: ImageData,
    *,
    accelerator: Accelerator,
    limit: int | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> Quality:
    """Evaluate on all images, or on the same ``limit`` of them each time, chosen once at random.

    The model is left in eval mode.
    """
    chosen = torch.arange(len(images))
    if limit is not None and limit < len(images):
        chosen = torch.randperm(len(images), generator=generator_for(0))[:limit]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    # Every process runs as many batches as every other: a sharded model's forward is a meeting of all.
    batches = math.ceil(math.ceil(len(chosen) / accelerator.num_processes) / batch_size)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        for number in range(batches):
            indices = mine[number * batch_size : (number + 1) * batch_size]
            part = indices if len(indices) else chosen[:1]
            logits = model(ready(images.batch(part), data, accelerator.device))
            labels = images.labels[part].to(accelerator.device)
            if len(indices):
                sums[0] += functional.cross_entropy(logits.float(), labels, reduction="sum")
                sums[1] += (logits.argmax(1) == labels).sum()
    loss, right = (accelerator.reduce(sums, reduction="sum") / len(chosen)).tolist()
    return Quality(loss, right)


def ready(images: torch.Tensor, data: ImageData, device: torch.device) -> torch.Tensor:
    """Bytes [n, C, H, W] as the model takes them: on the device, normalised, channels last."""
    return normalise(images.to(device), data.mean, data.std).contiguous(memory_format=torch.channels_last)
