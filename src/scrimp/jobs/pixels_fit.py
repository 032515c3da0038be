"""Training a pixel transformer: the loop of `scrimp.jobs.fit` with bits per dimension in the place of classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from scrimp.data import ImageData
from scrimp.data.images import Images
from scrimp.jobs.budget import StepCost
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.fit import Fitting
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.optim import schedule
from scrimp.jobs.pixels_config import PixelsTrainConfig
from scrimp.jobs.pixels_model import PixelTransformer, as_sequence
from scrimp.jobs.pixels_output import bits
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.primitives.draw import generator_for
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURED_AT_ONCE = 2**15
"""Pixels a forward pass where nothing is kept for a backward one."""


class PixelFitting(Fitting):
    """A run in the making, see `Fitting`; its curve holds bits per dimension.

    Args:
        config: model, optimiser and loop settings.
        model: fresh, unwrapped.
        data: images; their classes are not used.
        accelerator: see `scrimp.jobs.engine.start`.
        cost: counted FLOPs of an image.
        budget: FLOPs of the whole run.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: PixelsTrainConfig,
        model: PixelTransformer,
        data: ImageData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
    ) -> None:
        super().__init__(
            cast(ModelConfig, config),  # it has all that the loop asks for
            model,
            data,
            accelerator=accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=cost,
            budget=budget,
            seed=config.seed,
            checkpoint=checkpoint,
        )
        self.settings, self.output = config, model.output

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.accelerator.device), labels.to(self.accelerator.device)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nats = self._nats(self.model, images)
        return nats, nats

    def _clip(self) -> None:
        self.accelerator.unscale_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _nats(self, model: nn.Module, images: Tensor) -> Tensor:
        """Mean over the pixels of ``-ln p``, [batch]."""
        with self.accelerator.autocast():
            outputs = model(images)
        return self.output.nats(outputs.float(), as_sequence(images)).mean(1)

    def _pause(self, begin: tuple[float, float], stop: Callable[[], bool]) -> tuple[float, float]:
        self._stop = stop
        return super()._pause(begin, stop)

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        last = self.done
        point = {
            "flops": self.spent.flops,
            "seconds": self.spent.seconds,
            "cpu_seconds": self.spent.cpu_seconds,
            "samples": float(self.spent.images),
            "train_loss": self.measure(self.data.train, self.settings.probe),
            "test_loss": self.measure(self.data.test, self.settings.test_images if last else self.settings.probe),
            "learning_rate": schedule(self.spent.flops / self.budget, self.config),
        }
        point |= {f"{part}_bits": bits(point[f"{part}_loss"]) for part in ("train", "test")}
        self.spent.curve.append(cast(dict[str, float | None], point))
        self.accelerator.log(point, step=self.spent.steps)

    def measure(self, images: Images, limit: int | None) -> float:
        """Mean nats a dimension of all images, or of ``limit`` of them, the same each time; on every rank.

        Raises:
            Interrupted: a stop was asked for meanwhile; the checkpoint is written.
        """
        chosen = torch.arange(len(images))
        if limit is not None and limit < len(images):
            chosen = torch.randperm(len(images), generator=generator_for(0))[:limit]
        world, device = self.accelerator.num_processes, self.accelerator.device
        rows = max(1, MEASURED_AT_ONCE // math.prod(images.shape))
        mine = chosen[self.accelerator.process_index :: world]
        model = self.trained()
        total = torch.zeros((), dtype=torch.float64, device=device)
        with torch.no_grad():
            for part in mine.split(rows):
                total += self._nats(model, images.batch(part).to(device)).sum()
                if world == 1 and self._stop():
                    self._abandon()
        return float(cast(Tensor, self.accelerator.reduce(total, reduction="sum"))) / len(chosen)

    def trained(self) -> PixelTransformer:
        """What is measured, sampled and saved, in eval mode; unwrapped, so that replicas need not wait."""
        return cast(PixelTransformer, self.ema.module if self.ema is not None else self.plain).eval()

    def _abandon(self) -> None:
        """Leave a measurement: it is made anew when the run goes on."""
        self.spent.evaluations -= 1
        self.save()
        raise Interrupted

    _stop: Callable[[], bool] = staticmethod(lambda: False)
