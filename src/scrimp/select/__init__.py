"""Choosing what to spend compute on: ``(scores | record, budget) -> Selection(indices, weights)``.

Functions on scores: `uniform_sample` (baseline), `importance_sample`. Policies that plan a training round from what is
remembered of every sample: `uniform` (baseline), `history`, `prune`; `RoundSampler` deals their plans out in batches.
`Presampler` scores before it trains. Scores: `gradient_norm_bound`, `output_gradient_norm`.
"""

from scrimp.select.importance import (
    gradient_norm_bound,
    importance_sample,
    output_gradient_norm,
    speedup_threshold,
    variance_reduction,
)
from scrimp.select.policies import history, prune, uniform
from scrimp.select.presample import Gate, Presampler
from scrimp.select.record import Policy, Record
from scrimp.select.sampler import RoundSampler
from scrimp.select.selection import Selection
from scrimp.select.uniform import uniform_sample

__all__ = [
    "Gate",
    "Policy",
    "Presampler",
    "Record",
    "RoundSampler",
    "Selection",
    "gradient_norm_bound",
    "history",
    "importance_sample",
    "output_gradient_norm",
    "prune",
    "speedup_threshold",
    "uniform",
    "uniform_sample",
    "variance_reduction",
]
