"""What an audit tries, one case at a time, and what came of it: costs and answers image by image."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scrimp.attack.objective import Goal, answers
from scrimp.attack.patch import Patch, Place
from scrimp.attack.perturbation import Perturbation
from scrimp.attack.success import attack_success
from scrimp.attack.victim import Victim, costs_of, frozen
from scrimp.primitives.draw import generator_for

Kind = Literal["clean", "control", "attack", "defended", "pilot"]
Remember = Callable[[str, Callable[[], "Trial"]], "Trial"]
"""A trial's name and what makes it, to the trial: made now, or as kept from before."""


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        name: what reports call it; it also fixes what the case draws, so cases do not depend on one another.
        threat: T0 nothing is optimised, T1 one patch for all images, T2 one perturbation for all, T3 one for each, or
            ``black box``.
        kind: ``attack``, ``control``, ``defended`` (by ``defence``), ``clean``, or ``pilot``.
        goal: see `scrimp.attack.universal_patch`.
        area: of a patch, share of the pixels.
        place: of a patch, top and left; None: none, or anywhere.
        epsilon: of a perturbation, its radius.
        defence: the model is behind this one.
    """

    name: str
    threat: str
    kind: Kind
    goal: Goal | None = None
    area: float | None = None
    place: Place | None = None
    epsilon: float | None = None
    defence: str | None = None


@dataclass(frozen=True, eq=False)
class Trial:
    """What came of a case; tensors are on the CPU.

    Attributes:
        costs: FLOPs of each image, int64 [m].
        right: whether each was answered rightly, bool [m]; None without labels.
        same: whether each was answered as the same model answers it clean, bool [m]; None for images of its own.
        attack: what was made, on the device of the images; None where nothing was.
        spent: images through forward and backward; three that were only asked the cost of count as one.
        queries: images that were asked the cost of, of attacks that do only that.
        over: how many of the audited images these are, the first ones (several times over, where costs are more); None:
            images of its own.
    """

    case: Case
    costs: Tensor
    right: Tensor | None = None
    same: Tensor | None = None
    attack: Patch | Perturbation | None = None
    spent: int = 0
    queries: int | None = None
    over: int | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of right answers."""
        return None if self.right is None else float(self.right.double().mean())

    @property
    def mean(self) -> float:
        """FLOPs an image."""
        return float(self.costs.double().mean())

    def success(self, clean: Trial, full: float) -> float:
        """`attack_success` against the same images, clean."""
        return attack_success(self.costs, clean.costs[: self.over], full)

    def to_dict(self, clean: Trial, full: int, ceiling: int | None) -> dict[str, Any]:
        """As the audit's JSON has it; ``clean`` is of the same model behind the same defence."""
        case = self.case
        return {
            "name": case.name,
            "threat": case.threat,
            "kind": case.kind,
            "goal": case.goal,
            "area": case.area,
            "place": None if case.place is None else list(case.place),
            "epsilon": case.epsilon,
            "defence": case.defence,
            "images": self.over,
            "costs": self.costs.tolist(),
            "flops": spread(self.costs),
            "accuracy": self.accuracy,
            "agreement": None if self.same is None else float(self.same.double().mean()),
            "success": self.success(clean, full),
            "success_ceiling": None if ceiling is None else self.success(clean, ceiling),
            "spent": self.spent,
            "queries": self.queries,
            "file": None,
        }


def spread(costs: Tensor) -> dict[str, float]:
    """Mean, percentiles (costs that are there, nearest rank) and the largest of ``costs`` [n], n >= 1."""
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    ranks = {name: float(quantile(costs, share)) for name, share in shares.items()}
    return {"mean": float(costs.double().mean()), **ranks, "worst": float(costs.max())}


def quantile(costs: Tensor, share: float) -> int:
    """The cost that ``share`` of the images do not exceed, nearest rank."""
    return int(costs.sort().values[max(0, math.ceil(share * len(costs)) - 1)])


def stream(seed: int, name: str) -> torch.Generator:
    """What the case of this name draws from, whatever else is tried."""
    return generator_for(seed, zlib.crc32(name.encode()))


def shown(case: Case, attack: Patch | Perturbation, images: Tensor, seed: int) -> Tensor:
    """Images with a case's attack on them; a patch without a place goes where seed and name say."""
    if isinstance(attack, Perturbation):
        return attack.on(images)
    return attack.on(images, generator=stream(seed, f"{case.name}: places"))


@dataclass(frozen=True, eq=False)
class Bench:
    """The audited images, and the victim's answers to them.

    Attributes:
        victim: attacked and measured.
        images: audited on, [n, channels, height, width]; ``labels`` [n], or None.
        learn: images that attacks for all images are made on.
        clean: costs and answers without an attack; ``said``, the answers, int64 [n].
        seed: of all draws, with a case's name.
        batch: images at a time.
    """

    victim: Victim
    images: Tensor
    labels: Tensor | None
    learn: Tensor
    clean: Trial
    said: Tensor
    seed: int
    batch: int

    def shown(self, case: Case, attack: Patch | Perturbation, over: int | None = None) -> Tensor:
        """The first ``over`` audited images with an attack on them."""
        return shown(case, attack, self.images[:over], self.seed)

    def measure(self, case: Case, attack: Patch | Perturbation, over: int | None = None) -> Trial:
        """An attack on the first ``over`` audited images; what it was made with is left for `dataclasses.replace`."""
        changed = self.shown(case, attack, over)
        costs, said = look(self.victim, changed, self.batch)
        count = len(changed)
        right = None if self.labels is None else said == self.labels[:count].cpu()
        return Trial(case, costs, right, said == self.said[:count], attack, over=count)


def look(victim: Victim, images: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Costs and answers, both int64 [n] on the CPU."""
    with frozen(victim.model):
        costs = costs_of(victim.cost, images, batch=batch)
    return costs.long(), answers(victim, images, batch=batch).cpu()


def bench_of(
    victim: Victim,
    images: Tensor,
    labels: Tensor | None,
    learn: Tensor,
    *,
    seed: int,
    batch: int = 64,
    case: Case | None = None,
) -> Bench:
    """A victim measured on clean images; ``case`` names it where it is behind a defence."""
    costs, said = look(victim, images, batch)
    right = None if labels is None else said == labels.cpu()
    case = Case("clean", "T0", "clean") if case is None else case
    clean = Trial(case, costs, right, torch.ones_like(said, dtype=torch.bool), over=len(images))
    return Bench(victim, images, labels, learn, clean, said, seed, batch)
