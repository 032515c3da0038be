"""Attention sampling beside the whole image and beside attention pooling over all patches, on three kinds of images.

    python benchmarks/zoom_runs.py run              # many hours of one core; stop and start it at will
    python benchmarks/zoom_runs.py run --tasks signs --ways zoom whole --seeds 1
    python benchmarks/zoom_runs.py cost             # FLOPs, peak memory, images a second, in turns
    python benchmarks/zoom_runs.py table            # from the receipts there are
    python benchmarks/zoom_runs.py picture --out docs/images/zoom.png

mnist: five digits among fifty strokes on 1,500 x 1,500 pixels, 5,000 to train on. signs: a road sign or none among
things of the same colours in photographs of 2,048 x 1,536. modules: 6 x 10 solar cells on 3,000 x 1,800, one broken or
none. Every way has the same feature network and, in all, the FLOPs that attention sampling's passes take.
"""

from __future__ import annotations

import gc
import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import tyro
from PIL import Image

from scrimp.jobs.engine import accelerated
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.zoom import zoom_train
from scrimp.jobs.zoom_config import ZoomTrainConfig
from scrimp.jobs.zoom_model import Looking
from scrimp.jobs.zoom_pictures import look_at, overlay
from scrimp.jobs.zoom_plan import load_plan
from scrimp.jobs.zoom_readers import Readers, Views
from scrimp.jobs.zoom_setup import ZoomSetup, prepare_zoom
from scrimp.meter import Cost, Reading, ResidentPeak, paired
from scrimp.meter.resident import peak_resident
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt, save_receipt
from zoom_items import Box
from zoom_tables import table_text
from zoom_tasks import TASKS, Part, Task, cache_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

NAME = "zoom"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
OURS = "zoom"
HERE = ("out", "data", "test", "cache", "device", "json", "resume", "trackers")  # of the machine, not of the method


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished way and seed leaves its receipt."""

    tasks: tuple[str, ...] = tuple(TASKS)
    ways: tuple[str, ...] = ()
    """All of the task's where none is named."""
    seeds: int = 3
    out: Path = RECEIPTS
    work: Path = cache_folder() / "zoom" / "runs"
    """Where unfinished runs and weights are kept."""


@dataclass(frozen=True)
class Costs:
    """FLOPs, peak memory and CPU time of each way beside attention sampling's, at equal batches."""

    tasks: tuple[str, ...] = tuple(TASKS)
    batch: int = 4
    repeats: int = 3
    out: Path = RECEIPTS


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


@dataclass(frozen=True)
class Picture:
    """Draw where the first seed's models looked: a test image of each task that was trained."""

    out: Path
    work: Path = cache_folder() / "zoom" / "runs"
    number: int = 0
    """Which of the test images that have a box."""


def run(order: Run) -> None:
    for seed in range(order.seeds):
        for name in order.tasks:
            task = TASKS[name]
            for way in order.ways or tuple(task.ways):
                path = order.out / name / f"{way}-s{seed}.json"
                if way in task.ways and not path.is_file():
                    receipt = run_one(task, way, seed, order)
                    save_receipt(receipt, path)
                    print(f"{name} {way} seed {seed}: {receipt.quality}", flush=True)


def run_one(task: Task, way: str, seed: int, order: Run) -> Receipt:
    """One training, and where its patches fell."""
    train, test = task.load()
    folder = order.work / task.name / f"{way}-s{seed}"
    config = config_of(task, way, seed=seed, out=folder, budget=None if way == OURS else budget_of(task, order.out))
    receipt = zoom_train(config, data=(train.gallery, test.gallery))
    quality = {**receipt.quality, **looked(folder, test)} if config.method != "whole" else receipt.quality
    return published(replace(receipt, quality=quality), task, way)


def config_of(task: Task, way: str, *, seed: int = 0, out: Path | None = None, budget: float | None) -> ZoomTrainConfig:
    """A way's settings; by the task's passes where no budget of FLOPs is given."""
    method = {"method": way} if way in ("zoom", "abmil", "whole") else {}
    spent = {"epochs": task.epochs} if budget is None else {"flops": budget}
    settings = {"evaluations": 1, "probe": 20, "pictures": 0, **task.shared, **method, **task.ways[way], **spent}
    resume = out is not None and (out / "config.yaml").is_file()
    return ZoomTrainConfig(
        data=task.name, seed=seed, out=out, device="cpu", json=True, cache=cache_folder() / "zoom" / "views",
        resume=resume, **settings,
    )  # fmt: skip


