"""The attention sampling benchmarks' rows, made from their receipts; for benchmarks/readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from scrimp.receipts import Receipt, load_receipt

UNMEASURED = "Not measured yet."
OURS = "zoom"
TASKS = {
    "mnist": "Megapixel MNIST, 1,500 x 1,500",
    "signs": "Road signs in photographs, 2,048 x 1,536",
    "modules": "Solar modules of 60 cells, 3,000 x 1,800",
}
WAYS = {
    "zoom": "attention sampling",
    "abmil": "attention pooling over all patches",
    "whole": "whole image",
    "whole-half": "whole image, half the size",
    "whole-third": "whole image, a third of the size",
    "whole-quarter": "whole image, a quarter of the size",
}
CHANCE = {"mnist": 0.1, "signs": 1 / 7, "modules": 0.5}
NOTE = (
    "Every way has the same feature network and, in all, the FLOPs of attention sampling's passes; rates were not "
    "searched. Peak: resident memory of a training step of four images above the idle process. Accuracy: mean and "
    "deviation over seeds."
)
Runs = Mapping[str, Sequence[Receipt]]
MAPS = {"90_on_15": "90 % on 15", "99_on_10": "99 % on 10", "90_on_5": "90 % on 5"}


def gradient(receipt: Receipt) -> str:
    """Line 4: exact biases and ratios of a small problem, cosines of a large one."""
    quality = receipt.quality
    cosines = ", ".join(
        f"{about}: {quality[f'cosine_{name}_ours']:.5f} (published formula {quality[f'cosine_{name}_published']:+.2f})"
        for name, about in MAPS.items()
    )
    return (
        f"bias over every ordered sample at most {quality['enumerated_bias']:.0e}; variance without over with "
        f"replacement {quality['enumerated_variance_ratio']:.2f}x, with the control variate "
        f"{quality['enumerated_variance_ratio_control']:.2f}x; cosine with the exact gradient, "
        f"{receipt.config['draws']:,} samples, attention of which {cosines}"
    )


def sizes(receipt: Receipt) -> str:
    """Line 2: what grows with the image."""
    quality, notes = receipt.quality, receipt.notes
    seconds, shares = notes["cpu seconds an image"], notes["bytes read over the file's"]
    memory = notes["peak bytes"]
    sides = list(seconds)
    ours, whole = (", ".join(f"{memory[way][side] / 1e6:.0f}" for side in sides) for way in (OURS, "whole"))
    return (
        f"{sides[0]} to {sides[-1]} pixels: peak {quality['memory_ratio']:.2f}x "
        f"({ours} MB; decoded whole {whole}), CPU time {quality['time_ratio']:.2f}x "
        f"({', '.join(f'{1e3 * seconds[side]:.0f}' for side in sides)} ms), bytes read of the file "
        f"{', '.join(f'{100 * shares[side]:.1f} %' for side in sides)}"
    )


def card(folder: Path, picture: Path) -> str:
    """The method card's figures: a table a task, and a picture of where the patches fell if there is one."""
    tables = [table_text(folder / "zoom", task) for task in TASKS]
    shown = [f"![Test images with attention and patches](images/{picture.name})"] if picture.is_file() else []
    return "\n\n".join([*tables, NOTE, *shown])


def megapixel(receipts: Sequence[Receipt]) -> str:
    """Line 1: error, epochs at chance, cost beside the whole image."""
    costs = costs_of("mnist", receipts)
    if "whole" not in costs or OURS not in costs:
        return summary("mnist", receipts)
    whole, ours = costs["whole"].quality, costs[OURS].quality
    ratios = [
        f"{name} {float(ours[key] or 0) / float(whole[key] or 1):.3f}x"
        for name, key in (("FLOPs", "flops_train"), ("peak memory above an idle process", "peak_bytes_train"))
    ]
    speeds = [f"{float(one['images_a_cpu_second_score'] or 0):.1f}" for one in (ours, whole)]
    return f"{summary('mnist', receipts)}; training {', '.join(ratios)}; {' and '.join(speeds)} images a CPU second"


def objects(receipts: Sequence[Receipt]) -> str:
    """Line 3: the two tasks of photographs."""
    return "; ".join(summary(task, receipts) for task in ("signs", "modules"))


