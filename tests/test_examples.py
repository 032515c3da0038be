"""The examples run as a person would run them, and leave receipts that a report can be made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from scrimp.data import load_images
from scrimp.jobs.encoders import features_of, load_encoder
from scrimp.receipts import Receipt, load_receipt
from scrimp.report import find_receipts, summarise
from scrimp.represent import knn_accuracy

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, COUNT = 4, 90


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 100 grey 12 x 12 images each, bright above or below, under noise."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("above", "below")):
        (folder / name).mkdir()
        for number in range(100):
            pixels = torch.randint(0, 120, (12, 12), generator=generator)
            pixels[6 * label : 6 * label + 6] += 100
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{number}.png")
    return folder


def run(*arguments: object, script: str = "own_loop.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", f"examples/{script}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def own_loop(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example printed, and its folder after one run of each way."""
    folder = tmp_path_factory.mktemp("own")
    shown = ""
    for way in ("uniform", "history"):
        done = run("--data", photos, "--sampling", way, "--epochs", EPOCHS, "--out", folder)
        assert done.returncode == 0, done.stderr
        shown = done.stdout
    return shown, folder


def test_every_example_is_run_here() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == ["own_loop.py", "own_pretraining.py"]


@pytest.mark.parametrize("name", ["own_loop.py", "own_pretraining.py"])
def test_an_example_is_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 90


def test_own_loop_learns_at_the_same_cost_either_way(own_loop: tuple[str, Path]) -> None:
    receipts = {receipt.way: receipt for receipt in find_receipts([own_loop[1]])}
    assert set(receipts) == {"uniform", "history"}
    for receipt in receipts.values():
        assert receipt.quality["test_accuracy"] > 0.9
        assert receipt.cost.labels.value == 2 * COUNT
        assert receipt.cost.samples.value == EPOCHS * (2 * COUNT // 64) * 64
        assert receipt.cost.flops.value > 1e6
        assert receipt.cost.flops.missed == ()
        assert receipt.cost.seconds.value > 0
    assert receipts["uniform"].cost.flops == receipts["history"].cost.flops
    assert [row.way for row in summarise(receipts.values()) if row.baseline] == ["uniform"]


def test_own_loop_prints_its_receipt(own_loop: tuple[str, Path]) -> None:
    lines = own_loop[0].splitlines()
    path = lines[-1].removeprefix("receipt: ")
    receipt: Receipt = load_receipt(path)
    printed = {line.split()[0]: line.split()[1] for line in lines[:-1]}
    assert printed["test_accuracy"] == f"{receipt.quality['test_accuracy']:.4f}"
    assert printed["flops"] == f"{receipt.cost.flops.value:.4g}"
    assert printed["stored_bytes"] == "-"  # unknown is not 0
    assert set(receipt.cost.to_dict()) < set(printed)


def test_own_loop_says_what_is_wrong_with_its_data(tmp_path: Path) -> None:
    done = run("--data", tmp_path / "none", "--out", tmp_path / "own")
    assert done.returncode != 0
    assert "expected" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "own").exists()


def test_own_pretraining_gives_an_encoder_that_scrimp_and_timm_load(photos: Path, tmp_path: Path) -> None:
    options = ("--data", photos, "--model", "test_resnet", "--epochs", EPOCHS, "--out", tmp_path)
    done = run(*options, script="own_pretraining.py")
    assert done.returncode == 0, done.stderr
    receipt = load_receipt(tmp_path / "receipt.json")
    assert f"{receipt.quality['knn20_accuracy']:.4f}" in done.stdout
    assert receipt.quality["knn20_accuracy"] > 0.8
    assert receipt.cost.samples.value == EPOCHS * (2 * COUNT // 128) * 128
    assert receipt.cost.flops.value > 1e6
    assert receipt.cost.labels.value is None

    weights = load_file(tmp_path / "weights.safetensors")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn
        timm.create_model("test_resnet", num_classes=0, in_chans=1).load_state_dict(weights)
    encoder = load_encoder(tmp_path / "weights.safetensors")
    data = load_images(str(photos))
    accuracy = knn_accuracy(
        *(features_of(encoder, data.train, device="cpu"), data.train.labels),
        *(features_of(encoder, data.test, device="cpu"), data.test.labels),
        k=20,
    )
    assert accuracy == pytest.approx(receipt.quality["knn20_accuracy"])
