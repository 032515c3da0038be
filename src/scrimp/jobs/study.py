"""`scrimp study`: the conventional way beside the thrifty ways, under one budget, with a receipt and a report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scrimp.jobs.budget import checked_budget, flops_in
from scrimp.jobs.config import StudyConfig
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import REPORT, choose_folder, record_config
from scrimp.jobs.labels import labelled_rows
from scrimp.jobs.progress import add_bar, console, figures, progress_bar
from scrimp.jobs.setup import Setup, default_name, prepare
from scrimp.jobs.ways import Context, Way, check_way, find_ways, run_way
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt
from scrimp.report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress, TaskID

_BUDGET = "run_budget_flops"
_RESERVE = 0.8  # of the minutes: the rest is for loading, reporting and a machine that slows down


def study(
    config: StudyConfig, *, data: Any = None, accelerator: Accelerator | None = None
) -> tuple[Path, list[Receipt]]:
    """Run every way with every seed under the same FLOPs; writes receipts, weights, configuration and report.html.

    Seeds are the outer loop: a study that is stopped early still holds pairs.

    Args:
        config: see `StudyConfig`.
        data: anything `scrimp.data.load_images` takes, instead of ``config.data``.
        accelerator: an existing one.

    Returns:
        The run folder and the receipts, way by way and seed by seed.

    Raises:
        InputError: something in the configuration or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    begin = time.perf_counter()
    config.check()
    ways = find_ways(config.ways)
    _check(config, ways)
    with accelerated(config, accelerator) as started:
        return _study(config, config.data if data is None else data, ways, begin, started)


def _study(
    config: StudyConfig, source: Any, ways: list[Way], begin: float, accelerator: Accelerator
) -> tuple[Path, list[Receipt]]:
    name = default_name("study", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    setup = prepare(config, source, accelerator)
    wanted = {} if config.resume else {_BUDGET: _budget(config, setup, ways, begin)}
    if not config.resume:
        for way in ways:  # nothing is written before all is known to work
            check_way(way, _context(way, setup, config.seed, name=name, folder=folder, budget=wanted[_BUDGET]))
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    receipts = _run_all(config, setup, ways, folder=folder, name=name, budget=resolved[_BUDGET])
    if accelerator.is_main_process:
        write_report(receipts, folder / REPORT)
    accelerator.wait_for_everyone()
    return folder, receipts


def _check(config: StudyConfig, ways: list[Way]) -> None:
    """Refuse settings that these ways cannot mean."""
    if config.seeds < 1:
        raise InputError("at least 1 seed", f"{config.seeds}", "pass --seeds 3")
    made = {way.name for way in ways if len(way.stages) > 1}
    if config.weights is not None and made:
        raise InputError("--weights with sampling ways alone", min(made), "leave one out: it pretrains its own weights")
    if config.encoder is not None and not any(stage.name == "distill" for way in ways for stage in way.stages):
        got = f"{config.encoder} without one"
        raise InputError("a way with distill, for --encoder", got, "leave it out: elsewhere --model is pretrained")


def _run_all(
    config: StudyConfig, setup: Setup, ways: list[Way], *, folder: Path, name: str, budget: float
) -> list[Receipt]:
    shown = setup.accelerator.is_main_process and not config.json
    if shown:
        _announce(config, setup, len(ways), budget)
    receipts: dict[tuple[str, int], Receipt] = {}
    with progress_bar(shown=shown) as progress:
        whole = add_bar(progress, "study", total=len(ways) * config.seeds)
        for seed in range(config.seed, config.seed + config.seeds):
            for way in ways:
                bar = add_bar(progress, f"{way.name}, seed {seed}")
                context = _context(way, setup, seed, name=name, folder=folder, budget=budget)
                shower = _Shower(progress, bar, context)
                context = replace(
                    context, baseline=way is ways[0], report=shower.report, told=shower.told, resume=config.resume
                )
                receipts[way.name, seed] = run_way(way, context)
                progress.remove_task(bar)
                progress.advance(whole)
    return [receipts[way.name, seed] for way in ways for seed in range(config.seed, config.seed + config.seeds)]


def _context(way: Way, setup: Setup, seed: int, *, name: str, folder: Path, budget: float) -> Context:
    return Context(
        setup=setup,
        study=name,
        way=way.name,
        baseline=False,
        seed=seed,
        budget=budget,
        folder=folder / way.name / f"seed-{seed}",
        report=lambda spent: None,
    )


def _announce(config: StudyConfig, setup: Setup, ways: int, budget: float) -> None:
    labelled = ""
    if config.labelled < 1:
        rows = labelled_rows(setup.data, config.labelled, seed=config.seed)
        labelled = f" ({len(rows):,} with a label)"
    console.print(
        f"{setup.data.name}: {len(setup.data.train):,} training{labelled} and {len(setup.data.test):,} test images; "
        f"{ways} ways x {config.seeds} seeds, {budget:.3g} FLOPs each"
    )


class _Shower:
    """Shows how far a run is, and in a run of several stages which of them it is at."""

    def __init__(self, progress: Progress, bar: TaskID, context: Context) -> None:
        self.progress, self.bar, self.context = progress, bar, context

    def report(self, spent: Spent) -> None:
        latest = spent.curve[-1] if spent.curve else {}
        self.progress.update(self.bar, completed=spent.flops / self.context.budget, figures=figures(latest))

    def told(self, words: str) -> None:
        way, seed = self.context.way, self.context.seed
        if words != way:
            self.progress.update(self.bar, description=f"{way}, seed {seed}: {words}")


def _budget(config: StudyConfig, setup: Setup, ways: list[Way], begin: float) -> float:
    """FLOPs of each run: from the minutes of the whole study, from --flops, or the smaller of both."""
    batch_flops = setup.cost.train * config.batch_size
    budgets = [config.flops] if config.flops is not None else []
    if config.minutes is not None or not budgets:
        minutes = 3.0 if config.minutes is None else config.minutes
        train_seconds, eval_seconds = setup.timed()
        paces = [_pace(way, setup, train_seconds / batch_flops) for way in ways]
        used = time.perf_counter() - begin
        budgets.append(
            flops_in(
                (minutes * 60 * _RESERVE - used) / (len(config.ways) * config.seeds),
                batch_flops,
                train_seconds=sum(paces) / len(paces) * batch_flops,
                extra_seconds=setup.run_extra_seconds(eval_seconds),
            )
        )
    return checked_budget(min(budgets), batch_flops)


def _pace(way: Way, setup: Setup, usual: float) -> float:
    """Wall seconds a FLOP of this way takes; stages that cannot tell take as long as the slowest of those that can."""
    context = _context(way, setup, 0, name="", folder=Path(), budget=0.0)
    found = {stage.name: stage.pace(context) for stage in way.stages}
    slowest = max([usual, *(pace for pace in found.values() if pace is not None)])
    if len(way.stages) == 1:
        return found[way.stages[0].name] or usual
    return sum(stage.share * (found[stage.name] or slowest) for stage in way.stages)
