"""Policies: how a round of training draws is planned from what is remembered of every sample.

All have one signature, ``(record, budget, *, generator) -> Selection``, and consume the generator alike at first: a
policy whose gate is shut plans the very round that `uniform` would.
"""

from __future__ import annotations

import functools

import torch

from scrimp.primitives.draw import draw_systematic
from scrimp.primitives.errors import InputError
from scrimp.select.importance import normalised
from scrimp.select.record import Policy, Record
from scrimp.select.selection import Selection
from scrimp.select.uniform import uniform_sample


def uniform(record: Record, budget: int, *, generator: torch.Generator) -> Selection:
    """Shuffled passes over everything: the baseline."""
    return uniform_sample(len(record.scores), budget, generator=generator)


def history(*, mix: float = 0.2, gate: float = 1.3, staleness: int = 4) -> Policy:
    """Importance sampling by scores taken for free from the batches just trained.

    p_i = (1 - mix) s_i / sum s + mix / N, drawn by systematic sampling, weights 1 / (N p_i) <= 1 / mix. A sample whose
    score is ``staleness`` passes old gets p_i >= 1 / budget, which systematic sampling turns into a certain visit
    (the others' shares shrink for it: weights stay below 2 / mix). While `variance_reduction` of the scores is below
    ``gate`` the plan is `uniform`'s, bit for bit. Ages are asked once a round: the oldest score is ``staleness`` + 2
    passes old at most, as long as half a round can hold the stale ones.

    Args:
        mix: share of uniform sampling, in (0, 1]; bounds the weights.
        gate: the tau from which the policy acts; 1 opens it always, ``inf`` never.
        staleness: passes after which a sample must be seen again, >= 1.

    Raises:
        InputError: a parameter out of its range.
    """
    if not 0 < mix <= 1 or gate < 1 or staleness < 1:
        raise InputError(
            "mix in (0, 1], gate >= 1, staleness >= 1", f"{mix}, {gate}, {staleness}", "see history's documentation"
        )
    return functools.partial(_history, mix=mix, gate=gate, staleness=staleness)


def prune(*, share: float = 0.5, final: float = 0.125) -> Policy:
    """Leave out easy samples at random, count the ones kept for those left out, end on everything.

    InfoBatch's rule (Qin et al., ICLR 2024, eq. 4-5): of the samples scored below the mean each is left out with
    probability ``share``; the kept ones weigh 1 / (1 - share). The last ``final`` of the budget uses all samples. A
    round is shorter than a pass. Scores are losses in the paper.

    Args:
        share: probability of leaving out an easy sample, in [0, 1).
        final: share of the budget, at the end, in which nothing is left out, in [0, 1].

    Raises:
        InputError: a parameter out of its range.
    """
    if not 0 <= share < 1 or not 0 <= final <= 1:
        raise InputError("share in [0, 1), final in [0, 1]", f"{share}, {final}", "see prune's documentation")
    return functools.partial(_prune, share=share, final=final)


def _history(
    record: Record, budget: int, *, generator: torch.Generator, mix: float, gate: float, staleness: int
) -> Selection:
    tau = record.tau()
    if tau is None or tau < gate:
        return uniform(record, budget, generator=generator)
    count = len(record.scores)
    probabilities = (1 - mix) * normalised(record.filled()) + mix / count
    probabilities = _revisit(probabilities, record.ages >= staleness, budget)
    indices = draw_systematic(probabilities, budget, generator=generator)
    return Selection(indices, (1.0 / (count * probabilities[indices])).float())


def _revisit(probabilities: torch.Tensor, stale: torch.Tensor, budget: int) -> torch.Tensor:
    """Raise stale samples to a certain visit (p >= 1 / budget) at the expense of all the others' share.

    When more are stale than half the budget could visit, they share that half evenly, so that the rest goes on.
    """
    stale = stale & (probabilities * budget < 1)
    waiting = int(stale.sum())
    if waiting == 0:
        return probabilities
    floor = min(1.0 / budget, 0.5 / waiting)
    raised = torch.where(stale, torch.clamp_min(probabilities, floor), torch.zeros_like(probabilities))
    rest = torch.where(stale, torch.zeros_like(probabilities), probabilities)
    return raised + rest * ((1 - raised.sum()) / rest.sum()) if bool(rest.sum() > 0) else raised / raised.sum()


def _prune(record: Record, budget: int, *, generator: torch.Generator, share: float, final: float) -> Selection:
    plan = uniform(record, budget, generator=generator)
    if record.progress >= 1 - final or not bool(record.known.any()):
        return plan
    mean = record.scores[record.known].mean()
    easy = (record.scores < mean)[plan.indices]  # NaN, the never seen, is not below
    kept = ~easy | (torch.rand(len(plan), generator=generator) >= share)
    weights = torch.where(easy, 1.0 / (1.0 - share), 1.0)
    return Selection(plan.indices[kept], weights[kept])
