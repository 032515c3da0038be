"""The cheapest baseline of `scrimp adapt` on images: a linear classifier on the untouched model's features."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from scrimp.data import ImageData
from scrimp.data.images import Images
from scrimp.jobs.adapt_run import HOW, AdaptRun, facts, labels_used
from scrimp.jobs.adapt_setup import Adaptation
from scrimp.jobs.distill_teachers import put_together, shared_out
from scrimp.jobs.encoders import Encoder, features_of
from scrimp.jobs.engine import shared, total
from scrimp.jobs.folder import RECEIPT, plain
from scrimp.jobs.stages_probe import PROBE, counted_passes, probe_quality, save_probe
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.linear import fit_linear_probe


def run_probe(setup: Adaptation, run: AdaptRun, *, resume: bool) -> Receipt:
    """Fit the classifier to its optimum, write it and its receipt; a finished run is read back.

    It takes one forward pass an image and no budget.
    """
    done = run.folder / RECEIPT
    if resume and done.is_file():
        return load_receipt(done)
    data, accelerator = cast(ImageData, setup.data), setup.accelerator
    encoder = cast(Encoder, setup.subject.encoder)
    encoder.model.to(accelerator.device)
    with ResidentPeak() as peak, EnergyWindow() as energy:
        begin, cpu = time.perf_counter(), time.process_time()
        features = _features(encoder, data.train, setup)
        fit = functools.partial(fit_linear_probe, features, data.train.labels, classes=len(data.classes))
        probe = shared(accelerator, fit)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    test = _features(encoder, data.test, setup)
    size = shared(accelerator, lambda: save_probe(probe, run.folder / PROBE, data.classes))
    counted = shared(accelerator, lambda: counted_passes(encoder, data.train, len(data.train), fit))
    cost = Cost(
        seconds=Reading(seconds, HOW["seconds"]),
        cpu_seconds=Reading(total(accelerator, cpu_seconds), HOW["cpu_seconds"]),
        flops=replace(counted, how=HOW["flops"]),
        peak_bytes=peak.reading,
        joules=energy.reading,
        stored_bytes=Reading(float(size), HOW["stored_bytes"]),
        samples=Reading(0.0, HOW["samples"]),
        labels=labels_used(setup),
    )
    receipt = _receipt(setup, run, probe_quality(probe, (features, data.train.labels), (test, data.test.labels)), cost)
    if accelerator.is_main_process:
        save_receipt(receipt, done)
    accelerator.wait_for_everyone()
    return receipt


def _features(encoder: Encoder, images: Images, setup: Adaptation) -> Tensor:
    """Features of all images, float32 [n, dim] on the CPU; on every process, each gets all."""
    accelerator = setup.accelerator
    mine = images.take(shared_out(torch.arange(len(images)), accelerator))
    rows = 4 * setup.config.batch_size
    found = features_of(encoder, mine, device=accelerator.device, batch_size=rows)
    return put_together(found.to(accelerator.device), len(images), accelerator).cpu()


def _receipt(setup: Adaptation, run: AdaptRun, quality: dict[str, float | None], cost: Cost) -> Receipt:
    point = {name: getattr(cost, name).value for name in ("flops", "seconds", "cpu_seconds", "samples")}
    return Receipt(
        kind="run",
        name=run.name,
        way=run.way,
        seed=setup.config.seed,
        baseline=run.baseline,
        quality=quality,
        cost=cost,
        curve=[{**point, **quality}],
        config=plain(setup.config),
        notes={**facts(setup), "trained numbers": 0, "trained numbers of the classifier": setup.head},
    )
