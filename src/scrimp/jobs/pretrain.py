"""`scrimp pretrain`: an encoder from images without labels, under a budget."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp.data import ImageData
from scrimp.jobs.budget import StepCost, seconds_a_step
from scrimp.jobs.encoder_run import EncoderRun, load_data, new_encoder, resolve_budget, run_encoder
from scrimp.jobs.engine import accelerated, shared, slowest
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import CHECKPOINT, choose_folder, plain, record_config
from scrimp.jobs.labels import usable_labels
from scrimp.jobs.learner import Objective, Online, embedding_width, make_online, make_target
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.pretrain_fit import (
    CACHE,
    MakeViews,
    PretrainFitting,
    TwoViews,
    given_views,
    random_views,
    step_losses,
)
from scrimp.jobs.progress import add_bar, figures, progress_bar
from scrimp.jobs.setup import default_name
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt

if TYPE_CHECKING:
    from accelerate import Accelerator


def pretrain(
    config: PretrainConfig, *, data: Any = None, views: TwoViews | None = None, accelerator: Accelerator | None = None
) -> Receipt:
    """Train an encoder under a budget; writes weights, configuration, receipt, pictures and report to the run folder.

    Args:
        config: see `PretrainConfig`.
        data: anything `scrimp.data.load_images` takes, such as a pair of data sets; instead of ``config.data``.
        views: makes the two networks' views of a batch instead of those ``config`` describes (its ``local_crops`` then
            are none), such as `scrimp.data.per_image` of a transform of torchvision or lightly; see `TwoViews`.
        accelerator: an existing one; started as ``config`` says where omitted.

    Returns:
        The receipt, also written to the run folder.

    Raises:
        InputError: something in the configuration or the data cannot be used.
        Interrupted: SIGINT or SIGTERM came; go on with ``resume=True``.
    """
    config.check()
    source = config.data if data is None else data
    with accelerated(config, accelerator, bf16_on_cpu=True) as started:
        return _pretrain(config, source, views, started)


def _pretrain(config: PretrainConfig, source: Any, views: TwoViews | None, accelerator: Accelerator) -> Receipt:
    name = default_name("pretrain", source)
    folder = shared(accelerator, lambda: choose_folder(config.out, name, resume=config.resume))
    setup = prepare_pretraining(config, source, accelerator, views=views)
    wanted = {} if config.resume else {"budget_flops": setup.budget()}
    resolved = shared(accelerator, lambda: record_config(folder, config, wanted))
    with progress_bar(shown=accelerator.is_main_process and not config.json) as progress:
        bar = add_bar(progress, setup.way)

        def report(spent: Spent) -> None:
            latest = spent.curve[-1] if spent.curve else {}
            progress.update(bar, completed=spent.flops / resolved["budget_flops"], figures=figures(latest))

        return setup.run(folder, resolved["budget_flops"], report, name=name, resume=config.resume)


@dataclass(frozen=True)
class Pretraining:
    """Data, accelerator and counted cost: what one run, or several of a study, go by."""

    config: PretrainConfig
    data: ImageData
    accelerator: Accelerator
    cost: StepCost
    views: TwoViews | None

    @property
    def way(self) -> str:
        """What receipts call the method."""
        kind = self.config.constraint if self.config.method == "constrained" else ""
        return {"": self.config.method, "views": "constrained"}.get(kind, f"constrained-{kind}")

    def budget(self) -> float:
        """FLOPs of the run, the smallest of the budgets given."""
        return resolve_budget(self.config, self.data, self.cost, self._seconds)

    def run(
        self,
        folder: Path,
        budget: float,
        report: Callable[[Spent], None],
        *,
        name: str,
        seed: int | None = None,
        baseline: bool = False,
        resume: bool = False,
        drawn: bool = True,
    ) -> Receipt:
        """Train one encoder into ``folder``; a finished run is read back, an interrupted one goes on.

        ``drawn``: with pictures and a report.
        """
        config = self.config if seed is None else replace(self.config, seed=seed)
        run = EncoderRun(
            name=name,
            way=self.way,
            folder=folder,
            seed=config.seed,
            budget=budget,
            baseline=baseline,
            drawn=drawn,
            config={**plain(config), "budget_flops": budget},
            labels=int((usable_labels_of(config, self.data) >= 0).sum()),
            notes={
                "method": self.way,
                "memory": _memory_of(config, self.data),
                "unit of train_loss": "squared distance of unit vectors",
            },
        )
        make = functools.partial(self._fitting, config, folder, budget)
        return run_encoder(run, make, report, resume=resume)

    def _fitting(self, config: PretrainConfig, folder: Path, budget: float) -> PretrainFitting:
        online = new_online(config, self.data)
        rank = self.accelerator.process_index
        on_disk = config.method == "constrained" and config.cache == "disk"
        if on_disk:
            folder.mkdir(parents=True, exist_ok=True)
        objective = Objective(
            config,
            usable_labels_of(config, self.data),
            embedding_width(online),
            device=self.accelerator.device,
            gather=self.accelerator.gather if self.accelerator.num_processes > 1 else _alone,
            cache=folder / f"{CACHE}.{rank}" if on_disk else None,
        )
        return PretrainFitting(
            config,
            online,
            objective,
            self.data,
            accelerator=self.accelerator,
            cost=self.cost,
            budget=budget,
            checkpoint=folder / CHECKPOINT,
            views=_views(config, self.data, self.views),
        )

    def seconds_a_flop(self) -> float:
        """Wall seconds of training a FLOP takes, measured; the slowest process's."""
        step, _ = self._seconds()
        return step / (self.cost.train * self.config.batch_size)

    def _seconds(self) -> tuple[float, float]:
        """Wall seconds of one training step and of one forward pass, the slowest process's."""
        step, look = _trial(self.config, self.data, self.accelerator, rows=self._rows(), views=self.views)
        train, shown = slowest(self.accelerator, seconds_a_step(step, repeats=3), seconds_a_step(look, repeats=3))
        return train, shown

    def _rows(self) -> int:
        return self.config.batch_size // self.accelerator.num_processes


