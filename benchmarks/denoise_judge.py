"""Who judges drawn images: a small classifier of the real ones, trained once, in whose features distances are taken."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from scrimp.data import ImageData
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

EPOCHS, BATCH, RATE = 4, 128, 1e-2
_AT_ONCE = 500


class Judge(nn.Module):
    """Images [n, C, side, side] in -1 to 1, side a multiple of 4, to logits; 64 features below them."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for given, made in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
            if made < 64:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))  # makes the mean variance of a feature of real images 1

    def features(self, images: Tensor) -> Tensor:
        """Means over the image of what the last convolution gives, [n, 64]."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to float32 in -1 to 1."""
    return pixels.float() / 127.5 - 1


def trained_judge(data: ImageData, file: Path) -> tuple[Judge, float]:
    """The judge in ``file``, or a new one written there; with the CPU seconds that training took (nan: it was there).

    Weights are the same each time: the seed is no choice, as every figure rests on one judge.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge(data.train.shape[0], len(data.classes))
    if file.is_file():
        judge.load_state_dict(load_file(file))
        return judge.eval(), float("nan")
    start = time.process_time()
    _train(judge, data)
    judge.eval()
    judge.scale.fill_(features_of(judge, data.test.batch(torch.arange(len(data.test)))).var(0).mean().rsqrt())
    seconds = time.process_time() - start
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, partial)
    partial.replace(file)
    return judge.eval(), seconds


def _train(judge: Judge, data: ImageData) -> None:
    generator, steps = generator_for(0, 1), EPOCHS * (len(data.train) // BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.05)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.train), generator=generator)
        for rows in order[: steps // EPOCHS * BATCH].split(BATCH):
            logits = judge(scaled(data.train.batch(rows)))
            loss = functional.cross_entropy(logits, data.train.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


@torch.no_grad()
def features_of(judge: Judge, images: Tensor) -> Tensor:
    """float64 [n, 64] of images uint8 or in -1 to 1, [n, C, side, side]; variances are 1 in the mean on real ones."""
    if judge.training:
        raise InputError("a judge in evaluation mode", "one in training mode", "call .eval()")
    parts = [scaled(part) if part.dtype == torch.uint8 else part.clamp(-1, 1) for part in images.split(_AT_ONCE)]
    return torch.cat([judge.features(part).double() for part in parts]) * judge.scale


@torch.no_grad()
def accuracy_of(judge: Judge, data: ImageData) -> float:
    """Share of the test images that it names rightly."""
    right = 0
    for rows in torch.arange(len(data.test)).split(_AT_ONCE):
        right += int((judge(scaled(data.test.batch(rows))).argmax(1) == data.test.labels[rows]).sum())
    return right / len(data.test)
