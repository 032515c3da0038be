"""The loop of `scrimp.jobs.fit` for encoders: no classes, several parts a step, neighbours as the measure."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scrimp.data import ImageData
from scrimp.data.images import Images
from scrimp.jobs.budget import StepCost
from scrimp.jobs.config import ModelConfig
from scrimp.jobs.encoder_pictures import embedding_section, neighbour_picture
from scrimp.jobs.engine import spread
from scrimp.jobs.evaluate import EVALUATION_BATCH, ready
from scrimp.jobs.fit import Fitting
from scrimp.jobs.pretrain_config import EncoderConfig
from scrimp.jobs.sampling import Sampling, by_loss
from scrimp.jobs.sync_norm import synchronise_norms_
from scrimp.primitives.draw import generator_for
from scrimp.primitives.files import write_atomic
from scrimp.report import Section, picture
from scrimp.represent.knn import knn_accuracies
from scrimp.select import uniform

if TYPE_CHECKING:
    from accelerate import Accelerator

NEIGHBOURS = (1, 20)
_SHOWN = 8  # neighbours of an image in the picture
NEIGHBOURS_PICTURE = "neighbours.png"


class EncoderFitting(Fitting):
    """A run in the making whose model answers ``features=True`` with a list of its backbone's features.

    Args: as `scrimp.jobs.fit.Fitting`, without a sampling policy.
    """

    def __init__(
        self,
        config: EncoderConfig,
        model: nn.Module,
        data: ImageData,
        *,
        accelerator: Accelerator,
        cost: StepCost,
        budget: float,
        checkpoint: Path,
    ) -> None:
        super().__init__(
            cast(ModelConfig, config),  # it has all that the loop asks for
            self._everywhere(model, accelerator),
            data,
            accelerator=accelerator,
            sampling=Sampling(uniform, by_loss),
            cost=cost,
            budget=budget,
            seed=config.seed,
            checkpoint=checkpoint,
        )
        self.encoder_config = config
        self._loss = torch.zeros(2, dtype=torch.float64)  # sum since the last look, and how many steps

    def alike(self, model: nn.Module) -> nn.Module:
        """A network that is not trained, spread over the processes as the trained one is."""
        model = self._everywhere(model, self.accelerator).to(self.accelerator.device)
        if self.config.parallel == "fsdp":
            return spread(self.accelerator, model, "fsdp")
        return model.to(memory_format=torch.channels_last)

    def load_alike_(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Load a whole state dict into what `alike` gave."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))

    def accumulate(self, losses: list[Callable[[], Tensor]]) -> None:
        """Backward passes of the parts of a step; replicas exchange gradients at the last one only."""
        for number, loss in enumerate(losses, 1):
            waits = number < len(losses) and self.config.parallel == "ddp"
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                value = loss()
                self.accelerator.backward(value / len(losses))
            self._loss += torch.tensor([float(value.detach()) / len(losses), 1 / len(losses)], dtype=torch.float64)
        self.sampler.advance(1)

    def features(self, images: Images, rows: Tensor) -> Tensor:
        """The backbone's features of these images, float32 [n, dim] on the CPU; on every rank, each gets all."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(rows) // world)
        mine = rows[(torch.arange(share) * world + rank) % len(rows)]
        self.model.eval()
        found = []
        with torch.no_grad(), self.accelerator.autocast():
            for part in mine.split(EVALUATION_BATCH):
                shown = ready(images.batch(part), self.data, self.accelerator.device)
                found.append(self.model([shown], features=True)[0].float())
        every = cast(Tensor, self.accelerator.gather(torch.cat(found)))
        return every.view(world, share, -1).transpose(0, 1).flatten(0, 1)[: len(rows)].cpu()

    def probe_rows(self) -> Tensor:
        """The training images among which neighbours are sought, the same each time."""
        count = len(self.data.train)
        return torch.randperm(count, generator=generator_for(0))[: self.encoder_config.probe]

    def width(self) -> int:
        """Numbers in a feature vector; on every rank."""
        return self.features(self.data.test, torch.arange(min(2, len(self.data.test)))).shape[1]

    def sections(self, folder: Path) -> list[Section]:
        """Pictures of what was learned, for the report; the one of neighbours also as a file. On every rank."""
        rows, shown = self.probe_rows(), torch.arange(len(self.data.test))
        bank, test = self.features(self.data.train, rows), self.features(self.data.test, shown)
        if not self.accelerator.is_main_process:
            return []
        named = not self.encoder_config.unlabelled
        bank_images, shown_near = self.data.train.take(rows), min(_SHOWN, len(rows))
        neighbours = neighbour_picture(
            self.data.test, bank_images, query_features=test, bank_features=bank, k=shown_near, labels=named
        )
        write_atomic(folder / NEIGHBOURS_PICTURE, neighbours)
        about = "Test images (left) and the training images nearest to them in the space of the features"
        words = about + ("; green: of the same class, red: of another." if named else ".")
        labels = self.data.test.labels if named else None
        return [
            Section("Nearest neighbours", picture(neighbours, about), words, first=True),
            replace(embedding_section(test, labels, self.data.classes), first=True),
        ]

    def clean(self) -> None:
        """Delete what only an interrupted run needs; on the first process."""
        self.checkpoint.unlink(missing_ok=True)

    def _evaluate(self) -> None:
        self.spent.evaluations += 1
        loss = float(self._loss[0] / self._loss[1]) if self._loss[1] else None
        named = {} if self.encoder_config.unlabelled else self.neighbour_accuracies()
        self._loss.zero_()
        self._keep_point({"train_loss": loss, **named})

    def neighbour_accuracies(self) -> dict[str, float | None]:
        """Share of test images whose nearest training images have their class, ``knn1_accuracy`` and so on."""
        rows = self.probe_rows()
        bank = self.features(self.data.train, rows)
        test = self.features(self.data.test, torch.arange(len(self.data.test)))
        ks = [k for k in NEIGHBOURS if k <= len(rows)]
        found = knn_accuracies(bank, self.data.train.labels[rows], test, self.data.test.labels, ks=ks)
        return {f"knn{k}_accuracy": found.get(k) for k in NEIGHBOURS}

    def _more_state(self) -> dict[str, Any]:
        return {"loss": self._loss.clone()}

    def _take_up(self, state: dict[str, Any]) -> None:
        self._loss.copy_(state["loss"])

    @staticmethod
    def _everywhere(model: nn.Module, accelerator: Accelerator) -> nn.Module:
        return synchronise_norms_(model, accelerator.device) if accelerator.num_processes > 1 else model


def reshard_(*models: nn.Module) -> None:
    """Give up gathered parameters: a forward pass without a backward one leaves them whole on every process."""
    from torch.distributed.fsdp import FSDPModule

    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
