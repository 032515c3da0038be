"""`scrimp pretrain`: every method learns, is counted, resumes to the same bytes; one process and two agree."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_distributed import HERE, torchrun

from conftest import draw
from scrimp.data import ImageData, per_image
from scrimp.jobs.checkpoint import load_checkpoint
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.models import SmallResNet, create_model
from scrimp.jobs.pretrain import pretrain
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

METHODS = {
    "byol": {"method": "byol"},
    "mean-shift": {"method": "mean-shift"},
    "constrained": {"method": "constrained"},
    "disk": {"method": "constrained", "cache": "disk"},
    "constrained-labels": {"method": "constrained", "constraint": "labels", "labelled": 0.5},
    "constrained-pseudo-labels": {"method": "constrained", "constraint": "pseudo-labels", "labelled": 0.2},
    "crops": {"method": "mean-shift", "local_crops": 2, "local_share": 1.0, "accumulate": 2},
}
USUAL = {
    "model": "convnet-4",
    "batch_size": 16,
    "evaluations": 2,
    "probe": 64,
    "epochs": 2.0,
    "memory": 64,
    "hidden": 32,
}


def config(out: Path, **settings) -> PretrainConfig:
    return PretrainConfig(
        **{**USUAL, "dim": 16, "precision": "fp32", "json": True, "device": "cpu", **settings}, out=out
    )


@pytest.fixture(scope="module")
def small(shapes) -> ImageData:
    """A sixth of the shapes: two passes take a second."""
    return replace(shapes, train=shapes.train.take(torch.arange(64)), test=shapes.test.take(torch.arange(24)))


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_writes_what_it_says(shapes, tmp_path, name):
    receipt = pretrain(config(tmp_path / "run", **METHODS[name], epochs=4.0), data=shapes)
    losses = [point["train_loss"] for point in receipt.curve]
    assert losses[-1] < losses[0]
    assert receipt.cost.samples.value == 4 * 384
    assert receipt.cost.flops.value == pytest.approx(receipt.config["budget_flops"], rel=1e-6)
    assert receipt.cost.flops.missed == ()
    assert receipt.cost.labels.value == {"constrained-labels": 192, "constrained-pseudo-labels": 78}.get(name, 0)
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality
    written = {item.name for item in (tmp_path / "run").iterdir()}
    assert written == {CONFIG, RECEIPT, WEIGHTS, REPORT, "neighbours.png"}


def test_labels_in_the_constraint_help(shapes, tmp_path):
    """Neighbours of the same class must do more for the classes than any neighbours: the labels reach the loss."""
    settings = {"epochs": 6.0, "lr": 0.02}
    free = pretrain(config(tmp_path / "free", method="mean-shift", **settings), data=shapes)
    told = pretrain(config(tmp_path / "told", constraint="labels", **settings), data=shapes)
    assert told.quality["knn20_accuracy"] > free.quality["knn20_accuracy"] + 0.05


def test_costs_are_those_of_the_forward_and_backward_passes(shapes, tmp_path):
    found = {
        name: pretrain(config(tmp_path / name, **METHODS[name], epochs=1.0), data=shapes).cost.flops.value
        for name in ("byol", "mean-shift", "constrained")
    }
    assert found["mean-shift"] < 0.52 * found["byol"]
    assert found["mean-shift"] < found["constrained"] < 1.03 * found["mean-shift"]


def test_the_saved_weights_are_the_backbones_alone(small, tmp_path):
    pretrain(config(tmp_path / "run", model="resnet10t", batch_size=4, k=2, epochs=0.2), data=small)
    with torch.random.fork_rng([]):
        encoder = create_model("resnet10t", classes=0, channels=1, size=32)
    encoder.load_state_dict(load_file(tmp_path / "run" / WEIGHTS))
    with safe_open(tmp_path / "run" / WEIGHTS, "pt") as file:
        facts = file.metadata()
    assert (facts["kind"], facts["model"], facts["channels"], facts["size"]) == ("encoder", "resnet10t", "1", "16")


def test_a_vision_transformer_learns(small, tmp_path):
    receipt = pretrain(config(tmp_path / "run", model="vit_tiny_patch16_224", epochs=0.25), data=small)
    assert receipt.quality["train_loss"] is not None
    assert receipt.cost.flops.missed == ()


def test_unlabelled_images_of_any_arrangement(tmp_path):
    images, _ = draw(48, 0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / ("deep" if number % 2 else "")
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    receipt = pretrain(config(tmp_path / "run", data=str(tmp_path / "photos"), unlabelled=True))
    assert set(receipt.quality) == {"train_loss"}
    assert (tmp_path / "run" / "neighbours.png").is_file()


@pytest.mark.parametrize("method", ["mean-shift", "byol"])
def test_own_views_are_taken(small, tmp_path, method):
    """A transform of one image that gives two views, as lightly's do."""
    seen = []

    def transform(image: Image.Image) -> list[torch.Tensor]:
        seen.append(image.size)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, *image.size) / 255
        return [pixels, pixels.flip(2)]

    run = config(tmp_path / "run", method=method, epochs=1.0)
    receipt = pretrain(run, data=small, views=per_image(transform, seed=0))
    assert seen.count((16, 16)) >= 64
    again = pretrain(replace(run, out=tmp_path / "again"), data=small, views=per_image(transform, seed=0))
    assert again.quality == receipt.quality


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_resumes_to_the_same_bytes(small, tmp_path, monkeypatch, name):
    settings = {**METHODS[name], "epochs": 3.0}
    pretrain(config(tmp_path / "whole", **settings), data=small)
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == 6:
            self.save()
        if self.spent.steps == 9:
            raise Killed
        return pause(self, begin, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_pause", dying)
        with pytest.raises(Killed):
            pretrain(config(tmp_path / "killed", **settings), data=small)
    receipt = pretrain(config(tmp_path / "killed", **settings, resume=True), data=small)
    whole = load_receipt(tmp_path / "whole" / RECEIPT)
    assert receipt.notes["resumed"] == 1
    assert receipt.quality == whole.quality
    for file in (WEIGHTS, "neighbours.png"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {item.name for item in (tmp_path / "killed").iterdir()} == {
        item.name for item in (tmp_path / "whole").iterdir()
    }
    again = pretrain(config(tmp_path / "killed", **settings, resume=True), data=small)
    assert again.created == receipt.created


def test_the_cache_is_not_in_the_checkpoint_and_must_be_its_own(small, tmp_path, monkeypatch):
    step = Fitting._step

    def interrupting(self, *arguments):
        step(self, *arguments)
        if self.spent.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_step", interrupting)
        with pytest.raises(Interrupted):
            pretrain(config(tmp_path / "run"), data=small)
    (snapshot,) = (tmp_path / "run").glob("embeddings-*.safetensors")
    assert snapshot.name == "embeddings-3.safetensors"
    assert load_file(snapshot)["vectors"].shape == (64, 16)
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert set(state["more"]["objective"]) == {"memory", "earlier"}
    snapshot.unlink()
    with pytest.raises(InputError, match="embeddings"):
        pretrain(config(tmp_path / "run", resume=True), data=small)


def test_the_global_generator_is_left_alone(small, tmp_path):
    before = torch.get_rng_state()
    pretrain(config(tmp_path / "run", epochs=0.5), data=small)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch_size": 1000}, "batch"),
        ({"batch_size": 1}, "--batch-size"),
        ({"accumulate": 3}, "--accumulate"),
        ({"k": 17}, "neighbours"),
        ({"memory": 3}, "--memory"),
        ({"momentum": 1.0}, "--momentum"),
        ({"labelled": 0.0}, "--labelled"),
        ({"unlabelled": True, "constraint": "labels"}, "--unlabelled"),
        ({"model": "resnet-none"}, "timm"),
        ({"epochs": 0.001}, "one step"),
        ({"epochs": None, "minutes": 0.0001}, "seconds"),
        ({"parallel": "fsdp"}, "several processes"),
        ({"local_crops": 1}, "--local-share"),
    ],
)
def test_unusable_settings_say_so_and_leave_nothing(small, tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        pretrain(config(tmp_path / "run", **settings), data=small)
    assert not (tmp_path / "run" / WEIGHTS).exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the same runs by one process and by two."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for processes, folder in enumerate(folders, 1):
        torchrun(processes, str(HERE / "pretrain_worker.py"), str(folder), cwd=folder)
    return folders


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_network(runs, name, parallel):
    one = load_file(runs[0] / f"{name}-ddp" / WEIGHTS)
    two = load_file(runs[1] / f"{name}-{parallel}" / WEIGHTS)
    assert one.keys() == two.keys()
    for key in one:
        assert float((one[key] - two[key]).abs().max()) < 1e-3, key


def test_the_methods_differ(runs):
    """The parity above would hold of networks that never moved."""
    one, other = (load_file(runs[1] / f"{name}-ddp" / WEIGHTS) for name in ("byol", "mean-shift"))
    assert any(float((one[key] - other[key]).abs().max()) > 1e-2 for key in one)


def test_two_processes_measure_the_same(runs):
    one, two = (load_receipt(folder / "constrained-ddp" / RECEIPT) for folder in runs)
    assert two.notes["processes"] == 2
    assert one.quality["knn20_accuracy"] == pytest.approx(two.quality["knn20_accuracy"], abs=0.05)
    assert one.quality["train_loss"] == pytest.approx(two.quality["train_loss"], abs=1e-2)


def test_a_small_resnet_has_timms_names():
    import timm

    with torch.random.fork_rng([]):
        ours = SmallResNet(0, channels=3).state_dict()
        theirs = timm.create_model("resnet18", num_classes=0).state_dict()
        narrow = create_model("small-resnet18-8", classes=0, channels=1, size=28)
    differing = {key for key in ours if theirs[key].shape != ours[key].shape}
    assert ours.keys() == theirs.keys()
    assert differing == {"conv1.weight"}
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 64)
