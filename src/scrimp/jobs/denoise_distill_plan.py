"""What each step of a distillation learns, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.jobs.budget import StepCost
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig


@dataclass(frozen=True)
class Plan:
    """What each step of a run learns, and what it costs.

    Attributes:
        method: see `DenoiseDistillConfig`.
        steps: of the whole run.
        straight: the first so many learn straight paths.
        batch_size: pairs a step.
        jumps: numbers of steps that flow-map learns.
        cost: counted FLOPs of a pair.
    """

    method: str
    steps: int
    straight: int
    batch_size: int
    jumps: tuple[int, ...]
    cost: StepCost

    @property
    def budget(self) -> float:
        """FLOPs of all steps; a little more, lest the last one is lost to rounding."""
        later = self.steps - self.straight
        return (self.straight * self.flops(0) + later * self.flops(self.straight)) * (1 + 1e-9)

    def lesson(self, number: int) -> str:
        """The method of a step."""
        return "reflow" if number < self.straight else self.method

    def extra_calls(self, number: int) -> float:
        """Forward passes beside the one that is learnt from, on average of a step's pairs."""
        lesson = self.lesson(number)
        if lesson == "flow-map":
            return float(sum(jump for _, jump in self.turns())) / self.batch_size
        return 1.0 if lesson == "consistency" else 0.0

    def flops(self, number: int) -> float:
        """Of a step."""
        return self.batch_size * (self.cost.train + self.extra_calls(number) * self.cost.score)

    def turns(self) -> list[tuple[int, int]]:
        """(steps of the grid, jumps made before) of each pair of a batch: every jump of every grid in turn."""
        kinds = [(steps, jump) for steps in self.jumps for jump in range(steps)]
        return [kinds[place % len(kinds)] for place in range(self.batch_size)]


def plan_of(config: DenoiseDistillConfig, steps: int, cost: StepCost) -> Plan:
    """The plan of a run of so many steps."""
    straight = steps if config.method == "reflow" else round(config.straight * steps)
    return Plan(config.method, steps, straight, config.batch_size, config.jumps, cost)


def grids_of(steps: list[int], most: int) -> Tensor:
    """Levels of Euler's even steps, from 1 to 0, a row each; filled up with zeros to [n, most + 1]."""
    grids = torch.zeros(len(steps), most + 1)
    for row, count in enumerate(steps):
        grids[row, :count] = torch.linspace(1, 1 / count, count)
    return grids
