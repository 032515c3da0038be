"""Tasks of the adapter benchmark: a frozen pretrained model, a little data, a loss, and a figure to judge by."""

from __future__ import annotations

import csv
import functools
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pretrained.fetch import run, shakespeare, unpacked
from pretrained.saliency import MEAN, STD, load_saliency
from pretrained.text import load_smollm2, quiet
from scrimp.data import load_images
from scrimp.primitives.draw import generator_for

ELPV = "elpv-dataset==1.0.0.post1"
PARTS = ("test", "held-out")
VISION_STEPS = 100

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What every way is given alike.

    Attributes:
        metric: the name in ``score`` that counts; ``better`` is 1 where more is better, -1 where less is.
        targets: regular expression of the adapted modules' whole names; ``feedforward`` of those among them that end
            a block's perceptron (IA3 scales their inputs).
        fresh: seed -> a new model whose weights require no gradient, but those of the head, ``None`` where it has none.
        batches: seed -> the inputs and labels of every step.
        held: ``"test"`` or ``"held-out"`` (rates are chosen on it) -> inputs and labels, batch by batch.
    """

    name: str
    about: str
    metric: str
    better: int
    targets: str
    feedforward: str
    steps: int
    fresh: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    held: Callable[[str], Iterator[Batch]]
    head: str | None = None
    labels: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats, float32."""
        return functional.cross_entropy(*self._answers(model, batch))

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> dict[str, float]:
        """Accuracy (0 to 1), loss (nats) and perplexity over a part."""
        right = count = 0
        loss = 0.0
        for batch in self.held(part):
            with bfloat16():
                logits, labels = self._answers(model, batch)
            right, count = right + int((logits.argmax(-1) == labels).sum()), count + len(labels)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        return {
            "accuracy": right / count,
            "loss": loss / count,
            "perplexity": float(np.exp(loss / count)),
        }

    def _answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        found = model(inputs)
        logits = getattr(found, "logits", found)
        return logits.flatten(0, -2).float(), labels.flatten()


def bfloat16() -> torch.autocast:
    """How all models are run: half the time of float32 where the processor knows bfloat16, weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16)


class Classifier(nn.Module):
    """Transformer and a linear head on its class token and mean patch token: pictures [b, 3, s, s] to logits."""

    def __init__(self, backbone: nn.Module, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = 2 * int(backbone.embed_dim)  # type: ignore[arg-type]
        self.head = nn.utils.skip_init(nn.Linear, width, classes)
        with torch.no_grad():
            self.head.weight.normal_(std=0.01, generator=generator_for(seed, 1))
            self.head.bias.zero_()

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(pictures)  # type: ignore[operator]
        return self.head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))


class Pictures:
    """Pictures held ready [n, 3, s, s] with their labels: one pool to draw shots from, and the two parts held out."""

    def __init__(self, pool: Batch, held: dict[str, Batch], *, shots: int, batch: int, steps: int) -> None:
        self.pool, self.parts = pool, held
        self.shots, self.batch, self.steps = shots, batch, steps

    def batches(self, seed: int) -> Iterator[Batch]:
        """``shots`` of every class, in a new order each time round."""
        inputs, labels = self.pool
        generator = generator_for(seed, 2)
        kinds = [(labels == kind).nonzero()[:, 0] for kind in labels.unique()]
        rows = torch.cat([kind[torch.randperm(len(kind), generator=generator)[: self.shots]] for kind in kinds])
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.steps):
            if len(order) < self.batch:
                order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
            chosen, order = rows[order[: self.batch]], order[self.batch :]
            yield inputs[chosen], labels[chosen]

    def held(self, part: str) -> Iterator[Batch]:
        return zip(*(tensor.split(100) for tensor in self.parts[part]), strict=True)


@functools.cache
def transformer() -> nn.Module:
    model = load_saliency().backbone
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # with 17 tokens torch's fused attention makes a step 1.3 times as long
    return model  # type: ignore[return-value]


def vision(name: str, about: str, metric: str, *, classes: int, data: Callable[[], Pictures], labels: int) -> Task:
    found = functools.cache(data)

    def fresh(seed: int) -> nn.Module:
        return Classifier(deepcopy(transformer()), classes, seed)

    return Task(
        name=name,
        about=about,
        metric=metric,
        better=1,
        targets=r"backbone\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
        feedforward=r".*\.fc2",
        steps=VISION_STEPS,
        fresh=fresh,
        batches=lambda seed: found().batches(seed),
        held=lambda part: found().held(part),
        head="head",
        labels=labels,
    )


def ready(pictures: Tensor, size: int) -> Tensor:
    """Bytes [n, 1 or 3, h, w] to normalised floats [n, 3, size, size]."""
    scaled = functional.interpolate(pictures.float() / 255, size=(size, size), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (scaled.clamp(0, 1).expand(-1, 3, -1, -1) - mean) / std


def cifar10(*, size: int = 56, pool: int = 5000, held: int = 1000) -> Pictures:
    """Fixed rows: the test part from the test images, pool and held-out part from the training images."""
    data = load_images("cifar10")
    rows = torch.randperm(len(data.train), generator=generator_for(11))[: pool + held]
    shown = torch.randperm(len(data.test), generator=generator_for(12))[:held]

    def of(images: Any, chosen: Tensor) -> Batch:
        return ready(images.batch(chosen), size), images.labels[chosen]

    parts = {"test": of(data.test, shown), "held-out": of(data.train, rows[pool:])}
    return Pictures(of(data.train, rows[:pool]), parts, shots=100, batch=16, steps=VISION_STEPS)


def elpv(*, size: int = 56, each: int = 200) -> Pictures:
    """Cells surely whole or surely broken; as many of either in the parts held out, so that chance is a half."""
    folder = elpv_folder()
    rows = [line[0].split() for line in csv.reader((folder / "labels.csv").open())]
    cells = [(path, int(float(share))) for path, share, _ in rows if float(share) in (0.0, 1.0)]
    labels = torch.tensor([label for _, label in cells])
    pictures = ready(torch.stack([grey(folder / path) for path, _ in cells]), size)
    order = torch.randperm(len(cells), generator=generator_for(13))
    kinds = [order[labels[order] == kind] for kind in (0, 1)]

    def of(start: int, end: int | None) -> Batch:
        chosen = torch.cat([kind[start:end] for kind in kinds])
        return pictures[chosen], labels[chosen]

    parts = {"test": of(0, each), "held-out": of(each, each + each // 2)}
    return Pictures(of(each + each // 2, None), parts, shots=100, batch=16, steps=VISION_STEPS)


def grey(path: Path) -> Tensor:
    """A picture's bytes [1, h, w]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("L")).copy())[None]


