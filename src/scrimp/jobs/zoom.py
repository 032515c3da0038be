"""`scrimp zoom train`: a model of images too large to process whole, and what it looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from scrimp.jobs.engine import accelerated, shared, tracked
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, REPORT, WEIGHTS, choose_folder, plain, record_config
from scrimp.jobs.once import cost_of, save_weights
from scrimp.jobs.progress import add_bar, console, figures, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.jobs.zoom_config import ZoomTrainConfig
from scrimp.jobs.zoom_data import stored_bytes
from scrimp.jobs.zoom_fit import ZoomFitting
from scrimp.jobs.zoom_model import Looking
from scrimp.jobs.zoom_pictures import caption, look_at, overlay, overlay_section
from scrimp.jobs.zoom_plan import plan_metadata
from scrimp.jobs.zoom_setup import ZoomSetup, prepare_zoom
from scrimp.meter import Cost, EnergyWindow, ResidentPeak
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import Section, write_report

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress


def zoom_train(config: ZoomTrainConfig, *, data: Any = None, accelerator: Accelerator | None = None) -> Receipt:
    """Train under a budget; writes weights, configuration, receipt and a report with pictures to the run folder.

    Args:
        config: see `ZoomTrainConfig`.
        data: a `scrimp.jobs.zoom_files.Gallery`, or a pair of them to train and to test on; instead of
            ``config.data``.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator) as started:
        return _train(config, source, started)


def _train(config: ZoomTrainConfig, source: Any, accelerator: Accelerator) -> Receipt:
    name = default_name("zoom", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, f"{name}-{config.method}", resume=config.resume))
    done = folder / RECEIPT
    if config.resume and shared(accelerator, done.is_file):
        shared(accelerator, lambda: record_config(folder, config, {}))
        return load_receipt(done)
    shown = accelerator.is_main_process and not config.json
    with progress_bar(shown=shown and console.is_terminal) as progress:  # elsewhere it would leave an empty line
        setup = prepare_zoom(config, source, accelerator, _viewing(progress))
    with progress_bar(shown=shown) as progress:
        wanted = {} if config.resume else {"budget_flops": setup.budget(folder)}
        budget = shared(accelerator, lambda: record_config(folder, config, wanted))["budget_flops"]
        with ResidentPeak() as peak, EnergyWindow() as energy:
            fitting = _fit(setup, folder, budget, progress)
            stored = save_weights(fitting, folder / WEIGHTS, plan_metadata(setup.plan))
        cost = cost_of(setup, fitting.spent, peak.reading, energy.reading, stored)
        receipt = _receipt(setup, fitting, cost, name, budget)
        if accelerator.is_main_process:
            write_report([receipt], folder / REPORT, sections=_pictures(setup, fitting))
            save_receipt(receipt, done)
            fitting.checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return receipt


def _viewing(progress: Progress) -> Callable[[int, int], None]:
    bar = add_bar(progress, "views")

    def show(done: int, of: int) -> None:
        progress.update(bar, completed=done / of, visible=done < of)

    return show


def _fit(setup: ZoomSetup, folder: Path, budget: float, progress: Progress) -> ZoomFitting:
    config = setup.config
    bar = add_bar(progress, config.method)

    def report(spent: Spent) -> None:
        latest = spent.curve[-1] if spent.curve else {}
        progress.update(bar, completed=spent.flops / budget, figures=figures(latest))

    devices = [setup.accelerator.device.index or 0] if setup.accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # Dropout and the like: restored afterwards, and not alike on every process.
        torch.manual_seed(config.seed + 7919 * setup.accelerator.process_index)
        fitting = setup.fitting(folder, budget)
        if config.resume and fitting.checkpoint.is_file():
            fitting.resume()
        with tracked(setup.accelerator, config.trackers, folder, plain(config)):
            fitting.run(report)
    return fitting


def _pictures(setup: ZoomSetup, fitting: ZoomFitting) -> list[Section]:
    """Some test images, spread evenly over all."""
    test, config, target = setup.data.test, setup.config, setup.data.target
    count = min(config.pictures, len(test))
    if not count:
        return []
    rows = [place * len(test) // count for place in range(count)]
    model = cast(Looking, fitting.trained())
    device = setup.accelerator.device
    items = []
    for seen in look_at(setup.plan, model, test.views, rows, device=device, batch_size=config.batch_size):
        said = target.answers(seen.outputs[None])[0][0]
        texts = test.readers.gallery.labels
        truth = None if texts is None or target.task == "regression" else texts[seen.row]
        items.append((overlay(seen), caption(said, truth), Path(test.readers.gallery.name_of(seen.row)).name))
    return [overlay_section(items)]


def _receipt(setup: ZoomSetup, fitting: ZoomFitting, cost: Cost, name: str, budget: float) -> Receipt:
    config, data, spent = setup.config, setup.data, fitting.spent
    read = fitting.total_bytes()
    last = spent.curve[-1]
    return Receipt(
        kind="run",
        name=name,
        way=config.method,
        seed=config.seed,
        baseline=config.method == "whole",
        quality={key: value for key, value in sorted(last.items()) if key.startswith(("test_", "train_"))},
        cost=cost,
        curve=spent.curve,
        config={**plain(config), "budget_flops": budget},
        notes={
            "data": data.name,
            "task": data.target.task,
            "training images": len(data.train),
            "test images": len(data.test),
            "classes": len(data.classes),
            "skipped images": len(data.skipped),
            "largest image": data.train.sizes[int(data.train.sizes.prod(1).argmax())].tolist(),
            "view": list(setup.plan.shape),
            "flops an image, training": setup.cost.train,
            "flops an image, inference": setup.cost.score,
            "images a second": spent.images / spent.seconds if spent.seconds else None,
            "bytes of patches read": read,
            "bytes of patches read an image": None if read is None else read / spent.images,
            "bytes of the training files": stored_bytes(data.train),
            "processes": setup.accelerator.num_processes,
            "device": str(setup.accelerator.device),
            "resumed": spent.resumes,
            "train_loss measured on": f"{min(config.probe, len(data.train))} fixed training images",
        },
    )
