"""A batch sampler that plans its draws round by round, from scores of the batches just trained, on any number of ranks.

sampler = RoundSampler(len(train), 64, policy=history(), seed=0)
for images, labels in DataLoader(train, batch_sampler=sampler):
    logits = model(images)
    losses = cross_entropy(logits, labels, reduction="none")
    loss = sampler.weigh(losses, gradient_norm_bound(logits, labels))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.select.policies import uniform
from scrimp.select.record import Policy, Record
from scrimp.select.selection import Selection


class RoundSampler:
    """Plans a round of draws, deals it out in batches, and remembers the scores that come back.

    A round is about one pass: ``count`` draws, rounded down to whole batches (`prune` plans fewer). Every rank plans
    the same round, from the same seed and the same (gathered) scores, and takes its own rows of each batch: the draws
    are the same whatever the number of processes. Hand it to a plain ``DataLoader``, not to ``accelerator.prepare``,
    which would deal it out a second time.

    Args:
        count: samples in the data set.
        batch_size: samples a step, over all ranks together; a multiple of ``world_size``.
        policy: plans a round, such as `uniform`, ``history()``, ``prune()``.
        seed: fixes every draw.
        rank, world_size: this process among its peers; taken from ``torch.distributed`` where that is initialised.

    Raises:
        InputError: a batch larger than the data, or one that the ranks cannot share evenly.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        policy: Policy = uniform,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        initialised = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else (dist.get_rank() if initialised else 0)
        self.world_size = world_size if world_size is not None else (dist.get_world_size() if initialised else 1)
        _check(count, batch_size, self.rank, self.world_size)
        self.count, self.batch_size, self.policy, self.seed = count, batch_size, policy, seed
        self.progress = 0.0
        """Share of the budget that is spent; set it where a policy asks for it (`prune`'s final phase)."""
        self._scores = torch.full((count,), float("nan"))
        self._seen_at = torch.zeros(count, dtype=torch.int64)  # draws done when each score was taken
        self._draws = 0
        self._round = 0
        self._position = 0  # batches of this round already trained
        self._plan: Selection | None = None
        self._plain = False  # whether all weights of the plan are 1
        self._pending: list[tuple[int, Tensor]] = []  # (batch of this round, scores of the global batch)
        self._dealt: tuple[int, int] | None = None  # (round, position) from which a round was dealt to its end

    def __len__(self) -> int:
        """Batches of the round, those already trained included."""
        return self._batches(self._planned())

    def __iter__(self) -> Iterator[list[int]]:
        """Each batch's indices, this rank's rows only, from the first batch that was not trained yet."""
        self._skip_unweighed()
        plan, start = self._planned(), (self._round, self._position)
        for batch in range(self._position, self._batches(plan)):
            yield plan.indices[self._rows(batch)].tolist()
        self._dealt = start

    def weights(self) -> Tensor:
        """Weights of the batch being trained, [batch_size / world_size], float32, on the CPU."""
        return self._planned().weights[self._rows(self._position)]

    def weigh(self, losses: Tensor, scores: Tensor | None = None) -> Tensor:
        """The batch's unbiased mean loss; takes note of its scores and moves on to the next batch.

        Call it once for each batch, in order. The first batches may be fetched ahead by loader workers: what counts is
        what was trained.

        Args:
            losses: [batch_size / world_size], with gradient.
            scores: [batch_size / world_size], such as `gradient_norm_bound`; the losses themselves where omitted.

        Returns:
            Scalar, ``mean(weights * losses)``; exactly ``losses.mean()`` where all weights are 1.

        Raises:
            InputError: not one loss and one score for each sample of the batch, or a call under ``no_grad``
                (a validation loop must not move the sampler on).
        """
        if not torch.is_grad_enabled():
            raise InputError("losses of a training step", "a call under no_grad", "weigh training batches only")
        scores = losses if scores is None else scores
        rows = self.batch_size // self.world_size
        if losses.shape != (rows,) or scores.shape != (rows,):
            raise InputError(
                f"one loss and one score for each of the batch's {rows} samples",
                f"shapes {list(losses.shape)} and {list(scores.shape)}",
                "compute the loss with reduction='none'",
            )
        weights = self.weights()
        plain = self._plain
        self._pending.append((self._position, self._gather(scores.detach().float())))
        self.advance(1)
        return losses.mean() if plain else (losses * weights.to(losses.device, losses.dtype)).mean()

    def advance(self, batches: int) -> None:
        """Move on without scores, as a loop that trains on something else than the batch as dealt must say."""
        self._position += batches
        if self._position >= self._batches(self._planned()):
            self._finish_round()

    @property
    def trained(self) -> int:
        """Batches trained since the start, over all rounds."""
        return self._draws // self.batch_size + self._position

    def record(self) -> Record:
        """Scores and ages as known now; on several ranks, call it on all of them or on none."""
        self._flush()
        ages = (self._draws + self._position * self.batch_size - self._seen_at) // self.count
        return Record(self._scores.clone(), ages, self.progress)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the same draws: tensors and numbers only."""
        self._flush()
        plan = self._planned()
        return {
            "count": self.count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "progress": self.progress,
            "scores": self._scores.clone(),
            "seen_at": self._seen_at.clone(),
            "draws": self._draws,
            "round": self._round,
            "position": self._position,
            "indices": plan.indices.clone(),
            "weights": plan.weights.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was called; on any number of ranks.

        Raises:
            InputError: the state is of another data set, batch size or seed.
        """
        for key in ("count", "batch_size", "seed"):
            if state[key] != getattr(self, key):
                raise InputError(
                    f"a sampler state with {key} {getattr(self, key)}", f"{state[key]}", "resume with the same settings"
                )
        self._scores, self._seen_at = state["scores"].clone(), state["seen_at"].clone()
        self._draws, self._round, self._position = state["draws"], state["round"], state["position"]
        self.progress = state["progress"]
        self._set_plan(Selection(state["indices"].clone(), state["weights"].clone()))
        self._pending = []
        self._dealt = None

    def _skip_unweighed(self) -> None:
        """End a round that was dealt whole to a loop that never weighs; loader workers fetch ahead, so only now."""
        if self._dealt == (self._round, self._position):
            self.advance(self._batches(self._planned()) - self._position)
        self._dealt = None

    def _planned(self) -> Selection:
        if self._plan is None:
            budget = self.count // self.batch_size * self.batch_size
            record = self.record()
            plan = self.policy(record, budget, generator=generator_for(self.seed, self._round))
            if len(plan) < self.batch_size:  # pruning a tiny set can leave less than one batch
                plan = uniform(record, budget, generator=generator_for(self.seed, self._round))
            return self._set_plan(plan)
        return self._plan

    def _set_plan(self, plan: Selection) -> Selection:
        self._plan, self._plain = plan, bool((plan.weights == 1).all())
        return plan

    def _batches(self, plan: Selection) -> int:
        return len(plan) // self.batch_size

    def _rows(self, batch: int) -> slice:
        share = self.batch_size // self.world_size
        start = batch * self.batch_size + self.rank * share
        return slice(start, start + share)

    def _gather(self, scores: Tensor) -> Tensor:
        """The global batch's scores, in the order of its rows, on the device they came from."""
        if self.world_size == 1:
            return scores
        parts = [torch.empty_like(scores) for _ in range(self.world_size)]
        dist.all_gather(parts, scores.contiguous())
        return torch.cat(parts)

    def _flush(self) -> None:
        """Bring pending scores to the CPU: once a round, since each such copy makes a GPU wait."""
        if not self._pending:
            return
        plan = self._planned()
        for (batch, _), scores in zip(
            self._pending, torch.stack([item for _, item in self._pending]).cpu(), strict=True
        ):
            start = batch * self.batch_size
            drawn = plan.indices[start : start + self.batch_size]
            self._scores[drawn] = scores
            self._seen_at[drawn] = self._draws + start
        self._pending = []

    def _finish_round(self) -> None:
        self._flush()
        self._draws += self._position * self.batch_size
        self._round, self._position, self._plan = self._round + 1, 0, None


def _check(count: int, batch_size: int, rank: int, world_size: int) -> None:
    if not 1 <= batch_size <= count:
        raise InputError(f"a batch size from 1 to the {count} samples", f"{batch_size}", "choose a smaller batch")
    if batch_size % world_size:
        raise InputError(
            f"a batch size that {world_size} processes share evenly", f"{batch_size}", "choose a multiple of them"
        )
    if not 0 <= rank < world_size:
        raise InputError(f"a rank from 0 to {world_size - 1}", f"{rank}", "start the job with torchrun")
