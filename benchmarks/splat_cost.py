"""What encoding and decoding scenes takes: CPU time, wall time with two threads, and memory beside the .ply.

    python benchmarks/splat_cost.py      # some minutes on two cores

Each figure comes from fresh processes: one that reads a .ply and encodes it, one that reads the file a few times, of
which the median time counts. Their peaks are resident memory above that of a process with the same imports that does
neither. Scenes larger than fox60k are copies of it side by side, every number moved a little: no two are alike.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from common import RECEIPTS, keep
from scrimp.data.named import data_root
from scrimp.meter import Cost, Reading
from scrimp.meter.resident import peak_resident
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_json
from scrimp.receipts import Receipt
from scrimp.splats.files import ENDINGS, read, write
from scrimp.splats.scene import Splats

SCENES = {
    "fox60k": (60_000, 3),
    "60,000 without harmonics": (60_000, 0),
    "542,104": (542_104, 3),
    "542,104 without harmonics": (542_104, 0),
    "1,000,000": (1_000_000, 3),
}
"""Gaussians, and degree of the harmonics."""
FORMATS = ("sgs", "sog", "spz")
ABOUT = (
    "Scenes of more than 60,000 Gaussians are copies of fox60k side by side, every number moved a little. Wall time "
    "with two threads on two cores that other processes may share; peaks above an idle process with the same imports."
)
_NOISE = 0.01  # of each column's standard deviation


@dataclass(frozen=True)
class SplatCost:
    """CPU time, wall time and memory of our formats."""

    scenes: tuple[str, ...] = tuple(SCENES)
    formats: tuple[str, ...] = FORMATS
    data: Path | None = None
    """Folder of fox60k.ply; ``scenes`` in the data folder if not given."""
    repeats: int = 3
    """Decodings."""
    threads: int = 2
    out: Path = RECEIPTS / "splat-cost.json"


def grown(splats: Splats, count: int, degree: int) -> Splats:
    """Copies side by side until there are so many Gaussians; the first ones are the scene's own."""
    rows = torch.arange(count) % len(splats)
    copy = (torch.arange(count) // len(splats)).float()
    scene = splats.of_degree(degree).take(rows)
    if count <= len(splats):
        return scene
    generator, later = generator_for(0), (copy > 0).float()
    moved = {}
    for name, values in scene.tensors().items():
        noise = torch.randn(values.shape, generator=generator) * (_NOISE * values.std(0) if values.numel() else 1)
        moved[name] = values + noise * later.reshape(-1, *[1] * (values.ndim - 1))
    # Nearly all of a scene lies within this; beyond it a few Gaussians are far away.
    low, high = splats.means.quantile(0.02, 0), splats.means.quantile(0.98, 0)
    place = torch.stack([copy % 4, copy // 4 % 4, copy // 16], 1)
    return replace(scene, **moved | {"means": moved["means"] + place * (high - low)})


def idle(threads: int) -> None:
    """A process with the imports of the others, that does nothing."""
    _start(threads)


def encode(source: str, target: str, times: str, threads: int) -> None:
    """A fresh process's work: read a .ply, and write it in the format of the target's name."""
    _start(threads)
    splats = read(source)
    _timed(times, lambda: write(splats, target))


def decode(source: str, times: str, threads: int, repeats: int) -> None:
    """A fresh process's work: read a file a few times."""
    _start(threads)
    _timed(times, lambda: read(source), repeats)


def _start(threads: int) -> None:
    """What a first call has to do once: threads, and our modules and those of others."""
    torch.set_num_threads(threads)
    few = Splats(*[torch.randn(64, *shape) for shape in ((3,), (4,), (3,), (), (3,), (3, 3))])
    with tempfile.TemporaryDirectory() as folder:
        for ending in ENDINGS:
            read(write(few, Path(folder) / f"few{ending}", **({"lossy": True} if ending == ".splat" else {})))


def _timed(path: str, call: Callable[[], Any], repeats: int = 1) -> None:
    """Leave median CPU and wall seconds of calls, of which no two results are held together."""
    rows = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        rows.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
    write_json(path, {"cpu": cpu, "seconds": wall})


def measure(order: SplatCost, source: Path, count: int, format: str, resting: float) -> dict[str, float]:
    """One scene in one format."""
    times, target = source.with_name("times.json"), source.with_name(f"scene.{format}")
    ply = source.stat().st_size
    peak = peak_resident("splat_cost:encode", str(source), str(target), str(times), order.threads)
    spent = json.loads(times.read_text(encoding="utf-8"))
    found = {"bytes": float(target.stat().st_size), "bytes of the .ply": float(ply)}
    found |= {"encode cpu seconds": spent["cpu"], "encode seconds": spent["seconds"]}
    found["encode memory ratio"] = (float(peak.value or 0) - resting) / ply
    peak = peak_resident("splat_cost:decode", str(target), str(times), order.threads, order.repeats)
    spent = json.loads(times.read_text(encoding="utf-8"))
    cpu, seconds = spent["cpu"], spent["seconds"]
    found |= {"decode cpu seconds": cpu, "decode seconds": seconds}
    found["decode memory ratio"] = (float(peak.value or 0) - resting) / ply
    return found | {"decoded a second": count / seconds, "decoded a cpu second": count / cpu}


def main() -> None:
    order = tyro.cli(SplatCost)
    torch.set_num_threads(order.threads)
    path = (order.data or data_root() / "scenes") / "fox60k.ply"
    if not path.is_file():
        raise InputError("the scene fox60k.ply", "none", "pass --data, the folder that has it")
    resting = float(peak_resident("splat_cost:idle", order.threads).value or 0)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in order.scenes:
        count, degree = SCENES[name]
        with tempfile.TemporaryDirectory() as folder:
            source = write(grown(read(path), count, degree), Path(folder) / "scene.ply", normals=True)
            found[name] = {}
            for format in order.formats:
                found[name][format] = measure(order, source, count, format, resting)
                print(name, format, found[name][format], flush=True)
    last = found[order.scenes[-1]][order.formats[0]]
    receipt = Receipt(
        kind="benchmark",
        name="splat-cost",
        way=order.formats[0],
        seed=0,
        quality={f"{name} .{way} {key}": row[key] for name, ways in found.items() for way, row in ways.items()
                 for key in ("encode cpu seconds", "decoded a second", "encode memory ratio", "decode memory ratio")},
        cost=Cost(
            seconds=Reading(last["encode seconds"], f"wall clock of encoding, {order.threads} threads"),
            cpu_seconds=Reading(last["encode cpu seconds"], "process CPU time of encoding"),
            stored_bytes=Reading(last["bytes"], "size of the file"),
        ),
        config={"repeats": order.repeats, "threads": order.threads},
        notes={"measured": found, "idle bytes": resting, "about": ABOUT, "torch": torch.__version__},
    )  # fmt: skip
    keep(receipt, order.out)


if __name__ == "__main__":
    main()
