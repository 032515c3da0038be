"""Choosing what to spend compute on: ``(scores | record, budget) -> Selection(indices, weights)``.

Functions on scores: `uniform_sample` (baseline), `importance_sample`. Policies that plan a training round from what is
remembered of every sample: `uniform` (baseline), `history`, `prune`; `RoundSampler` deals their plans out in batches.
`Presampler` scores before it trains. Scores: `gradient_norm_bound`, `output_gradient_norm`.

Attention maps over locations have a result of their own, ``(attention map, budget) -> Locations(indices, weights)``:
`sample_locations`, `top_locations`; `expected_features` combines the features there into the estimate of `expectation`.
"""

from scrimp.select.attention_maps import entropy, expectation, smoothed
from scrimp.select.attention_sampling import Locations, expected_features, sample_locations, top_locations
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
    "Locations",
    "Policy",
    "Presampler",
    "Record",
    "RoundSampler",
    "Selection",
    "entropy",
    "expectation",
    "expected_features",
    "gradient_norm_bound",
    "history",
    "importance_sample",
    "output_gradient_norm",
    "prune",
    "sample_locations",
    "smoothed",
    "speedup_threshold",
    "top_locations",
    "uniform",
    "uniform_sample",
    "variance_reduction",
]
