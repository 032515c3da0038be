"""`scrimp swap`: another attention in a pretrained model, without fine-tuning, held against the original."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from scrimp.jobs.device import pick_device
from scrimp.jobs.folder import REPORT, choose_folder, plain, record_config
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.swap_data import load_batches, sizes_of
from scrimp.jobs.swap_measure import Bench, ratios
from scrimp.jobs.swap_models import load_subject
from scrimp.jobs.swap_settings import ORIGINAL, Setting, settings_of
from scrimp.jobs.swap_subject import Batch, Subject, batches_of, subject_of
from scrimp.jobs.swap_table import recommend, swap_section
from scrimp.primitives.files import write_json
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import write_report

RECOMMENDATION = "recommendation.json"


@dataclass(frozen=True)
class Swapped:
    """What a swap leaves.

    Attributes:
        folder: the run folder.
        receipts: size by size, the original first, then setting by setting.
        recommended: for each study (one size) the cheapest way within the tolerance, or ``None``.
    """

    folder: Path
    receipts: list[Receipt]
    recommended: dict[str, str | None]


def swap(config: SwapConfig, *, model: nn.Module | None = None, data: Any = None) -> Swapped:
    """Try every setting at every size; writes configuration, a receipt each, recommendation and report.html.

    Args:
        config: see `SwapConfig`.
        model: a ready model instead of the one ``config.model`` names (which then only names it); moved to the device
            and set to eval mode for the run.
        data: batches instead of ``config.data``: a list of tensors, (inputs, labels) pairs or mappings of keywords
            with perhaps ``labels``; or a mapping from sizes to such lists.

    Returns:
        The run folder, the receipts and the recommendations.

    Raises:
        InputError: model, data or configuration cannot be used, or an attention cannot honour what the model asks.
        Interrupted: SIGINT or SIGTERM came; finished settings are kept, go on with ``resume=True``.
    """
    config.check()
    device = pick_device(config.device)
    label = Path(config.model).name or "model"
    folder = choose_folder(config.out, f"swap-{label}", resume=config.resume)
    subject = load_subject(config) if model is None else subject_of(model, label, layers=config.layers)
    inputs = _batches_by_size(config, subject, data)
    if config.resume:
        record_config(folder, config, {})  # the interrupted run's, or refused
    was_training = subject.model.training
    subject.model.eval().to(device)
    try:
        with stop_requests() as stop:
            receipts = _run_all(_Run(config, subject, folder, device, stop), inputs)
    finally:
        subject.model.train(was_training)
    recommended = recommend(receipts, config.tolerance)
    write_json(folder / RECOMMENDATION, {"tolerance": config.tolerance, "recommended": recommended})
    write_report(receipts, folder / REPORT, sections=[swap_section(receipts, config.tolerance)])
    return Swapped(folder, receipts, recommended)


@dataclass(frozen=True)
class _Run:
    config: SwapConfig
    subject: Subject
    folder: Path
    device: str
    stop: Callable[[], bool]

    def bench(self, batches: Sequence[Batch]) -> Bench:
        return Bench(self.subject, batches, config=self.config, device=self.device, stop=self.stop)


_Inputs = dict[int | None, Callable[[], Sequence[Batch]]]
"""For each size, how to load its batches; ``None`` is the size that somebody else's batches have."""


def _batches_by_size(config: SwapConfig, subject: Subject, data: Any) -> _Inputs:
    if data is None:
        return {size: functools.partial(load_batches, config, subject, size) for size in sizes_of(config, subject)}
    given = data if isinstance(data, Mapping) else {None: data}
    found = {size: batches_of(items) for size, items in given.items()}
    return {size: functools.partial(found.__getitem__, size) for size in found}


def _run_all(run: _Run, inputs: _Inputs) -> list[Receipt]:
    settings = settings_of(run.config)
    ways: list[Setting | None] = [None, *settings]
    receipts = []
    with progress_bar(shown=not run.config.json) as progress:
        bar = add_bar(progress, "swap", total=len(inputs) * len(ways))
        for place, (size, load) in enumerate(inputs.items()):
            home = run.folder / "receipts" / str(size or "given")
            if run.config.resume and all((home / _file(way)).is_file() for way in ways):
                receipts += [load_receipt(home / _file(way)) for way in ways]
                progress.advance(bar, len(ways))
                continue
            bench = run.bench(load())
            bench.try_out(settings, size)
            if place == 0 and not run.config.resume:
                record_config(run.folder, run.config, {})  # nothing is written before all is known to work
            for way in ways:
                progress.update(bar, figures=f"{_study(run, size)}, {ORIGINAL if way is None else way.way}")
                receipts.append(_receipt(run, bench, way, size=size, file=home / _file(way)))
                progress.advance(bar)
    return receipts


def _receipt(run: _Run, bench: Bench, way: Setting | None, *, size: int | None, file: Path) -> Receipt:
    """Measured and written, or read from where an interrupted run left it."""
    if run.config.resume and file.is_file():
        return load_receipt(file)
    if run.stop():
        raise Interrupted
    receipt = _original(run, bench, size) if way is None else _measured(run, bench, way, size)
    save_receipt(receipt, file)
    return receipt


def _original(run: _Run, bench: Bench, size: int | None) -> Receipt:
    return replace(
        _blank(run, bench, size),
        way=ORIGINAL,
        baseline=True,
        quality=bench.scores(None).quality_of_original(),
        cost=bench.cost_of_original(),
        notes={**_facts(run, bench, size), "attention_flops": bench.original_attention_flops.value},
    )


def _measured(run: _Run, bench: Bench, setting: Setting, size: int | None) -> Receipt:
    cost, times = bench.cost(setting)
    flops = bench.attention_flops(setting)
    return replace(
        _blank(run, bench, size),
        way=setting.way,
        quality=bench.scores(setting).quality(),
        cost=cost,
        notes={
            **_facts(run, bench, size),
            "attention_flops": flops.value,
            "attention_flops_missed": list(flops.missed),
            "attention_flops_of_original": bench.original_attention_flops.value,
            "ratios": ratios(times),
        },
    )


def _blank(run: _Run, bench: Bench, size: int | None) -> Receipt:
    return Receipt(
        kind="run", name=_study(run, size), way="", seed=run.config.seed, config=plain(run.config) | {"size": size}
    )


def _facts(run: _Run, bench: Bench, size: int | None) -> dict[str, Any]:
    return {
        "data": run.config.data,
        "size": size,
        "device": run.device,
        "outputs": run.subject.gives,
        "batches": len(bench.batches),
        "layers": run.config.layers or "all",
    }


def _study(run: _Run, size: int | None) -> str:
    if size is None:
        return run.subject.name
    return f"{run.subject.name} at {size} {'px' if run.subject.tokenizer is None else 'tokens'}"


def _file(way: Setting | None) -> str:
    return f"{ORIGINAL}.json" if way is None else way.file
