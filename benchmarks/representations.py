"""Features without labels at equal FLOPs: mean shift in its forms beside lightly's SimSiam, BYOL, DINO and SimCLR.

    python benchmarks/representations.py run        # hours on two cores; stop and start it at will
    python benchmarks/representations.py run --settings cifar10-10k --seeds 0
    python benchmarks/representations.py table      # from the receipts there are

All run in one loop: the same network, batches, views of one module, optimiser and schedule, precision, seeds and
evaluation. lightly's methods use its own losses and heads (the extra ``bench``). Each is trained, fully
decayed, at shares of one budget in FLOPs that are counted, not assumed: the curve of quality against FLOPs is of such
ends of runs, never of the middle of a longer one. Equal epochs are read off where two runs saw the same images.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from scrimp.data import ImageData, load_images
from scrimp.jobs.budget import StepCost
from scrimp.jobs.encoder_run import EncoderRun, new_encoder, run_encoder
from scrimp.jobs.engine import start
from scrimp.jobs.folder import CHECKPOINT, plain
from scrimp.jobs.learner import Objective, Online, embedding_width, make_online, make_target
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.pretrain_fit import PretrainFitting, random_views, step_losses
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import require
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.linear import linear_accuracy

NAME = "representations"
RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
SHARES = (1.0, 0.5)  # of a setting's budget


@dataclass(frozen=True)
class Setting:
    """Images, network, and the budget in passes of mean shift."""

    about: str
    data: Callable[[], ImageData]
    model: str
    passes: float


def few(name: str, count: int) -> ImageData:
    """``count`` training images of a named set, chosen once at random, and 2,000 test images."""
    data = load_images(name)
    rows = torch.randperm(len(data.train), generator=generator_for(1))[:count]
    shown = torch.randperm(len(data.test), generator=generator_for(2))[:2000]
    label = f"{data.name}, {count:,} images"
    return dataclasses.replace(data, train=data.train.take(rows), test=data.test.take(shown), name=label)


SETTINGS = {
    "cifar10-10k": Setting(
        "CIFAR-10, 10,000 images, eighth-width ResNet-18",
        functools.partial(few, "cifar10", 10_000),
        "small-resnet18-8",
        6,
    ),
    "fashion-mnist-10k": Setting(
        "Fashion-MNIST, 10,000 images, eighth-width ResNet-18",
        functools.partial(few, "fashion-mnist", 10_000),
        "small-resnet18-8",
        6,
    ),
    "cifar10": Setting("CIFAR-10, half-width ResNet-18", lambda: load_images("cifar10"), "small-resnet18-32", 100),
    "fashion-mnist": Setting(
        "Fashion-MNIST, half-width ResNet-18", lambda: load_images("fashion-mnist"), "small-resnet18-32", 50
    ),
}
OURS = {
    "constrained": {"method": "constrained"},
    "mean-shift": {"method": "mean-shift"},
    "byol": {"method": "byol"},
}
RECIPE = {"optimizer": "sgd", "lr": 0.1, "batch_size": 64, "evaluations": 1, "probe": 10_000}


class LightlyOnline(Online):
    """Backbone and heads of one of lightly's methods; SimSiam's gives both views' predictions, then projections."""

    def __init__(self, backbone: nn.Module, features: int, method: str, *, hidden: int, dim: int) -> None:
        from lightly.models.modules import heads

        prediction: nn.Module | None = None
        if method == "simsiam":
            projection = heads.SimSiamProjectionHead(features, hidden, dim)
            prediction = heads.SimSiamPredictionHead(dim, hidden // 4, dim)
        elif method == "byol":
            projection = heads.BYOLProjectionHead(features, hidden, dim)
            prediction = heads.BYOLPredictionHead(dim, hidden, dim)
        elif method == "simclr":
            projection = heads.SimCLRProjectionHead(features, hidden, dim)
        else:
            projection = heads.DINOProjectionHead(features, hidden, dim, 1024, batch_norm=True, freeze_last_layer=-1)
        super().__init__(backbone, projection, prediction)
        self.both = method == "simsiam"

    def forward(self, views: list[Tensor], *, features: bool = False) -> list[Tensor]:
        if not self.both or features:
            return super().forward(views, features=features)
        projected = [self.projector(self.backbone(view)) for view in views]
        assert self.predictor is not None
        return [self.predictor(item) for item in projected] + projected


class LightlyObjective(Objective):
    """One of lightly's losses in the place of ours."""

    def __init__(self, config: PretrainConfig, labels: Tensor, dim: int, *, device: torch.device, method: str) -> None:
        super().__init__(config, labels, dim, device=device)
        from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss

        self.method = method
        self.loss = {
            "simsiam": NegativeCosineSimilarity,
            "byol": NegativeCosineSimilarity,
            "simclr": functools.partial(NTXentLoss, temperature=0.2),
            "dino": functools.partial(DINOLoss, output_dim=1024, warmup_teacher_temp_epochs=0),
        }[method]()

    def losses(self, online: list[Tensor], target: list[Tensor], rows: Tensor) -> Tensor:
        if self.method == "simsiam":
            (first, second, one, other) = online
            value = (self.loss(first, other.detach()) + self.loss(second, one.detach())) / 2
        elif self.method == "byol":
            value = (self.loss(online[0], target[1]) + self.loss(online[1], target[0])) / 2
        elif self.method == "simclr":
            value = self.loss(online[0], online[1])
        else:
            value = self.loss(target, online, epoch=0)
        return value.expand(len(rows))

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])