def prepare_pretraining(
    config: PretrainConfig, source: Any, accelerator: Accelerator, *, views: TwoViews | None = None
) -> Pretraining:
    """Load images and count the cost of a step.

    Raises:
        InputError: data, model or batch size that cannot be used.
    """
    data = load_data(config, source, accelerator)
    if config.method != "byol" and config.k > config.batch_size // config.accumulate:
        got = f"k {config.k} of {config.batch_size // config.accumulate} images"
        raise InputError("at most as many neighbours as images a step (a part of it)", got, "lower --k")
    rows = max(8, config.k)
    step, _ = _trial(config, data, accelerator, rows=rows, views=views, autocast=False)
    _first(step, config)  # the first batch finds no earlier view, so the second is counted
    counted = count_flops(step)
    if counted.value is None:
        raise InputError("a model whose FLOPs can be counted", str(config.model), "choose another --model")
    return Pretraining(config, data, accelerator, StepCost(counted.value / rows, 0.0, counted.missed), views)


def new_online(config: PretrainConfig, data: ImageData) -> Online:
    """The learning network, its initial weights fixed by the seed."""
    backbone, features = new_encoder(config, data)
    return make_online(backbone, features, config)


def usable_labels_of(config: PretrainConfig, data: ImageData) -> torch.Tensor:
    """The labels the loss may use; the same images for every method of one seed."""
    return usable_labels(data, config.labelled if config.uses_labels else 0.0, seed=config.seed)


def _trial(
    config: PretrainConfig,
    data: ImageData,
    accelerator: Accelerator,
    *,
    rows: int,
    views: TwoViews | None,
    autocast: bool = True,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step and a look at images, on networks of their own."""
    device = accelerator.device
    online = copy.deepcopy(new_online(config, data)).to(device)
    target = make_target(online)
    labels = usable_labels_of(config, data)
    objective = Objective(config, labels, embedding_width(online), device=device)
    chosen = torch.arange(rows) % len(data.train)
    batch = data.train.batch(chosen).to(device)
    casts: Any = accelerator.autocast if autocast else nullcontext
    made = _views(replace(config, batch_size=rows), data, views)(batch, 0, slice(0, rows))

    def step() -> None:
        step_losses(online.train(), target, objective, made, chosen, autocast=casts).mean().backward()

    def look() -> None:
        with torch.no_grad(), casts():
            online.eval()(made.online[:1], features=True)

    return step, look


def _first(step: Callable[[], Any], config: PretrainConfig) -> None:
    try:
        step()
    except (RuntimeError, AssertionError) as error:
        if not config.local_crops:
            raise
        raise InputError(
            "a model that takes smaller images too, for --local-crops",
            f"{config.model} ({str(error).splitlines()[0]})",
            "pass --local-share 1, --local-crops 0, or a convolutional timm model",
        ) from error


def _views(config: PretrainConfig, data: ImageData, given: TwoViews | None) -> MakeViews:
    return random_views(config, data) if given is None else given_views(given, config, data)


def _memory_of(config: PretrainConfig, data: ImageData) -> int | None:
    objective = Objective(config, torch.zeros(len(data.train), dtype=torch.int64), 1, device=torch.device("cpu"))
    return None if objective.memory is None else len(objective.memory)


def _alone(rows: torch.Tensor) -> torch.Tensor:
    return rows
