"""The grid of attentions that `scrimp swap` tries, each a function of the family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scrimp.attend import (
    clustered_attention,
    improved_clustered_attention,
    linear_attention,
    softmax_attention,
)
from scrimp.jobs.swap_config import SwapConfig
from scrimp.primitives.draw import generator_for

ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "improved-clustered": improved_clustered_attention,
    "clustered": clustered_attention,
    "linear": linear_attention,
    "softmax": softmax_attention,
}
ORIGINAL = "original"
"""The way of the model as it came."""


@dataclass(frozen=True)
class Setting:
    """One attention with its numbers; ``None`` for those it does not have."""

    attention: str
    clusters: int | None = None
    topk: int | None = None

    @property
    def way(self) -> str:
        """Its name in receipts, such as ``improved-clustered C=100 k=32``."""
        clusters = "" if self.clusters is None else f" C={self.clusters}"
        return self.attention + clusters + ("" if self.topk is None else f" k={self.topk}")

    @property
    def file(self) -> str:
        return self.way.replace(" ", "-").replace("=", "") + ".json"

    def function(self, seed: int) -> Callable[..., Tensor]:
        """The function, its random draws begun anew: every pass of one seed is the same."""
        options: dict[str, Any] = {"clusters": self.clusters, "topk": self.topk}
        options = {key: value for key, value in options.items() if value is not None}
        if self.clusters is not None:
            options["generator"] = generator_for(seed)
        return functools.partial(ATTENTIONS[self.attention], **options)


def settings_of(config: SwapConfig) -> list[Setting]:
    """Every combination asked for, attention by attention."""
    found = []
    for name in config.attention:
        clusters = config.clusters if "clustered" in name else (None,)
        topk = config.topk if name == "improved-clustered" else (None,)
        found += [Setting(name, count, keys) for count in clusters for keys in topk]
    return found