class Beside:
    """One method on one setting: its networks and objective, and what an image costs."""

    def __init__(self, setting: Setting, data: ImageData, way: str, seed: int) -> None:
        self.way, self.data = way, data
        settings = OURS.get(way, {"method": "byol"})  # lightly's take the two equal views that byol does
        self.config = PretrainConfig(model=setting.model, seed=seed, json=True, device="cpu", **RECIPE, **settings)
        self.accelerator = start(self.config, "cpu", bf16_on_cpu=True)

    def networks(self) -> tuple[Online, Objective]:
        backbone, features = new_encoder(self.config, self.data)
        labels = torch.full((len(self.data.train),), -1)
        if self.way in OURS:
            online = make_online(backbone, features, self.config)
            return online, Objective(self.config, labels, embedding_width(online), device=torch.device("cpu"))
        method = self.way.removeprefix("lightly-")
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.seed + 1)
            online = LightlyOnline(backbone, features, method, hidden=2 * features, dim=max(64, features // 4))
        return online, LightlyObjective(self.config, labels, 1, device=torch.device("cpu"), method=method)

    def target_views(self) -> bool:
        """Whether the target network has anything to do."""
        return self.way not in ("lightly-simsiam", "lightly-simclr")

    def views(self, config: PretrainConfig) -> Any:
        made = random_views(config, self.data)
        if self.target_views():
            return made
        return lambda *order: dataclasses.replace(made(*order), target=[])

    def cost(self) -> StepCost:
        online, objective = self.networks()
        target, rows = make_target(online), torch.arange(16)
        few_views = self.views(dataclasses.replace(self.config, batch_size=16))
        views = few_views(self.data.train.batch(rows), 0, slice(0, 16))

        def step() -> None:
            step_losses(online.train(), target, objective, views, rows, autocast=nullcontext).mean().backward()

        step()
        counted = count_flops(step)
        return StepCost((counted.value or 0.0) / 16, 0.0, counted.missed)

    def train(self, budget: float, share: float, folder: Path) -> tuple[Receipt, PretrainFitting]:
        cost, made = self.cost(), []

        def make() -> PretrainFitting:
            online, objective = self.networks()
            made.append(
                PretrainFitting(
                    self.config,
                    online,
                    objective,
                    self.data,
                    accelerator=self.accelerator,
                    cost=cost,
                    budget=budget,
                    checkpoint=folder / CHECKPOINT,
                    views=self.views(self.config),
                )
            )
            return made[0]

        run = EncoderRun(
            name=NAME,
            way=self.way if share == 1 else f"{self.way} at {share:g}x",
            folder=folder,
            seed=self.config.seed,
            budget=budget,
            baseline=self.way == "lightly-simsiam",
            config={**plain(self.config), "way": self.way, "budget_flops": budget, "share": share},
            labels=0,
            notes={"passes": budget / cost.train / len(self.data.train), "FLOPs an image": cost.train},
        )
        receipt = run_encoder(run, make, lambda spent: None, resume=(folder / CHECKPOINT).is_file())
        return receipt, made[0]


WAYS = (*OURS, "lightly-simsiam", "lightly-byol", "lightly-dino", "lightly-simclr")


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished run leaves its receipt, an unfinished one its checkpoint in --folder."""

    settings: tuple[str, ...] = ("cifar10-10k", "fashion-mnist-10k")
    ways: tuple[str, ...] = WAYS
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = SHARES
    threads: int = 2
    folder: Path | None = None


@dataclass(frozen=True)
class Table:
    """Print the table of the receipts there are."""


def path_of(setting: str, way: str, share: float, seed: int) -> Path:
    return RECEIPTS / setting / f"{way}-{share:g}-seed{seed}.json"


def run(order: Run) -> None:
    require("lightly", "bench")
    torch.set_num_threads(order.threads)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in order.seeds:
            for name in order.settings:
                setting, data = SETTINGS[name], SETTINGS[name].data()
                base = Beside(setting, data, "mean-shift", 0).cost().train
                for share in order.shares:
                    for way in order.ways:
                        if path_of(name, way, share, seed).is_file():
                            continue
                        folder = (order.folder or Path(scratch)) / name / f"{way}-{share:g}-{seed}"
                        folder.mkdir(parents=True, exist_ok=True)
                        run_one(Beside(setting, data, way, seed), name, setting.passes * base * share, share, folder)


def run_one(beside: Beside, name: str, passes_flops: float, share: float, folder: Path) -> None:
    data, seed = beside.data, beside.config.seed
    receipt, fitting = beside.train(passes_flops * len(data.train), share, folder)
    bank = fitting.features(data.train, torch.arange(len(data.train)))
    test = fitting.features(data.test, torch.arange(len(data.test)))
    linear = linear_accuracy(bank, data.train.labels, test, data.test.labels)
    quality = {**receipt.quality, "linear_accuracy": linear}
    found = dataclasses.replace(receipt, kind="benchmark", name=f"{NAME}/{name}", quality=quality)
    save_receipt(found, path_of(name, beside.way, share, seed))
    print(f"{name} {receipt.way} seed {seed}: {quality}", flush=True)


def load(setting: str, way: str, share: float) -> list[Receipt]:
    """The receipts there are, seed by seed."""
    paths = [path_of(setting, way, share, seed) for seed in range(9)]
    return [load_receipt(path) for path in paths if path.is_file()]


def spread(receipts: list[Receipt], name: str) -> str:
    values = [100 * value for item in receipts if (value := item.quality.get(name)) is not None]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table_text() -> str:
    """The table in markdown."""
    head = "| setting | way | share of the FLOPs | passes | 20-NN, % | 1-NN, % | linear, % | seeds |"
    rows = [head, "|---|---|---|---|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        for way in WAYS:
            for share in SHARES:
                found = load(name, way, share)
                if not found:
                    continue
                passes = f"{found[0].notes['passes']:.1f}"
                figures = [spread(found, f"{kind}_accuracy") for kind in ("knn20", "knn1", "linear")]
                cells = [setting.about, way, f"{share:g}x", passes, *figures, str(len(found))]
                rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def table(_: Table) -> None:
    print(table_text())


def main() -> None:
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    run(order) if isinstance(order, Run) else table(order)


if __name__ == "__main__":
    main()
