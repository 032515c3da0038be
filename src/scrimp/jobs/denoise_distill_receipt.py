"""What a distillation leaves beside the model: its receipt, a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scrimp.denoise.quality import paired_error
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_distill_fit import DenoiseDistillFitting
from scrimp.jobs.denoise_distill_pairs import HeldOut, Pairs, Teacher
from scrimp.jobs.engine import total
from scrimp.jobs.folder import plain
from scrimp.jobs.pixels_generate import save_grid
from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt

_TEACHER, _STUDENT = "teacher_paired_error_", "paired_error_"


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that has trained.

    Attributes:
        peak, energy: read over all of it.
        stored: bytes of the model's weights.
    """

    config: DenoiseDistillConfig
    name: str
    fitting: DenoiseDistillFitting
    pairs: Pairs
    teacher: Teacher
    peak: Reading
    energy: Reading
    stored: int


def receipt_of(run: Finished) -> Receipt:
    """The receipt; on every rank."""
    config, fitting, plan = run.config, run.fitting, run.fitting.plan
    spent, making, held_out = fitting.spent, _making(run), fitting.held_out
    at = {n: float(paired_error(images, held_out.reference).mean()) for n, images in held_out.teacher.items()}
    quality = {key: value for key, value in spent.curve[-1].items() if key.startswith((_STUDENT, "train_loss"))}
    return Receipt(
        kind="run",
        name=run.name,
        way=config.method,
        seed=config.seed,
        quality=quality | {f"{_TEACHER}{steps}": error for steps, error in at.items()},
        cost=_cost(run, making),
        curve=spent.curve,
        config={**plain(config), "steps": plan.steps},
        notes={
            "shape": list(run.pairs.shape),
            "teacher predicts": run.teacher.denoiser.process.prediction,
            "teacher's solver": run.teacher.solver,
            "flops a call and image": plan.cost.score,
            "teacher's calls an image": {str(steps): run.teacher.calls(steps) for steps in at},
            "steps on straight paths": plan.straight,
            "pairs": {"count": len(run.pairs), "stored_bytes": run.pairs.stored_bytes, **making},
            "training": {"flops": spent.flops, "seconds": spent.seconds},
            "paired error": f"to the teacher's {config.reference_steps}-step images of {config.held_out} noises",
            "samples.png": f"rows: {', '.join(map(str, config.jumps))} step(s) of the student, then the teacher",
            "processes": fitting.accelerator.num_processes,
            "device": str(fitting.accelerator.device),
            "resumed": spent.resumes,
        },
    )


def table_of(receipt: Receipt) -> str:
    """Paired errors of teacher and student by steps, in lines; the student's FLOPs an image are its steps' calls."""
    calls = receipt.notes["teacher's calls an image"]
    student = {key.removeprefix(_STUDENT): error for key, error in receipt.quality.items() if key.startswith(_STUDENT)}
    lines = ["paired error to the teacher's reference", f"{'steps':>5}  {'teacher':>16}  {'student':>16}"]
    for steps in sorted({*calls, *student}, key=int):
        theirs = _cell(receipt.quality.get(f"{_TEACHER}{steps}"), calls.get(steps))
        lines.append(f"{steps:>5}  {theirs:>16}  {_cell(student.get(steps), int(steps)):>16}")
    return "\n".join(lines)


def save_picture(images: Tensor, held_out: HeldOut, path: Path, *, count: int) -> None:
    """A row of the student's images for each number of steps, below them the teacher's."""
    rows = [part[:count] for part in (*images.split(len(held_out.reference)), held_out.reference)]
    save_grid(as_bytes(torch.cat(rows)), path, columns=len(rows[0]))


def as_bytes(images: Tensor) -> Tensor:
    """Images from [-1, 1] as uint8, what lies beyond cut off."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def _cell(error: float | None, calls: int | None) -> str:
    return "-" if error is None else f"{error:.3f} ({calls} calls)"


def _making(run: Finished) -> dict[str, float]:
    """What the pairs took, whichever run made them."""
    calls = len(run.pairs) * run.teacher.calls(run.config.teacher_steps)
    return {
        "calls": calls,
        "flops": calls * run.fitting.plan.cost.score,
        "seconds": run.pairs.seconds / run.fitting.accelerator.num_processes,
        "cpu_seconds": run.pairs.cpu_seconds,
    }


def _cost(run: Finished, making: dict[str, float]) -> Cost:
    spent, how = run.fitting.spent, "making the pairs and training, measuring left out"
    cpu_seconds = total(run.fitting.accelerator, spent.cpu_seconds) + making["cpu_seconds"]
    counted = "counted once for a call and a step of each kind, times their numbers"
    return Cost(
        seconds=Reading(spent.seconds + making["seconds"], f"wall clock: {how}"),
        cpu_seconds=Reading(cpu_seconds, f"process CPU time, all processes: {how}"),
        flops=Reading(spent.flops + making["flops"], counted, run.fitting.plan.cost.missed),
        peak_bytes=run.peak,
        joules=run.energy,
        stored_bytes=Reading(float(run.stored), "size of the weights file"),
        samples=Reading(float(spent.images), "pairs through forward and backward"),
        labels=Reading(0.0, "none is used"),
    )
