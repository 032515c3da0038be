"""`scrimp splats fit`: a scene within its size, told truly, the same whether it was interrupted or shared."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from splats_photographs import SIDE, cameras, scene, write_photographs

from scrimp.cli import main, parse
from scrimp.jobs import splats_fit_file, splats_fit_run
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_fit import FittedScene, splats_fit
from scrimp.jobs.splats_fit_file import perceptual, quantiser_for, stored_within
from scrimp.jobs.splats_fit_plan import first_scene, most_gaussians, photographs, settings_of
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt
from scrimp.splats import read, render, write

FAST = {"steps": 20, "gaussians": 120, "degree": 0, "evaluations": 2, "device": "cpu", "json": True}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"))


def fit_to(out: Path, photos: Path, **settings) -> FittedScene:
    return splats_fit(SplatsFitConfig(images=photos, out=out, **FAST | settings))


def psnr_by_hand(path: Path, place: int, photos: Path) -> float:
    with Image.open(photos / f"{place}.png") as image:
        taken = np.asarray(image).astype(float) / 255
    shown = render(read(path), cameras(place + 1)[place], background=(1.0, 1.0, 1.0)).clamp(0, 1).double().numpy()
    return 10 * math.log10(1 / float(((taken - shown) ** 2).mean()))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("format", "size"), [("sgs", "2.5kB"), ("sog", "13kB")])
def test_what_is_told_is_true(tmp_path, photos, format, size):
    done = fit_to(tmp_path / "run", photos, format=format, size=size, ply=True)
    after, unrounded, own = done.receipts
    stored = done.path.stat().st_size
    assert 0.4 * float(size[:-2]) * 1000 < stored <= float(size[:-2]) * 1000
    assert [each.way for each in done.receipts] == [
        f".{format}, rounded afterwards",
        ".ply, not rounded",
        f".{format}, trained for it",
    ]
    assert [each.baseline for each in done.receipts] == [True, False, False]
    assert own.quality["psnr"] == pytest.approx(psnr_by_hand(done.path, 0, photos), abs=1e-3)  # 0.png is held out
    assert unrounded.quality["psnr"] > 10
    assert own.cost.stored_bytes.value == stored >= after.cost.stored_bytes.value
    assert own.cost.cpu_seconds.value > own.curve[-1]["cpu_seconds"] > own.curve[0]["cpu_seconds"] > 0
    assert [point["samples"] for point in own.curve] == [10, 20]
    assert [point["samples"] for point in after.curve] == [10, 20]
    assert own.curve[0] == after.curve[0] != own.curve[1]
    assert own.notes["held out"] == 1
    assert own.notes["Gaussians"] == len(read(done.path))
    assert load_receipt(tmp_path / "run" / "receipt.json").to_dict() == own.to_dict()
    kept = {"config.yaml", "preview.png", "receipt.json", "report.html", "view.html", "scene.ply", f"scene.{format}"}
    assert names(tmp_path / "run") == kept | {"baseline", "unrounded"}
    with Image.open(tmp_path / "run" / "preview.png") as preview:
        assert preview.size == (2 * SIDE, SIDE)
    assert (tmp_path / "run" / "report.html").read_text().count('<img src="data:image/png') == 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> FittedScene:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fixture of each test comes after this one
    done = fit_to(tmp_path_factory.mktemp("straight"), photos, format="sgs", size="2.5kB")
    torch.set_num_threads(threads)
    return done


@pytest.mark.parametrize("at", [17, 22])  # with rounding, and in the second ending without it
def test_interrupted_and_resumed_gives_the_same_file(tmp_path, photos, straight, monkeypatch, at):
    asked = iter([False] * (at - 1) + [True])
    with monkeypatch.context() as stopped:
        stopped.setattr(splats_fit_run, "stop_requests", lambda: nullcontext(lambda: next(asked)))
        with pytest.raises(Interrupted):
            fit_to(tmp_path / "run", photos, format="sgs", size="2.5kB")
    left = names(tmp_path / "run")
    assert not left & {"receipt.json", "scene.sgs"}
    assert ("plain.safetensors" in left, "trained.safetensors" in left) == (at == 22, True)
    resumed = fit_to(tmp_path / "run", photos, format="sgs", size="2.5kB", resume=True)
    assert resumed.path.read_bytes() == straight.path.read_bytes()
    for one, other in zip(resumed.receipts, straight.receipts, strict=True):
        assert one.quality == other.quality
        assert one.cost.stored_bytes == other.cost.stored_bytes
    again = fit_to(tmp_path / "run", photos, format="sgs", size="2.5kB", resume=True)
    assert [each.to_dict() for each in again.receipts] == [each.to_dict() for each in resumed.receipts]
    with pytest.raises(InputError, match="degree"):
        fit_to(tmp_path / "run", photos, format="sgs", size="2.5kB", resume=True, degree=1)


def test_a_signal_stops_it_between_steps(tmp_path, photos, monkeypatch, capsys):
    shown = splats_fit_run.Stage._look
    monkeypatch.setattr(
        splats_fit_run.Stage, "_look", lambda stage: (shown(stage), os.kill(os.getpid(), signal.SIGTERM))
    )
    arguments = ["--steps", "10", "--gaussians", "50", "--degree", "0", "--device", "cpu", "--out"]
    assert main(["splats", "fit", str(photos), *arguments, str(tmp_path / "run")]) == 130
    assert "--resume" in capsys.readouterr().err
    assert names(tmp_path / "run") >= {"config.yaml", "shared.safetensors"}
    (tmp_path / "run" / "shared.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      damaged")
    assert main(["splats", "fit", str(photos), *arguments, str(tmp_path / "run"), "--resume"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scrimp:")]
    assert "shared.safetensors" in line


def test_without_rounding_in_the_loop_it_is_rounded_afterwards(tmp_path, photos):
    done = fit_to(tmp_path / "run", photos, format="sgs", size="2kB", quantise=False, holdout=0, strategy="classic")
    plain, own = done.receipts
    assert done.path.stat().st_size <= 2000
    assert (plain.way, plain.baseline, own.way) == (".ply, not rounded", True, ".sgs, rounded afterwards")
    assert "trained on" in own.notes["measured on"]
    assert own.notes["trained on"] == 7


def test_it_goes_on_from_a_scene(tmp_path, photos):
    path = write(scene(), tmp_path / "given.ply")
    done = fit_to(tmp_path / "run", photos, format="sgs", init=path, baseline=False, gaussians=60, steps=10)
    assert len(done.receipts) == 1
    assert done.receipts[0].quality["psnr"] > 24
    config, dataset = SplatsFitConfig(images=photos, init=path), photographs(SplatsFitConfig(images=photos))
    assert len(first_scene(config, dataset, 25)) == 25


def test_what_does_not_fit_loses_rungs_and_then_gaussians(photos):
    whole = scene(400, 1)
    views = cameras(3)
    for format, most in (("sgs", 2500), ("sog", 22000)):
        kept, fewer = (stored_within(whole, format, size, cameras=views) for size in (most, most // 2))
        assert len(kept.data) <= most
        assert len(fewer.data) <= most // 2
        assert kept.dropped == 0 < fewer.dropped < 400
        assert len(splats_fit_file.decoded(fewer.data, format)) == 400 - fewer.dropped
    with pytest.raises(InputError, match="--size"):
        stored_within(whole, "sgs", 100, cameras=views)


def test_rounding_is_as_fine_as_the_size_allows(photos):
    whole = scene(2000, 1)
    for format, sizes in (("sgs", ("20kB", "30kB", None)), ("sog", ("48kB", "60kB", None))):
        told = []
        for size in sizes:
            config = SplatsFitConfig(images=photos, format=format, size=size)
            quantiser, words = quantiser_for(whole, config)
            quantiser.refresh(whole, anew=True)
            assert size is None or len(quantiser.encode(whole)) <= 1.02 * config.most_bytes()
            told.append(words)
        assert told[0] != told[1] or format == "sog"


def test_minutes_become_steps_that_a_resumed_run_keeps(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.splats_fit_plan._seconds", lambda data, start, settings, quantiser=None: [0.1] * 4)
    monkeypatch.setattr("scrimp.jobs.splats_fit_plan._SLACK", 0.5)
    done = fit_to(tmp_path / "run", photos, steps=30, minutes=4 / 60, baseline=False, format="sgs")
    found = done.receipts[-1].notes["steps"]
    assert 10 <= found < 30
    assert found == pytest.approx(4 * 0.5 / 0.1, rel=0.3)
    with pytest.raises(InputError, match="--minutes of at least"):
        fit_to(tmp_path / "short", photos, steps=None, minutes=1e-4)
    assert not (tmp_path / "short").exists()


def test_the_number_of_gaussians_follows_size_and_pixels(photos):
    dataset = photographs(SplatsFitConfig(images=photos))
    found = {
        size: most_gaussians(SplatsFitConfig(images=photos, size=size, format="sgs"), dataset)
        for size in (None, "5kB", "1GB")
    }
    assert found[None] == found["1GB"] == 2000
    assert found["5kB"] == 500
    settings = settings_of(SplatsFitConfig(images=photos), first=1000, most=2000, steps=3000)
    assert 1000 * settings.strategy.growth ** (0.8 * 3000 / settings.strategy.every) > 2000


def test_lpips_is_asked_only_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert perceptual() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    assert perceptual() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "absent"),
        (["."], "transforms.json"),
        (["photos", "--minutes", "0"], "--minutes"),
        (["photos", "--steps", "3"], "--steps"),
        (["photos", "--size", "100"], "--size of at least"),
        (["photos", "--size", "big"], "2MB"),
        (["photos", "--out", "a.sog"], "folder"),
        (["photos", "--init", "absent.ply"], "absent"),
        (["missing"], "1 absent: gone.png"),
        (["broken"], "1.png"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(tmp_path, photos, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    for name in ("missing", "broken"):
        Path(name).mkdir()
        told = json.loads((photos / "transforms.json").read_text())
        told["frames"] = told["frames"][:3]
        for place in range(3):
            (tmp_path / name / f"{place}.png").write_bytes((photos / f"{place}.png").read_bytes())
        if name == "missing":
            told["frames"].append(told["frames"][0] | {"file_path": "gone.png"})
        else:
            path = tmp_path / name / "1.png"
            path.write_bytes(path.read_bytes()[:90])
        (tmp_path / name / "transforms.json").write_text(json.dumps(told))
    before = names(tmp_path)
    assert main(["splats", "fit", *arguments, "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("scrimp: expected ")
    assert words in line
    assert names(tmp_path) == before


def test_the_shell_fills_the_configuration():
    got = parse(["splats", "fit", "a", "--minutes", "10", "--size", "1MB", "--no-quantise", "--longest", "None"])
    wanted = SplatsFitConfig(images=Path("a"), minutes=10.0, size="1MB", quantise=False, longest=None)
    assert got == wanted
    assert got.most_bytes() == 1_000_000
    assert dataclasses.replace(got, size=None).most_bytes() is None