def summary(task: str, receipts: Sequence[Receipt]) -> str:
    """A task's accuracies, costs and hits in one sentence."""
    runs = by_way(task, receipts)
    if OURS not in runs:
        return f"{task}: not measured yet"
    parts = [f"{WAYS[way]} {100 * mean(many, 'test_accuracy'):.1f} %{seeds(many)}" for way, many in runs.items()]
    parts += [f"left chance in pass {left_chance(task, runs[OURS]):.0f}"] if task == "mnist" else []
    return f"{task}: {', '.join(parts)}; patches on the object {hits(runs[OURS])}"


def left_chance(task: str, runs: Sequence[Receipt]) -> float:
    """Mean over seeds of the pass after which the test accuracy was first twice chance's."""
    found = []
    for run in runs:
        per_pass = run.notes["training images"]
        over = [point["samples"] / per_pass for point in run.curve if point["test_accuracy"] >= 2 * CHANCE[task]]
        found.append(min(over, default=float("nan")))
    return statistics.fmean(found)


def hits(runs: Sequence[Receipt]) -> str:
    share, chance = mean(runs, "hit_patches"), mean(runs, "hit_patches_chance")
    seen, by_luck = mean(runs, "hit_images"), mean(runs, "hit_images_chance")
    anywhere = f"images where one is {100 * seen:.0f} % (chance {100 * by_luck:.0f} %)"
    return f"{100 * share:.0f} % (chance {100 * chance:.1f} %), {anywhere}"


def seeds(runs: Sequence[Receipt]) -> str:
    values = [100 * float(run.quality["test_accuracy"] or 0) for run in runs]
    return f" +- {statistics.stdev(values):.1f} ({len(values)} seeds)" if len(values) > 1 else " (1 seed)"


def mean(runs: Sequence[Receipt], name: str) -> float:
    values = [run.quality.get(name) for run in runs]
    return statistics.fmean(float("nan") if value is None else value for value in values)


def by_way(task: str, receipts: Sequence[Receipt]) -> Runs:
    """Trainings of a task, in the order of `WAYS`."""
    own = [receipt for receipt in receipts if receipt.name == f"zoom/{task}"]
    return {way: many for way in WAYS if (many := [one for one in own if one.way == way])}


def costs_of(task: str, receipts: Sequence[Receipt]) -> Mapping[str, Receipt]:
    return {one.way: one for one in receipts if one.name == f"zoom/{task}/cost"}


def table_text(folder: Path, task: str) -> str:
    """A table in Markdown: a row a way, what it gave and what it cost; from the receipts in ``folder``."""
    receipts = [load_receipt(path) for path in sorted((folder / task).glob("*.json"))]
    runs, costs = by_way(task, receipts), costs_of(task, receipts)
    rows = [row(way, runs.get(way, ()), costs.get(way)) for way in WAYS if way in runs or way in costs]
    if not rows:
        return f"{TASKS[task]}: {UNMEASURED.lower()}"
    head = "| | test accuracy | seeds | passes | GFLOP an image | peak, MB | images a CPU second |"
    chance = f"{100 * CHANCE[task]:.0f} % by chance"
    return "\n".join([f"**{TASKS[task]}**, {chance}", "", head, "|---" + "|--:" * 6 + "|", *rows])


def row(way: str, runs: Sequence[Receipt], cost: Receipt | None) -> str:
    """What was not trained, or not measured, is a dash."""
    given, passes, flops = ["-", "0"], "-", float("nan")
    if runs:
        values = [100 * float(run.quality["test_accuracy"] or 0) for run in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        given = [f"{statistics.fmean(values):.1f}{spread} %", str(len(values))]
        parts = [float(run.cost.samples.value or 0) / run.notes["training images"] for run in runs]
        passes = f"{statistics.fmean(parts):.1f}"
        flops = statistics.fmean(run.notes["flops an image, training"] for run in runs)
    spent = ["-", "-"]
    if cost is not None:
        flops, quality = float(cost.quality["flops_train"] or 0), cost.quality
        peak, speed = quality["peak_bytes_train"], quality["images_a_cpu_second_train"]
        spent = [f"{float(peak or 0) / 1e6:.0f}", f"{float(speed or 0):.1f}"]
    return f"| {' | '.join([WAYS[way], *given, passes, f'{flops / 1e9:.2f}', *spent])} |"
