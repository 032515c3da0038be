"""`scrimp train` from Python: budgets, gates, resuming, and inputs that cannot be used."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from scrimp.jobs.budget import time_step
from scrimp.jobs.config import TrainConfig
from scrimp.jobs.engine import check_sharded, check_world
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, WEIGHTS
from scrimp.jobs.models import create_model
from scrimp.jobs.train import train
from scrimp.primitives.errors import InputError, MissingExtraError
from scrimp.receipts import load_receipt

POLICIES = ["uniform", "history", "prune", "presample"]


def config(out: Path, **settings) -> TrainConfig:
    usual = {"epochs": 4, "batch_size": 16, "model": "convnet-8", "evaluations": 2, "json": True, "device": "cpu"}
    return TrainConfig(**{**usual, **settings}, out=out)


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, *, save_at: int) -> None:
    """Let the next run save at one step and die some steps later."""
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == save_at:
            self.save()
        if self.spent.steps == step:
            raise Killed
        return pause(self, begin, stop)

    monkeypatch.setattr(Fitting, "_pause", dying)


def always_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scrimp.select.presample.Gate.open", property(lambda self: self.tau > 0))


@pytest.mark.parametrize("sampling", POLICIES)
def test_it_learns_and_keeps_the_budget(shapes, tmp_path, sampling):
    receipt = train(config(tmp_path / "run", sampling=sampling, epochs=8), data=shapes)
    budget = receipt.config["budget_flops"]
    assert receipt.quality["test_accuracy"] > 0.8
    assert 0.97 * budget < receipt.cost.flops.value <= budget
    assert receipt.curve[0]["train_loss"] > receipt.curve[-1]["train_loss"]
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality


@pytest.mark.parametrize("sampling", POLICIES)
@pytest.mark.parametrize("extras", [{}, {"augment": "crop", "ema": 0.9, "optimizer": "adamw"}], ids=["plain", "extras"])
def test_a_killed_run_resumes_to_the_same_bits(shapes, tmp_path, monkeypatch, sampling, extras):
    always_open(monkeypatch)
    settings = {"sampling": sampling, "gate": 1.0, **extras}
    train(config(tmp_path / "whole", **settings), data=shapes)
    with monkeypatch.context() as patch:
        kill_at(47, patch, save_at=37)
        with pytest.raises(Killed):
            train(config(tmp_path / "killed", **settings), data=shapes)
    receipt = train(config(tmp_path / "killed", **settings, resume=True), data=shapes)
    assert receipt.notes["resumed"] == 1
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not (tmp_path / "killed" / CHECKPOINT).exists()


def test_dropout_resumes_to_the_same_bits(shapes, tmp_path, monkeypatch):
    def with_dropout(*args, **options):
        return torch.nn.Sequential(torch.nn.Dropout(0.2), create_model(*args, **options))

    monkeypatch.setattr("scrimp.jobs.setup.create_model", with_dropout)
    train(config(tmp_path / "whole"), data=shapes)
    with monkeypatch.context() as patch:
        kill_at(30, patch, save_at=20)
        with pytest.raises(Killed):
            train(config(tmp_path / "killed"), data=shapes)
    train(config(tmp_path / "killed", resume=True), data=shapes)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_shut_gate_trains_the_very_same_network(shapes, tmp_path, monkeypatch):
    train(config(tmp_path / "uniform"), data=shapes)
    train(config(tmp_path / "history", sampling="history", gate=1e9), data=shapes)
    monkeypatch.setattr("scrimp.jobs.fit.speedup_threshold", lambda *args, **options: 1e9)
    train(config(tmp_path / "presample", sampling="presample"), data=shapes)
    uniform = (tmp_path / "uniform" / WEIGHTS).read_bytes()
    assert (tmp_path / "history" / WEIGHTS).read_bytes() == uniform
    assert (tmp_path / "presample" / WEIGHTS).read_bytes() == uniform


def test_an_open_gate_does_not(shapes, tmp_path):
    train(config(tmp_path / "uniform"), data=shapes)
    train(config(tmp_path / "history", sampling="history", gate=1.0), data=shapes)
    assert (tmp_path / "history" / WEIGHTS).read_bytes() != (tmp_path / "uniform" / WEIGHTS).read_bytes()


def test_presampling_is_charged_for_its_scores(shapes, tmp_path, monkeypatch):
    always_open(monkeypatch)
    plain = train(config(tmp_path / "uniform"), data=shapes)
    scored = train(config(tmp_path / "presample", sampling="presample"), data=shapes)
    assert scored.cost.samples.value < 0.75 * plain.cost.samples.value
    assert scored.cost.flops.value <= plain.config["budget_flops"]


def test_the_global_generator_is_left_alone(shapes, tmp_path):
    before = torch.get_rng_state()
    train(config(tmp_path / "run", epochs=1), data=shapes)
    assert torch.equal(before, torch.get_rng_state())


def test_the_target_accuracy_stops_early(shapes, tmp_path):
    receipt = train(config(tmp_path / "run", epochs=40, evaluations=40, target_accuracy=0.8), data=shapes)
    assert receipt.quality["test_accuracy"] >= 0.8
    assert receipt.cost.flops.value < 0.8 * receipt.config["budget_flops"]


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k"])
def test_timm_models_train_and_load_back(shapes, tmp_path, name):
    train(config(tmp_path / "run", model=name, size=None, flops=2e9, epochs=None), data=shapes)
    import timm

    options = {"img_size": 16} if "vit" in name else {}
    model = timm.create_model(name, num_classes=3, in_chans=1, **options)
    model.load_state_dict(load_file(tmp_path / "run" / WEIGHTS))


def test_fine_tuning_keeps_all_but_the_classifier(shapes, tmp_path):
    train(config(tmp_path / "first"), data=shapes)
    train_two, test_two = (item.take((item.labels < 2).nonzero()[:, 0]) for item in (shapes.train, shapes.test))
    two = dataclasses.replace(shapes, train=train_two, test=test_two, classes=("a", "b"))
    settings = {"weights": tmp_path / "first" / WEIGHTS, "epochs": 3}
    receipt = train(config(tmp_path / "second", **settings), data=two)
    assert receipt.quality["test_accuracy"] > 0.9


class Pairs(Dataset):
    """A plain map-style data set of (tensor, label)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image, int(label)


