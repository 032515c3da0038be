"""Training a few numbers of a model: the loop of `scrimp.jobs.fit`, over images or text, with small checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.data import ImageData
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_text import TextData, TokenSet
from scrimp.jobs.budget import StepCost
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.evaluate import evaluate
from scrimp.jobs.fit import Fitting, Spent
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.primitives.draw import generator_for
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator


class AdaptFitting(Fitting):
    """A run in the making, see `Fitting`. Checkpoints hold what is trained, nothing that is frozen.

    Batch statistics stay as the frozen layers learnt them unless everything is trained.

    Args:
        config: its learning rate resolved.
        model: fresh, unwrapped, with its adapter.
        data: images, or text.
        accelerator: see `scrimp.jobs.engine.start`.
        cost: counted FLOPs of an example.
        budget: FLOPs of the whole run.
        checkpoint: file to write checkpoints to.
    """

    def __init__(
        self,
        config: AdaptConfig,
        model: nn.Module,
        data: ImageData | TextData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
    ) -> None:
        whole = config.method == "full"
        self._settled = [] if whole else [item for item in model.modules() if _has_statistics(item)]
        self._kept = {name for name, item in model.named_parameters() if item.requires_grad}
        self._kept |= {name for name, _ in model.named_buffers()} if whole else set()
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
        self.settings = config

    def run(self, report: Callable[[Spent], None]) -> None:
        """As `Fitting.run`; where the untouched model means something, it is measured first."""
        if not self.spent.curve and self._starts_as_something():
            self._evaluate()
            self.spent.evaluations -= 1
        super().run(report)

    def measure(self, model: nn.Module, *, train: bool) -> dict[str, float | None]:
        """Quality of a model on the test data, or on some of the training data; on every rank."""
        part, limit = (self.data.train, self.config.probe) if train else (self.data.test, None)
        rows = max(1, min(500, 4 * self.config.batch_size))
        found = evaluate(model, part, self.data, accelerator=self.accelerator, limit=limit, batch_size=rows)
        return {"accuracy": found.accuracy, "loss": found.loss}

    def _starts_as_something(self) -> bool:
        return False

    def _gathered(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is trained, and the optimiser's state, whole and on the CPU whatever the sharding."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.model, self.raw_optimizer, options=options)
        return {name: value for name, value in model.items() if name in self._kept}, optimizer

    def _restore(self, states: tuple[dict[str, Any], dict[str, Any]]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        model, optimizer = states
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_state_dict(
            self.model, self.raw_optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options
        )

    def _backward(self, images: Any, labels: Any, weights: Tensor | None) -> None:
        for module in self._settled:
            module.eval()
        super()._backward(images, labels, weights)

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        test, probe = (self.measure(self.best_model(), train=train) for train in (False, True))
        self._keep_point({"train_loss": probe["loss"], **{f"test_{name}": value for name, value in test.items()}})


class TextFitting(AdaptFitting):
    """The same over text: perplexity where it is to be continued, accuracy where rows are classified."""

    def measure(self, model: nn.Module, *, train: bool) -> dict[str, float | None]:
        data: TextData = self.data  # type: ignore[assignment]
        part, limit = (data.train, self.config.probe) if train else (data.test, None)
        loss, right = self._sums(model, part, limit)
        if data.classes:
            return {"accuracy": right, "loss": loss}
        return {"perplexity": math.exp(loss) if loss < 700 else None, "loss": loss}

    def _starts_as_something(self) -> bool:
        return not self.data.classes

    def _prepare(self, images: Tensor, labels: Tensor, number: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        return images.to(self.accelerator.device), labels.to(self.accelerator.device)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._losses_of(self.model, images, labels)

    def _losses_of(self, model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            logits = model(tokens)
        return token_losses(logits, tokens, labels), logits

    def _sums(self, model: nn.Module, part: TokenSet, limit: int | None) -> tuple[float, float]:
        """Mean loss and share of right answers over all rows, or the same ``limit`` of them each time."""
        chosen = torch.arange(len(part))
        if limit is not None and limit < len(part):
            chosen = torch.randperm(len(part), generator=generator_for(0))[:limit]
        accelerator, rows = self.accelerator, self.config.batch_size
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        # Every process runs as many batches as every other: a sharded model's forward is a meeting of all.
        batches = math.ceil(math.ceil(len(chosen) / accelerator.num_processes) / rows)
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        model.eval()
        with torch.no_grad():
            for number in range(batches):
                indices = mine[number * rows : (number + 1) * rows]
                taken = indices if len(indices) else chosen[:1]
                tokens, labels = part.tokens[taken].to(sums.device), part.labels[taken].to(sums.device)
                losses, logits = self._losses_of(model, tokens, labels)
                if len(indices):
                    sums[0] += losses.sum()
                    sums[1] += (logits.argmax(-1) == labels).sum() if logits.ndim == 2 else 0
        loss, right = (cast(Tensor, accelerator.reduce(sums, reduction="sum")) / len(chosen)).tolist()
        return loss, right


def token_losses(logits: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """Nats of each row, [batch]: of its label, or for logits [batch, length, words] the mean over next tokens."""
    if logits.ndim == 2:
        return functional.cross_entropy(logits.float(), labels, reduction="none")
    each = functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return each.mean(1)


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None
