"""What a distillation's FLOPs go into: the teachers' passes before the first step, and the steps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_json

PLAN = "teacher.json"
"""File of an unfinished run: what it planned when it began, so that going on does not plan anew."""


@dataclass(frozen=True)
class Outlay:
    """What the teachers have to do before the first step.

    Attributes:
        images: to train on.
        teachers: FLOPs of one image through each teacher.
        finished: rows of features that each teacher's file has already.
        probed: labelled images that the teachers see as they are, for classifiers on their features.
        most: views of every image that may be kept; 0 where the teachers see every step's own.
    """

    images: int
    teachers: tuple[float, ...]
    finished: tuple[int, ...]
    probed: int
    most: int

    def flops(self, views: int) -> float:
        """FLOPs before the first step where ``views`` views of every image are kept."""
        missing = [max(0, views * self.images - done) for done in self.finished]
        return sum(cost * (rows + self.probed) for cost, rows in zip(self.teachers, missing, strict=True))

    def views_for(self, passes: float) -> int:
        """Views worth keeping in a run of so many passes: no more than it will use."""
        return min(self.most, max(1, int(passes + 0.5)))


@dataclass(frozen=True)
class Plan:
    """How a run's FLOPs are shared out.

    Attributes:
        training: FLOPs of the steps.
        before: FLOPs of the teachers before them.
        views: views of every image that are kept; 0 for none.
        started: for each teacher ``finished`` rows, ``seconds`` and ``cpu_seconds`` of its file when the run began.
    """

    training: float
    before: float
    views: int
    started: tuple[dict[str, float], ...] = ()

    def write(self, folder: Path) -> None:
        write_json(folder / PLAN, asdict(self))

    @staticmethod
    def read(folder: Path) -> Plan | None:
        """The plan of the run in ``folder``, if it began.

        Raises:
            InputError: the file is damaged.
        """
        if not (folder / PLAN).is_file():
            return None
        try:
            found: dict[str, Any] = json.loads((folder / PLAN).read_bytes())
            return Plan(**{**found, "started": tuple(found["started"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError("the run's plan", f"{folder / PLAN}, damaged", "start again in another folder") from error


def plan_for(total: float, outlay: Outlay, *, image_flops: float, step_flops: float) -> Plan:
    """Share ``total`` FLOPs out: as many views as the passes that are left will use.

    Args:
        image_flops: of one image of a step.
        step_flops: of one step.

    Raises:
        InputError: nothing is left for a step.
    """
    a_pass = image_flops * outlay.images
    for views in range(outlay.most, 1, -1):
        training = total - outlay.flops(views)
        if training >= step_flops and outlay.views_for(training / a_pass) == views:
            return Plan(training, outlay.flops(views), views)
    least = min(1, outlay.most)
    before = outlay.flops(least)
    if total - before < step_flops:
        wanted = (
            f"a budget of at least {before + step_flops:.3g} FLOPs, the teachers' passes before the first step included"
        )
        raise InputError(wanted, f"{total:.3g}", "raise the budget, or pass --cache none")
    return Plan(total - before, before, least)
