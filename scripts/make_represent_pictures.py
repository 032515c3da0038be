"""Draw the pictures of the self-supervised and distillation cards, in headless Chromium (needs the test tools).

    python scripts/make_represent_pictures.py receipts docs/images             # some minutes on two cores
    python scripts/make_represent_pictures.py receipts docs/images curves      # from the receipts alone

Small networks are trained on the built-in images: one without labels, whose neighbours are shown, and a teacher with
labels, whose student never sees one. Frames are green where the class is the image's.
Where there are receipts of benchmarks/representations.py, the quality against FLOPs is drawn as well.
"""

from __future__ import annotations

import base64
import io
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from make_picture import WIDTH, draw, shoot
from PIL import Image
from torch import Tensor, nn

from scrimp.data import WEAK, ImageData, View, load_images, standardise, strong_for, view_of
from scrimp.jobs.encoder_pictures import OTHER, SAME
from scrimp.jobs.models import create_model
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.nearest import nearest
from scrimp.receipts import Receipt
from scrimp.report import find_receipts
from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure
from scrimp.represent import (
    EmbeddingCache,
    Memory,
    constrained_mean_shift_loss,
    earlier_views,
    follow_,
    predictor,
    projector,
    regression_head,
    regression_loss,
    target_of,
)

TEACHER, STUDENT = "small-resnet18-8", "convnet-8"
PASSES, BATCH, REMEMBERED, DIM, K = 6, 128, 3000, 64, 5
BASELINE = "lightly-simsiam"
SHOWN = 4
"""Images a picture explains, each of another class."""

CONFUSED = (0, 2, 4, 6)
"""T-shirt, pullover, coat and shirt: classes that look alike."""

Row = list[list[tuple[Tensor, bool | None]]]
"""Groups of pictures [C, H, W] in 0 to 1, each with whether it is of the row's class (None: no frame)."""


@dataclass
class Seen:
    """The last batch of a pretraining run, and what its memories held then."""

    rows: Tensor
    target_view: Tensor
    query_view: Tensor
    earlier_view: Tensor
    free: Tensor
    bound: Tensor
    remembered: Tensor
    """The views in the memory, [size, C, H, W]."""
    labels: Tensor


def main(receipts: str, pictures: str, only: str = "") -> None:
    out, folder = Path(pictures), Path(receipts) / "representations"
    if folder.is_dir():
        measured = find_receipts([folder])
        settings = sorted({receipt.name for receipt in measured})
        draw([against_flops(measured, name) for name in settings[:2]], out / "representations.png")
    if only == "curves":
        return
    torch.manual_seed(0)
    data = load_images("builtin")
    heads = ("image; views of target and learning<br>network; target view of the pass before",
             "mean shift:<br>remembered views nearest to the target view",
             "constrained: those whose images were<br>nearest to the view of the pass before")  # fmt: skip
    draw_page(heads, list(neighbour_rows(data, pretrain(data))), out / "self-supervised.png")
    teacher = classify(data)
    draw_page(*distillation_page(data, teacher, distill(data, teacher)), out / "distillation.png")


def encoder(name: str, data: ImageData) -> nn.Module:
    channels, size, _ = data.train.shape
    return create_model(name, classes=0, channels=channels, size=size)


def batches(data: ImageData, *, key: int) -> Iterator[tuple[int, Tensor]]:
    """Shuffled batches of `PASSES` passes, with their number."""
    number = 0
    for epoch in range(PASSES):
        order = torch.randperm(len(data.train), generator=generator_for(key, epoch))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield number, rows
            number += 1


def made(data: ImageData, rows: Tensor, view: View, *, key: int, number: int) -> Tensor:
    return view_of(data.train.batch(rows), view, generator=generator_for(key, number))


