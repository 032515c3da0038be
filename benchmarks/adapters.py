"""Adapters of kilobytes beside peft's: accuracy, bytes on disk and CPU time on the same tasks.

    python benchmarks/adapters.py run               # hours of one core; stop and start it at will
    python benchmarks/adapters.py run --tasks cifar10 --ways lora-4 nola-64 --seeds 1
    python benchmarks/adapters.py tune --tasks cifar10 --ways lora-4    # three rates on held-out data
    python benchmarks/adapters.py step-time         # beside LoRA r4, step by step in one process
    python benchmarks/adapters.py table             # from the receipts there are
    python benchmarks/adapters.py picture --out docs/images/adapters.png

Every way trains the same frozen model on the same batches for the same steps: AdamW without decay, warm-up, cosine; the
seed fixes the images or passages, their order, the head's first weights and the adapter's. The head is trained in full
by all at one rate and is not counted in their bytes. A way's file is what its own tool writes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro

from adapt_tables import METRICS, curve, table_text
from adapt_tasks import TASKS, Task
from adapt_ways import BASELINE, HEAD_RATE, LIKE, WARM_UP, WAYS, Training, Way, stored_tensors
from scrimp.meter import Cost, Reading, paired, saved_bytes
from scrimp.meter.measure import bytes_on_disk
from scrimp.receipts import Receipt, load_receipt, save_receipt

NAME = "adapters"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
HELD_OUT_SEED = 100


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished way and seed leaves its receipt."""

    tasks: tuple[str, ...] = tuple(TASKS)
    ways: tuple[str, ...] = tuple(WAYS)
    seeds: int = 5
    out: Path = RECEIPTS


@dataclass(frozen=True)
class Tune:
    """Held-out figures of rates around a way's own, with a seed that is used for nothing else."""

    tasks: tuple[str, ...] = ("cifar10", "shakespeare")
    ways: tuple[str, ...] = tuple(WAYS)
    out: Path = RECEIPTS


@dataclass(frozen=True)
class StepTime:
    """CPU time of a training step over LoRA r4's, in turns, and the activations it saves."""

    tasks: tuple[str, ...] = tuple(TASKS)
    ways: tuple[str, ...] = tuple(WAYS)
    repeats: int = 15
    out: Path = RECEIPTS


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


@dataclass(frozen=True)
class Picture:
    """Draw the metric against bytes on disk."""

    out: Path
    receipts: Path = RECEIPTS
    tasks: tuple[str, str] = ("cifar10", "shakespeare")


def path_of(out: Path, task: str, way: str, seed: int) -> Path:
    return out / task / f"{way}-s{seed}.json"


def forms(way: str, wanted: Iterable[str]) -> list[str]:
    """The ways among those ``wanted`` that share the training of this one."""
    return [name for name in wanted if name == way or WAYS[name].of == way]


def run(order: Run) -> None:
    for name in order.tasks:
        task = TASKS[name]()
        for seed in range(order.seeds):
            for way in dict.fromkeys(WAYS[form].of or form for form in order.ways):
                if name not in WAYS[way].rates:
                    continue
                missing = [
                    form for form in forms(way, order.ways) if not path_of(order.out, name, form, seed).is_file()
                ]
                if missing:
                    run_one(task, way, seed, missing, out=order.out)


