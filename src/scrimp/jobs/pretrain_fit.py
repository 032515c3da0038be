"""Pretraining: the loop of `scrimp.jobs.fit` with two views of each image in the place of its label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from scrimp.data import STRONG, WEAK, ImageData, View, standardise, strong_for, view_of
from scrimp.jobs.budget import StepCost
from scrimp.jobs.checkpoint import gather_training_state
from scrimp.jobs.encoder_fit import EncoderFitting, reshard_
from scrimp.jobs.learner import Objective, Online, Views, make_target
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.snapshots import Snapshots
from scrimp.primitives.draw import generator_for
from scrimp.represent import follow_

if TYPE_CHECKING:
    from accelerate import Accelerator

CACHE = "embeddings.cache"
"""File of the last embeddings of an unfinished run, where they are kept on disk; one a process."""

_STREAMS = 16  # keys of the views' random streams; the first ones are the loop's


class PretrainFitting(EncoderFitting):
    """A run in the making, see `scrimp.jobs.fit.Fitting`; its curve holds the loss and the accuracy of neighbours.

    Args:
        config: method, networks and loop.
        online: the learning network, fresh and unwrapped.
        objective: the loss and its memories.
        data: images; their labels are used to measure, and where ``objective`` was given them.
        accelerator: see `scrimp.jobs.engine.start`.
        cost: counted FLOPs of an image.
        budget: FLOPs of the whole run.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: PretrainConfig,
        online: Online,
        objective: Objective,
        data: ImageData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
        views: MakeViews | None = None,
    ) -> None:
        target = make_target(online)
        super().__init__(config, online, data, accelerator=accelerator, cost=cost, budget=budget, checkpoint=checkpoint)
        self.settings, self.objective = config, objective
        self.target = self.alike(target)
        self.make_views = views or random_views(config, data)
        self.snapshots = Snapshots(checkpoint.parent) if objective.cache is not None else None

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Views, Tensor]:
        rank, rows = self.accelerator.process_index, len(images)
        place = slice(rank * rows, (rank + 1) * rows)
        return self.make_views(images.to(self.accelerator.device), number, place), indices

    def _backward(self, images: Views, labels: Tensor, weights: Tensor | None) -> None:
        reshard_(self.target, self.plain)
        online = cast(Online, self.plain)
        for part in ("backbone", "projector"):
            follow_(getattr(self.target, part), getattr(online, part), momentum=self.settings.momentum)
        count = self.settings.accumulate

        def loss(part: int, views: Views) -> Tensor:
            return self._losses(views, labels[part::count])[0].mean()

        self.accumulate([partial(loss, part, views) for part, views in enumerate(images.parts(count))])

    def _losses(self, images: Views, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = step_losses(
            self.model, self.target, self.objective, images, labels, autocast=self.accelerator.autocast
        )
        return losses, losses

    def _more_state(self) -> dict[str, Any]:
        more = super()._more_state()
        reshard_(self.target)
        target, _ = gather_training_state(self.target, torch.optim.SGD(self.target.parameters(), lr=0.0))
        more |= {"target": target, "objective": self.objective.state_dict()}
        if self.snapshots is not None and self.accelerator.is_main_process:
            assert self.objective.cache is not None
            self.snapshots.write(self.objective.cache.state_dict(), self.spent.steps)
        return more

    def _take_up(self, state: dict[str, Any]) -> None:
        super()._take_up(state)
        self.load_alike_(self.target, state["target"])
        self.objective.load_state_dict(state["objective"])
        if self.snapshots is not None:
            assert self.objective.cache is not None
            self.objective.cache.load_state_dict(self.snapshots.read(self.spent.steps))

    def clean(self) -> None:
        super().clean()
        if self.snapshots is not None:
            self.snapshots.keep_only(None)
        for path in self.checkpoint.parent.glob(f"{CACHE}.*"):
            path.unlink()

    def _saved(self) -> None:
        if self.snapshots is not None:
            self.snapshots.keep_only(self.spent.steps)


def step_losses(
    online: torch.nn.Module, target: torch.nn.Module, objective: Objective, views: Views, rows: Tensor, *, autocast: Any
) -> Tensor:
    """The loss of each image, [batch]: one step's whole work but for the backward pass."""
    with torch.no_grad(), autocast():
        targets = target(views.target)
    with autocast():
        predictions = online(views.online)
    return objective.losses([item.float() for item in predictions], [item.float() for item in targets], rows)


TwoViews = Callable[..., tuple[Tensor, Tensor]]
"""``views(images, generator, *, rows, total)``: what the learning and the target network see of uint8 images
[n, C, H, W], pixels in 0 to 1; see `scrimp.data.per_image`. With byol each network sees both."""

MakeViews = Callable[[Tensor, int, slice], Views]
"""``(images uint8 [n, C, H, W], number of the batch, which rows of it these are) -> Views``, standardised."""


def given_views(make: TwoViews, config: PretrainConfig, data: ImageData) -> MakeViews:
    """Somebody's own views in the place of ours."""

    def views(images: Tensor, number: int, place: slice) -> Views:
        generator = generator_for(config.seed, _STREAMS, number)
        pair = make(images, generator, rows=place, total=config.batch_size)
        first, second = (standardise(view, data.mean, data.std) for view in pair)
        return Views([first, second], [first, second]) if config.method == "byol" else Views([first], [second])

    return views


class _Random:
    def __init__(self, online: list[View], target: list[View], data: ImageData, *, seed: int, total: int) -> None:
        self.online, self.target, self.data, self.seed, self.total = online, target, data, seed, total

    def __call__(self, images: Tensor, number: int, place: slice) -> Views:
        made = [self._made(images, view, number, place, stream) for stream, view in enumerate(self.online)]
        if not self.target:
            return Views(made, made)
        first = len(self.online)
        theirs = [self._made(images, view, number, place, first + stream) for stream, view in enumerate(self.target)]
        return Views(made, theirs)

    def _made(self, images: Tensor, view: View, number: int, place: slice, stream: int) -> Tensor:
        generator = generator_for(self.seed, _STREAMS + stream, number)
        made = view_of(images, view, generator=generator, rows=place, total=self.total)
        return standardise(made, self.data.mean, self.data.std)


def random_views(config: PretrainConfig, data: ImageData) -> MakeViews:
    """The views of the papers: for byol two that both networks see, else a query's, small ones, and a target's."""
    size = data.train.shape[1]
    kinds = {"strong": strong_for(size), "weak": WEAK}
    query = kinds[config.query]
    if config.method == "byol":
        online, target = [query, query], []
    else:
        small = replace(
            STRONG if size > 64 else query, scale=(0.05, 0.2), size=max(8, round(size * config.local_share))
        )
        online, target = [query] + [small] * config.local_crops, [kinds[config.target]]
    return _Random(online, target, data, seed=config.seed, total=config.batch_size)