def test_a_pair_of_torch_data_sets(shapes, tmp_path):
    receipt = train(config(tmp_path / "run", epochs=2), data=(Pairs(shapes.train), Pairs(shapes.test)))
    assert receipt.notes["training images"] == 384


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_trains_alike_with_and_without_workers(shape_folder, tmp_path, workers):
    receipt = train(config(tmp_path / "run", data=str(shape_folder), workers=workers, epochs=6))
    assert receipt.quality["test_accuracy"] == pytest.approx(
        train(config(tmp_path / "again", data=str(shape_folder), epochs=6)).quality["test_accuracy"]
    )


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-10], "empty": b"", "other": b"GIF89a" + content, "flipped": content}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "other", "flipped"])
def test_a_damaged_checkpoint_is_refused(shapes, tmp_path, monkeypatch, how):
    with monkeypatch.context() as patch:
        kill_at(20, patch, save_at=10)
        with pytest.raises(Killed):
            train(config(tmp_path / "run"), data=shapes)
    damage(tmp_path / "run" / CHECKPOINT, how)
    with pytest.raises(InputError, match=r"checkpoint.*got"):
        train(config(tmp_path / "run", resume=True), data=shapes)


def test_a_damaged_receipt_is_refused(shapes, tmp_path):
    train(config(tmp_path / "run", epochs=1), data=shapes)
    (tmp_path / "run" / RECEIPT).write_text('{"schema": 1, "kind"')
    with pytest.raises(InputError, match="receipt"):
        train(config(tmp_path / "run", epochs=1, resume=True), data=shapes)


