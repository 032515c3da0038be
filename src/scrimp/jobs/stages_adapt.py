"""The stage that adapts a pretrained encoder: a classifier and NOLA's few numbers, on the labelled images."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import load_file

from scrimp.adapt import load_adapter_, merge_
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_models import Subject, image_model
from scrimp.jobs.adapt_run import ADAPTER, AdaptRun, run_adaptation
from scrimp.jobs.adapt_setup import Adaptation, adaptation_of
from scrimp.jobs.budget import checked_budget
from scrimp.jobs.encoders import create_encoder
from scrimp.jobs.engine import shared
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.stages import Context, Stage
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import Receipt

# What the job shares with the study; method, optimiser and its settings are its own.
_SHARED = (
    "batch_size",
    "precision",
    "compile",
    "parallel",
    "workers",
    "on_corrupt",
    "evaluations",
    "probe",
    "checkpoint_seconds",
    "trackers",
)


def adapt_with(share: float) -> Stage:
    """The stage that adapts the encoder before it and puts a classifier on it; the rest of it stays as it was.

    A step takes at most as many images as are labelled. Leaves the adapter, and the merged classifier as weights.
    """

    def run(context: Context) -> Receipt:
        if context.encoder is None:
            raise InputError("a stage before adapt that makes an encoder", "none", "write pretrain+adapt")
        setup = _adaptation(context)
        task = AdaptRun(context.stage_name, "adapt", context.folder, context.budget)
        receipt, _ = run_adaptation(setup, task, context.report, resume=context.resume)
        shared(setup.accelerator, lambda: _write_merged(setup, context))
        return receipt

    def check(context: Context) -> None:
        setup = _adaptation(context)
        checked_budget(context.budget, setup.cost.train * setup.config.batch_size)

    def pace(context: Context) -> float:
        return _adaptation(context).seconds_a_flop()

    return Stage("adapt", share, run, check=check, pace=pace)


def _adaptation(context: Context) -> Adaptation:
    """On the labelled images alone, from the encoder, or where there is none yet from one as large."""
    study, rows = context.config, context.labelled
    settings = {name: getattr(study, name) for name in _SHARED}
    config = AdaptConfig(model=study.model, data=context.setup.data.name, seed=context.seed, **settings)
    data = context.setup.data
    if len(rows) < len(data.train):
        data = replace(data, train=data.train.take(rows))
    return adaptation_of(config, _subject(context), data, context.setup.accelerator)


def _subject(context: Context) -> Subject:
    data, name = context.setup.data, context.config.model
    channels, size, _ = data.train.shape
    facts = {"kind": "images", "architecture": name, "channels": channels, "size": size, "classes": list(data.classes)}
    if context.encoder is not None:
        state = load_file(context.encoder)
    else:
        with torch.random.fork_rng([]):
            state = create_encoder(name, channels=channels, size=size).state_dict()
    return Subject(name=name, build=lambda seed: image_model(facts, state, seed=seed), facts=facts)


def _write_merged(setup: Adaptation, context: Context) -> None:
    """The classifier with its adapter merged, as `scrimp train` leaves one."""
    if (context.folder / WEIGHTS).is_file():
        return
    model = setup.subject.build(setup.config.seed)
    load_adapter_(model, context.folder / ADAPTER)
    merge_(model)
    names = {"model": setup.subject.name, "classes": "\n".join(setup.data.classes), "format": "pt"}
    write_atomic(context.folder / WEIGHTS, pack_weights(model.state_dict(), names))
