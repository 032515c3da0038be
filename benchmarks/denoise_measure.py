"""The parts of denoise_runs.py: what each measures of one task and seed, and the receipt it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoise_judge import Judge, features_of, trained_judge
from denoise_models import ABLATIONS, TASKS, adapted, budget_of, lying, student, styled_folder, trained
from denoise_sampling import Draws, Setting, fd_and_error
from denoise_tables import (
    COVERAGE,
    GATE,
    JUDGE,
    LONG,
    NAME,
    PERSONAL,
    PLAIN,
    SAMPLING,
    STUDENT,
    THRIFTY,
    WITHOUT,
    as_good,
    front,
)
from scrimp.data import ImageData
from scrimp.denoise.calibration import calibrate
from scrimp.denoise.calibration import coverage as covered
from scrimp.denoise.quality import precision_recall
from scrimp.jobs.denoise_models import load_denoiser
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_json
from scrimp.receipts import Receipt, save_receipt

BASELINE, SOLVER = Setting("ddim", 50), Setting("dpm++", 20)
EXACT = Setting("dpm++", 100)
"""Of second order: 100 steps of DDIM are still half as far from the limit as 50."""
SOLVERS, CACHED = ("ddim", "dpm++", "unipc", "deis"), ("dpm++", "unipc")
STEPS, MANY = (5, 6, 8, 10, 12, 15, 18, 20, 25, 50), (12, 15, 20, 25, 30)
CACHES, DEPTHS = ("every 2", "every 3", "below 0.1", "below 0.2"), (1, 2)
LOOKED_AT = (*(Setting("ddim", steps) for steps in GATE), *(Setting("dpm++", steps) for steps in (5, 10, 20)))
"""Settings whose FD is taken whatever they cost."""
JUMPS = (1, 2, 4)
FEW, LONGEST = ("dpm++", "unipc"), 12
COVERED, CALIBRATED, FRESH = Setting("dpm++", 20, "below 0.2"), 6, 16
"""What coverage is measured of, with how many batches to calibrate (each round) and to look at."""
PAIRED, TIMED, ROUNDS, TRIED = 64, 50, 5, 5
"""Images of which the paired error is taken, images and rounds of timing, most settings of a kind whose FD is taken."""


@dataclass
class Bench:
    """The data, the judge and where things are."""

    data: ImageData
    work: Path
    out: Path

    @cached_property
    def judge(self) -> Judge:
        file = self.work / f"{JUDGE}.safetensors"
        if not file.is_file():
            raise InputError("a trained judge in --work", "none", "run --parts judge first")
        return trained_judge(self.data, file)[0]

    @cached_property
    def real(self) -> Tensor:
        """Features of all test images."""
        return features_of(self.judge, self.data.test.batch(torch.arange(len(self.data.test))))

    def home(self, name: str, seed: int) -> Path:
        return self.work / name / f"s{seed}"

    def long(self, name: str, seed: int) -> Path:
        """The run folder of the model that sampling is measured on, trained if need be."""
        _recipe(self, name, LONG, seed)
        return self.home(name, seed) / LONG

    def draws(self, folder: Path, name: str, *, adapter: Path | None = None, classes: bool = True) -> Draws:
        """Of the model in a run folder; the noise is that of all models."""
        denoiser = load_denoiser(folder, adapter=adapter)
        kept = (folder if adapter is None else adapter.parent) / ("features" if classes else "features-no-class")
        return Draws(denoiser, self.judge, 9, TASKS[name].samples, kept, classes)

    def file(self, name: str, way: str, seed: int) -> Path:
        return self.out / name / f"{way.replace(' ', '-')}-s{seed}.json"

    def publish(self, name: str, way: str, seed: int, **content: Any) -> None:
        receipt = Receipt("benchmark", f"{NAME}/{name}", way, seed=seed, **content)
        save_receipt(receipt, self.file(name, way, seed))
        print(f"{name} {way} seed {seed}: {receipt.quality}", flush=True)


def train(bench: Bench, name: str, seed: int) -> None:
    for way in (PLAIN, THRIFTY):
        _recipe(bench, name, way, seed)


def ablation(bench: Bench, name: str, seed: int) -> None:
    for part in ABLATIONS:
        _recipe(bench, name, WITHOUT + part, seed)


def _recipe(bench: Bench, name: str, way: str, seed: int) -> None:
    if bench.file(name, way, seed).is_file():
        return
    folder, run = trained(TASKS[name], way, seed, bench.home(name, seed))
    draws = bench.draws(folder, name)
    made = draws.features(BASELINE)
    distance, error = fd_and_error(made, bench.real)
    solver = fd_and_error(draws.features(SOLVER), bench.real)[0]
    precision, recall = precision_recall(bench.real[: len(made)], made)
    cost = Cost(flops=Reading(budget_of(run), "training, counted"), cpu_seconds=run.cost.cpu_seconds)
    quality = {"fd": distance, "fd_error": error, "fd_solver": solver, "precision": precision, "recall": recall}
    notes = {
        "sampler": BASELINE.name,
        "solver": SOLVER.name,
        "images": len(made),
        "training": run.notes,
        "error": run.quality,
    }
    bench.publish(name, way, seed, quality=quality, cost=cost, notes=notes)


def sample(bench: Bench, name: str, seed: int) -> None:
    if bench.file(name, SAMPLING, seed).is_file():
        return
    draws = bench.draws(bench.long(name, seed), name)
    rows = _grid(draws, bench.home(name, seed) / "grid.json")
    for one in LOOKED_AT:
        _add_distance_(rows[one.name], draws, bench.real)
    base = rows[BASELINE.name]
    for one in _chosen(rows, draws, bench.real):
        rows[one] |= draws.seconds(_setting(rows[one]), BASELINE, rounds=ROUNDS, count=TIMED)
    notes = {"baseline": BASELINE.name, "exact": EXACT.name, "images": draws.count, "paired images": PAIRED,
             "settings": list(rows.values())}  # fmt: skip
    bench.publish(name, SAMPLING, seed, quality={"fd": base["fd"], "fd_error": base["fd_error"]}, notes=notes)


def _grid(draws: Draws, file: Path) -> dict[str, dict[str, Any]]:
    """Cost and paired error of every setting, by name; done ones are in the file."""
    settings = [Setting(solver, steps) for solver in SOLVERS for steps in STEPS]
    kinds = [(cache, depth, 1) for cache in CACHES for depth in DEPTHS] + [(CACHES[0], DEPTHS[0], 0)]
    settings += [Setting(solver, steps, *kind) for solver in CACHED for steps in MANY for kind in kinds]
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    exact: Tensor | None = None
    for one in dict.fromkeys((EXACT, BASELINE, *LOOKED_AT, *settings)):
        if one.name not in rows:
            exact = draws.images(EXACT, PAIRED)[0] if exact is None else exact
            rows[one.name] = {**draws.paired(one, exact), "fd": None, "fd_error": None}
            write_json(file, rows)
    return rows


def _chosen(rows: dict[str, dict[str, Any]], draws: Draws, real: Tensor) -> set[str]:
    """The cheapest as good, by both measures and by FD alone, with and without reuse.

    FD is taken from cheap to dear until one is as good, of those that nothing cheaper comes nearer than.
    """
    base, found = rows[BASELINE.name], set()
    for reuse in (False, True):
        line = front(rows.values(), reuse=reuse, most=base["flops"])
        for paired in (False, True):
            near = [one for one in line if not paired or one["paired_error"] <= base["paired_error"]]
            for one in near[:TRIED]:
                _add_distance_(one, draws, real)
                if as_good(one, base, paired=paired):
                    found.add(str(one["name"]))
                    break
    return found


def _add_distance_(row: dict[str, Any], draws: Draws, real: Tensor) -> None:
    row["fd"], row["fd_error"] = fd_and_error(draws.features(_setting(row)), real)


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row["solver"], row["steps"], row["cache"], row["depth"], row["order"])


def taught(bench: Bench, name: str, seed: int) -> None:
    if bench.file(name, STUDENT, seed).is_file():
        return
    teacher = bench.long(name, seed)
    folder, run = student(TASKS[name], teacher, seed, bench.home(name, seed))
    mine, theirs = bench.draws(folder, name), bench.draws(teacher, name)
    rows = []
    for steps in JUMPS:
        own = Setting("euler", steps)
        distance, error = fd_and_error(mine.features(own), bench.real)
        solvers = {one.name: fd_and_error(theirs.features(one), bench.real)[0] for one in _solvers(steps)}
        best = min(solvers, key=lambda key: solvers[key])
        rows.append({"steps": steps, "flops": steps * mine.flops(0), "fd": distance, "fd_error": error,
                     "solver": best, "solver_fd": solvers[best], "solvers": solvers,
                     "needed": _needed(theirs, bench.real, distance)})  # fmt: skip
    cost = Cost(flops=run.cost.flops, cpu_seconds=run.cost.cpu_seconds)
    quality = {f"fd_{row['steps']}": row["fd"] for row in rows}
    bench.publish(name, STUDENT, seed, quality=quality, cost=cost, notes={"rows": rows, "training": run.quality})


def _needed(draws: Draws, real: Tensor, distance: float) -> int | None:
    """The fewest steps with which a solver of the teacher comes to this FD; None: more than those tried."""
    for steps in range(1, LONGEST + 1):
        if any(fd_and_error(draws.features(Setting(solver, steps)), real)[0] <= distance for solver in FEW):
            return steps
    return None


def _solvers(steps: int) -> list[Setting]:
    return [Setting(solver, steps) for solver in SOLVERS]


def coverage(bench: Bench, name: str, seed: int) -> None:
    """Whether the calibrated estimate bounds what reuse really did to the output, sample by sample."""
    if bench.file(name, COVERAGE, seed).is_file():
        return
    draws = bench.draws(bench.long(name, seed), name)

    def run(first: int) -> Callable[[int], object]:
        return lambda number: draws.fresh(COVERED, PAIRED, number=first + number)

    model, rule, depth = draws.denoiser.model, COVERED.rule(), COVERED.depth
    with torch.no_grad():
        bound = calibrate(model, run(0), rule=rule, batches=CALIBRATED, depth=depth, order=COVERED.order)
        found = covered(
            model, run(10_000), rule=replace(rule, scale=bound), batches=FRESH, depth=depth, order=COVERED.order
        )
    notes = {"images": found.samples, "setting": COVERED.name, "level": bound.level, "calibrated on": bound.samples,
             "scale": bound.scale, "reused": found.reused, "worst": found.worst}  # fmt: skip
    bench.publish(name, COVERAGE, seed, quality={"coverage": found.share}, notes=notes)


def personal(bench: Bench, name: str, seed: int) -> None:
    if bench.file(name, f"{PERSONAL}lora", seed).is_file():
        return
    teacher, task = bench.long(name, seed), TASKS[name]
    images = styled_folder(bench.data, bench.home(name, seed) / "style", seed=seed)
    real = features_of(bench.judge, lying(bench.data.test.batch(torch.arange(len(bench.data.test)))))
    for style in ("none", "nola", "lora"):
        adapter, size, notes = None, Reading(), {"images": 500, "sampled": task.samples}
        if style != "none":
            folder, run = adapted(task, teacher, style, seed, images)
            adapter = folder / "adapter.safetensors"
            size, notes = Reading(float(adapter.stat().st_size), "bytes on disk"), {**notes, "error": run.quality}
        made = bench.draws(teacher, name, adapter=adapter, classes=False).features(BASELINE)
        distance, error = fd_and_error(made, real)
        quality = {"fd": distance, "fd_error": error}
        bench.publish(name, PERSONAL + style, seed, quality=quality, cost=Cost(stored_bytes=size), notes=notes)


PARTS: dict[str, Callable[[Bench, str, int], None]] = {
    "train": train,
    "sample": sample,
    "coverage": coverage,
    "student": taught,
    "personal": personal,
    "ablation": ablation,
}
