"""Few labels: constrained mean shift by pseudo-labels beside the same network trained on those labels alone.

    python benchmarks/few_labels.py run        # half an hour on two cores; stop and start it at will
    python benchmarks/few_labels.py table      # from the receipts there are

Built-in images (12,000 of Fashion-MNIST), of which 1 % or 10 % have a label, the same ones for every way of a seed; the
small `convnet-8`, which two cores train for enough steps; equal FLOPs, counted. Encoders are judged by a linear
classifier on their features, fitted to the labelled images; the network trained from scratch by its own classifier and
by such a linear one.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from representations import spread
from scrimp.data import ImageData, load_images
from scrimp.jobs.distill import distill
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.encoders import features_of, load_encoder
from scrimp.jobs.labels import labelled_rows
from scrimp.jobs.pretrain import pretrain
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent import linear_accuracy

NAME = "few-labels"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
SHARES = (0.01, 0.1)
PASSES = 20.0
COMMON = {"model": "convnet-8", "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "evaluations": 1}
WAYS = {
    "pseudo-labels": "constrained mean shift by labels and pseudo-labels, then a linear classifier",
    "scratch": "trained on the labelled images alone",
    "constrained": "constrained mean shift without labels, then a linear classifier",
}
"""In this order, since from scratch a network is given the FLOPs that pseudo-labels took."""


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished run leaves its receipt."""

    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = SHARES
    passes: float = PASSES
    threads: int = 2


@dataclass(frozen=True)
class Table:
    """Print the table of the receipts there are."""


def path_of(way: str, share: float, seed: int) -> Path:
    return RECEIPTS / f"{way}-{share:g}-seed{seed}.json"


def run(order: Run) -> None:
    torch.set_num_threads(order.threads)
    data = load_images("builtin")
    for seed in order.seeds:
        for share in order.shares:
            for way in order.ways:
                if not path_of(way, share, seed).is_file():
                    run_one(data, way, share, seed, passes=order.passes)


def run_one(data: ImageData, way: str, share: float, seed: int, *, passes: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        receipt = trained(data, way, share, seed, passes=passes, out=out)
        encoder = load_encoder(out / "weights.safetensors")
        bank, test = (features_of(encoder, part, device=torch.device("cpu")) for part in (data.train, data.test))
    rows = labelled_rows(data, share, seed=seed)
    labels = data.train.labels
    probe = linear_accuracy(bank[rows], labels[rows], test, data.test.labels, unlabelled=bank)
    quality = {**receipt.quality, "probe_accuracy": probe}
    quality.setdefault("test_accuracy", probe)
    found = dataclasses.replace(
        receipt,
        kind="benchmark",
        name=f"{NAME}/{share:g}",
        way=way,
        baseline=way == "scratch",
        quality=quality,
        config={**receipt.config, "out": None, "labelled": share},
        notes={**receipt.notes, "labelled images": len(rows)},
    )
    save_receipt(found, path_of(way, share, seed))
    print(f"{share:g} {way} seed {seed}: {quality}", flush=True)


def trained(data: ImageData, way: str, share: float, seed: int, *, passes: float, out: Path) -> Receipt:
    """One run; all have the FLOPs of ``passes`` passes with pseudo-labels, to within one search of neighbours."""
    common = {**COMMON, "seed": seed, "json": True, "device": "cpu", "out": out}
    if way == "scratch":
        budget = load_receipt(path_of("pseudo-labels", share, seed)).cost.flops.value
        return distill(DistillConfig(**common, flops=budget, method="scratch", labelled=share), data=data)
    constraint = {"constrained": "views", "pseudo-labels": "pseudo-labels"}[way]
    return pretrain(PretrainConfig(**common, constraint=constraint, labelled=share, epochs=passes), data=data)


def load(way: str, share: float) -> list[Receipt]:
    """The receipts there are, seed by seed."""
    paths = [path_of(way, share, seed) for seed in range(9)]
    return [load_receipt(path) for path in paths if path.is_file()]


def table_text() -> str:
    """The table in markdown."""
    head = "| labels | way | test accuracy, % | linear classifier on its features, % | FLOPs | seeds |"
    rows = [head, "|---|---|---|---|---|---|"]
    for share in SHARES:
        for way, about in WAYS.items():
            found = load(way, share)
            if not found:
                continue
            flops = statistics.mean(item.cost.flops.value or 0.0 for item in found)
            figures = [spread(found, f"{kind}_accuracy") for kind in ("test", "probe")]
            rows.append(
                "| " + " | ".join([f"{100 * share:g} %", about, *figures, f"{flops:.2e}", str(len(found))]) + " |"
            )
    return "\n".join(rows)


def table(_: Table) -> None:
    print(table_text())


def main() -> None:
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    run(order) if isinstance(order, Run) else table(order)


if __name__ == "__main__":
    main()
