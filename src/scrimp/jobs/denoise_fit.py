"""Training a denoiser: the loop of `scrimp.jobs.fit` with noise levels, parts of images and an error of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scrimp.data import ImageData
from scrimp.data.augment import crop_flip
from scrimp.denoise import ImportanceLevels, LevelSampler, LogitNormalLevels, UniformLevels
from scrimp.jobs.budget import StepCost
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.denoise_config import DenoiseTrainConfig
from scrimp.jobs.denoise_models import Denoiser
from scrimp.jobs.denoise_train_error import clean_error
from scrimp.jobs.denoise_train_plan import Plan
from scrimp.jobs.denoise_train_step import Objective, Rows
from scrimp.jobs.fit import Fitting
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

_FLIP, _STEP = 21, 22  # keys of the independent random streams of one seed


class DenoiseFitting(Fitting):
    """A run in the making, see `Fitting`; its curve holds the error of the clean image.

    Args:
        config: model, optimiser and loop settings.
        denoiser: fresh, unwrapped, on its device.
        data: images and their classes.
        accelerator: see `scrimp.jobs.engine.start`.
        plan: steps of each kind, and their cost.
        labelled: whether the network is told the classes.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: DenoiseTrainConfig,
        denoiser: Denoiser,
        data: ImageData,
        *,
        accelerator: Accelerator,
        plan: Plan,
        labelled: bool,
        checkpoint: Path,
    ) -> None:
        super().__init__(
            cast(ModelConfig, replace(config, lr=config.resolved_lr())),  # it has all that the loop asks for
            denoiser.model,
            data,
            accelerator=accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=StepCost(plan.whole_flops, 0.0),
            budget=plan.flops(config.batch_size),
            seed=config.seed,
            checkpoint=checkpoint,
        )
        self.settings, self.plan, self.labelled = config, plan, labelled
        self.denoiser = replace(denoiser, model=self.plain)
        # After the average's copy was made, which needs no hooks.
        self.objective = Objective(self.denoiser, weighting=config.part("weighting"), keep=config.part("keep"))
        self.scores = ImportanceLevels(denoiser.process.levels)
        self.levels: LevelSampler = self._sampler_of(config.part("timesteps"))
        self.loss: float | None = None
        self.by_snr: dict[str, float] = {}
        self._partial = self._under_way = False
        self._norms = torch.empty(0)
        self._index = torch.empty(0, dtype=torch.int64)

    def trained(self) -> Denoiser:
        """What is measured, sampled and saved, in eval mode: the moving average where there is one."""
        model = self.ema.module if self.ema is not None else self.plain
        return replace(self.denoiser, model=model.eval())

    def ratio(self) -> float | None:
        """The most that importance timesteps can gain, see `ImportanceLevels.variance_ratio`; None: not known yet."""
        return self.scores.variance_ratio()

    def _sampler_of(self, name: str) -> LevelSampler:
        if name == "importance":
            return self.scores
        count = self.scores.levels
        return LogitNormalLevels(count) if name == "logit-normal" else UniformLevels(count, even=name == "even")

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.accelerator.device)
        if self.settings.augment == "flip":
            rows = self._rows()
            images = crop_flip(
                images,
                padding=0,
                flip=True,
                generator=generator_for(self.seed, _FLIP, number),
                rows=slice(rows.first, rows.first + rows.count),
                total=rows.total,
            )
        return as_network_sees(images), labels.to(self.accelerator.device)

    def _step(self, images: Any, labels: Any, weights: Tensor | None) -> None:
        self._partial, self._under_way = self.spent.steps < self.plan.partial_steps, True
        super()._step(images, labels, weights)
        self._under_way = False

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows, generator = self._rows(), generator_for(self.seed, _STEP, self.spent.steps)
        draw = self.levels.draw(rows.total, generator=generator)
        dropped = torch.rand(rows.total, generator=generator) < self.settings.label_dropout
        self._index = draw.index
        losses, self._norms = self.objective.losses(
            (images, self._told(labels, rows.of(dropped))),
            rows.of(draw.index),
            partial=self._partial,
            rows=rows,
            generator=generator,
            through=self.model,
            autocast=self.accelerator.autocast(),
        )
        return losses * rows.of(draw.weight).to(losses.device), losses.detach()

    def _weigh(self, losses: Tensor, outputs: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """The mean; every process takes note of the whole batch's scores."""
        both = torch.stack([self._norms, outputs], 1)
        norms, plain = cast(Tensor, self.accelerator.gather(both)).cpu().unbind(1)
        self.loss = float(plain.mean())
        if not bool(torch.isfinite(norms).all()):
            kept = "the last checkpoint is kept" if self.checkpoint.is_file() else "there is no checkpoint yet"
            raise InputError(
                "finite losses",
                f"NaN or infinite ones in step {self.spent.steps + 1}; {kept}",
                "start a new run with a lower --lr, or --precision fp32 or bf16",
            )
        self.scores.update_(self._index, norms)
        return super()._weigh(losses, outputs, labels, weights)

    def _told(self, labels: Tensor, dropped: Tensor) -> Tensor | None:
        null = self.denoiser.null_label
        if not self.labelled:
            return None
        return labels if null is None else labels.masked_fill(dropped.to(labels.device), null)

    def _clip(self) -> None:
        self.accelerator.unscale_gradients(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def _rows(self) -> Rows:
        count = self.settings.batch_size // self.accelerator.num_processes
        return Rows(self.accelerator.process_index * count, count, self.settings.batch_size)

    def _step_flops(self, pool: int = 1) -> float:
        """Of the step that runs, or of the next one; `Fitting._step` asks after it has counted the step."""
        plan = self.plan
        partial = self._partial if self._under_way else self.spent.steps < plan.partial_steps
        return self.settings.batch_size * (plan.partial_flops if partial else plan.whole_flops)

    @property
    def done(self) -> bool:
        """Whether all planned steps are made."""
        return self.spent.steps >= self.plan.steps

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        test, train = (
            clean_error(self.trained(), part, self.accelerator, limit=self.settings.probe, labelled=self.labelled)
            for part in (self.data.test, self.data.train)
        )
        self.by_snr = test.by_snr
        self._keep_point({"train_loss": train.loss, "test_loss": test.loss, "variance_ratio": self.ratio()})

    def _more_state(self) -> dict[str, Any]:
        return {"levels": self.scores.state_dict()}

    def _take_up(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state["levels"])

    def _make_ema(self) -> AveragedModel | None:
        settings = cast(DenoiseTrainConfig, self.config)
        if settings.ema is None or settings.adapter != "none":
            return None
        most = settings.ema

        @torch.no_grad()
        def average(averages: Any, fresh: Any, count: Any) -> None:
            # Few steps in, the average of all of them: else the untrained weights would linger.
            done = int(count)
            torch._foreach_lerp_(list(averages), list(fresh), 1 - min(most, (1 + done) / (10 + done)))

        return AveragedModel(self.plain, multi_avg_fn=average, use_buffers=False)


def as_network_sees(images: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
