"""The grid of attentions that `scrimp swap` tries, each a function of the family."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import scrimp.attend as family
from scrimp.jobs.swap_config import SwapConfig
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

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
        """The function, its random draws begun anew: every pass of one seed is the same.

        Raises:
            InputError: this installation has no such attention.
        """
        name = f"{self.attention.replace('-', '_')}_attention"
        member = getattr(family, name, None)
        if member is None:
            raise InputError("an attention of scrimp.attend", self.attention, "choose another --attention")
        options: dict[str, Any] = {"clusters": self.clusters, "topk": self.topk}
        options = {key: value for key, value in options.items() if value is not None}
        if self.clusters is not None:
            options["generator"] = generator_for(seed)
        return functools.partial(member, **options)


def settings_of(config: SwapConfig) -> list[Setting]:
    """Every combination asked for, attention by attention."""
    found = []
    for name in config.attention:
        clusters = config.clusters if "clustered" in name else (None,)
        topk = config.topk if name == "improved-clustered" else (None,)
        found += [Setting(name, count, keys) for count in clusters for keys in topk]
    return found
