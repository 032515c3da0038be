"""`scrimp probe` from weights to receipt: its figures are those of the parts; resume, stops and mistakes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scrimp import cli
from scrimp.data import ImageData, TensorImages
from scrimp.jobs import probe as job
from scrimp.jobs.encoders import create_encoder, encoder_metadata, features_of, load_encoder
from scrimp.jobs.folder import CONFIG, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.probe import probe
from scrimp.jobs.probe_config import ProbeConfig
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt
from scrimp.represent.knn import knn_accuracy
from scrimp.represent.linear import few_label_rows, linear_accuracy

KEYS = ["knn1", "knn20", "knn200", "linear", "linear_1pct", "linear_10pct"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder's run folder: a convnet for the shapes, its weights random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_encoder("convnet-4", channels=1, size=16)
    file = tmp_path_factory.mktemp("weights") / "pretrain-shapes" / WEIGHTS
    file.parent.mkdir()
    save_file(
        model.state_dict(), file, encoder_metadata("convnet-4", channels=1, size=16, mean=(0.2,), std=(0.2,), dim=64)
    )
    return file


def config(out: Path, weights: Any, data: Any = "shapes", **settings: Any) -> ProbeConfig:
    usual = {"json": True, "device": "cpu"}
    return ProbeConfig(**{**usual, **settings}, weights=str(weights), data=str(data), out=out)


def test_the_figures_are_those_of_the_parts(weights, shapes, tmp_path):
    receipt = probe(config(tmp_path / "run", weights, seed=5), data=shapes)
    encoder = load_encoder(weights)
    train, test = (features_of(encoder, part, device="cpu") for part in (shapes.train, shapes.test))
    given = train, shapes.train.labels, test, shapes.test.labels
    quality = receipt.quality
    assert list(quality) == [f"{key}_accuracy" for key in KEYS]
    assert quality["knn1_accuracy"] == knn_accuracy(*given, k=1)
    assert quality["knn20_accuracy"] == knn_accuracy(*given, k=20)
    assert quality["knn200_accuracy"] == knn_accuracy(*given, k=200, temperature=0.1)
    assert quality["linear_accuracy"] == linear_accuracy(*given) > 0.5
    few = receipt.notes["linear_10pct_accuracy"]
    assert few["labels"] == 39
    assert len(few["draws"]) == 3
    assert quality["linear_10pct_accuracy"] == pytest.approx(sum(few["draws"]) / 3)
    assert few["deviation"] == pytest.approx(float(torch.tensor(few["draws"]).double().std()))
    rows = few_label_rows(shapes.train.labels, fraction=0.1, generator=generator_for(5, 1, 2))
    wanted = linear_accuracy(train[rows], given[1][rows], test, given[3], unlabelled=train)
    assert few["draws"][2] == wanted
    assert receipt.notes["linear_1pct_accuracy"]["labels"] == 3
    assert quality["linear_1pct_accuracy"] < quality["linear_accuracy"]


def test_the_receipt_and_what_is_written(weights, shapes, tmp_path):
    receipt = probe(config(tmp_path / "run", weights.parent), data=shapes)
    assert {item.name for item in (tmp_path / "run").iterdir()} == {CONFIG, RECEIPT, REPORT}
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality
    assert (receipt.kind, receipt.name, receipt.way) == ("run", "probe-dataset", "pretrain-shapes")
    encoder = load_encoder(weights)
    one = count_flops(lambda: encoder.model(torch.zeros(1, 1, 16, 16)))
    assert receipt.cost.flops.value == one.value * (384 + 96)
    assert receipt.cost.flops.missed == ()
    assert receipt.cost.labels.value == 384
    assert receipt.cost.stored_bytes.value == weights.stat().st_size
    assert receipt.cost.seconds.value >= sum(receipt.notes["seconds of parts"].values()) > 0
    assert receipt.notes["encoder"]["dim"] == 64
    assert "pretrain-shapes" in (tmp_path / "run" / REPORT).read_text()


def test_the_same_seed_gives_the_same_figures(weights, shapes, tmp_path):
    first, second, other = (
        probe(config(tmp_path / str(place), weights, seed=seed), data=shapes) for place, seed in enumerate((0, 0, 1))
    )
    assert first.quality == second.quality
    assert first.notes["linear_1pct_accuracy"] != other.notes["linear_1pct_accuracy"]
    assert first.quality["linear_accuracy"] == other.quality["linear_accuracy"]


def test_too_few_training_images_leave_figures_out(weights, shapes, tmp_path):
    small = replace(shapes, train=shapes.train.take(torch.arange(15)))
    receipt = probe(config(tmp_path / "run", weights, draws=1), data=small)
    assert receipt.quality["knn200_accuracy"] is receipt.quality["knn20_accuracy"] is None
    assert receipt.quality["knn1_accuracy"] is not None
    assert "only 15" in receipt.notes["knn200_accuracy"]
    assert receipt.notes["linear_1pct_accuracy"]["deviation"] is None
    assert json.loads((tmp_path / "run" / RECEIPT).read_text())["quality"]["knn20_accuracy"] is None


def test_a_folder_of_other_images_is_brought_to_the_encoders_size(weights, shape_folder, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_encoder("convnet-4", channels=3, size=24)
    about = encoder_metadata("convnet-4", channels=3, size=24, mean=(0.2,) * 3, std=(0.2,) * 3, dim=144)
    save_file(model.state_dict(), tmp_path / "colour.safetensors", about)
    receipt = probe(config(tmp_path / "run", tmp_path / "colour.safetensors", shape_folder, draws=1))
    assert receipt.way == "colour"
    assert receipt.name == f"probe-{shape_folder.name}"
    assert receipt.notes["encoder"]["size"] == 24
    assert receipt.quality["linear_accuracy"] > 0.4
    colours = ImageData(
        train=TensorImages(torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.arange(6) % 2),
        test=TensorImages(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2)),
        classes=("a", "b"),
        name="colours",
        mean=(0.5,) * 3,
        std=(1.0,) * 3,
    )
    with pytest.raises(InputError, match="1 channel"):
        probe(config(tmp_path / "grey", weights), data=colours)
    assert not (tmp_path / "grey").exists()


def test_a_ready_encoder_and_images_of_another_size(weights, shapes, tmp_path):
    encoder = load_encoder(weights)
    first = probe(config(tmp_path / "named", "mine", draws=1), data=shapes, encoder=encoder)
    assert first.way == "mine"
    assert first.cost.stored_bytes.value is None
    large = replace(
        shapes,
        train=TensorImages(shapes.train.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), shapes.train.labels),
        test=TensorImages(shapes.test.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), shapes.test.labels),
    )
    second = probe(config(tmp_path / "large", "mine", draws=1), data=large, encoder=encoder)
    assert second.quality["linear_accuracy"] == pytest.approx(first.quality["linear_accuracy"], abs=0.1)
    assert second.cost.flops.value == first.cost.flops.value
    with pytest.raises(InputError, match="leave size out"):
        probe(config(tmp_path / "size", "mine", size=32), data=shapes, encoder=encoder)


def test_a_finished_run_is_read_back_and_a_stopped_one_begun_again(weights, shapes, tmp_path, monkeypatch):
    def stopping(*arguments: Any, **settings: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return linear_accuracy(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(job, "linear_accuracy", stopping)
        with pytest.raises(Interrupted):
            probe(config(tmp_path / "run", weights), data=shapes)
    assert {item.name for item in (tmp_path / "run").iterdir()} == {CONFIG}
    with pytest.raises(InputError, match="draws"):
        probe(config(tmp_path / "run", weights, resume=True, draws=2), data=shapes)
    done = probe(config(tmp_path / "run", weights, resume=True), data=shapes)
    monkeypatch.setattr(job, "load_encoder", lambda *_, **__: pytest.fail("loaded again"))
    again = probe(config(tmp_path / "run", weights, resume=True), data=shapes)
    assert again.created == done.created
    assert again.quality == done.quality
    with pytest.raises(InputError, match="--resume"):
        probe(config(tmp_path / "run", weights), data=shapes)


def test_mistakes_are_told_before_anything_is_written(weights, shapes, tmp_path):
    def said(weights: Any = weights, **settings: Any) -> str:
        with pytest.raises(InputError) as error:
            probe(config(tmp_path / "run", weights, **settings), data=shapes)
        assert not (tmp_path / "run").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--draws" in said(draws=0)
    assert "--l2" in said(l2=0.0)
    assert "--batch-size" in said(batch_size=0)
    assert "--size" in said(size=0)
    assert "absent" in said("none.safetensors")
    assert "weights for resnet18" in said("resnet18")
    assert "no other model" in said(model="resnet18")
    assert "one of the devices" in said(device="cuda")


def test_from_the_shell(weights, shape_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = ["probe", str(weights), str(shape_folder), "--device", "cpu", "--draws", "1"]
    assert cli.main([*usual, "--json", "--out", "run"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["quality"] == load_receipt(tmp_path / "run" / RECEIPT).quality
    assert cli.main([*usual, "--out", "again"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("1 nearest neighbour", "10 % of the labels", "linear classifier"))
    assert f"{100 * shown['quality']['linear_accuracy']:.1f} %" in printed
    assert cli.main(["probe", "none.safetensors", str(shape_folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
