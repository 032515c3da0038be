"""`scrimp adapt`: a large model fine-tuned by a few trained numbers, beside what one would do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_probe import run_probe
from scrimp.jobs.adapt_run import AdaptRun, run_adaptation
from scrimp.jobs.adapt_setup import Adaptation, adaptation_of, prepare_adaptation
from scrimp.jobs.engine import accelerated, shared
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import REPORT, choose_folder, record_config
from scrimp.jobs.progress import add_bar, figures, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.receipts import Receipt
from scrimp.report import write_report

if TYPE_CHECKING:
    from accelerate import Accelerator

BASELINE = "baseline"
"""Folder of the baseline's run within the run folder."""


def adapt(config: AdaptConfig, *, data: Any = None, accelerator: Accelerator | None = None) -> list[Receipt]:
    """Adapt a model under a budget; writes adapter, configuration, receipts and report to the run folder.

    Args:
        config: see `AdaptConfig`.
        data: anything `scrimp.data.load_images` takes, such as a pair of data sets; instead of ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt of the adapter and, where there is one, of the baseline, also written to the run folder.

    Raises:
        InputError: something in the configuration, the model or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator) as started:
        return _adapt(config, source, started)


def _adapt(config: AdaptConfig, source: Any, accelerator: Accelerator) -> list[Receipt]:
    name = default_name(f"adapt-{config.method}", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    setup = prepare_adaptation(config, source, accelerator)
    wanted = {}
    if not config.resume:
        wanted = {"budget_flops": setup.budget(), "baseline": _baseline(config, setup), "model": setup.subject.facts}
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    budget, beside = resolved["budget_flops"], resolved["baseline"]
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:

        def shown(way: str) -> Callable[[Spent], None]:
            bar = add_bar(progress, way)

            def report(spent: Spent) -> None:
                latest = spent.curve[-1] if spent.curve else {}
                progress.update(bar, completed=spent.flops / budget, figures=_figures(latest))

            return report

        run = AdaptRun(name, config.method, folder, budget)
        receipts = [run_adaptation(setup, run, shown(config.method), resume=config.resume)[0]]
        if beside != "none":
            run = AdaptRun(name, beside, folder / BASELINE, budget, baseline=True)
            receipts.append(_beside(setup, run, shown(beside), resume=config.resume))
    if accelerator.is_main_process:
        write_report(receipts, folder / REPORT)
    accelerator.wait_for_everyone()
    return receipts


def _baseline(config: AdaptConfig, setup: Adaptation) -> str:
    if config.baseline != "auto":
        return config.baseline
    return "linear" if setup.subject.encoder is not None and config.method != "linear" else "none"


def _beside(setup: Adaptation, run: AdaptRun, report: Callable[[Spent], None], *, resume: bool) -> Receipt:
    """The baseline, on the same data from the same model under the same budget."""
    if run.way == "linear" and setup.subject.encoder is not None:
        return run_probe(setup, run, resume=resume)
    usual = {"lr": None, "where": None, "bits": 32, "numbers": None, "bytes": None, "rank": None, "bases": None}
    config = replace(setup.config, method=run.way, **usual)  # type: ignore[arg-type]
    other = adaptation_of(config, setup.subject, setup.data, setup.accelerator)
    return run_adaptation(other, run, report, resume=resume)[0]


def _figures(point: dict[str, float | None]) -> str:
    perplexity = point.get("test_perplexity")
    return figures(point) + (f"  perplexity {perplexity:.4g}" if perplexity is not None else "")
