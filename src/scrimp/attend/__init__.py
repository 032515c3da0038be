"""Attention in one signature: ``(query, key, value, *, ...) -> output``, tensors [batch, heads, tokens, dim].

`softmax_attention` is the baseline. `linear_attention`, also token by token as `linear_attention_step`, and
`clustered_attention` with `improved_clustered_attention` take its place at a cost that grows linearly with the tokens.
`attention` sends the attention of a model as it is to any of them.
"""

from scrimp.attend.clustered import clustered_attention
from scrimp.attend.feature_maps import SoftmaxMimic, elu_plus_one, random_features, relu
from scrimp.attend.grouping import Groups, group_queries
from scrimp.attend.improved import improved_clustered_attention
from scrimp.attend.linear import linear_attention
from scrimp.attend.recurrent import (
    LinearState,
    linear_attention_step,
    linear_attention_step_,
    load_state,
    save_state,
)
from scrimp.attend.reroute import Call, Routed, attention
from scrimp.attend.softmax import softmax_attention

__all__ = [
    "Call",
    "Groups",
    "LinearState",
    "Routed",
    "SoftmaxMimic",
    "attention",
    "clustered_attention",
    "elu_plus_one",
    "group_queries",
    "improved_clustered_attention",
    "linear_attention",
    "linear_attention_step",
    "linear_attention_step_",
    "load_state",
    "random_features",
    "relu",
    "save_state",
    "softmax_attention",
]
