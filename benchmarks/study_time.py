"""`scrimp study` as a new user runs it: the whole process on two cores, from nothing to table and report.

    python benchmarks/study_time.py          # under four minutes; on a quiet machine

Charged with everything: starting Python, importing, reading the built-in images, timing the steps, training, drawing
the report.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import scrimp
from common import RECEIPTS, keep
from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt, load_receipt

LIMIT_SECONDS = 240


@dataclass(frozen=True)
class StudyTime:
    """Wall and CPU seconds of `scrimp study` in an empty folder, as one process."""

    cores: int = 2
    """Cores it may use; where the system cannot hold it to them, all there are."""
    out: Path = RECEIPTS / "study-time.json"


def run(order: StudyTime) -> Receipt:
    cores = hold_to(order.cores)
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu, printed = study(Path(folder))
        return receipt_of(Path(folder), printed, cores=cores, wall=wall, cpu=cpu)


def hold_to(cores: int) -> int | None:
    """Keep this process and its children to so many cores; returns how many there then are, where that is known."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return len(os.sched_getaffinity(0))


def study(folder: Path) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds of all its processes, and what it printed; a study that fails ends the benchmark."""
    home = str(Path(scrimp.__file__).resolve().parent.parent)  # a relative PYTHONPATH would not hold in the new folder
    paths = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "scrimp", "study"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def receipt_of(folder: Path, printed: str, *, cores: int | None, wall: float, cpu: float) -> Receipt:
    (report,) = folder.glob("runs/*/report.html")
    runs = [load_receipt(path) for path in sorted(report.parent.rglob("receipt.json"))]
    missing = [item.way for item in runs if item.way not in printed]
    if not runs or missing:
        raise SystemExit(f"the study left {len(runs)} receipts, and its table lacks {missing}")
    flops = [item.cost.flops.value for item in runs]
    total = sum(item for item in flops if item is not None) if None not in flops else None
    return Receipt(
        kind="benchmark",
        name="study-time",
        way="scrimp study",
        cost=Cost(
            seconds=Reading(wall, "wall, whole process"),
            cpu_seconds=Reading(cpu, "user and system CPU, whole process and its children"),
            flops=Reading(total, f"sum over the study's {len(runs)} runs"),
        ),
        notes={
            "cores": cores,
            "limit, seconds": LIMIT_SECONDS,
            "within the limit": wall < LIMIT_SECONDS,
            "runs": len(runs),
            "ways": sorted({item.way for item in runs}),
            "report, bytes": report.stat().st_size,
            "data": runs[0].notes["data"],
        },
    )


def main() -> None:
    order = tyro.cli(StudyTime)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
