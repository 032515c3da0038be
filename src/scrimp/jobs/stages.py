"""Stages: what a way of a study is made of, one after another under one budget, and what each is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from scrimp.jobs.budget import checked_budget
from scrimp.jobs.config import StudyConfig
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, WEIGHTS
from scrimp.jobs.labels import labelled_rows
from scrimp.jobs.once import Task, run_task
from scrimp.jobs.setup import Setup
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt
from scrimp.report.collect import STAGES


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        setup: data, model, accelerator, cost of a step.
        study: name of the study; way: name of the way; baseline: whether it is the conventional one.
        seed: of this run.
        budget: FLOPs this stage may spend.
        folder: where it writes.
        before: receipt of the stage before it, if any; encoder: weights file of that stage.
        report: called as the stage goes on.
        told: called with a few words on what is being done.
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
    encoder: Path | None = None
    told: Callable[[str], None] = lambda words: None
    resume: bool = False

    @property
    def config(self) -> StudyConfig:
        """The study's settings."""
        return cast(StudyConfig, self.setup.config)

    @property
    def stage_name(self) -> str:
        """Name in the receipts of a run's stages, which are none of the study's runs."""
        return f"{self.study}, stages of {self.way}"

    @property
    def labelled(self) -> Tensor:
        """The training images whose label may be used; the same for every way of one seed."""
        return labelled_rows(self.setup.data, self.config.labelled, seed=self.seed)


def _nothing(context: Context) -> float:
    return 0.0


def _anything(context: Context) -> None:
    pass


def _as_the_model(context: Context) -> float | None:
    return None


@dataclass(frozen=True)
class Stage:
    """One step of a way.

    Attributes:
        name: of the stage, and of its folder.
        share: of the way's budget (shares sum to 1), once every stage's ``fixed`` is taken off.
        run: does the work; writes its receipt and weights to its folder.
        fixed: FLOPs that it takes whatever the budget is.
        check: refuses what it cannot do, before anything is written.
        pace: measures the wall seconds a FLOP of it takes; ``None`` for those of the study's own training steps.
    """

    name: str
    share: float
    run: Callable[[Context], Receipt]
    fixed: Callable[[Context], float] = _nothing
    check: Callable[[Context], None] = _anything
    pace: Callable[[Context], float | None] = _as_the_model


@dataclass(frozen=True)
class Way:
    """A way to get from images to a working model.

    Attributes:
        name, about: what it is called, and what it is.
        stages: in order.
        finish: makes the run's receipt and files of those of its stages; without one, the last stage's are the run's.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    finish: Callable[[Context, dict[str, Receipt]], Receipt] | None = None


def run_way(way: Way, context: Context) -> Receipt:
    """Run the stages in order, each in its own folder where there are several.

    Stages that are finished are read back when the run is resumed, the one that was interrupted goes on.

    Raises:
        InputError: the shares of the budget do not sum to 1, or no stage at all.
    """
    done = context.folder / RECEIPT
    if way.finish is not None and context.resume and done.is_file():
        return load_receipt(done)
    receipts: dict[str, Receipt] = {}
    spent = 0.0
    encoder: Path | None = None
    for stage, own in planned(way, context):
        context.told(stage.name)
        before = next(reversed(receipts.values()), None)
        report = _after(spent, context.report)
        receipt = stage.run(replace(own, before=before, encoder=encoder, report=report))
        spent += receipt.cost.flops.value or 0.0
        receipts[stage.name], encoder = receipt, own.folder / WEIGHTS
    return receipt if way.finish is None else way.finish(context, receipts)


def check_way(way: Way, context: Context) -> None:
    """Let every stage look at what it will be given.

    Raises:
        InputError: a stage cannot do with it.
    """
    for stage, own in planned(way, context):
        stage.check(own)


def planned(way: Way, context: Context) -> list[tuple[Stage, Context]]:
    """The stages, each with its budget and its folder."""
    if not way.stages:
        raise InputError(f"at least one stage in way {way.name}", "none", "give it one")
    if abs(sum(stage.share for stage in way.stages) - 1) > 1e-9:
        raise InputError(f"shares of the budget of way {way.name} that sum to 1", "others", "correct its stages")
    fixed = {stage.name: stage.fixed(context) for stage in way.stages}
    left = context.budget - sum(fixed.values())
    if left <= 0:
        wanted = f"a budget above {sum(fixed.values()):.3g} FLOPs for way {way.name}"
        raise InputError(wanted, f"{context.budget:.3g}", "raise the budget, or lower --labelled")
    found = []
    for stage in way.stages:
        folder = context.folder if len(way.stages) == 1 else context.folder / STAGES / stage.name
        found.append((stage, replace(context, budget=fixed[stage.name] + stage.share * left, folder=folder)))
    return found


def _after(flops: float, report: Callable[[Spent], None]) -> Callable[[Spent], None]:
    """``report`` with what earlier stages spent counted in."""
    return lambda spent: report(replace(spent, flops=spent.flops + flops))


def train_with(sampling: str, share: float = 1.0) -> Stage:
    """The stage that trains a classifier on the labelled images with one sampling policy, from the encoder before it
    if there is one.

    A step takes at most as many images as are labelled.
    """

    def run(context: Context) -> Receipt:
        task = Task(
            name=context.study if context.encoder is None else context.stage_name,
            way=context.way if context.encoder is None else sampling,
            sampling=sampling,
            budget=context.budget,
            folder=context.folder,
            seed=context.seed,
            baseline=context.baseline and context.encoder is None,
        )
        return run_task(_training(context), task, context.report, resume=context.resume)

    def check(context: Context) -> None:
        setup = _training(context)
        checked_budget(context.budget, setup.cost.train * setup.config.batch_size)

    return Stage(sampling, share, run, check=check)


def _training(context: Context) -> Setup:
    """The study's setup with the labelled images alone, starting from the encoder."""
    setup, rows = context.setup, context.labelled
    if len(rows) < len(setup.data.train):
        processes = setup.accelerator.num_processes
        most = len(rows) // processes * processes
        if not most:
            got = f"{len(rows)} labelled image(s)"
            raise InputError(f"one labelled image a process, {processes}", got, "raise --labelled")
        config = replace(setup.config, batch_size=min(setup.config.batch_size, most))
        data = replace(setup.data, train=setup.data.train.take(rows))
        setup = replace(setup, config=config, data=data)
    return setup if context.encoder is None else replace(setup, encoder=context.encoder)
