"""Prediction on images of growing size, read from tiled files: peak memory, CPU time, share of the file that is read.

    python benchmarks/zoom_sizes.py            # five minutes on one core

Megapixel MNIST at 1,500, 3,000 and 6,000 pixels, as TIFF in deflated tiles with smaller levels. A fresh process opens a
file, makes the view of 180 pixels, lets attention choose 10 patches of 50 pixels, reads them and answers; files take
turns, medians count. The network's weights are those of its start: what it answers costs the same. Beside it stands one
that decodes the same file whole.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from common import RECEIPTS, keep
from scrimp.data import open_image
from scrimp.jobs.zoom_files import Gallery
from scrimp.jobs.zoom_labels import Target
from scrimp.jobs.zoom_plan import Plan
from scrimp.jobs.zoom_readers import Readers
from scrimp.meter import Cost
from scrimp.meter.resident import peak_resident
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt
from zoom_data import tiff
from zoom_mnist import CLASSES, megapixel_mnist

VIEW, PATCH, PATCHES = 180, 50, 10
WAYS = ("zoom", "whole")


@dataclass(frozen=True)
class ZoomSizes:
    """Memory, time and bytes against the size of the image."""

    sides: tuple[int, ...] = (1500, 3000, 6000)
    images: int = 3
    """Of each size."""
    repeats: int = 3
    """Fresh processes for each peak; predictions of each image that are timed."""
    out: Path = RECEIPTS / "zoom-sizes.json"


def network() -> tuple[Plan, Any]:
    plan = Plan(
        method="zoom",
        attention="contrast",
        attention_level=-1,
        features="convnet",
        maps=1,
        patches=PATCHES,
        patch_size=(PATCH,),
        smooth=1e-5,
        replacement=False,
        control=True,
        shape=(1, VIEW, VIEW),
        mean=(0.005,),
        std=(0.05,),
        target=Target("classes", CLASSES),
    )
    return plan, plan.build().eval()


def predict(path: str, plan: Plan, model: Any) -> tuple[torch.Tensor, int]:
    """What the model says of a file, and how many bytes of pixels were read for it."""
    readers = Readers(Gallery([path]), limit=1)
    with torch.inference_mode():
        outputs, _ = model(plan.scenes(readers, [0], readers.view(0, plan.shape)[None]))
    read = readers.bytes_read
    readers.open(0).close()
    assert read is not None
    return outputs, read


def decode(path: str) -> torch.Tensor:
    """All pixels of a file at full resolution."""
    with open_image(path) as image:
        return image.read((0, 0, *image.size))


def once(way: str, path: str) -> None:
    """A fresh process's work."""
    torch.set_num_threads(1)
    plan, model = network()
    if way == "zoom":
        predict(path, plan, model)
    else:
        decode(path)


def write_images(folder: Path, order: ZoomSizes) -> dict[int, list[str]]:
    made = {}
    for side in order.sides:
        maker = megapixel_mnist("test", side)
        paths = [folder / f"{side}-{number}.tiff" for number in range(order.images)]
        for number, path in enumerate(paths):
            write_atomic(path, tiff(np.ascontiguousarray(maker.make(number).pixels)))
        made[side] = [str(path) for path in paths]
    return made


def peaks(order: ZoomSizes, files: dict[int, list[str]]) -> dict[str, dict[int, float]]:
    """Median peak resident bytes of each way and size, taking turns."""
    found: dict[str, dict[int, list[float]]] = {way: {side: [] for side in order.sides} for way in WAYS}
    for repeat in range(order.repeats):
        for side in order.sides:
            for way in WAYS:
                path = files[side][repeat % order.images]
                found[way][side].append(float(peak_resident("zoom_sizes:once", way, path).value or 0))
    return {way: {side: statistics.median(many) for side, many in sides.items()} for way, sides in found.items()}


def times(order: ZoomSizes, files: dict[int, list[str]]) -> tuple[dict[int, float], dict[int, float]]:
    """Median CPU seconds of a prediction, and bytes read over the bytes of the file, by size."""
    plan, model = network()
    seconds: dict[int, list[float]] = {side: [] for side in order.sides}
    shares: dict[int, list[float]] = {side: [] for side in order.sides}
    predict(files[order.sides[0]][0], plan, model)  # what is imported and set up once is no part of it
    for _ in range(order.repeats):
        for number in range(order.images):
            for side in order.sides:
                path = files[side][number]
                begin = time.process_time()
                _, read = predict(path, plan, model)
                seconds[side].append(time.process_time() - begin)
                shares[side].append(read / Path(path).stat().st_size)
    return (
        {side: statistics.median(many) for side, many in seconds.items()},
        {side: statistics.fmean(many) for side, many in shares.items()},
    )


def main() -> None:
    order = tyro.cli(ZoomSizes)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        files = write_images(Path(place), order)
        memory = peaks(order, files)
        seconds, shares = times(order, files)
    least, most = min(order.sides), max(order.sides)
    receipt = Receipt(
        kind="benchmark",
        name="zoom-sizes",
        way="zoom",
        seed=0,
        quality={
            "memory_ratio": memory["zoom"][most] / memory["zoom"][least],
            "time_ratio": seconds[most] / seconds[least],
            "whole_memory_ratio": memory["whole"][most] / memory["whole"][least],
        },
        cost=Cost(),
        config={"sides": list(order.sides), "images": order.images, "repeats": order.repeats},
        notes={
            "peak bytes": {way: {str(side): value for side, value in sides.items()} for way, sides in memory.items()},
            "cpu seconds an image": {str(side): value for side, value in seconds.items()},
            "bytes read over the file's": {str(side): value for side, value in shares.items()},
            "torch": torch.__version__,
        },
    )
    keep(receipt, order.out)


if __name__ == "__main__":
    main()