def budget_of(task: Task, out: Path) -> float:
    """The FLOPs that attention sampling's passes took."""
    path = out / task.name / f"{OURS}-s0.json"
    if not path.is_file():
        sys.exit(f"{Path(__file__).name}: run {OURS} on {task.name} first: the others get its FLOPs")
    return float(load_receipt(path).config["budget_flops"])


def published(receipt: Receipt, task: Task, way: str) -> Receipt:
    """Without what only holds on this machine."""
    config = {key: value for key, value in receipt.config.items() if key not in HERE}
    return replace(receipt, kind="benchmark", name=f"{NAME}/{task.name}", way=way, config=config)


def looked(folder: Path, test: Part) -> dict[str, float]:
    """Shares of the test images with boxes, and of patches on them, that hold the middle of a box; and chance."""
    plan, model = load_plan(folder)
    readers = Readers(test.gallery, limit=4)
    rows = [row for row, boxes in enumerate(test.boxes) if boxes]
    views = Views(readers, plan.shape, cache_folder() / "zoom" / "views")
    widest = max(plan.patch_size)
    hits, found, chance = [], [], []
    for seen in look_at(plan, model, views, rows, device=torch.device("cpu"), batch_size=8):
        boxes = [grown(box, widest) for box in seen.boxes.tolist()]
        inside = [[holds(box, item) for item in test.boxes[seen.row]] for box in boxes]
        hits.append(statistics.fmean(any(one) for one in inside))
        found.append(float(any(map(any, inside))))
        chance.append(by_chance(seen.size, widest, test.boxes[seen.row]))
    many = plan.patches * plan.maps
    return {
        "hit_patches": statistics.fmean(hits),
        "hit_patches_chance": statistics.fmean(chance),
        "hit_images": statistics.fmean(found),
        "hit_images_chance": statistics.fmean(1 - (1 - share) ** many for share in chance),
    }


