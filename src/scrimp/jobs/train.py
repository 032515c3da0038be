"""`scrimp train`: one model, one sampling policy, one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scrimp.jobs.budget import checked_budget, flops_in
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import choose_folder, record_config
from scrimp.jobs.once import Task, run_task
from scrimp.jobs.progress import add_bar, figures, progress_bar
from scrimp.jobs.setup import Setup, default_name, prepare
from scrimp.receipts import Receipt

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: TrainConfig, *, data: Any = None, accelerator: Accelerator | None = None) -> Receipt:
    """Train one classifier under a budget; writes weights, configuration and receipt to the run folder.

    Args:
        config: see `TrainConfig`.
        data: anything `scrimp.data.load_images` takes, such as a pair of data sets; instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    with accelerated(config, accelerator) as started:
        return _train(config, config.data if data is None else data, started)


def _train(config: TrainConfig, source: Any, accelerator: Accelerator) -> Receipt:
    name = default_name(f"train-{config.sampling}", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    setup = prepare(config, source, accelerator)
    wanted = {} if config.resume else {"budget_flops": _budget(config, setup)}
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    task = Task(
        name=name,
        way=config.sampling,
        sampling=config.sampling,
        budget=resolved["budget_flops"],
        folder=folder,
        seed=config.seed,
        baseline=config.sampling == "uniform",
        target_accuracy=config.target_accuracy,
    )
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:
        bar = add_bar(progress, config.sampling)

        def report(spent: Spent) -> None:
            latest = spent.curve[-1] if spent.curve else {}
            progress.update(bar, completed=spent.flops / task.budget, figures=figures(latest))

        return run_task(setup, task, report, resume=config.resume)


def _budget(config: TrainConfig, setup: Setup) -> float:
    """FLOPs of the run: the smallest of the budgets that were given."""
    a_pass = setup.cost.train * len(setup.data.train)
    budgets = []
    if config.minutes is not None:
        train_seconds, eval_seconds = setup.timed()
        budgets.append(
            flops_in(
                config.minutes * 60,
                setup.cost.train * config.batch_size,
                train_seconds=train_seconds,
                extra_seconds=setup.run_extra_seconds(eval_seconds),
            )
        )
    if config.flops is not None:
        budgets.append(config.flops)
    if config.epochs is not None or not budgets:
        budgets.append(a_pass * (5 if config.epochs is None else config.epochs))
    return checked_budget(min(budgets), setup.cost.train * config.batch_size)
