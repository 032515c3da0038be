"""Diffusion at lower cost, measured: recipes of training, samplers with reuse, students and adapters.

    python benchmarks/denoise_runs.py run                     # hours of one core; stop and start at will
    python benchmarks/denoise_runs.py run --tasks dit --seeds 0 --parts train sample
    python benchmarks/denoise_runs.py table                   # from those there are in receipts/denoise
    python benchmarks/denoise_runs.py picture --out docs/images/denoise.png

dit, unet: small denoisers of Fashion-MNIST with classes, trained by `scrimp denoise train` with the plain recipe, and
with the thrifty one on 0.6 of its FLOPs. The judge, whose features give the Frechet distance (FD), is a classifier that
`--parts judge` trains in a minute; every other part needs it, and all but `judge` need `train`.
sample: every setting is held against 50 steps of DDIM: FLOPs, distance to the model's own 100-step samples from the
same noise, and for those that pass FD and time. coverage: of the error estimate of reuse. student: `scrimp denoise
distill`. personal: a style by NOLA and LoRA. ablation: the thrifty recipe without one of its parts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from denoise_judge import accuracy_of, features_of, scaled, trained_judge
from denoise_measure import PARTS, Bench
from denoise_models import TASKS
from denoise_tables import JUDGE, NAME, card
from scrimp.data import load_images
from scrimp.data.packed import cache_folder
from scrimp.denoise.quality import frechet_distance
from scrimp.meter import Cost, Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME


@dataclass(frozen=True)
class Run:
    """Measure what is missing; every piece leaves its receipt, an unfinished one what is done of it in --work."""

    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0, 1, 2)
    parts: tuple[str, ...] = (JUDGE, *PARTS)
    """In this order, each for all tasks and seeds."""
    threads: int = 1
    out: Path = RECEIPTS
    work: Path = cache_folder() / NAME


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


@dataclass(frozen=True)
class Picture:
    """Draw what settings cost against how far their images are from the exact ones, from the receipts of seed 0."""

    receipts: Path = RECEIPTS
    out: Path = RECEIPTS.parent.parent / "docs" / "images" / "denoise.png"


def run(order: Run) -> None:
    for given, known in ((order.tasks, TASKS), (order.parts, (JUDGE, *PARTS))):
        if strange := set(given).difference(known):
            raise InputError(f"out of {', '.join(known)}", strange.pop(), "correct it")
    torch.set_num_threads(order.threads)
    bench = Bench(load_images("fashion-mnist"), order.work, order.out)
    for part in order.parts:
        if part == JUDGE:
            judged(bench)
            continue
        for name in order.tasks:
            for seed in order.seeds:
                PARTS[part](bench, name, seed)


def judged(bench: Bench) -> None:
    """Train the judge and say what its distances are of images of known quality."""
    file = bench.out / JUDGE / f"{JUDGE}-s0.json"
    if file.is_file():
        return
    _, seconds = trained_judge(bench.data, bench.work / f"{JUDGE}.safetensors")
    generator, data = generator_for(6), bench.data
    seen = data.train.batch(torch.randperm(len(data.train), generator=generator)[:2000])
    clean = scaled(data.test.batch(torch.arange(2000)))
    others = {
        "fd_floor": seen,
        "fd_noise": torch.randn(clean.shape, generator=generator),
        "fd_blurred": torch.nn.functional.avg_pool2d(clean, 3, 1, 1),
    }
    quality: dict[str, float | None] = {"test_accuracy": accuracy_of(bench.judge, data)}
    quality |= {key: frechet_distance(features_of(bench.judge, images), bench.real) for key, images in others.items()}
    cost = Cost(cpu_seconds=Reading(None if seconds != seconds else seconds, "process CPU: training"))
    save_receipt(Receipt("benchmark", f"{NAME}/{JUDGE}", JUDGE, seed=0, quality=quality, cost=cost), file)
    print(f"judge: {quality}", flush=True)


def picture(order: Picture) -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
    from make_picture import draw

    from denoise_picture import scatter

    files = [order.receipts / name / "sampling-s0.json" for name in TASKS]
    figures = [scatter(load_receipt(file)) for file in files if file.is_file()]
    if not figures:
        sys.exit(f"{Path(__file__).name}: no sampling of seed 0 in {order.receipts}: run it first")
    draw(figures, order.out)


def main() -> None:
    commands = {"run": Run, "table": Table, "picture": Picture}
    work: dict[type, Callable[[Any], None]] = {
        Run: run,
        Table: lambda order: print(card(order.out.parent)),
        Picture: picture,
    }
    order: Any = tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:])
    work[type(order)](order)


if __name__ == "__main__":
    main()
