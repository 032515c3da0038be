"""What denoise_runs.py trains: recipes, students and adapters, each once, through the jobs of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from denoise_tables import LONG, PLAIN, THRIFTY, WITHOUT
from scrimp.data import ImageData
from scrimp.jobs.denoise import denoise_train
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.folder import CONFIG, RECEIPT
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

SHARE = 0.6
"""FLOPs of the thrifty recipe over the plain one's."""
STYLED = 500
ABLATIONS: dict[str, dict[str, Any]] = {
    "v": {"prediction": "epsilon"},
    "weighting": {"weighting": "constant"},
    "importance": {"timesteps": "uniform"},
    "dropping": {"keep": 1.0},
}
"""What the plain recipe has in the place of each part of the thrifty one."""
_SHARED: dict[str, Any] = {"device": "cpu", "precision": "fp32", "json": True, "evaluations": 3, "samples": 16}


@dataclass(frozen=True)
class Task:
    """A network, how long it is trained, and how many images FD is taken of.

    Attributes:
        flops: of the plain recipe.
        long: of the model that sampling is measured on; a network trained briefly is worse with more steps.
    """

    model: str
    flops: float
    long: float
    samples: int
    student_steps: int
    adapter_steps: int
    lr: float = 2e-3


TASKS = {
    "dit": Task("dit-64", 1.28e13, 3.2e13, 2000, 1500, 500),  # 2,000 steps of 64 images, and 5,000
    "unet": Task("unet-16", 2.8e13, 4.2e13, 1000, 600, 250),  # 1,000, and 1,500
}


def trained(task: Task, way: str, seed: int, home: Path) -> tuple[Path, Receipt]:
    """The run folder of a recipe and its receipt; goes on with one that is unfinished."""
    folder = home / way.replace(" ", "-")
    if not (folder / RECEIPT).is_file():
        settings: dict[str, Any] = {"recipe": THRIFTY, "flops": SHARE * task.flops}
        if way == PLAIN:
            settings = {"recipe": PLAIN, "flops": task.flops}
        elif way == LONG:
            settings = {"recipe": THRIFTY, "flops": task.long, "keep": 1.0}
        settings |= ABLATIONS.get(way.removeprefix(WITHOUT), {})
        _train(folder, model=task.model, data="fashion-mnist", seed=seed, lr=task.lr, **settings)
    return folder, load_receipt(folder / RECEIPT)


def budget_of(receipt: Receipt) -> float:
    """FLOPs of a training run, what was measured along the way left out."""
    flops = receipt.cost.flops.value
    if flops is None:
        raise InputError("a training run whose FLOPs are known", receipt.name, "train it anew")
    return float(flops)


def student(task: Task, teacher: Path, seed: int, home: Path) -> tuple[Path, Receipt]:
    """The run folder of a student of few steps and its receipt."""
    from scrimp.jobs.denoise_distill import denoise_distill
    from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig

    folder = home / "student"
    if not (folder / RECEIPT).is_file():
        settings = {**_SHARED, "samples": 8, "steps": task.student_steps, "pairs_folder": home / "pairs"}
        again = (folder / CONFIG).is_file()
        denoise_distill(DenoiseDistillConfig(model=teacher, seed=seed, out=folder, resume=again, **settings))
    return folder, load_receipt(folder / RECEIPT)


def adapted(task: Task, teacher: Path, style: str, seed: int, images: Path) -> tuple[Path, Receipt]:
    """The run folder of an adapter, ``nola`` or ``lora``, trained on a folder of images, and its receipt."""
    folder = teacher.parent / f"personal-{style}"
    if not (folder / RECEIPT).is_file():
        settings: dict[str, Any] = {"start": teacher, "adapter": style, "steps": task.adapter_steps, "rank": 4}
        _train(folder, data=str(images), seed=seed, **settings)
    return folder, load_receipt(folder / RECEIPT)


def styled_folder(data: ImageData, home: Path, *, seed: int) -> Path:
    """A folder of 500 training images of a style the model never saw: turned over the diagonal, as if lying."""
    rows = torch.randperm(len(data.train), generator=generator_for(5, seed))[:STYLED]
    home.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(lying(data.train.batch(rows))):
        file = home / f"{number:03}.png"
        if not file.is_file():
            Image.fromarray(image[0].numpy()).save(file)
    return home


def lying(images: torch.Tensor) -> torch.Tensor:
    """Rows for columns, [n, C, side, side]."""
    return images.transpose(-1, -2).contiguous()


def _train(folder: Path, **settings: Any) -> None:
    denoise_train(DenoiseTrainConfig(out=folder, resume=(folder / CONFIG).is_file(), **_SHARED, **settings))
