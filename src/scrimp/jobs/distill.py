"""`scrimp distill`: a small network from one or several frozen teachers, without labels, under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_setup import prepare_distillation
from scrimp.jobs.encoders import Encoder
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import choose_folder, record_config
from scrimp.jobs.progress import add_bar, figures, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.receipts import Receipt

if TYPE_CHECKING:
    from accelerate import Accelerator


def distill(
    config: DistillConfig,
    *,
    data: Any = None,
    teachers: Sequence[Encoder] | None = None,
    accelerator: Accelerator | None = None,
) -> Receipt:
    """Train a student under a budget; writes weights, configuration, receipt, pictures and report to the run folder.

    Args:
        config: see `DistillConfig`.
        data: anything `scrimp.data.load_images` takes, such as a pair of data sets; instead of ``config.data``.
        teachers: ready encoders instead of those ``config.teacher`` names; copied.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration, the data or a teacher cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator, bf16_on_cpu=True) as started:
        return _distill(config, source, started, teachers)


def _distill(
    config: DistillConfig, source: Any, accelerator: Accelerator, teachers: Sequence[Encoder] | None
) -> Receipt:
    name = default_name("distill", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    setup = prepare_distillation(config, source, accelerator, teachers=teachers)
    wanted = {} if config.resume else {"budget_flops": setup.budget()}
    budget = shared(accelerator, lambda: record_config(folder, config, wanted))["budget_flops"]
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:
        bar = add_bar(progress, setup.way)

        def told(share: float) -> None:
            progress.update(bar, figures=f"teacher's features {100 * share:.0f} %")

        def report(spent: Spent) -> None:
            latest = spent.curve[-1] if spent.curve else {}
            progress.update(bar, completed=spent.flops / budget, figures=figures(latest))

        return setup.run(folder, budget, report, name=name, resume=config.resume, told=told)
