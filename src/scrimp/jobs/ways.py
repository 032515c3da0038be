"""The ways a study compares: each a list of stages that share one budget, the first way being the conventional one.

A later method joins by one more stage and one more row in `WAYS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scrimp.jobs.fit import Spent
from scrimp.jobs.once import Task, run_task
from scrimp.jobs.setup import Setup
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        setup: data, model, accelerator, cost of a step.
        study: name of the study; way: name of the way; baseline: whether it is the conventional one.
        seed: of this run.
        budget: FLOPs this stage may spend.
        folder: where it writes.
        before: receipt of the stage before it, if any.
        report: called as the stage goes on.
        resume: go on where an interrupted run stopped.
    """

    setup: Setup
    study: str
    way: str
    baseline: bool
    seed: int
    budget: float
    folder: Path
    report: Callable[[Spent], None]
    before: Receipt | None = None
    resume: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of a way: its name, its share of the way's budget (shares sum to 1) and what it does."""

    name: str
    share: float
    run: Callable[[Context], Receipt]


@dataclass(frozen=True)
class Way:
    """A way to get from images to a working model."""

    name: str
    about: str
    stages: tuple[Stage, ...]


def train_with(sampling: str) -> Stage:
    """The stage that trains a classifier with one sampling policy."""

    def run(context: Context) -> Receipt:
        task = Task(
            name=context.study,
            way=context.way,
            sampling=sampling,
            budget=context.budget,
            folder=context.folder,
            seed=context.seed,
            baseline=context.baseline,
        )
        return run_task(context.setup, task, context.report, resume=context.resume)

    return Stage("train", 1.0, run)


WAYS: tuple[Way, ...] = (
    Way("uniform", "shuffled passes over all images", (train_with("uniform"),)),
    Way("history", "importance sampling by scores of the batches just trained", (train_with("history"),)),
    Way("prune", "easy images left out at random, the kept ones counted for them", (train_with("prune"),)),
    Way("presample", "importance sampling from a larger scored batch, when that pays", (train_with("presample"),)),
)


def find_ways(names: tuple[str, ...]) -> list[Way]:
    """The ways of these names, in their order.

    Raises:
        InputError: no such way, or one named twice.
    """
    known = {way.name: way for way in WAYS}
    strangers = [name for name in names if name not in known]
    if strangers or not names or len(set(names)) != len(names):
        got = strangers[0] if strangers else " ".join(names) or "none"
        raise InputError(f"different ways out of: {', '.join(known)}", got, "see scrimp study --help")
    return [known[name] for name in names]


def run_way(way: Way, context: Context) -> Receipt:
    """Run the stages in order, each in its own folder where there are several; returns the last one's receipt.

    Raises:
        InputError: the shares of the budget do not sum to 1.
    """
    if abs(sum(stage.share for stage in way.stages) - 1) > 1e-9:
        raise InputError(f"shares of the budget of way {way.name} that sum to 1", "others", "correct its stages")
    receipt = None
    for stage in way.stages:
        folder = context.folder if len(way.stages) == 1 else context.folder / stage.name
        receipt = stage.run(
            Context(**{**vars(context), "budget": context.budget * stage.share, "folder": folder, "before": receipt})
        )
    if receipt is None:
        raise InputError(f"at least one stage in way {way.name}", "none", "give it one")
    return receipt
