"""The ways a study compares: each a list of stages that share one budget, the first way being the conventional one.

A later method joins by one more stage and one more row in `WAYS`, or as a part of the names that "+" joins.
"""

from __future__ import annotations

from scrimp.jobs.sampling import SAMPLINGS
from scrimp.jobs.stages import Context, Stage, Way, check_way, run_way, train_with
from scrimp.jobs.stages_adapt import adapt_with
from scrimp.jobs.stages_encoder import distill_with, pretrain_with
from scrimp.jobs.stages_label import label_stage
from scrimp.jobs.stages_probe import probe_stage
from scrimp.jobs.stages_receipt import join_stages
from scrimp.primitives.errors import InputError

__all__ = [
    "DISTILL_SHARE",
    "TRAIN_SHARE",
    "WAYS",
    "Context",
    "Stage",
    "Way",
    "check_way",
    "find_ways",
    "run_way",
]

TRAIN_SHARE = 0.2
"""Of a run's budget, what adapt or a sampling way gets that trains on from an encoder. The passes of a probe, or of
label, are taken off first."""
DISTILL_SHARE = 0.4
"""Of what is left for the encoder, what distilling gets, the teacher's passes included; pretraining gets the rest."""

WAYS: tuple[Way, ...] = (
    Way("uniform", "shuffled passes over all images", (train_with("uniform"),)),
    Way("history", "importance sampling by scores of the batches just trained", (train_with("history"),)),
    Way("prune", "easy images left out at random, the kept ones counted for them", (train_with("prune"),)),
    Way("presample", "importance sampling from a larger scored batch, when that pays", (train_with("presample"),)),
)

_ON_FEATURES = ("probe", "label")
_ENDS = (*_ON_FEATURES, "adapt", *SAMPLINGS)
_ABOUT = {
    "pretrain": "an encoder from images without labels",
    "distill": "taught to the model",
    "probe": "a linear classifier on its features",
    "label": "a linear classifier on its features, the labels it learns from chosen by these",
    "adapt": "a classifier on it and a few numbers in it trained, the rest frozen",
}


def find_ways(names: tuple[str, ...]) -> list[Way]:
    """The ways of these names, in their order: those of `WAYS`, and stages joined by "+".

    Raises:
        InputError: no such way, one named twice, or stages in an order that means nothing.
    """
    known = {way.name: way for way in WAYS}
    strangers = [name for name in names if name not in known and "+" not in name]
    if strangers or not names or len(set(names)) != len(names):
        got = strangers[0] if strangers else " ".join(names) or "none"
        joined = "pretrain+probe, pretrain+adapt, pretrain+distill+probe and the like"
        wanted = f"different ways out of: {', '.join(known)}, {joined}"
        raise InputError(wanted, got, "see scrimp study --help")
    return [known[name] if name in known else _joined(name) for name in names]


def _joined(name: str) -> Way:
    parts = name.split("+")
    _check_order(name, parts)
    last = 0.0 if parts[-1] in _ON_FEATURES else TRAIN_SHARE
    distill = DISTILL_SHARE * (1 - last) if "distill" in parts else 0.0
    made = {
        "pretrain": pretrain_with(1 - last - distill, teacher="distill" in parts),
        "distill": distill_with(distill),
        "probe": probe_stage(),
        "label": label_stage(),
        "adapt": adapt_with(last),
        **{sampling: train_with(sampling, last) for sampling in SAMPLINGS},
    }
    about = ", ".join(_ABOUT.get(part, f"all of it trained on, {part}") for part in parts)
    return Way(name, about, tuple(made[part] for part in parts), join_stages)


def _check_order(name: str, parts: list[str]) -> None:
    stages = ("pretrain", "distill", *_ENDS)
    strangers = [part for part in parts if part not in stages]
    ends = [part for part in parts if part in _ENDS]
    broken = {
        f"stages out of: {', '.join(stages)}": bool(strangers),
        "each stage at most once in a way": len(set(parts)) < len(parts),
        "pretrain before all that builds on an encoder": parts[0] != "pretrain",
        "a way that ends in probe, label, adapt or a sampling way": parts[-1] not in _ENDS,
        f"nothing after {ends[0] if ends else 'the end'}": len(ends) > 1,
    }
    for wanted, wrong in broken.items():
        if wrong:
            got = f"'{strangers[0]}' in {name}" if strangers else name
            raise InputError(wanted, got, "write it like pretrain+distill+probe or pretrain+uniform")