def grown(box: list[int], side: int) -> list[int]:
    """The largest patch around the same place."""
    left, top, width, height = box
    return [left - (side - width) // 2, top - (side - height) // 2, side, side]


def holds(box: list[int], item: Box) -> bool:
    across, down = item.left + item.width / 2 - box[0], item.top + item.height / 2 - box[1]
    return 0 <= across < box[2] and 0 <= down < box[3]


def by_chance(size: tuple[int, int], side: int, items: tuple[Box, ...]) -> float:
    """Share of an image's places around which a patch holds the middle of a box, places anywhere in the image.

    On a grid of steps of a tenth of the patch.
    """
    step = max(1, side // 10)
    x = torch.arange(0, size[0], step)[:, None].double()
    y = torch.arange(0, size[1], step)[None].double()
    held = torch.zeros(len(x), y.shape[1], dtype=torch.bool)
    for item in items:
        near_x = (x - (item.left + item.width / 2)).abs() <= side / 2
        near_y = (y - (item.top + item.height / 2)).abs() <= side / 2
        held |= near_x & near_y
    return float(held.double().mean())


def costs(order: Costs) -> None:
    for name in order.tasks:
        task = TASKS[name]
        for way in task.ways:
            path = order.out / name / f"cost-{way}.json"
            if not path.is_file():
                with accelerated(config_of(task, OURS, budget=None)) as accelerator:
                    receipt = cost_of(task, way, order, accelerator)
                save_receipt(receipt, path)
                print(f"{name} {way}: {receipt.quality}", flush=True)


def cost_of(task: Task, way: str, order: Costs, accelerator: Accelerator) -> Receipt:
    """Of one way: an image's FLOPs, a step's peak above the idle process, and both CPU times over attention sampling's.

    Reading and making views is part of both times.
    """
    ours, theirs = (prepared(task, each, order.batch, accelerator) for each in (OURS, way))
    train = paired(step_of(theirs, order.batch), step_of(ours, order.batch), order.repeats, warmup=1)
    score = paired(look_of(theirs, order.batch), look_of(ours, order.batch), order.repeats, warmup=1)
    peaks = {what: peak(task, way, what, order) for what in ("idle", "train", "score")}
    quality = {
        "flops_train": theirs.cost.train,
        "flops_score": theirs.cost.score,
        "flops_train_over_ours": theirs.cost.train / ours.cost.train,
        "flops_score_over_ours": theirs.cost.score / ours.cost.score,
        "cpu_train_over_ours": train.cpu_ratio.median,
        "cpu_score_over_ours": score.cpu_ratio.median,
        "images_a_cpu_second_train": order.batch / train.a.readings()[1].value,  # type: ignore[operator]
        "images_a_cpu_second_score": order.batch / score.a.readings()[1].value,  # type: ignore[operator]
        "peak_bytes_train": peaks["train"] - peaks["idle"],
        "peak_bytes_score": peaks["score"] - peaks["idle"],
        "peak_bytes_idle": peaks["idle"],
    }
    cost = Cost(flops=Reading(theirs.cost.train, "counted: forward and backward of an image"))
    config = {"batch": order.batch, "repeats": order.repeats, **dict(task.ways[way])}
    return Receipt("benchmark", f"{NAME}/{task.name}/cost", way, quality=quality, cost=cost, config=config)


def prepared(task: Task, way: str, batch: int, accelerator: Accelerator) -> ZoomSetup:
    """On a few images, views made anew each time: reading them is what the whole image costs."""
    few = task.load()[0].gallery.take(range(batch))
    config = replace(config_of(task, way, budget=None), batch_size=batch, cache=None, resume=False)
    return prepare_zoom(config, (few, few), accelerator, lambda done, total: None)


def step_of(setup: ZoomSetup, batch: int) -> Callable[[], None]:
    """Read and learn from a batch."""
    fitting = setup.fitting(Path(), 1e18)
    rows, train = torch.arange(batch), setup.data.train

    def step() -> None:
        views = torch.stack([train.readers.view(row, train.shape) for row in rows.tolist()])
        inputs, labels = fitting._prepare(views, train.labels[rows], 0, rows)
        fitting.model.train()
        losses, _ = fitting._losses(inputs, labels)
        losses.mean().backward()
        fitting.model.zero_grad()

    return step


def look_of(setup: ZoomSetup, batch: int) -> Callable[[], None]:
    """Read and answer a batch."""
    model: Looking = setup.plan.build().eval()  # type: ignore[assignment]
    rows, train = list(range(batch)), setup.data.train

    def look() -> None:
        views = torch.stack([train.readers.view(row, train.shape) for row in rows])
        with torch.no_grad():
            model(setup.plan.scenes(train.readers, rows, views))

    return look


def peak(task: Task, way: str, what: str, order: Costs) -> float:
    """Median peak resident bytes of fresh processes."""
    found = [
        float(peak_resident("zoom_runs:work", task.name, way, what, order.batch).value or 0)
        for _ in range(order.repeats)
    ]
    return statistics.median(found)


def work(task: str, way: str, what: str, batch: int) -> None:
    """A fresh process's work: everything but the step, or a few of them."""
    torch.set_num_threads(1)
    with accelerated(config_of(TASKS[task], way, budget=None)) as accelerator:
        setup = prepared(TASKS[task], way, batch, accelerator)
        do = {"idle": lambda: None, "train": step_of(setup, batch), "score": look_of(setup, batch)}[what]
        gc.collect()
        with ResidentPeak():  # from here on; making the data took more
            for _ in range(2):
                do()


def print_tables(order: Table) -> None:
    print("\n\n".join(table_text(order.out, name) for name in TASKS if (order.out / name).is_dir()))


def picture(order: Picture) -> None:
    """Side by side, of equal heights."""
    shown = [
        drawn(task, order) for task in TASKS.values() if (order.work / task.name / f"{OURS}-s0" / WEIGHTS).is_file()
    ]
    if not shown:
        sys.exit(f"{Path(__file__).name}: no trained {OURS} in {order.work}: run it first")
    height = max(one.height for one in shown)
    shown = [one.resize((round(one.width * height / one.height), height), Image.Resampling.LANCZOS) for one in shown]
    gap = height // 40
    sheet = Image.new("RGB", (sum(one.width + gap for one in shown) - gap, height), "white")
    left = 0
    for one in shown:
        sheet.paste(one, (left, 0))
        left += one.width + gap
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_atomic(order.out, content.getvalue())


def drawn(task: Task, order: Picture) -> Image.Image:
    """The overlay of one test image, from a view of its own large enough to be looked at."""
    plan, model = load_plan(order.work / task.name / f"{OURS}-s0")
    test = task.load()[1]
    readers = Readers(test.gallery, limit=1)
    row = [place for place, boxes in enumerate(test.boxes) if boxes][order.number]
    (seen,) = look_at(plan, model, Views(readers, plan.shape, None), [row], device=torch.device("cpu"), batch_size=1)
    return Image.open(io.BytesIO(overlay(seen))).convert("RGB")


def main() -> None:
    commands = {"run": Run, "cost": Costs, "table": Table, "picture": Picture}
    work_of: dict[type, Callable[[Any], None]] = {Run: run, Costs: costs, Table: print_tables, Picture: picture}
    order = tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:])
    torch.set_num_threads(1)
    work_of[type(order)](order)


if __name__ == "__main__":
    main()