def run_one(task: Task, name: str, seed: int, wanted: list[str], *, out: Path) -> None:
    """One training, and a receipt for each form that its numbers are stored in."""
    rate, wall, cpu = WAYS[name].rates[task.name], time.perf_counter(), time.process_time()
    training = Training(task, WAYS[name], seed=seed, rate=rate)
    last = training.run(seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    training.model.eval()
    score = {**task.score(training.model, "test"), "train_loss": last}
    for form in wanted:
        with tempfile.TemporaryDirectory() as place:
            file = WAYS[form].store(training.handle, Path(place))
            found = score if WAYS[form].reload is None else {**score, **again(training, WAYS[form], file, seed)}
            receipt = receipt_of(task, form, seed, training, quality=found, file=file)
        cost = replace(receipt.cost, seconds=Reading(wall, "wall"), cpu_seconds=Reading(cpu, "process CPU"))
        save_receipt(replace(receipt, cost=cost), path_of(out, task.name, form, seed))
        size = receipt.notes["adapter_bytes"]
        print(f"{task.name} {form} seed {seed}: {found[task.metric]:.4f}, {size} bytes, {cpu:.0f} s", flush=True)


def again(training: Training, way: Way, file: Path | None, seed: int) -> dict[str, float]:
    """The score of a fresh model with the stored adapter in it."""
    assert way.reload is not None
    assert file is not None
    task, model = training.task, training.task.fresh(seed)
    model.requires_grad_(False)
    with torch.no_grad():
        for name, value in training.head.items():
            model.get_parameter(name).copy_(value)
    way.reload(model, task, file)
    return task.score(model.eval(), "test")


def receipt_of(
    task: Task, way: str, seed: int, training: Training, *, quality: dict[str, Any], file: Path | None
) -> Receipt:
    """What was reached, and the bytes it takes; versions of what wrote them."""
    stored = Reading(0, "nothing to store") if file is None else bytes_on_disk(file)
    beside = [] if file is None else [path for path in file.parent.iterdir() if path != file and path.suffix == ".json"]
    receipt = Receipt("benchmark", f"{NAME}/{task.name}", way, seed=seed, baseline=way == BASELINE, quality=quality)
    config = {
        "about": WAYS[way].about,
        **WAYS[way].settings,
        "rate": WAYS[way].rates[task.name],
        "head_rate": HEAD_RATE,
        "steps": task.steps,
        "warm_up": WARM_UP,
        "training_of": WAYS[way].of or way,
    }
    notes = {
        "task": task.about,
        "trainable": training.numbers(),
        "adapter_bytes": stored.value,
        "config_bytes": sum(path.stat().st_size for path in beside),
        "head_bytes": head_bytes(training),
        "precision": "bfloat16 autocast, float32 weights",
    }
    cost = Cost(stored_bytes=stored, labels=Reading(task.labels, "drawn by the seed"))
    return replace(receipt, cost=cost, config=config, notes=notes, versions=receipt.versions | tools())


def head_bytes(training: Training) -> int:
    """Bytes on disk of the head, the same for all."""
    with tempfile.TemporaryDirectory() as place:
        file = stored_tensors(training.head, Path(place))
        return 0 if file is None else file.stat().st_size


@functools.cache
def tools() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(("peft", "transformers", "safetensors"))
    for name in found:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def tune(order: Tune) -> None:
    for name in order.tasks:
        task = TASKS[name]()
        for way in order.ways:
            if WAYS[way].of is None and way not in LIKE and WAYS[way].rates.get(name):
                print(f"{name} {way}: best rate {best_rate(task, way, order.out):.1g}", flush=True)


def best_rate(task: Task, way: str, out: Path) -> float:
    """The best of three rates around the way's own, or of two more where the best of them is not between others."""
    found: dict[int, float] = {}
    places = [-1, 0, 1]
    while places:
        found |= {place: task.better * tried(task, way, 3.0**place, out) for place in places}
        best = max(found, key=lambda place: found[place])
        places = [place for place in (best - 1, best + 1) if place not in found and abs(place) <= 3]
    return WAYS[way].rates[task.name] * 3.0**best


def tried(task: Task, way: str, factor: float, out: Path) -> float:
    """The metric on held-out data after training at the way's rate times ``factor``; its receipt is kept."""
    rate = WAYS[way].rates[task.name] * factor
    path = out / task.name / "rates" / f"{way}-{rate:.1g}.json"
    if not path.is_file():
        training = Training(task, WAYS[way], seed=HELD_OUT_SEED, rate=rate)
        last = training.run(HELD_OUT_SEED)
        quality = {**task.score(training.model.eval(), "held-out"), "train_loss": last}
        name = f"{NAME}/{task.name}/rates"
        found = Receipt("benchmark", name, way, seed=HELD_OUT_SEED, quality=quality, config={"rate": rate})
        save_receipt(found, path)
    value = load_receipt(path).quality[task.metric]
    return -math.inf * task.better if value is None else value


def step_time(order: StepTime) -> None:
    for name in order.tasks:
        task = TASKS[name]()
        for way in order.ways:
            path = order.out / name / "step-time" / f"{way}.json"
            if WAYS[way].of is None and WAYS[way].rates.get(name, 0.0) and not path.is_file():
                receipt = step_receipt(task, way, repeats=order.repeats)
                save_receipt(receipt, path)
                print(f"{name} {way}: {receipt.quality}", flush=True)


def step_receipt(task: Task, way: str, *, repeats: int) -> Receipt:
    """CPU time of one step over LoRA r4's, median of pairs taken in turns, and the activations one step saves."""
    mine, base = (Training(task, WAYS[name], seed=0, rate=WAYS[name].rates[task.name]) for name in (way, BASELINE))
    batch = next(task.batches(0))
    found = paired(lambda: mine.step(batch), lambda: base.step(batch), repeats, warmup=2)
    saved, saved_base = (saved_bytes(lambda one=one: one.forward(batch)) for one in (mine, base))
    quality = {
        "cpu_ratio": found.cpu_ratio.median,
        "cpu_ratio_low": found.cpu_ratio.low,
        "cpu_ratio_high": found.cpu_ratio.high,
        "saved_ratio": (saved.value or 0.0) / (saved_base.value or math.nan),
    }
    seconds, cpu_seconds = found.a.readings()
    cost = Cost(seconds=seconds, cpu_seconds=cpu_seconds, saved_bytes=saved)
    return Receipt("benchmark", f"{NAME}/{task.name}/step-time", way, quality=quality, cost=cost)


def print_tables(order: Table) -> None:
    print("\n\n".join(table_text(order.out, name) for name in METRICS if (order.out / name).is_dir()))


def picture(order: Picture) -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
    from make_picture import draw

    draw([curve(order.receipts, name) for name in order.tasks], order.out)


def main() -> None:
    commands = {"run": Run, "tune": Tune, "step-time": StepTime, "table": Table, "picture": Picture}
    work = {Run: run, Tune: tune, StepTime: step_time, Table: print_tables, Picture: picture}
    order = tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:])
    torch.set_num_threads(1)
    work[type(order)](order)


if __name__ == "__main__":
    main()
