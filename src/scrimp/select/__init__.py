"""Choosing what to spend compute on: ``(scores | record, budget) -> Selection(indices, weights)``.

Functions on scores: `uniform_sample` (baseline), `importance_sample`. Policies that plan a training round from what is
remembered of every sample: `uniform` (baseline), `history`, `prune`; `RoundSampler` deals their plans out in batches.
`Presampler` scores before it trains. Scores: `gradient_norm_bound`, `output_gradient_norm`.

Attention maps over locations have a result of their own, ``(attention map, budget) -> Locations(indices, weights)``:
`sample_locations`, `top_locations`; `expected_features` combines the features there into the estimate of `expectation`.

Images to label have one too, ``(features, probabilities, labelled, budget) -> Selection``: `random_labels` (baseline),
`nearest_to_centres`, `multi_round`, `k_centre`, `typicality`, `coverage`, `herding`, `margin`, `predictive_entropy`,
`badge`, `coefficient_gradients`, `coefficient_determinants`; combined by `cold_start` and `balanced`; `bridge` brings
others. `gain_left`, `changes_left` and `enough` say when to stop.
"""

from scrimp.select.active import balanced, cold_start, random_labels
from scrimp.select.active_bridge import bridge
from scrimp.select.active_centres import k_centre, multi_round, nearest_to_centres
from scrimp.select.active_density import coverage, typicality
from scrimp.select.active_doubt import margin, predictive_entropy
from scrimp.select.active_gradients import (
    badge,
    coefficient_determinants,
    coefficient_gradients,
    expected_residuals,
    head_gradients,
    predicted_residuals,
)
from scrimp.select.active_herding import herding
from scrimp.select.active_pool import Strategy
from scrimp.select.active_stopping import Gain, changes_left, enough, gain_left
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
    "Gain",
    "Gate",
    "Locations",
    "Policy",
    "Presampler",
    "Record",
    "RoundSampler",
    "Selection",
    "Strategy",
    "badge",
    "balanced",
    "bridge",
    "changes_left",
    "coefficient_determinants",
    "coefficient_gradients",
    "cold_start",
    "coverage",
    "enough",
    "entropy",
    "expectation",
    "expected_features",
    "expected_residuals",
    "gain_left",
    "gradient_norm_bound",
    "head_gradients",
    "herding",
    "history",
    "importance_sample",
    "k_centre",
    "margin",
    "multi_round",
    "nearest_to_centres",
    "output_gradient_norm",
    "predicted_residuals",
    "predictive_entropy",
    "prune",
    "random_labels",
    "sample_locations",
    "smoothed",
    "speedup_threshold",
    "top_locations",
    "typicality",
    "uniform",
    "uniform_sample",
    "variance_reduction",
]
