"""`scrimp zoom`: shapes hidden somewhere on large canvases are found, named and shown; killed, split, mistaken runs."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import CLASSES, SIDE, draw
from scrimp.cli import main
from scrimp.data import open_image
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.zoom import zoom_train
from scrimp.jobs.zoom_config import ZoomPredictConfig, ZoomTrainConfig
from scrimp.jobs.zoom_files import Gallery
from scrimp.jobs.zoom_fit import attention_terms
from scrimp.jobs.zoom_plan import load_plan
from scrimp.jobs.zoom_predict import OVERLAYS, PREDICTIONS, zoom_predict
from scrimp.jobs.zoom_readers import Readers, Views
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

HERE = Path(__file__).parent
CANVAS = 256
SHOWN = '<figure><img src="data:image/png'
SMALL = {"patches": 3, "patch_size": (24,), "view": 32, "attention": "small", "features": "convnet-4"}
SMALL |= {"batch_size": 12, "probe": 24}
SHORT = {"epochs": 0.5, "evaluations": 1, "pictures": 2}  # five steps
LITTLE = {**SHORT, "epochs": 1}
TOGETHER: dict[str, dict] = {
    "zoom": {**SHORT, "maps": 2, "augment": "flip", "optimizer": "sgd", "lr": 0.02},
}


def config(out: Path, **settings) -> ZoomTrainConfig:
    usual = {"data": "unused", **SMALL, "lr": 1e-2, "evaluations": 2, "json": True, "device": "cpu", "cache": None}
    return ZoomTrainConfig(**{**usual, **settings}, out=out)


def hide(count: int, seed: int) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
    """Canvases [count, CANVAS, CANVAS] of noise with one shape each, what it is, and its centre, x and y."""
    shapes, labels = draw(count, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    canvases = torch.randint(0, 40, (count, CANVAS, CANVAS), generator=generator).to(torch.uint8)
    corners = torch.randint(0, CANVAS - 2 * SIDE, (count, 2), generator=generator).tolist()
    centres = []
    for canvas, shape, (left, top) in zip(canvases, shapes[:, 0], corners, strict=True):
        strokes = (shape >= 120).repeat_interleave(2, 0).repeat_interleave(2, 1)
        canvas[top : top + 2 * SIDE, left : left + 2 * SIDE][strokes] += 200
        rows, columns = strokes.nonzero(as_tuple=True)
        centres.append((left + int(columns.double().mean()), top + int(rows.double().mean())))
    return canvases.numpy(), [CLASSES[label] for label in labels.tolist()], centres


def galleries(root: Path) -> tuple[Gallery, Gallery]:
    """What `data` wrote."""
    found = []
    for part in ("train", "test"):
        names = json.loads((root / f"{part}.json").read_text())
        found.append(Gallery([str(root / part / f"{number:03}.npy") for number in range(len(names))], names))
    return found[0], found[1]


@pytest.fixture(scope="session")
def hidden(tmp_path_factory) -> Path:
    """120 and 30 canvases as arrays on disk, and where the shapes are."""
    root = tmp_path_factory.mktemp("hidden")
    for part, count, seed in (("train", 120, 0), ("test", 30, 1)):
        canvases, names, centres = hide(count, seed)
        (root / part).mkdir()
        for number, canvas in enumerate(canvases):
            np.save(root / part / f"{number:03}.npy", canvas)
        (root / f"{part}.json").write_text(json.dumps(names))
        (root / f"{part}_centres.json").write_text(json.dumps(centres))
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A few of them as PNG files in class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for part, count, seed in (("train", 24, 2), ("test", 6, 3)):
        canvases, names, _ = hide(count, seed)
        for number, (canvas, name) in enumerate(zip(canvases, names, strict=True)):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(canvas).save(folder / f"{number:03}.png")
    return root


@pytest.fixture(scope="session")
def learned(hidden, tmp_path_factory) -> Path:
    """A run that has learnt its task."""
    out = tmp_path_factory.mktemp("zoom") / "learned"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    zoom_train(config(out, epochs=14, evaluations=3, pictures=2), data=galleries(hidden))
    torch.set_num_threads(threads)
    return out


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


@contextmanager
def stop_after(step: int) -> Iterator[None]:
    """Save at this step, and die at the next one."""
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == step:
            self.save()
        if self.spent.steps == step + 1:
            raise Killed
        return pause(self, begin, stop)

    Fitting._pause = dying
    try:
        yield
    finally:
        Fitting._pause = pause


def test_a_hidden_shape_is_learnt_from_image_labels_alone(learned, hidden):
    receipt = load_receipt(learned / RECEIPT)
    assert receipt.quality["test_accuracy"] > 0.8  # chance: a third
    assert receipt.curve[-1]["train_loss"] < 0.7 * receipt.curve[0]["train_loss"]
    assert {item.name for item in learned.iterdir()} == {CONFIG, RECEIPT, REPORT, WEIGHTS}
    assert (receipt.way, receipt.baseline) == ("zoom", False)
    assert receipt.cost.samples.value == 14 * 120
    assert receipt.cost.flops.missed == ()
    assert receipt.cost.flops.value == pytest.approx(14 * 120 * receipt.notes["flops an image, training"])
    assert receipt.notes["images a second"] == pytest.approx(14 * 120 / receipt.cost.seconds.value)
    page = (learned / REPORT).read_text()
    assert page.count(SHOWN) == 2
    assert "002.npy" not in page
    assert "015.npy" in page


def test_only_patches_are_read(learned, hidden):
    """Of an array on disk those pages of memory that hold the patches; views are made of the whole, before training."""
    notes = load_receipt(learned / RECEIPT).notes
    assert 3 * 24 * 24 <= notes["bytes of patches read an image"] <= 3 * 3 * 4096  # 24 rows lie on three pages
    assert notes["bytes of the training files"] == sum(item.stat().st_size for item in (hidden / "train").iterdir())


def test_attention_is_held_as_wide_as_the_patches():
    settings = ZoomTrainConfig(data="unused", patches=8, spread=0.5, entropy=0.1)
    narrow, wide = math.log(2), math.log(100)
    found = attention_terms(torch.tensor([narrow, wide]), settings)
    assert found.tolist() == pytest.approx([0.5 * math.log(8 / 2) - 0.1 * narrow, -0.1 * wide])
    everywhere = ZoomTrainConfig(data="unused", method="abmil", entropy=0.1)
    assert attention_terms(torch.tensor([narrow]), everywhere).item() == pytest.approx(-0.1 * narrow)


@pytest.mark.parametrize("method", ["abmil", "whole"])
def test_the_ordinary_ways(method, hidden, tmp_path):
    settings = {**SHORT, "method": method, "whole_size": 64}
    receipt = zoom_train(config(tmp_path / "run", **settings), data=galleries(hidden))
    assert (receipt.way, receipt.baseline) == (method, method == "whole")
    assert receipt.quality["test_accuracy"] is not None
    assert receipt.notes["view"] == ([1, 64, 64] if method == "whole" else [1, 32, 32])
    page = (tmp_path / "run" / REPORT).read_text()
    assert page.count(SHOWN) == 2


def test_the_cost_of_all_patches_is_that_of_each_times_their_number(hidden, tmp_path):
    runs = {
        "zoom": {"patches": 5},
        "more": {"patches": 10},
        "abmil": {"method": "abmil", "patch_size": (24,)},
    }
    flops = {}
    for name, settings in runs.items():
        receipt = zoom_train(config(tmp_path / name, **{**SHORT, "pictures": 0, **settings}), data=galleries(hidden))
        flops[name] = receipt.notes["flops an image, inference"]
    patch = (flops["more"] - flops["zoom"]) / 5
    gate = 2 * (2 * 16 * 128 + 128)  # its two layers and its score, for a patch
    assert flops["abmil"] == pytest.approx(121 * (patch + gate) + 2 * 16 * 3 + 2 * 121 * 16, rel=0.01)


@pytest.mark.parametrize("settings", [{"augment": "flip", "ema": 0.5}, {"maps": 2, "patch_size": (24, 48)}])
def test_a_killed_run_resumes_to_the_same_bytes(settings, hidden, tmp_path):
    settings = {**SHORT, **settings}
    data = galleries(hidden)
    whole = zoom_train(config(tmp_path / "whole", **settings), data=data)
    with pytest.raises(Killed), stop_after(3):
        zoom_train(config(tmp_path / "killed", **settings), data=data)
    receipt = zoom_train(config(tmp_path / "killed", **settings, resume=True), data=data)
    assert receipt.notes["resumed"] == 1
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert receipt.notes["bytes of patches read"] == whole.notes["bytes of patches read"]
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    again = zoom_train(config(tmp_path / "killed", **settings, resume=True), data=data)
    assert again.created == receipt.created


def test_an_interrupted_measurement_is_made_anew(hidden, tmp_path, monkeypatch):
    from scrimp.jobs.zoom_fit import ZoomFitting

    inner = ZoomFitting.scenes_of

    def interrupting(self, *arguments, **options):
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *arguments, **options)

    data = galleries(hidden)
    zoom_train(config(tmp_path / "whole", **SHORT), data=data)
    with monkeypatch.context() as patch:
        patch.setattr(ZoomFitting, "scenes_of", interrupting)
        with pytest.raises(Interrupted):
            zoom_train(config(tmp_path / "stopped", **SHORT), data=data)
    receipt = zoom_train(config(tmp_path / "stopped", **SHORT, resume=True), data=data)
    assert len(receipt.curve) == 1
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_opened_images_are_taken_as_well(hidden, tmp_path):
    """Any object that reads like an opened image, made when it is asked for; its views are kept in memory."""
    paths = galleries(hidden)

    class Lazily(list):
        def __getitem__(self, row):
            return open_image(super().__getitem__(row))

    opened = tuple(Gallery(Lazily(gallery.images), gallery.labels) for gallery in paths)
    for name, data in (("paths", paths), ("opened", opened)):
        zoom_train(config(tmp_path / name, **SHORT), data=data)
    assert (tmp_path / "paths" / WEIGHTS).read_bytes() == (tmp_path / "opened" / WEIGHTS).read_bytes()
    assert "image 15" in (tmp_path / "opened" / REPORT).read_text()


def test_loader_workers_change_nothing(hidden, tmp_path):
    data = galleries(hidden)
    for workers in (0, 1):
        settings = {**SHORT, "workers": workers, "pictures": 0, "cache": tmp_path / f"views{workers}"}
        zoom_train(config(tmp_path / str(workers), **settings), data=data)
    assert (tmp_path / "0" / WEIGHTS).read_bytes() == (tmp_path / "1" / WEIGHTS).read_bytes()


def test_two_processes_train_the_same_network(hidden, tmp_path):
    for name, settings in TOGETHER.items():
        zoom_train(config(tmp_path / "1" / name, **settings), data=galleries(hidden))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, str(HERE / "zoom_worker.py"), str(hidden), str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TOGETHER:
        one, two = (load_file(tmp_path / processes / name / WEIGHTS) for processes in ("1", "2"))
        assert all(float((one[key] - two[key]).abs().max()) < 1e-4 for key in one)
        first, second = (load_receipt(tmp_path / processes / name / RECEIPT) for processes in ("1", "2"))
        assert (first.notes["processes"], second.notes["processes"]) == (1, 2)
        assert first.quality["test_loss"] == pytest.approx(second.quality["test_loss"], rel=1e-3)
        assert first.notes["bytes of patches read"] == second.notes["bytes of patches read"]
    resumed = tmp_path / "2" / "resumed"
    assert (resumed / WEIGHTS).read_bytes() == (tmp_path / "2" / "zoom" / WEIGHTS).read_bytes()
    assert load_receipt(resumed / RECEIPT).notes["bytes of patches read"] == first_bytes(tmp_path / "2" / "zoom")


def first_bytes(run: Path) -> int:
    return load_receipt(run / RECEIPT).notes["bytes of patches read"]


def test_a_mirrored_batch_is_the_mirror_image(learned, hidden, tmp_path):
    """The patches of a mirrored image, read from the file as it is, are those of a mirrored file."""
    plan, model = load_plan(learned)
    rows = list(range(4))
    for row in rows:
        np.save(tmp_path / f"{row}.npy", np.ascontiguousarray(np.load(hidden / "test" / f"{row:03}.npy")[:, ::-1]))
    plain, turned = (
        Readers(Gallery([str(path) for path in paths]), limit=2)
        for paths in ([hidden / "test" / f"{row:03}.npy" for row in rows], [tmp_path / f"{row}.npy" for row in rows])
    )
    views = torch.stack([plain.view(row, plan.shape) for row in rows])
    flips = torch.tensor([True, True, False, True])
    with torch.no_grad():
        mine = model.look(plan.scenes(plain, rows, views, flips=flips))
        shown = torch.where(flips[:, None, None, None], views.flip(3), views)
        wanted = model.look(plan.scenes(turned, rows, shown))
        straight = model.look(plan.scenes(plain, rows, views))
    for row in (0, 1, 3):
        assert torch.equal(mine.outputs[row], wanted.outputs[row])
        assert torch.equal(mine.boxes[row], wanted.boxes[row])
    assert torch.equal(mine.boxes[2], straight.boxes[2])


def test_views_are_kept_until_the_file_changes(hidden, tmp_path, monkeypatch):
    path = tmp_path / "image.npy"
    np.save(path, np.load(hidden / "test" / "000.npy"))
    gallery = Gallery([str(path)])
    made = []
    inner = Readers.view
    monkeypatch.setattr(Readers, "view", lambda self, row, shape: made.append(shape) or inner(self, row, shape))

    def view(side: int) -> torch.Tensor:
        return Views(Readers(gallery, limit=1), (1, side, side), tmp_path / "kept").get(0)

    first = view(32)
    assert torch.equal(view(32), first)
    assert len(made) == 1
    assert view(16).shape == (1, 16, 16)
    kept = [item for item in (tmp_path / "kept").rglob("*") if item.is_file()]
    for item in kept:
        item.write_bytes(item.read_bytes()[:-9] + b"damagedxx")
    assert torch.equal(view(32), first)
    assert len(made) == 3
    np.save(path, 255 - np.load(path))
    os.utime(path, ns=(1, 1))
    assert not torch.equal(view(32), first)


def test_views_and_patches_of_several_forms(tmp_path):
    canvas = np.zeros((40, 90, 3), np.uint8)
    canvas[10:20, 30:50] = (200, 100, 0)
    np.save(tmp_path / "colour.npy", canvas)
    np.save(tmp_path / "grey.npy", canvas[..., 0])
    readers = Readers(Gallery([str(tmp_path / "colour.npy"), str(tmp_path / "grey.npy")]), limit=1)
    assert readers.view(0, (3, 20, 20)).shape == (3, 20, 20)  # another form than the image's
    assert readers.view(1, (3, 80, 180)).shape == (3, 80, 180)  # larger than the image
    boxes = torch.tensor([[30, 10, 10, 10], [-5, -5, 10, 10], [25, 5, 30, 30]])
    patches = readers.patches(0, boxes, 10, 3)
    assert patches[0].flatten(1).unique(dim=1).T.tolist() == [[200, 100, 0]]
    assert int(patches[1].max()) == 0
    assert patches[2, 0].float().mean() == pytest.approx(200 * 200 / 900, rel=0.05)  # reduced three times
    assert torch.equal(readers.patches(1, boxes, 10, 3)[:, 1], patches[:, 0])
    grey = Image.fromarray(canvas).convert("L")
    assert int(readers.patches(0, boxes[:1], 10, 1)[0, 0, 0, 0]) == grey.getpixel((30, 10))


def test_predictions_show_where_the_shape_is(learned, hidden, tmp_path):
    gallery = galleries(hidden)[1]
    run = ZoomPredictConfig(run=learned, data="unused", out=tmp_path / "out", json=True, device="cpu", overlays=3)
    receipt = zoom_predict(run, data=gallery)
    trained = load_receipt(learned / RECEIPT)
    assert receipt.quality["test_accuracy"] == pytest.approx(trained.quality["test_accuracy"])
    assert receipt.quality["test_loss"] == pytest.approx(trained.quality["test_loss"], rel=1e-4)
    assert receipt.cost.flops.value == pytest.approx(30 * trained.notes["flops an image, inference"])
    with (tmp_path / "out" / PREDICTIONS).open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probabilities", "boxes", "given"]
    centres = json.loads((hidden / "test_centres.json").read_text())
    hits = right = 0
    for row, middle in zip(rows, centres, strict=True):
        shares = json.loads(row["probabilities"])
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(shares, key=shares.get)
        right += row["label"] == row["given"]
        boxes = json.loads(row["boxes"])
        assert len(boxes) == 3
        hits += any(x <= middle[0] <= x + w and y <= middle[1] <= y + h for x, y, w, h in boxes)
    assert right / 30 == pytest.approx(receipt.quality["test_accuracy"])
    assert hits >= 24  # chance: three patches of 24 hold a given point in 3 of 100 images
    drawn = sorted((tmp_path / "out" / OVERLAYS).iterdir())
    assert [item.name for item in drawn] == [f"{number:05}-{number:03}.png" for number in range(3)]
    with Image.open(drawn[0]) as picture:
        assert picture.size == (360, 360)
        assert len(picture.getcolors(picture.width * picture.height)) > 10
    assert (tmp_path / "out" / REPORT).read_text().count(SHOWN) == 3


def test_stopped_predictions_go_on(learned, hidden, tmp_path, monkeypatch):
    from scrimp.jobs import zoom_predict as module

    gallery = galleries(hidden)[1].take(range(10))
    usual = {"run": learned, "data": "unused", "json": True, "device": "cpu", "batch_size": 4, "overlays": 1}
    zoom_predict(ZoomPredictConfig(**usual, out=tmp_path / "whole"), data=gallery)
    inner, calls = module.look_at, []

    def interrupting(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "look_at", interrupting)
        with pytest.raises(Interrupted):
            zoom_predict(ZoomPredictConfig(**usual, out=tmp_path / "stopped"), data=gallery)
    monkeypatch.setattr(module, "look_at", lambda *a, **o: calls.append(None) or inner(*a, **o))
    receipt = zoom_predict(ZoomPredictConfig(**usual, out=tmp_path / "stopped", resume=True), data=gallery)
    assert (receipt.notes["resumed"], receipt.notes["images"], len(calls)) == (1, 10, 3)
    assert (tmp_path / "stopped" / PREDICTIONS).read_bytes() == (tmp_path / "whole" / PREDICTIONS).read_bytes()


def test_from_the_shell(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--patches", "3", "--patch-size", "24", "--view", "32", "--features", "convnet-4", "--batch-size", "8"]
    short = ["--epochs", "1", "--evaluations", "1", "--device", "cpu"]
    assert main(["zoom", "train", str(pictures), *flags, *short, "--out", "run"]) == 0
    assert "zoom" in capsys.readouterr().out
    assert main(["zoom", "predict", "run", str(pictures / "test"), "--json", "--device", "cpu"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert receipt["notes"]["images"] == 6
    assert set(receipt["quality"]) == {"test_accuracy", "test_loss"}
    assert main(["zoom", "predict", "run", str(pictures), "--json", "--device", "cpu", "--overlays", "0"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert (receipt["notes"]["images"], receipt["quality"]) == (30, {})
    assert main(["zoom", "train", str(pictures), *flags, *short, "--patch-size", "500", "--out", "no"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scrimp: expected --patch-size of at most 256")
    assert error.count("\n") == 1
    assert not Path("no").exists()


def write_table(path: Path, rows: list[tuple[str, ...]], columns: str = "image,label") -> str:
    path.write_text("\n".join([columns, *(",".join(row) for row in rows)]) + "\n")
    return str(path)


def test_tables_of_labels_and_of_numbers(hidden, tmp_path):
    _, names, _ = hide(24, 0)
    labels = [f"{name};big" if number % 2 else name for number, name in enumerate(names)]
    paths = [str(hidden / "train" / f"{number:03}.npy") for number in range(24)]
    several = write_table(tmp_path / "several.csv", list(zip(paths, labels, strict=True)))
    receipt = zoom_train(config(tmp_path / "several", data=several, **LITTLE, held_out=0.25))
    assert receipt.notes["task"] == "labels"
    assert (receipt.notes["training images"], receipt.notes["test images"]) == (18, 6)
    assert {"test_mean_average_precision", "test_accuracy", "test_loss"} <= set(receipt.quality)
    plan, _ = load_plan(tmp_path / "several")
    assert plan.target.classes == ("bar", "big", "cross", "ring")
    numbers = [(path, f"{100 + number}") for number, path in enumerate(paths)]
    parts = [(*row, "test" if place < 4 else "train") for place, row in enumerate(numbers)]
    table = write_table(tmp_path / "numbers.csv", parts, "path,label,split")
    receipt = zoom_train(config(tmp_path / "numbers", data=table, **LITTLE, task="regression"))
    assert (receipt.notes["training images"], receipt.notes["test images"]) == (20, 4)
    assert receipt.quality["test_mean_error"] == pytest.approx(12, abs=6)  # the mean of training is 113.5
    prediction = ZoomPredictConfig(run=tmp_path / "numbers", data=table, out=tmp_path / "p", json=True, device="cpu")
    zoom_predict(prediction)
    with (tmp_path / "p" / PREDICTIONS).open() as file:
        assert all(90 < float(row["label"]) < 140 for row in csv.DictReader(file))


def test_a_damaged_image_is_named_or_left_out(pictures, tmp_path):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(pictures, root)
    victim = sorted((root / "train" / "bar").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:5000])
    with pytest.raises(InputError, match=victim.name):
        zoom_train(config(tmp_path / "run", data=str(root), **LITTLE))
    receipt = zoom_train(config(tmp_path / "run", data=str(root), **LITTLE, on_corrupt="skip"))
    assert (receipt.notes["training images"], receipt.notes["skipped images"]) == (23, 1)
    usual = {"run": tmp_path / "run", "data": str(root / "train"), "json": True, "device": "cpu", "overlays": 0}
    with pytest.raises(InputError, match=victim.name):
        zoom_predict(ZoomPredictConfig(**usual, out=tmp_path / "p"))
    receipt = zoom_predict(ZoomPredictConfig(**usual, out=tmp_path / "q", on_corrupt="skip"))
    assert (receipt.notes["images"], receipt.notes["skipped images"]) == (23, 1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"patch_size": (300,)}, "at most 256"),
        ({"patches": 2000, "attention": "small"}, "--patches of at most 1024"),
        ({"features": "resnet180"}, "timm model name"),
        ({"attention": "resnet180"}, "timm model name"),
        ({"patch_size": (8,), "features": "plain-4"}, "8 x 8"),
        ({"batch_size": 0}, "--batch-size"),
        ({"patch_size": ()}, "--patch-size"),
        ({"smooth": 1.0}, "--smooth"),
        ({"clip": 0.0}, "--clip"),
        ({"epochs": 0.01}, "one step"),
        ({"task": "regression"}, "a number"),
    ],
)
def test_unusable_settings_say_so(settings, word, hidden, tmp_path):
    train, test = galleries(hidden)
    with pytest.raises(InputError, match=word):
        zoom_train(config(tmp_path / "run", **{**SHORT, **settings}), data=(train.take(range(24)), test.take(range(6))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda root: str(root / "absent"), "absent"),
        (lambda root: str(root), "one folder of images a class"),
        (lambda root: write_table(root / "a.csv", [("x.png", "a")], "file,label"), "a column image or path"),
        (lambda root: write_table(root / "a.csv", [("x.png", "a")], "image,name"), "class folders, or a .csv"),
        (lambda root: write_table(root / "a.csv", [("x.png", "a"), ("y.png", "a")]), "two classes"),
        (lambda root: write_table(root / "a.csv", [("x.png", "a"), ("y.png", "b"), ("z.png", "b")]), "x.png"),
        (lambda root: write_table(root / "a.csv", [("", "a"), ("y.png", "b")]), "line 2"),
    ],
)
def test_unusable_data_say_so(make, word, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=word):
        zoom_train(config(tmp_path / "run", data=make(tmp_path / "data")))


def test_what_is_no_run_is_refused(learned, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((learned / WEIGHTS).read_bytes()[:-10])
    for run, word in (("none", "finished run"), ("other.safetensors", "another job"), ("cut.safetensors", "whole")):
        with pytest.raises(InputError, match=word):
            zoom_predict(ZoomPredictConfig(run=tmp_path / run, data=str(tmp_path), device="cpu", json=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="images"):
        zoom_predict(ZoomPredictConfig(run=learned, data=str(tmp_path / "empty"), device="cpu", json=True))


def test_resuming_with_other_settings_is_refused(learned, hidden):
    with pytest.raises(InputError, match="patches"):
        zoom_train(
            config(learned, epochs=14, evaluations=3, pictures=2, patches=4, resume=True), data=galleries(hidden)
        )


def test_minutes_become_steps(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.zoom_setup.seconds_a_step", lambda step, **_: step() or 0.1)
    settings = {"minutes": 0.07, "epochs": None, "evaluations": 1, "pictures": 0, "probe": 1}
    receipt = zoom_train(config(tmp_path / "run", **settings), data=galleries(hidden))
    assert 20 <= receipt.cost.samples.value / 12 <= 32  # 4.2 s less those for the rest of a run