def test_resuming_with_other_settings_is_refused(shapes, tmp_path):
    train(config(tmp_path / "run", epochs=1), data=shapes)
    with pytest.raises(InputError, match="lr"):
        train(config(tmp_path / "run", epochs=1, lr=0.5, resume=True), data=shapes)


def test_folders_are_never_overwritten(shapes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("kept")
    with pytest.raises(InputError, match="empty folder"):
        train(config(tmp_path / "run"), data=shapes)
    with pytest.raises(InputError, match="to resume"):
        train(config(tmp_path / "run", resume=True), data=shapes)
    assert [item.name for item in (tmp_path / "run").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model": "no_such_net"}, "timm model name"),
        ({"batch_size": 1000}, "batch size"),
        ({"flops": 10.0, "epochs": None}, "budget of at least one step"),
        ({"minutes": 0.0001, "epochs": None}, "seconds"),
        ({"weights": Path("absent.safetensors")}, "safetensors"),
        ({"parallel": "fsdp"}, "several processes"),
        ({"ema": 0.9, "parallel": "fsdp"}, "several processes"),
    ],
)
def test_unusable_settings_say_so(shapes, tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        train(config(tmp_path / "run", **settings), data=shapes)
    assert not (tmp_path / "run" / CONFIG).exists() or not (tmp_path / "run" / RECEIPT).exists()


@pytest.mark.parametrize("name", ["lr", "warmup", "ema", "evaluations", "probe", "mix", "gate", "pool"])
def test_numbers_out_of_range_say_so(name):
    with pytest.raises(InputError, match=name):
        TrainConfig(**{name: -1}).check()


def test_fewer_processes_than_asked_for_is_an_error():
    check_world(2, {"WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="2 processes"):
        check_world(1, {"WORLD_SIZE": "2"})


@pytest.mark.touches_global_rng
def test_whole_parameters_are_not_shards():
    with pytest.raises(InputError, match="sharded"):
        check_sharded(torch.nn.Linear(2, 2).parameters())


def test_the_minutes_budget_becomes_flops(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.budget.time_step", lambda *_, **__: (0.1, 0.0))
    receipt = train(config(tmp_path / "run", epochs=None, minutes=0.1, evaluations=1), data=shapes)
    assert 54 <= receipt.cost.samples.value / 16 <= 55  # 6 s less half a second for the rest of a run


def test_timing_a_step_leaves_the_model_alone():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 1, 16, 16, generator=generator), torch.tensor([0, 1, 2, 0])
    with torch.random.fork_rng():
        model = create_model("convnet-8", classes=3, channels=1, size=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_seconds, shown_seconds = time_step(model, images, labels, shown=images)
    assert train_seconds > 0
    assert shown_seconds > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_trackers_log_into_the_run_folder(shapes, tmp_path):
    pytest.importorskip("tensorboard")
    train(config(tmp_path / "run", trackers=("tensorboard",), epochs=1), data=shapes)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_missing_and_unknown_trackers_say_so(shapes, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="tensorboard, mlflow, trackio"):
        train(config(tmp_path / "run", trackers=("diary",)), data=shapes)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"scrimp\[trackers\]"):
        train(config(tmp_path / "run", trackers=("trackio",)), data=shapes)


def test_half_precision_trains(shapes, tmp_path):
    receipt = train(config(tmp_path / "run", precision="bf16", epochs=8), data=shapes)
    assert receipt.quality["test_accuracy"] > 0.8


@pytest.mark.slow
def test_a_compiled_model_saves_plain_names(shapes, tmp_path):
    train(config(tmp_path / "plain"), data=shapes)
    train(config(tmp_path / "compiled", compile=True), data=shapes)
    plain, compiled = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(plain[key], compiled[key], atol=1e-3) for key in plain)
