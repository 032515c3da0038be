"""The stages that make an encoder, from all training images and none of their labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scrimp.jobs.budget import checked_budget
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_setup import Distillation, prepare_distillation
from scrimp.jobs.pretrain import Pretraining, prepare_pretraining
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.stages import Context, Stage
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt

# What an encoder's job shares with the study; the optimiser's settings are its own.
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


def pretrain_with(share: float, *, teacher: bool) -> Stage:
    """The stage that pretrains the study's model, or the network that will be its ``teacher``."""

    def prepared(context: Context) -> Pretraining:
        study = context.config
        model, own = (study.encoder, False) if teacher else (study.model, study.pretrained)
        config = PretrainConfig(
            **_settings(context), method=study.pretrain_method, model=model, pretrained=own, seed=context.seed
        )
        return prepare_pretraining(config, context.setup.data, context.setup.accelerator)

    def run(context: Context) -> Receipt:
        return prepared(context).run(
            context.folder, context.budget, context.report, name=context.stage_name, resume=context.resume, drawn=False
        )

    def check(context: Context) -> None:
        if context.config.batch_size < PretrainConfig.k:
            got = f"{context.config.batch_size}"
            raise InputError(f"batches of at least {PretrainConfig.k} images to pretrain on", got, "raise --batch-size")
        checked_budget(context.budget, prepared(context).cost.train * context.config.batch_size)

    def pace(context: Context) -> float:
        return prepared(context).seconds_a_flop()

    return Stage("pretrain", share, run, check=check, pace=pace)


def distill_with(share: float) -> Stage:
    """The stage that teaches the study's model what the encoder before it sees; the teacher's passes are in it."""

    def run(context: Context) -> Receipt:
        study = context.config
        config = DistillConfig(
            **_settings(context),
            teacher=(str(context.encoder),),
            model=study.model,
            pretrained=study.pretrained,
            seed=context.seed,
        )
        setup = _distillation(config, context)

        def told(share: float) -> None:
            context.told(f"distill, teacher's features {100 * share:.0f} %")

        return setup.run(
            context.folder,
            context.budget,
            context.report,
            name=context.stage_name,
            resume=context.resume,
            told=told,
            drawn=False,
        )

    def check(context: Context) -> None:
        """The teacher is still to be made, so its passes are not known; the student's step is at least the model's."""
        checked_budget(context.budget, context.setup.cost.train * context.config.batch_size)

    return Stage("distill", share, run, check=check)


def _distillation(config: DistillConfig, context: Context) -> Distillation:
    """With the teacher's features kept, or where the budget is too small for a pass over all images, without."""
    data, accelerator = context.setup.data, context.setup.accelerator
    setup = prepare_distillation(config, data, accelerator)
    teacher = sum(reading.value or 0.0 for reading in setup.passes)
    if context.budget > (setup.cost.train + teacher) * len(data.train):
        return setup
    return prepare_distillation(replace(config, cache="none"), data, accelerator)


def _settings(context: Context) -> dict[str, Any]:
    return {name: getattr(context.config, name) for name in _SHARED}
