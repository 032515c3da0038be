"""The stage that chooses which images to label, by the features of an encoder, and puts a linear probe on these."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.jobs.label_config import LabelConfig
from scrimp.jobs.label_learner import strategy_named
from scrimp.jobs.stages import Context, Stage
from scrimp.jobs.stages_probe import probe_receipt
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.represent.knn import unit_rows
from scrimp.represent.linear import fit_linear_probe

_CHOOSING = 5  # key of the draws
_ROUNDS = 10


def label_stage() -> Stage:
    """As many labels as the other ways of the study may use, but of images chosen as `scrimp label` chooses by default.

    A tenth of them a round. No budget but a forward pass of all training images; the FLOPs of choosing and fitting,
    which none can foresee, are added to the run's.
    """
    return Stage("label", 0.0, _run, fixed=lambda context: context.setup.cost.score * len(context.setup.data.train))


def _run(context: Context) -> Receipt:
    rows = torch.arange(len(context.setup.data.train))
    return probe_receipt(context, "label", rows, lambda features: chosen_rows(features, context))


def chosen_rows(features: Tensor, context: Context) -> Tensor:
    """Images to label, in the order of choice, of those with ``features`` [n, dim]; no other label is looked at."""
    data, budget = context.setup.data, len(context.labelled)
    config, classes = LabelConfig(data=data.name), len(data.classes)
    strategy = strategy_named(config, config.strategy, classes)
    known, found = unit_rows(features), torch.zeros(0, dtype=torch.int64)
    probabilities: Tensor | None = None
    while len(found) < budget:
        if len(found):
            probe = fit_linear_probe(known[found], data.train.labels[found], classes=classes, unlabelled=known)
            probabilities = probe.logits(known).softmax(1)
        more = min(max(1, budget // _ROUNDS), budget - len(found))
        generator = generator_for(context.seed, _CHOOSING, len(found))
        picked = strategy(known, probabilities, found, more, generator=generator)
        found = torch.cat([found, picked.indices])
    return found
