"""Presampling: score a large batch by a forward pass, train on the part of it that matters, when that pays.

Source: Algorithm 1 of Katharopoulos and Fleuret, ICML 2018 (arXiv 1803.00942).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.select.importance import importance_sample, speedup_threshold

Score = Callable[[Tensor, Tensor], Tensor]
"""Maps inputs [n, ...] and targets [n, ...] to scores [n]; run without gradient, with the model in eval mode."""


class Gate:
    """Opens while the moving average of tau exceeds a threshold. It starts shut, at tau = 0.

    Args:
        threshold: tau from which importance sampling pays; see `speedup_threshold`.
        momentum: of the moving average, ``tau <- momentum * tau + (1 - momentum) * tau_new``.
    """

    def __init__(self, threshold: float, *, momentum: float = 0.9) -> None:
        if not threshold >= 0 or not 0 <= momentum < 1:
            raise InputError("a threshold >= 0 and momentum in [0, 1)", f"{threshold}, {momentum}", "use the defaults")
        self.threshold, self.momentum, self.tau = threshold, momentum, 0.0

    @property
    def open(self) -> bool:
        return self.tau > self.threshold

    def update(self, scores: Tensor) -> None:
        """Take in the scores of one uniform sample, [n]."""
        total, squares = torch.stack([scores.sum(), scores.square().sum()]).tolist()  # one wait for a GPU, no checks
        tau = max(1.0, (len(scores) * squares) ** 0.5 / total) if total > 0 else 1.0
        self.tau = self.momentum * self.tau + (1 - self.momentum) * tau


class Presampler:
    """Turns a stream of uniform batches into batches worth training on.

        presampler = Presampler(score, pool=3)
        for images, labels, weights in presampler(loader):
            ...
            loss = (weights * losses).mean()
            presampler.observe(gradient_norm_bound(logits, labels))

    While the gate is shut each batch passes through untouched with weights 1, and its own scores, which cost nothing,
    move the gate. While it is open, ``pool`` batches are scored together and as many samples as one batch holds are
    drawn from them with replacement, with weights 1 / (B g_i).

    On several ranks each scores its own rows; the draw is made from all of them, alike on every rank, and the chosen
    rows are exchanged.

    Args:
        score: see `Score`.
        pool: batches scored for one batch trained (the paper's B / b).
        gate: when to presample; by default `speedup_threshold` at costs 1 and 2.
        seed: fixes the draws.
    """

    def __init__(self, score: Score, *, pool: int = 3, gate: Gate | None = None, seed: int = 0) -> None:
        if pool < 2:
            raise InputError("a pool of at least 2 batches", f"{pool}", "choose 3, as the paper does, or more")
        self.score, self.pool, self.seed = score, pool, seed
        self.gate = gate or Gate(speedup_threshold(pool, 1))
        self.consumed = 0
        """Batches that the current step took from the stream."""
        self._chosen = 0

    def __call__(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (inputs [b, ...], targets [b, ...], weights [b]). The end of a stream too short for a pool passes."""
        stream = iter(batches)
        while taken := list(itertools.islice(stream, self.pool if self.gate.open else 1)):
            if len(taken) == self.pool:
                self.consumed = self.pool
                yield self._choose(taken)
                continue
            self.consumed = 1
            for inputs, targets in taken:
                yield inputs, targets, torch.ones(len(inputs), device=inputs.device)

    def observe(self, scores: Tensor) -> None:
        """Take in the trained batch's scores, [b]; a presampled batch is no uniform sample and does not count."""
        if self.consumed == 1:
            self.gate.update(_gather(scores.detach().float()))

    def state_dict(self) -> dict[str, Any]:
        return {"tau": self.gate.tau, "chosen": self._chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.tau, self._chosen = state["tau"], state["chosen"]

    def _choose(self, taken: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        if len({len(targets) for _, targets in taken}) > 1:
            raise InputError("batches of one size", "a shorter one", "pass drop_last=True to the loader")
        with torch.no_grad():
            scores = torch.stack([_gather(self.score(inputs, targets).float()) for inputs, targets in taken]).flatten()
        self.gate.update(scores)
        chosen = importance_sample(scores, len(scores) // self.pool, generator=generator_for(self.seed, self._chosen))
        self._chosen += 1
        inputs, targets = torch.cat([item[0] for item in taken]), torch.cat([item[1] for item in taken])
        share = len(taken[0][0])
        rows = slice(_rank() * share, (_rank() + 1) * share)
        return (
            _exchange(inputs, chosen.indices, share)[rows],
            _exchange(targets, chosen.indices, share)[rows],
            chosen.weights[rows],
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(values: Tensor) -> Tensor:
    if _world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(_world())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def _exchange(local: Tensor, chosen: Tensor, share: int) -> Tensor:
    """Rows ``chosen`` of the pool, [len(chosen), ...], on every rank.

    The pool is numbered batch by batch and, within a batch, rank by rank; ``local`` holds this rank's ``share`` rows of
    each. Every row has one owner, so the sum over ranks of what each one owns, zero elsewhere, is exact.
    """
    if _world() == 1:
        return local[chosen]
    batch, row = chosen // (share * _world()), chosen % (share * _world())
    mine = row // share == _rank()
    rows = local.new_zeros((len(chosen), *local.shape[1:]))
    rows[mine] = local[(batch * share + row % share)[mine]]
    dist.all_reduce(rows)
    return rows
