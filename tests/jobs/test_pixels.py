"""`scrimp pixels train` and `scrimp pixels sample`: learning, budgets, resuming to the same bytes, mistakes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file

from conftest import CLASSES, draw
from scrimp.cli import main
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.pixels import pixels_train
from scrimp.jobs.pixels_config import PixelsSampleConfig, PixelsTrainConfig
from scrimp.jobs.pixels_generate import SAMPLES
from scrimp.jobs.pixels_sample import load_model, pixels_sample
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

HERE = Path(__file__).parent
SMALL = {"layers": 1, "heads": 2, "head_dim": 8, "batch_size": 8, "evaluations": 2, "probe": 16, "test_images": 16}


def config(out: Path, **settings) -> PixelsTrainConfig:
    usual = {**SMALL, "steps": 12, "samples": 3, "json": True, "device": "cpu", "lr": 1e-2}
    return PixelsTrainConfig(**{**usual, **settings}, out=out)


def small_images(count: int, seed: int, side: int = 6) -> TensorImages:
    images, labels = draw(count, seed)
    return TensorImages(images[:, :, 5 : 5 + side, 5 : 5 + side].contiguous(), labels)


def tiny_set() -> ImageData:
    train, test = small_images(96, 0), small_images(24, 1)
    return ImageData(train=train, test=test, classes=CLASSES, name="tiny", mean=(0.2,), std=(0.2,), skipped=())


@pytest.fixture(scope="module")
def tiny() -> ImageData:
    return tiny_set()


@pytest.fixture(scope="module", params=["linear", "softmax"])
def run(request, tmp_path_factory, tiny) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("pixels") / f"run-{request.param}"
    pixels_train(config(out, attention=request.param), data=tiny)
    return out


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch, *, save_at: int) -> None:
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == save_at:
            self.save()
        if self.spent.steps == step:
            raise Killed
        return pause(self, begin, stop)

    monkeypatch.setattr(Fitting, "_pause", dying)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
@pytest.mark.parametrize("output", ["categorical", "logistics"])
def test_it_learns_and_writes_what_it_says(tiny, tmp_path, attention, output):
    receipt = pixels_train(config(tmp_path / "run", attention=attention, output=output, steps=60), data=tiny)
    assert receipt.quality["test_bits"] < 7
    assert receipt.quality["test_bits"] == pytest.approx(receipt.quality["test_loss"] / math.log(2))
    assert receipt.curve[0]["test_bits"] > receipt.curve[-1]["test_bits"]
    assert receipt.cost.samples.value == 60 * 8
    assert receipt.cost.flops.value == pytest.approx(receipt.config["budget_flops"])
    assert receipt.cost.flops.missed == ()
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality
    assert {item.name for item in (tmp_path / "run").iterdir()} == {CONFIG, RECEIPT, WEIGHTS, SAMPLES}


def test_the_last_measurement_is_that_of_the_saved_model(tiny, tmp_path):
    receipt = pixels_train(config(tmp_path / "run", test_images=None, ema=0.5), data=tiny)
    model = load_model(tmp_path / "run")
    images = tiny.test.batch(torch.arange(24))
    with torch.no_grad():
        nats = model.output.nats(model(images), images.flatten(1))
    assert float(nats.mean()) == pytest.approx(receipt.quality["test_loss"], rel=1e-5)


@pytest.mark.parametrize("extras", [{}, {"ema": 0.9, "optimizer": "radam"}], ids=["plain", "extras"])
def test_a_killed_run_resumes_to_the_same_bytes(tiny, tmp_path, monkeypatch, extras):
    settings = {"steps": 20, **extras}
    pixels_train(config(tmp_path / "whole", **settings), data=tiny)
    with monkeypatch.context() as patch:
        kill_at(15, patch, save_at=13)
        with pytest.raises(Killed):
            pixels_train(config(tmp_path / "killed", **settings), data=tiny)
    receipt = pixels_train(config(tmp_path / "killed", **settings, resume=True), data=tiny)
    assert receipt.notes["resumed"] == 1
    for name in (WEIGHTS, SAMPLES):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    again = pixels_train(config(tmp_path / "killed", **settings, resume=True), data=tiny)
    assert again.created == receipt.created


@pytest.mark.parametrize("where", ["step", "measurement"])
def test_an_interrupted_run_resumes_to_the_same_bytes(tiny, tmp_path, monkeypatch, where):
    from scrimp.jobs.pixels_fit import PixelFitting

    name = {"step": "_step", "measurement": "_nats"}[where]
    inner = getattr(PixelFitting, name)

    def interrupting(self, *arguments):
        if where == "step" or not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *arguments)

    pixels_train(config(tmp_path / "whole"), data=tiny)
    with monkeypatch.context() as patch:
        patch.setattr(PixelFitting, name, interrupting)
        with pytest.raises(Interrupted):
            pixels_train(config(tmp_path / "stopped"), data=tiny)
    assert (tmp_path / "stopped" / CHECKPOINT).is_file()
    receipt = pixels_train(config(tmp_path / "stopped", resume=True), data=tiny)
    assert len(receipt.curve) == 2
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_global_generator_and_the_arguments_are_left_alone(tiny, tmp_path):
    before = torch.get_rng_state()
    pixels_train(config(tmp_path / "run", steps=2), data=tiny)
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_of_pictures_trains(shape_folder, tmp_path):
    receipt = pixels_train(config(tmp_path / "run", data=str(shape_folder), size=5, epochs=0.1, steps=None))
    assert receipt.notes["shape"] == [1, 5, 5]
    assert receipt.cost.samples.value == 16  # of 192: whole steps only


def test_the_minutes_become_steps(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.pixels.seconds_a_step", lambda *_, **__: 0.1)
    receipt = pixels_train(config(tmp_path / "run", steps=None, minutes=0.05, probe=1, test_images=1), data=tiny)
    assert 15 <= receipt.cost.samples.value / 8 <= 25  # 3 s less those for the rest of a run


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch_size": 1000}, "batch size"),
        ({"layers": 0}, "--layers"),
        ({"lr": 0.0}, "--lr"),
        ({"warmup": 1.0}, "--warmup"),
        ({"ema": 1.0}, "--ema"),
        ({"test_images": 0}, "--test-images"),
        ({"minutes": 0.0001, "steps": None}, "seconds"),
        ({"epochs": 0.001, "steps": None}, "one step"),
    ],
)
def test_unusable_settings_say_so(tiny, tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        pixels_train(config(tmp_path / "run", **settings), data=tiny)
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_settings_is_refused(run, tiny):
    with pytest.raises(InputError, match="head_dim"):
        pixels_train(config(run, attention=run.name[4:], head_dim=4, resume=True), data=tiny)


def sample_config(run: Path, out: Path, **settings) -> PixelsSampleConfig:
    return PixelsSampleConfig(**{"count": 5, "batch": 2, "json": True, "device": "cpu", **settings}, run=run, out=out)


@pytest.mark.parametrize("settings", [{}, {"cache": "none"}, {"weights": "int8"}], ids=["cache", "none", "int8"])
def test_images_are_generated(run, tmp_path, settings):
    receipt = pixels_sample(sample_config(run, tmp_path / "made", **settings))
    assert receipt.quality["images_a_second"] == pytest.approx(5 / receipt.cost.seconds.value)
    assert receipt.quality["seconds_a_token"] == pytest.approx(receipt.cost.seconds.value / (5 * 36))
    assert (receipt.cost.flops.value is None) == (settings.get("cache") == "none")
    assert {item.name for item in (tmp_path / "made").iterdir()} == {CONFIG, RECEIPT, SAMPLES}


def test_the_seed_fixes_the_picture_and_the_batch_does_not(run, tmp_path):
    pictures = []
    for number, settings in enumerate([{}, {"batch": 5}, {"cache": "none"}, {"seed": 1}, {"temperature": 0.1}]):
        pixels_sample(sample_config(run, tmp_path / str(number), **settings))
        pictures.append((tmp_path / str(number) / SAMPLES).read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    assert len(set(pictures)) == 3


def test_images_are_completed(run, tiny, tmp_path):
    from PIL import Image

    receipt = pixels_sample(sample_config(run, tmp_path / "made", count=3), data=tiny)
    assert receipt.notes["pixels given"] == 18
    with Image.open(tmp_path / "made" / SAMPLES) as picture:
        assert picture.size == (22, 22)  # three images, each as given, completed and as it was


def test_stopped_sampling_goes_on(run, tmp_path, monkeypatch):
    from scrimp.jobs import pixels_sample as module

    pixels_sample(sample_config(run, tmp_path / "whole"))
    inner, calls = module.make_decoder, []

    def interrupting(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_decoder", interrupting)
        with pytest.raises(Interrupted):
            pixels_sample(sample_config(run, tmp_path / "stopped"))
    receipt = pixels_sample(sample_config(run, tmp_path / "stopped", resume=True))
    assert receipt.notes["resumed"] == 1
    assert (tmp_path / "stopped" / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()


def test_what_is_no_run_is_refused(run, tmp_path, shapes):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CONFIG).write_text("job: train\nconfig: {}\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / CONFIG).write_text((run / CONFIG).read_text())
    for folder, word in (
        (tmp_path / "none", CONFIG),
        (tmp_path / "other", "another job"),
        (tmp_path / "half", "--resume"),
    ):
        with pytest.raises(InputError, match=word):
            pixels_sample(sample_config(folder, tmp_path / "made"))
    (tmp_path / "half" / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(InputError, match="safetensors"):
        pixels_sample(sample_config(tmp_path / "half", tmp_path / "made"))
    with pytest.raises(InputError, match="--count"):
        pixels_sample(sample_config(run, tmp_path / "made", count=1000), data=tiny_set())
    with pytest.raises(InputError, match="--temperature"):
        pixels_sample(sample_config(run, tmp_path / "made", temperature=0.0))
    assert not (tmp_path / "made").exists()


def test_the_flags_make_the_configurations():
    found = tyro.cli(PixelsTrainConfig, args=["mnist", "--attention", "softmax", "--test-images", "None"])
    assert (found.data, found.attention, found.test_images) == ("mnist", "softmax", None)
    found = tyro.cli(PixelsSampleConfig, args=["runs/x", "--count", "3"])
    assert (found.run, found.count) == (Path("runs/x"), 3)


def test_from_the_shell(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shown = ["--device", "cpu", "--count", "2"]
    assert main(["pixels", "sample", str(run), *shown]) == 0
    output = capsys.readouterr()
    assert SAMPLES in output.err
    assert "images" in output.out
    assert main(["pixels", "sample", str(run), *shown, "--json"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert receipt["way"].startswith(run.name[4:])
    assert main(["pixels", "sample", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("scrimp: expected a run folder")
    assert error.count("\n") == 1


def test_two_processes_train_the_same_network(tiny, tmp_path):
    pixels_train(config(tmp_path / "1", lr=1e-3), data=tiny)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, __file__, str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / str(processes) / WEIGHTS) for processes in (1, 2))
    assert all(float((one[key] - two[key]).abs().max()) < 1e-3 for key in one)
    one, two = (load_receipt(tmp_path / str(processes) / RECEIPT) for processes in (1, 2))
    assert (one.notes["processes"], two.notes["processes"]) == (1, 2)
    assert one.quality["test_bits"] == pytest.approx(two.quality["test_bits"], rel=1e-3)


if __name__ == "__main__":
    pixels_train(config(Path(sys.argv[1]), lr=1e-3), data=tiny_set())
