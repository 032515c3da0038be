"""The networks and the losses of `scrimp pretrain`: plain parts of `scrimp.represent`, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.pseudo_labels import Labeller
from scrimp.represent import (
    EmbeddingCache,
    Memory,
    byol_loss,
    constrained_mean_shift_loss,
    earlier_views,
    mean_shift_loss,
    predictor,
    projector,
    same_label,
    target_of,
)

_MEMORY = 131_072


class Online(nn.Module):
    """Backbone, projector and predictor of the network that learns; `target` has the first two.

    Args:
        backbone: images [n, C, H, W] -> features [n, m].
        projector: features -> embeddings; predictor: embeddings -> predictions of the target's.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor

    def forward(self, views: list[Tensor], *, features: bool = False) -> list[Tensor]:
        """What comes of each view; the backbone's features alone where asked for. One call, as replicas need it."""
        maps = [self.backbone(view) for view in views]
        if features:
            return maps
        embeddings = [self.projector(item) for item in maps]
        return embeddings if self.predictor is None else [self.predictor(item) for item in embeddings]


def make_online(backbone: nn.Module, features: int, config: PretrainConfig) -> Online:
    """The learning network; its heads' initial weights are fixed by the configuration's seed."""
    hidden = config.hidden or 2 * features
    dim = config.dim or max(64, features // 4)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed + 1)
        return Online(backbone, projector(features, hidden=hidden, dim=dim), predictor(dim, hidden=hidden))


def make_target(online: Online) -> Online:
    """The network that follows, at first the same; it has no predictor."""
    return cast(Online, target_of(Online(online.backbone, online.projector, None)))


def embedding_width(online: Online) -> int:
    """Numbers in an embedding."""
    layers = [module for module in online.projector.modules() if isinstance(module, nn.Linear)]
    return layers[-1].out_features


@dataclass(frozen=True)
class Views:
    """A batch as the two networks see it: lists of [batch, C, H, W]."""

    online: list[Tensor]
    target: list[Tensor]

    def parts(self, count: int) -> list[Views]:
        """The same in ``count`` equal parts: every ``count``-th image, so that several processes' parts are one's."""
        return [
            Views([view[part::count] for view in self.online], [view[part::count] for view in self.target])
            for part in range(count)
        ]


Gather = Callable[[Tensor], Tensor]
"""Rows of every process, in the order of ranks."""


class Objective:
    """One method's loss and what it remembers between steps.

    Args:
        config: method, constraint, k, memory.
        labels: int64 [images], `NO_LABEL` where it may not be used.
        dim: width of an embedding.
        device: where embeddings come from.
        gather: see `Gather`; the memories of all processes are the same.
        cache: file of the last embeddings; in RAM where omitted.
    """

    def __init__(
        self,
        config: PretrainConfig,
        labels: Tensor,
        dim: int,
        *,
        device: torch.device,
        gather: Gather = lambda rows: rows,
        cache: Path | None = None,
    ) -> None:
        self.config, self.labels, self.gather = config, labels, gather
        size = config.memory or min(_MEMORY, max(4 * config.k, config.batch_size, len(labels) // 4))
        self.memory = Memory(size, dim, device=device) if config.method != "byol" else None
        constraint = config.constraint if config.method == "constrained" else None
        self.earlier = Memory(size, dim, device=device) if constraint == "views" else None
        self.labeller = Labeller(labels, config.confidence) if constraint == "pseudo-labels" else None
        kept = constraint in ("views", "pseudo-labels")
        self.cache = EmbeddingCache(len(labels), dim, path=cache) if kept else None
        self.mix = config.mix if config.mix is not None else (0.5 if constraint == "views" else 0.0)

    def losses(self, online: list[Tensor], target: list[Tensor], rows: Tensor) -> Tensor:
        """The loss of each image, [batch].

        Args:
            online: predictions, a list of [batch, dim], one for each view.
            target: the target network's embeddings, likewise.
            rows: which image each is, int64 [batch], on the CPU.
        """
        if self.memory is None:
            pairs = zip(online, reversed(target), strict=True)
            return torch.stack([byol_loss(ours, theirs, reduction="none") for ours, theirs in pairs]).mean(0)
        (mine,) = target
        everyone, every_row = self.gather(mine), self.gather(rows.to(mine.device)).cpu()
        if self.config.method == "mean-shift":
            self.memory.push_(everyone)
            return mean_shift_loss(online, mine, self.memory, k=self.config.k, reduction="none")
        constraint = self._constraint(mine, everyone, rows, every_row)
        return constrained_mean_shift_loss(
            online, mine, self.memory, constraint=constraint, k=self.config.k, mix=self.mix, reduction="none"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. The cache is not in it: see `cache`."""
        parts = {"memory": self.memory, "earlier": self.earlier, "labeller": self.labeller}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def _constraint(self, mine: Tensor, everyone: Tensor, rows: Tensor, every_row: Tensor) -> Any:
        assert self.memory is not None
        if self.earlier is not None and self.cache is not None:
            before = self.cache.read(rows, device=mine.device)
            self.earlier.push_(self.cache.read(every_row, device=mine.device))
            self.memory.push_(everyone)
            self.cache.write_(every_row, everyone)
            return earlier_views(before, self.earlier)
        if self.labeller is not None and self.cache is not None:
            self.labeller.look_(self.cache, len(every_row))
            every_label = self.labeller.labels_of(everyone, every_row)
            self.cache.write_(every_row, everyone)
        else:
            every_label = self.labels[every_row].to(everyone.device)
        self.memory.push_(everyone, labels=every_label)
        place = (every_row[:, None] == rows.cpu()).float().argmax(0)
        return same_label(every_label[place.to(every_label.device)])