def schedule(parameters: list[nn.Parameter], data: ImageData) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    steps = PASSES * (len(data.train) // BATCH)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)


def pretrain(data: ImageData) -> Seen:
    """Constrained mean shift, as in examples/own_pretraining.py, that remembers its views as well."""
    online = nn.Sequential(encoder(TEACHER, data), projector(64, dim=DIM))
    target, head = target_of(online), predictor(DIM)
    memory, before = Memory(REMEMBERED, DIM), Memory(REMEMBERED, DIM)
    cache = EmbeddingCache(len(data.train), DIM)
    last = torch.zeros(len(data.train), *data.train.shape)
    views, labels = torch.zeros(REMEMBERED, *data.train.shape), torch.zeros(REMEMBERED, dtype=torch.int64)
    optimizer, rates = schedule([*online.parameters(), *head.parameters()], data)
    seen = None
    for number, rows in batches(data, key=1):
        weak, strong = (
            made(data, rows, view, key=key, number=number) for key, view in ((2, WEAK), (3, strong_for(28)))
        )
        follow_(target, online)
        with torch.no_grad():
            there = target(standardise(weak, data.mean, data.std))
        earlier = cache.read(rows)
        before.push_(earlier)
        at = memory.push_(there)
        views[at], labels[at] = weak, data.train.labels[rows]
        cache.write_(rows, there)
        vouched = earlier_views(earlier, before)
        here = head(online(standardise(strong, data.mean, data.std)))
        loss = constrained_mean_shift_loss(here, there, memory, constraint=vouched, k=K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        near = memory.search(there, K), vouched(there, memory, K)[0]
        seen, last[rows] = Seen(rows, weak, strong, last[rows], *near, views, labels), weak
    assert seen is not None
    return seen


def classify(data: ImageData) -> nn.Module:
    """A teacher that was trained with labels."""
    backbone, classifier = encoder(TEACHER, data), nn.Linear(64, len(data.classes))
    optimizer, rates = schedule([*backbone.parameters(), *classifier.parameters()], data)
    for number, rows in batches(data, key=7):
        view = standardise(made(data, rows, WEAK, key=8, number=number), data.mean, data.std)
        loss = nn.functional.cross_entropy(classifier(backbone(view)), data.train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return backbone.eval()


def distill(data: ImageData, teacher: nn.Module) -> nn.Module:
    """SimReg: the small network learns the teacher's features of the very view it sees itself."""
    student = encoder(STUDENT, data)
    head = regression_head(288, 64)
    optimizer, rates = schedule([*student.parameters(), *head.parameters()], data)
    for number, rows in batches(data, key=4):
        view = standardise(made(data, rows, WEAK, key=5, number=number), data.mean, data.std)
        with torch.no_grad():
            wanted = teacher(view)
        loss = regression_loss(head(student(view)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return student.eval()


def neighbour_rows(data: ImageData, seen: Seen) -> Iterator[Row]:
    """The first images of the last batch whose two sets of neighbours differ, one a class."""
    shown: set[int] = set()
    for place, row in enumerate(seen.rows.tolist()):
        label = int(data.train.labels[row])
        free, bound = seen.free[place], seen.bound[place]
        if label in shown or len(shown) == SHOWN or len(set(free.tolist()) & set(bound.tolist())) > 2:
            continue
        shown.add(label)
        image = data.train.batch(torch.tensor([row]))[0] / 255
        parts = (image, seen.target_view[place], seen.query_view[place], seen.earlier_view[place])
        views: list[tuple[Tensor, bool | None]] = [(part, None) for part in parts]
        near: Row = [[(seen.remembered[at], bool(seen.labels[at] == label)) for at in rows] for rows in (free, bound)]
        yield [views, *near]


def distillation_page(data: ImageData, teacher: nn.Module, student: nn.Module) -> tuple[list[str], list[Row]]:
    """Test images and their neighbours by teacher, student, and the student before training."""
    networks = {"frozen teacher": (TEACHER, teacher), "student": (STUDENT, student),
                "student before training": (STUDENT, encoder(STUDENT, data).eval())}  # fmt: skip
    one = torch.zeros(1, *data.train.shape)
    heads = ["image, and<br>view of both"]
    heads += [f"nearest to the {what}<br>({name}, {cost(model, one):.1f} MFLOP an image)"
              for what, (name, model) in networks.items()]  # fmt: skip
    bank, tests = torch.arange(2000), torch.arange(400)
    chosen = [int((data.test.labels[tests] == label).nonzero()[0]) for label in CONFUSED]
    found = [neighbours(model, data, bank, torch.tensor(chosen)) for _, model in networks.values()]
    rows = []
    for place, test in enumerate(chosen):
        image, label = data.test.batch(torch.tensor([test])), int(data.test.labels[test])
        view = view_of(image, WEAK, generator=generator_for(6, test))[0]
        groups: Row = [[(image[0] / 255, None), (view, None)]]
        for near in found:
            images = data.train.batch(near[place]) / 255
            same = (data.train.labels[near[place]] == label).tolist()
            groups.append(list(zip(images, same, strict=True)))
        rows.append(groups)
    return heads, rows


def cost(model: nn.Module, image: Tensor) -> float:
    """Millions of FLOPs of an image."""
    with torch.no_grad():
        return (count_flops(lambda: model(image)).value or float("nan")) / 1e6


@torch.no_grad()
def neighbours(model: nn.Module, data: ImageData, bank: Tensor, tests: Tensor) -> Tensor:
    def features(pixels: Tensor) -> Tensor:
        return nn.functional.normalize(model(standardise(pixels / 255, data.mean, data.std)))

    return nearest(features(data.test.batch(tests)), features(data.train.batch(bank)), K)[1]


def draw_page(heads: Sequence[str], rows: Sequence[Row], picture: Path) -> None:
    """Rows of pictures under the heads of their groups, as one PNG."""
    tiles = sum(len(group) for group in rows[0])
    side = (WIDTH - 40 * len(heads)) // tiles - 10
    cells = [f"<th colspan={len(group)}>{head}</th>" for head, group in zip(heads, rows[0], strict=True)]
    gap = "<td class=gap></td>"
    body = "".join(f"<tr>{gap.join(''.join(map(tile, group)) for group in row)}</tr>" for row in rows)
    style = (
        "body{margin:0;background:#fff;display:flex;justify-content:center;font:15px sans-serif;color:#333;padding:8px}"
        "table{border-spacing:3px}th{font-weight:normal;padding-bottom:6px}.gap{width:24px}th{white-space:nowrap}"
        f"img{{width:{side}px;height:{side}px;image-rendering:pixelated;display:block;border:3px solid #fff}}"
    )
    page = f"<meta charset=utf-8><style>{style}</style><table><tr>{'<th></th>'.join(cells)}</tr>{body}</table>"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "page.html"
        file.write_text(page, encoding="utf-8")
        shoot(file, picture, Path(scratch))


def tile(shown: tuple[Tensor, bool | None]) -> str:
    pixels, same = shown
    content = io.BytesIO()
    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    Image.fromarray((levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)).numpy()).save(content, "PNG")
    colour = "#fff" if same is None else SAME if same else OTHER
    data = base64.b64encode(content.getvalue()).decode()
    return f"<td><img style='border-color:{colour}' src='data:image/png;base64,{data}'></td>"


def against_flops(receipts: Sequence[Receipt], name: str) -> go.Figure:
    """20-NN accuracy at the ends of the runs of one setting, mean over seeds, against their FLOPs."""
    figure = empty_figure()
    mine = [receipt for receipt in receipts if receipt.name == name]
    ways = sorted({receipt.config["way"] for receipt in mine} - {BASELINE})
    colours = {BASELINE: BASELINE_COLOUR, **dict(zip(ways, COLOURS, strict=False))}
    for way, colour in colours.items():
        points = ends([receipt for receipt in mine if receipt.config["way"] == way])
        dash = "dot" if way.startswith("lightly") else "solid"
        x, y = [point[0] for point in points], [point[1] for point in points]
        figure.add_scatter(x=x, y=y, name=way, mode="lines+markers", line={"color": colour, "dash": dash})
    figure.update_xaxes(type="log", title_text=f"FLOPs, {name.rpartition('/')[2]}")
    figure.update_yaxes(title_text="20-NN accuracy, %")
    return figure


def ends(receipts: Sequence[Receipt]) -> list[tuple[float, float]]:
    """For each share of the budget: FLOPs, and mean accuracy in percent."""
    shares = sorted({receipt.config["share"] for receipt in receipts})
    found = []
    for share in shares:
        mine = [receipt for receipt in receipts if receipt.config["share"] == share]
        flops = statistics.fmean(receipt.cost.flops.value or float("nan") for receipt in mine)
        found.append((flops, 100 * statistics.fmean(receipt.quality["knn20_accuracy"] or 0.0 for receipt in mine)))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:4])
