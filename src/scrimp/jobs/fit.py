"""The training loop: one model, one policy, one budget in FLOPs; killed at any step, it can go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from scrimp.data import ImageData, crop_flip
from scrimp.jobs.budget import StepCost
from scrimp.jobs.checkpoint import (
    gather_random_states,
    gather_training_state,
    load_checkpoint,
    restore_random_state_,
    restore_training_state_,
    save_checkpoint,
)
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.engine import spread
from scrimp.jobs.evaluate import evaluate, ready
from scrimp.jobs.interrupt import Interrupted, stop_requests
from scrimp.jobs.optim import make_optimizer, schedule
from scrimp.jobs.sampling import Sampling
from scrimp.meter.device import synchronise
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.select import Gate, Presampler, RoundSampler, speedup_threshold

if TYPE_CHECKING:
    from accelerate import Accelerator

_AUGMENT = 1  # keys of the independent random streams of one seed
_PRESAMPLE = 2
_AGREE_EVERY = 20  # steps between asking all processes whether to stop or to save


@dataclass
class Spent:
    """How far a run is."""

    steps: int = 0
    images: int = 0  # images gone through forward and backward
    flops: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    evaluations: int = 0
    resumes: int = 0
    reached: bool = False  # the target accuracy
    curve: list[dict[str, float | None]] = field(default_factory=list)


class Fitting:
    """A run in the making. `run` trains to the end of the budget; figures are in ``spent``.

    Args:
        config: model, optimiser and loop settings.
        model: fresh, unwrapped.
        data: images and classes.
        accelerator: see `scrimp.jobs.engine.start`.
        sampling: see `scrimp.jobs.sampling.SAMPLINGS`.
        cost: counted FLOPs of an image.
        budget: FLOPs of the whole run, scoring included.
        seed: of draws and augmentation.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: nn.Module,
        data: ImageData,
        *,
        accelerator: Accelerator,
        sampling: Sampling,
        cost: StepCost,
        budget: float,
        seed: int,
        checkpoint: Path,
        target_accuracy: float | None = None,
    ) -> None:
        self.config, self.data, self.accelerator, self.sampling = config, data, accelerator, sampling
        self.cost, self.budget, self.seed, self.checkpoint = cost, budget, seed, checkpoint
        self.target_accuracy = target_accuracy
        self.spent = Spent()
        # FSDP2 takes contiguous parameters only; the images are channels last either way.
        self.plain = model if config.parallel == "fsdp" else model.to(memory_format=torch.channels_last)
        runner = cast(nn.Module, torch.compile(model)) if config.compile else model
        self.model = spread(accelerator, runner, config.parallel)
        self.raw_optimizer = make_optimizer(self.model, config)
        self._set_apart()
        self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        self.ema = self._make_ema()
        self.sampler = RoundSampler(
            len(data.train),
            config.batch_size,
            policy=sampling.policy,
            seed=seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.presampler = self._make_presampler() if sampling.presample else None

    @property
    def done(self) -> bool:
        """Whether another step would go over the budget, or the target is reached."""
        pool = self.config.pool if self.presampler is not None and self.presampler.gate.open else 1
        return self.spent.reached or self.spent.flops + self._step_flops(pool) > self.budget

    def run(self, report: Callable[[Spent], None]) -> None:
        """Train until `done`; ``report`` is called after each step.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
        """
        with stop_requests() as stop:
            self._saved_at = time.perf_counter()
            while not self.done:
                begin = read_clocks()
                for images, labels, weights in self._stream():
                    self._step(images, labels, weights)
                    begin = self._pause(begin, stop)
                    report(self.spent)
                    if self.done:
                        break
                self._clock(begin)
            if not self.spent.curve or self.spent.curve[-1]["flops"] != self.spent.flops:
                self._evaluate()

    def best_model(self) -> nn.Module:
        """What is validated and saved: the moving average where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def resume(self) -> None:
        """Take up the checkpoint.

        Raises:
            InputError: it is damaged or of another run.
        """
        state = load_checkpoint(self.checkpoint)
        self._restore((state["model"], state["optimizer"]))
        self.sampler.load_state_dict(state["sampler"])
        self.spent = Spent(**state["spent"])
        self.spent.resumes += 1
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.presampler is not None:
            self.presampler.load_state_dict(state["presampler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        restore_random_state_(state["random"], self.accelerator)
        self._take_up(state["more"])

    def save(self) -> None:
        """Write the checkpoint; on every rank, since shards are gathered."""
        model, optimizer = self._gathered()
        state = {
            "model": model,
            "optimizer": optimizer,
            "sampler": self.sampler.state_dict(),
            "spent": asdict(self.spent),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "presampler": self.presampler.state_dict() if self.presampler is not None else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "random": gather_random_states(self.accelerator),
            "more": self._more_state(),
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, state)
            self._saved()
        self._saved_at = time.perf_counter()

    def _stream(self) -> Iterator[tuple[Any, Any, Tensor | None]]:
        """This round's batches, on the device: (images, labels, weights where they were presampled)."""
        loader: DataLoader[Any] = DataLoader(
            self.data.train,  # type: ignore[arg-type]  # a map-style set by protocol
            batch_sampler=self.sampler,
            collate_fn=_whole,
            num_workers=self.config.workers,
            generator=torch.Generator(),  # else each new loader draws from the global one, and resuming makes a new one
        )
        start = self.sampler.trained
        batches = (
            self._prepare(images, labels, start + turn, indices)
            for turn, (images, labels, indices) in enumerate(loader)
        )
        if self.presampler is not None:
            yield from self.presampler(batches)
        else:
            yield from ((images, labels, None) for images, labels in batches)

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Any, Any]:
        """On the device, augmented by the stream of this batch's number, as `_losses` takes them."""
        device = self.accelerator.device
        images, labels = images.to(device), labels.to(device)
        if self.config.augment != "none":
            rank, rows = self.accelerator.process_index, len(images)
            images = crop_flip(
                images,
                padding=images.shape[-1] // 8 if self.config.augment == "crop" else 0,
                flip=True,
                generator=generator_for(self.seed, _AUGMENT, number),
                rows=slice(rank * rows, (rank + 1) * rows),
                total=self.config.batch_size,
            )
        return ready(images, self.data, device), labels

    def _step(self, images: Any, labels: Any, weights: Tensor | None) -> None:
        self.model.train()
        rate = schedule(self.spent.flops / self.budget, self.config)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)
        self._backward(images, labels, weights)
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        self.spent.steps += 1
        self.spent.images += self.config.batch_size
        self.spent.flops += self._step_flops(self._pool())
        self.sampler.progress = self.spent.flops / self.budget

    def _backward(self, images: Any, labels: Any, weights: Tensor | None) -> None:
        """Leave the step's gradients in the parameters."""
        losses, outputs = self._losses(images, labels)
        self.accelerator.backward(self._weigh(losses, outputs, labels, weights))

    def _losses(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Loss of each image, [batch], and the outputs it is of."""
        with self.accelerator.autocast():
            logits = self.model(images)
        return functional.cross_entropy(logits.float(), labels, reduction="none"), logits

    def _clip(self) -> None:
        """Bound the gradients, where the job does."""

    def _keep_point(self, measured: dict[str, float | None]) -> None:
        """Add what was measured to the curve, with what was spent until here, and to the trackers' logs."""
        point = {
            "flops": self.spent.flops,
            "seconds": self.spent.seconds,
            "cpu_seconds": self.spent.cpu_seconds,
            "samples": float(self.spent.images),
            "learning_rate": schedule(self.spent.flops / self.budget, self.config),
            **measured,
        }
        self.spent.curve.append(point)
        self.accelerator.log({key: value for key, value in point.items() if value is not None}, step=self.spent.steps)

    def _gathered(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Model and optimiser as a checkpoint holds them, whole whatever the sharding; on every rank."""
        return gather_training_state(self.model, self.raw_optimizer)

    def _restore(self, states: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Take up what `_gathered` gave."""
        restore_training_state_(self.model, self.raw_optimizer, states)

    def _more_state(self) -> dict[str, Any]:
        """What else a checkpoint of the job holds; called on every rank."""
        return {}

    def _take_up(self, state: dict[str, Any]) -> None:
        """Take up what `_more_state` gave."""

    def _saved(self) -> None:
        """The checkpoint is written; called on the first process."""

    def _weigh(self, losses: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        scores = self.sampling.scores(losses, logits, labels)
        if self.presampler is None:
            return self.sampler.weigh(losses, scores)
        self.sampler.advance(self.presampler.consumed)
        self.presampler.observe(scores)
        return losses.mean() if weights is None or self.presampler.consumed == 1 else (losses * weights).mean()

    def _pool(self) -> int:
        return self.presampler.consumed if self.presampler is not None else 1

    def _step_flops(self, pool: int = 1) -> float:
        scored = self.cost.score * pool if pool > 1 else 0.0
        return self.config.batch_size * (self.cost.train + scored)

    def _pause(self, begin: tuple[float, float], stop: Callable[[], bool]) -> tuple[float, float]:
        """Between steps: stop the clock where something other than training is due, and do it."""
        due = self._evaluation_due()
        save, halt = self._agreed(stop)
        if not (due or save or halt):
            return begin
        self._clock(begin)
        if due:
            self._evaluate()
        if save or halt:
            self.save()
        if halt:
            raise Interrupted
        return read_clocks()

    def _clock(self, begin: tuple[float, float]) -> None:
        synchronise()  # a GPU may still be at work on the last steps
        now = read_clocks()
        self.spent.seconds += now[0] - begin[0]
        self.spent.cpu_seconds += now[1] - begin[1]

    def _agreed(self, stop: Callable[[], bool]) -> tuple[bool, bool]:
        """Whether to save and whether to halt; on several processes all must do so at one step."""
        alone = self.accelerator.num_processes == 1
        if not alone and self.spent.steps % _AGREE_EVERY:
            return False, False
        wish = (time.perf_counter() - self._saved_at > self.config.checkpoint_seconds, stop())
        if alone:
            return wish
        flags = torch.tensor([float(item) for item in wish], device=self.accelerator.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def _evaluation_due(self) -> bool:
        share = (self.spent.evaluations + 1) / self.config.evaluations
        return self.done or self.spent.flops >= share * self.budget

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        model = self.best_model()
        test = evaluate(model, self.data.test, self.data, accelerator=self.accelerator)
        probe = evaluate(model, self.data.train, self.data, accelerator=self.accelerator, limit=self.config.probe)
        tau = self.presampler.gate.tau if self.presampler is not None else self.sampler.record().tau()
        measured = {"train_loss": probe.loss, "test_accuracy": test.accuracy, "test_loss": test.loss, "tau": tau}
        self._keep_point(measured)
        self.spent.reached = self.target_accuracy is not None and test.accuracy >= self.target_accuracy

    def _make_presampler(self) -> Presampler:
        backward = self.cost.train - self.cost.score
        threshold = speedup_threshold(self.config.pool, 1, forward=self.cost.score, backward=backward)
        seed = self.seed * 31 + _PRESAMPLE
        return Presampler(self._score, pool=self.config.pool, gate=Gate(threshold), seed=seed)

    def _score(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.eval()
        with self.accelerator.autocast():
            logits = self.model(images)
        return self.sampling.scores(functional.cross_entropy(logits.float(), labels, reduction="none"), logits, labels)

    def _set_apart(self) -> None:
        """For subclasses: parameter groups of their own, whose ``times`` is the factor of the learning rate."""

    def _make_ema(self) -> AveragedModel | None:
        if self.config.ema is None:
            return None
        if self.config.parallel == "fsdp":
            raise InputError("--parallel ddp with --ema", "fsdp", "drop one of the two")
        return AveragedModel(self.plain, multi_avg_fn=get_ema_multi_avg_fn(self.config.ema), use_buffers=True)


def _whole(batch: Any) -> Any:
    """The data set hands over whole batches: nothing to collate. A named function, since loader workers pickle it."""
    return batch


def read_clocks() -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and of its finished loader workers."""
    times = os.times()
    return time.perf_counter(), time.process_time() + times.children_user + times.children_system
