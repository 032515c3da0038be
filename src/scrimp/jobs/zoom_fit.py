"""Training on large images: the loop of `scrimp.jobs.fit`, whose batches are views with patches to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scrimp.data import ImageData
from scrimp.jobs.budget import StepCost
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.fit import Fitting
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.jobs.zoom_config import ZoomTrainConfig
from scrimp.jobs.zoom_data import ZoomData, ZoomImages
from scrimp.jobs.zoom_model import Draws, Scenes
from scrimp.jobs.zoom_plan import Plan
from scrimp.primitives.draw import generator_for
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

_PATCHES, _FLIPS = 8, 9  # keys of the independent random streams of one seed

Batch = tuple[Scenes, Draws]


def attention_terms(entropy: Tensor, config: ZoomTrainConfig) -> Tensor:
    """What is added to the losses [batch] for the attention's entropy [batch], in nats."""
    terms = -config.entropy * entropy
    if config.method == "zoom":
        # Attention on fewer places than patches are drawn wastes the rest of them.
        terms = terms + config.spread * (math.log(config.patches) - entropy).clamp_min(0)
    return terms


class ZoomFitting(Fitting):
    """A run in the making, see `Fitting`.

    Which patches are drawn depends on the seed, the step and the row in the whole batch: on one process as on many.

    Args:
        config: optimiser and loop settings.
        plan: of the model.
        model: fresh, unwrapped.
        data: large images.
        accelerator: see `scrimp.jobs.engine.start`.
        cost: counted FLOPs of an image.
        budget: FLOPs of the whole run.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: ZoomTrainConfig,
        plan: Plan,
        model: nn.Module,
        data: ZoomData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
    ) -> None:
        super().__init__(
            cast(ModelConfig, config),  # it has all that the loop asks for
            model,
            cast(ImageData, data),
            accelerator=accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=cost,
            budget=budget,
            seed=config.seed,
            checkpoint=checkpoint,
        )
        self.settings, self.plan, self.images = config, plan, data
        self.bytes_read: int | None = 0
        """Bytes of pixels read in training steps, on this process; ``None`` if a reader does not know."""

    def scenes_of(self, part: ZoomImages, rows: Tensor, views: Tensor, *, flips: Tensor | None = None) -> Scenes:
        """Images of one part as the model takes them, on the device."""
        views = views.to(self.accelerator.device)
        return self.plan.scenes(part.readers, rows.tolist(), views, flips=flips)

    def outputs(self, part: ZoomImages, rows: Tensor) -> Tensor:
        """What the trained model says of images, by the patches of most attention: [n, outputs], on every rank.

        Raises:
            Interrupted: a stop was asked for meanwhile; the checkpoint is written.
        """
        world, device = self.accelerator.num_processes, self.accelerator.device
        found = torch.zeros(len(rows), self.images.target.outputs, dtype=torch.float64, device=device)
        model = self.trained()
        mine = torch.arange(len(rows))[self.accelerator.process_index :: world]
        with torch.no_grad():
            for places in mine.split(max(1, self.config.batch_size // world)):
                chosen = rows[places]
                with self.accelerator.autocast():
                    said, _ = model(self.scenes_of(part, chosen, part.batch(chosen)))
                found[places.to(device)] = said.double()
                if world == 1 and self._stop():
                    self._abandon()
        return cast(Tensor, self.accelerator.reduce(found, reduction="sum")) if world > 1 else found

    def trained(self) -> nn.Module:
        """What is measured and saved, in eval mode; unwrapped, so that replicas need not wait."""
        return (self.ema.module if self.ema is not None else self.plain).eval()

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Batch, Tensor]:
        first = self.accelerator.process_index * len(indices)

        def draws(map_number: int) -> list[torch.Generator]:
            rows = range(first, first + len(indices))
            return [generator_for(self.seed, _PATCHES, number, row, map_number) for row in rows]

        flips = None
        if self.settings.augment == "flip":
            every = torch.rand(self.config.batch_size, generator=generator_for(self.seed, _FLIPS, number)) < 0.5
            flips = every[first : first + len(indices)]
        scenes = self.scenes_of(self.images.train, indices, images, flips=flips)
        return (scenes, draws), labels.to(self.accelerator.device)

    def _backward(self, images: Any, labels: Any, weights: Tensor | None) -> None:
        readers = self.images.train.readers
        before = readers.bytes_read
        super()._backward(images, labels, weights)
        after = readers.bytes_read
        known = before is not None and after is not None and self.bytes_read is not None
        self.bytes_read = self.bytes_read + after - before if known else None  # type: ignore[operator]

    def _losses(self, images: Batch, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            outputs, spread = self.model(*images)
        return self.images.target.losses(outputs, labels) + attention_terms(spread, self.settings), outputs

    def _clip(self) -> None:
        self.accelerator.unscale_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _more_state(self) -> dict[str, Any]:
        return {"bytes_read": self.total_bytes()}

    def _take_up(self, state: dict[str, Any]) -> None:
        # All processes' bytes so far are counted on the first one from here on.
        before = state["bytes_read"]
        self.bytes_read = before if before is None or self.accelerator.is_main_process else 0

    def total_bytes(self) -> int | None:
        """`bytes_read` over all processes; call it on every rank."""
        counts = torch.tensor([math.nan if self.bytes_read is None else float(self.bytes_read)], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            counts = cast(Tensor, self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum"))
        total = float(counts)
        return None if math.isnan(total) else int(total)

    def _pause(self, begin: tuple[float, float], stop: Callable[[], bool]) -> tuple[float, float]:
        self._stop = stop
        return super()._pause(begin, stop)

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        data, target = self.images, self.images.target
        test = self.outputs(data.test, torch.arange(len(data.test))).cpu()
        few = torch.randperm(len(data.train), generator=generator_for(0))[: self.config.probe]
        probe = target.quality(self.outputs(data.train, few).cpu(), data.train.labels[few])
        tested = target.quality(test, data.test.labels)
        self._keep_point({"train_loss": probe["loss"], **{f"test_{name}": value for name, value in tested.items()}})

    def _abandon(self) -> None:
        """Leave a measurement: it is made anew when the run goes on."""
        self.spent.evaluations -= 1
        self.save()
        raise Interrupted

    _stop: Callable[[], bool] = staticmethod(lambda: False)