def elpv_folder() -> Path:
    """Folder of the labels and pictures of the solar cells (CC BY-NC-SA), whose package is not installed."""
    name = ELPV.replace("==", "-")

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", ELPV, "--dest", place], ELPV)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)

    return unpacked(name, fill) / "elpv_dataset" / "data"


def language(*, tokens: int = 64, batch: int = 2, steps: int = 60, windows: int = 32) -> Task:
    """SmolLM2 on Shakespeare's plays: trained on the first nine tenths, judged on the rest."""
    loaded = functools.cache(load_smollm2)

    @functools.cache
    def text() -> Tensor:
        with quiet():
            return torch.tensor(loaded()[1](shakespeare()).input_ids)

    def batches(seed: int) -> Iterator[Batch]:
        generator, end = generator_for(seed, 2), len(text()) * 9 // 10 - tokens - 1
        for _ in range(steps):
            starts = torch.randint(end, (batch, 1), generator=generator)
            chosen = text()[starts + torch.arange(tokens + 1)]
            yield chosen[:, :-1], chosen[:, 1:]

    def held(part: str) -> Iterator[Batch]:
        twentieth = len(text()) // 20
        start = (19 if part == "test" else 18) * twentieth
        for row in range(0, windows, batch):
            starts = torch.tensor([start + (row + one) * (twentieth - tokens - 1) // windows for one in range(batch)])
            chosen = text()[starts[:, None] + torch.arange(tokens + 1)]
            yield chosen[:, :-1], chosen[:, 1:]

    def fresh(_: int) -> nn.Module:
        model = deepcopy(loaded()[0])
        model.config.use_cache = False
        model.set_attn_implementation("eager")  # quicker than SDPA with so few tokens
        return model

    return Task(
        name="shakespeare",
        about=f"SmolLM2-135M-Instruct on tinyshakespeare, {steps} steps of {batch} x {tokens} tokens, perplexity of "
        f"{windows} windows of the last twentieth",
        metric="perplexity",
        better=-1,
        targets=r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        feedforward=r".*\.down_proj",
        steps=steps,
        fresh=fresh,
        batches=batches,
        held=held,
    )


TASKS: dict[str, Callable[[], Task]] = {
    "cifar10": lambda: vision(
        "cifar10",
        "CIFAR-10, 100 images a class, ViT-S/14 at 56 pixels, accuracy on 1,000 test images",
        "accuracy",
        classes=10,
        data=cifar10,
        labels=1000,
    ),
    "elpv": lambda: vision(
        "elpv",
        "solar cells whole or broken, 100 photographs of either, ViT-S/14 at 56 pixels, accuracy on 200 of either",
        "accuracy",
        classes=2,
        data=elpv,
        labels=200,
    ),
    "shakespeare": language,
}
