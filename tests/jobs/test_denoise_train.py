"""`scrimp denoise train`: learning, budgets of both kinds of steps, resuming to the same bytes, adapters, mistakes."""

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
from PIL import Image
from safetensors.torch import load_file

from conftest import CLASSES, draw
from scrimp.cli import main
from scrimp.data import ImageData, TensorImages
from scrimp.denoise import ImportanceLevels
from scrimp.jobs.denoise import denoise_train
from scrimp.jobs.denoise_config import RECIPES, DenoiseTrainConfig
from scrimp.jobs.denoise_fit import DenoiseFitting
from scrimp.jobs.denoise_models import find_model, load_denoiser, new_denoiser
from scrimp.jobs.denoise_train_error import LOG10_SNR, clean_error, levels_near
from scrimp.jobs.denoise_train_plan import Costs, count_costs, make_plan
from scrimp.jobs.denoise_train_run import ADAPTER
from scrimp.jobs.denoise_train_step import Objective, Parts, Rows
from scrimp.jobs.engine import accelerated
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.pixels_generate import SAMPLES
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

pytest.importorskip("diffusers")

HERE = Path(__file__).parent
SMALL = {"model": "unet-8", "batch_size": 8, "evaluations": 2, "probe": 18, "samples": 3, "sample_steps": 2}
TOGETHER = {
    "unet": {"model": "unet-8", "steps": 6, "keep": 0.6},
    "dit": {"model": "dit-16", "steps": 16, "batch_size": 32, "augment": "flip"},
    "plain": {"model": "dit-16", "recipe": "plain", "steps": 6},
}
"""Runs that one process and two make alike."""


def config(out: Path, **settings) -> DenoiseTrainConfig:
    usual = {**SMALL, "steps": 8, "json": True, "device": "cpu"}
    return DenoiseTrainConfig(**{**usual, **settings}, out=out)


def small_images(count: int, seed: int, side: int = 12) -> TensorImages:
    images, labels = draw(count, seed)
    return TensorImages(images[:, :, 2 : 2 + side, 2 : 2 + side].contiguous(), labels)


def tiny_set() -> ImageData:
    train, test = small_images(96, 0), small_images(36, 1)
    return ImageData(train=train, test=test, classes=CLASSES, name="tiny", mean=(0.2,), std=(0.2,), skipped=())


def weights_of(run: Path) -> Path:
    return next((run / "model").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def tiny() -> ImageData:
    return tiny_set()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny) -> Path:
    """A trained model of three classes."""
    out = tmp_path_factory.mktemp("denoise") / "base"
    denoise_train(config(out, model="dit-16", steps=20, lr=3e-3), data=tiny)
    return out


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


def dying(step: int, save_at: int):
    """A `Fitting._pause` that saves at one step and dies at another."""
    pause = Fitting._pause

    def replaced(self, begin, stop):
        if self.spent.steps == save_at:
            self.save()
        if self.spent.steps == step:
            raise Killed
        return pause(self, begin, stop)

    return replaced


@pytest.fixture(scope="module", params=["unet-8", "dit-16"])
def untrained(request, tiny):
    """A name, and the error of a network of that name without training."""
    denoiser = new_denoiser(request.param, (1, 12, 12), 3, "v", seed=0)
    with accelerated(config(Path("unused"))) as accelerator:
        return request.param, clean_error(denoiser, tiny.test, accelerator, limit=18, labelled=True).loss


def test_it_learns_and_writes_what_it_says(tiny, untrained, tmp_path):
    name, before = untrained
    settings = {"model": name, "keep": 0.6, "steps": 30, "ema": 0.9, "lr": 4e-3}
    receipt = denoise_train(config(tmp_path / "run", **settings), data=tiny)
    assert before * 0.85 > receipt.curve[0]["test_loss"] > receipt.curve[1]["test_loss"]
    notes = receipt.notes
    steps = notes["steps on parts of images"], notes["steps on whole images"]
    assert sum(steps) == 30
    assert min(steps) > 0
    counted = 8 * (steps[0] * notes["flops an image"]["part"] + steps[1] * notes["flops an image"]["whole"])
    assert receipt.cost.flops.value == pytest.approx(counted)
    # Parts first, and the last quarter of the FLOPs on whole images.
    assert 8 * steps[1] * notes["flops an image"]["whole"] / counted == pytest.approx(0.25, abs=0.04)
    assert notes["flops an image"]["part"] < 0.75 * notes["flops an image"]["whole"]
    assert (notes["prediction"], notes["weighting"], notes["timesteps"]) == ("v", "min-snr", "importance")
    assert set(notes["test error by snr"]) == {f"{10**power:.3g}" for power in LOG10_SNR}
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality
    assert {item.name for item in (tmp_path / "run").iterdir()} == {CONFIG, RECEIPT, "model", SAMPLES}
    assert receipt.cost.stored_bytes.value == weights_of(tmp_path / "run").stat().st_size


def test_the_gain_is_bounded_in_words(tiny, tmp_path, capsys, monkeypatch):
    """Uniform draws of a batch see too few levels; with few ranges all are seen, and the bound is known."""
    unknown = denoise_train(config(tmp_path / "unknown", steps=2), data=tiny)
    assert unknown.notes["variance_ratio"] is None
    assert "not known" in unknown.notes["importance timesteps"]
    few = ImportanceLevels.__init__.__kwdefaults__
    monkeypatch.setitem(few, "bins", 4)
    known = denoise_train(config(tmp_path / "known", recipe="plain", steps=4, json=False), data=tiny)
    ratio = known.notes["variance_ratio"]
    assert ratio > 1
    assert known.curve[-1]["variance_ratio"] == ratio
    assert f"at most {ratio:.2f}x" in known.notes["importance timesteps"]
    assert f"importance timesteps can gain at most {ratio:.2f}x here" in capsys.readouterr().err


def test_the_error_is_that_of_the_saved_model(tiny, tmp_path):
    receipt = denoise_train(config(tmp_path / "run", ema=0.5), data=tiny)
    with accelerated(config(tmp_path)) as accelerator:
        found = clean_error(load_denoiser(tmp_path / "run"), tiny.test, accelerator, limit=18, labelled=True)
    assert found.loss == pytest.approx(receipt.quality["test_loss"], rel=1e-5)


def test_the_error_means_the_same_whatever_is_predicted(tiny, tmp_path):
    """Networks that answer zero as v, noise and flow: their clean estimates are known, and so is the error."""

    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameter = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, *arguments, **options):
            return (torch.zeros_like(x),)

    with accelerated(config(tmp_path)) as accelerator:
        for prediction in ("epsilon", "v", "sample", "flow"):
            denoiser = new_denoiser("unet-8", (1, 12, 12), None, prediction, seed=0)
            levels = levels_near(denoiser)
            near = denoiser.process.snr(levels).log10()
            assert torch.allclose(near, torch.tensor(LOG10_SNR), atol=0.06)
            object.__setattr__(denoiser, "model", Zero())
            found = clean_error(denoiser, tiny.test, accelerator, limit=36, labelled=False)
            clean = tiny.test.pixels.double() / 127.5 - 1
            if prediction == "sample":
                assert found.by_snr["1"] == pytest.approx(float(clean.square().mean()), rel=0.5)
            if prediction == "epsilon":  # x / signal - clean = sigma / signal * noise
                assert found.by_snr["100"] == pytest.approx(0.01, rel=0.3)
                assert found.by_snr["0.01"] == pytest.approx(100, rel=0.3)
                # 4 of the powers have min(snr, 5) / snr < 1
                wanted = sum(min(10**power, 5) / 10**power for power in LOG10_SNR) / len(LOG10_SNR)
                assert found.loss == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize("model", ["unet-8", "dit-16"])
def test_a_killed_run_resumes_to_the_same_bytes(tiny, tmp_path, monkeypatch, model):
    settings = {"model": model, "keep": 0.6, "steps": 14, "augment": "flip"}
    denoise_train(config(tmp_path / "whole", **settings), data=tiny)
    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_pause", dying(9, save_at=7))
        with pytest.raises(Killed):
            denoise_train(config(tmp_path / "killed", **settings), data=tiny)
    receipt = denoise_train(config(tmp_path / "killed", **settings, resume=True), data=tiny)
    assert receipt.notes["resumed"] == 1
    for find in (weights_of, lambda run: run / SAMPLES):
        assert find(tmp_path / "killed").read_bytes() == find(tmp_path / "whole").read_bytes()
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    again = denoise_train(config(tmp_path / "killed", **settings, resume=True), data=tiny)
    assert again.created == receipt.created


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch):
    inner = DenoiseFitting._step

    def interrupting(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiseFitting, "_step", interrupting)
        with pytest.raises(Interrupted):
            denoise_train(config(tmp_path / "stopped"), data=tiny)
    assert (tmp_path / "stopped" / CHECKPOINT).is_file()
    receipt = denoise_train(config(tmp_path / "stopped", resume=True), data=tiny)
    assert (receipt.notes["resumed"], receipt.cost.samples.value) == (1, 64)
    with pytest.raises(InputError, match="batch_size"):
        denoise_train(config(tmp_path / "stopped", resume=True, batch_size=4), data=tiny)


def test_two_processes_train_the_same_network(tmp_path):
    for name, settings in TOGETHER.items():
        denoise_train(config(tmp_path / "1" / name, **settings), data=tiny_set())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*launcher, str(HERE / "denoise_worker.py"), str(tmp_path / "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in TOGETHER:
        one, two = (load_file(weights_of(tmp_path / processes / name)) for processes in ("1", "2"))
        assert all(float((one[key] - two[key]).abs().max()) < 2e-3 for key in one), name
        first, second = (load_receipt(tmp_path / processes / name / RECEIPT) for processes in ("1", "2"))
        assert (first.notes["processes"], second.notes["processes"]) == (1, 2)
        assert first.quality["test_loss"] == pytest.approx(second.quality["test_loss"], rel=1e-2)
        ratios = first.notes["variance_ratio"], second.notes["variance_ratio"]
        if name == "dit":
            assert ratios == pytest.approx(ratios[::-1], rel=1e-2)
        else:
            assert ratios == (None, None)  # 6 batches of 8 do not see all of 64 ranges of levels
    assert weights_of(tmp_path / "2" / "resumed").read_bytes() == weights_of(tmp_path / "2" / "dit").read_bytes()
    # Both processes hold the scores of the whole batch.
    mine, other = (torch.tensor(json.loads((tmp_path / "2" / f"scores-{rank}.json").read_text())) for rank in (0, 1))
    assert mine.any()
    assert torch.equal(mine, other)


@pytest.mark.parametrize("adapter", ["nola", "lora"])
def test_an_adapter_learns_beside_the_untouched_model(base, tiny, tmp_path, adapter):
    before = weights_of(base).read_bytes()
    rings = small_images(96, 3)
    rings = rings.take((rings.labels == 2).nonzero().flatten())
    data = ImageData(rings, rings, ("rings",), "rings", (0.2,), (0.2,))
    settings = {"start": base, "adapter": adapter, "steps": 30, "batch_size": 64, "lr": 2e-2, "evaluations": 3}
    receipt = denoise_train(config(tmp_path / "run", **settings), data=data)
    assert receipt.curve[-1]["test_loss"] < receipt.curve[0]["test_loss"]
    assert weights_of(base).read_bytes() == before
    assert {item.name for item in (tmp_path / "run").iterdir()} == {CONFIG, RECEIPT, ADAPTER, SAMPLES}
    size = (tmp_path / "run" / ADAPTER).stat().st_size
    assert receipt.cost.stored_bytes.value == size
    assert receipt.cost.samples.value == 30 * 32  # the batch is what there is
    if adapter == "nola":
        assert size <= 8192
    model = load_denoiser(base).model
    assert receipt.notes["numbers of the model"] == sum(item.numel() for item in model.parameters())
    adapted = load_denoiser(base, adapter=tmp_path / "run" / ADAPTER)
    with accelerated(config(tmp_path)) as accelerator:
        errors = [
            clean_error(item, rings, accelerator, limit=18, labelled=False).loss
            for item in (load_denoiser(base), adapted)
        ]
    assert errors[1] < errors[0]
    assert errors[1] == pytest.approx(receipt.quality["test_loss"], rel=1e-3)  # rounded to 16 bits


def test_an_adapter_of_a_folder_of_images_from_the_shell(base, tmp_path):
    for number, image in enumerate(small_images(20, 4).pixels):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "photos" / f"{number}.png")
    command = ["denoise", "train", str(tmp_path / "photos"), "--start", str(base), "--adapter", "nola", "--steps", "2"]
    flags = ["--probe", "9", "--samples", "0", "--rank", "2", "--adapter-bytes", "4000", "--json"]
    assert main([*command, *flags, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert (tmp_path / "run" / ADAPTER).stat().st_size <= 4000
    assert load_receipt(tmp_path / "run" / RECEIPT).notes["classes"] is None


def test_training_goes_on_from_a_model(base, tiny, tmp_path):
    receipt = denoise_train(config(tmp_path / "run", start=base, steps=10), data=tiny)
    assert receipt.notes["prediction"] == "v"
    assert receipt.quality["test_loss"] < 1.1 * load_receipt(base / RECEIPT).quality["test_loss"]
    assert (find_model(tmp_path / "run") / "transformer").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "flow", "timesteps": "logit-normal", "weighting": "constant"},
        {"prediction": "sample", "weighting": "p2", "timesteps": "even"},
        {"model": "dit-16", "attention": "linear", "precision": "bf16", "classes": False},
        {"keep": 1.0, "ema": None, "optimizer": "radam", "attention": "clustered"},
    ],
    ids=str,
)
def test_single_flags_override_the_recipe(tiny, tmp_path, settings):
    settings = {"keep": 0.6, **settings}
    receipt = denoise_train(config(tmp_path / "run", **settings), data=tiny)
    for name in ("prediction", "weighting", "timesteps"):
        assert receipt.notes[name] == settings.get(name, RECIPES["thrifty"][name])
    assert math.isfinite(receipt.quality["test_loss"])
    assert not receipt.baseline
    stored = load_denoiser(tmp_path / "run")
    assert stored.attention == settings.get("attention", "softmax")
    bare = settings.get("classes") is False
    assert (stored.classes, stored.names) == ((None, ()) if bare else (3, tuple(CLASSES)))
    if settings["keep"] == 1.0:
        assert receipt.notes["steps on parts of images"] == 0


def test_plain_is_the_baseline(tiny, tmp_path):
    receipt = denoise_train(config(tmp_path / "run", recipe="plain", steps=2), data=tiny)
    assert (receipt.way, receipt.baseline) == ("plain", True)
    assert receipt.notes["prediction"] == "epsilon"
    assert receipt.notes["steps on parts of images"] == 0


@pytest.mark.parametrize(
    ("budget", "partial", "whole"),
    [
        ({"steps": 100}, 86, 14),
        ({"flops": 1e6}, 187, 31),
        ({"epochs": 2.0}, 21, 3),
        ({"steps": 100, "flops": 1e5}, 18, 3),
    ],
)
def test_budgets_pay_for_both_kinds_of_steps(tmp_path, budget, partial, whole):
    """A step costs 4,000 FLOPs on parts, 8,000 on whole images; a quarter of the FLOPs is for whole ones."""
    settings = {"steps": None, **budget, "batch_size": 8, "model": "dit-16"}
    costs = Costs(500.0, 1000.0, 300.0, ())
    denoiser = new_denoiser("dit-16", (1, 12, 12), None, "v", seed=0)
    with accelerated(config(tmp_path)) as accelerator:
        plan = make_plan(
            config(tmp_path, **settings), denoiser, costs, accelerator=accelerator, images=100, labelled=False
        )
    assert (plan.partial_steps, plan.whole_steps) == (partial, whole)
    assert plan.flops(8) <= (budget.get("flops") or 1e9)


def test_minutes_become_steps(tiny, tmp_path):
    receipt = denoise_train(config(tmp_path / "run", steps=None, minutes=0.05, keep=0.6), data=tiny)
    assert 10 <= receipt.cost.samples.value / 8 < 1000


@pytest.mark.parametrize("model", ["unet-8", "dit-16"])
def test_parts_cost_their_share(model):
    asked = DenoiseTrainConfig(model=model, keep=0.5 if model == "dit-16" else 0.45)
    costs = count_costs(asked, new_denoiser(model, (1, 12, 12), None, "v", seed=0), labelled=False)
    kept = 5 / 9 if model == "dit-16" else 4 / 9
    assert kept / 2 < costs.partial / costs.whole < kept + 0.25
    assert costs.forward < costs.whole / 2


def test_squares_come_from_their_images():
    denoiser = new_denoiser("unet-8", (2, 12, 16), None, "v", seed=0)
    parts = Parts(denoiser, 0.4)
    assert parts.side == 8
    assert parts.share == pytest.approx(64 / 192)
    images = torch.arange(4 * 2 * 12 * 16).view(4, 2, 12, 16).float()
    both = parts.cut(images, Rows(0, 4, 4), generator=generator_for(3))
    later = parts.cut(images[2:], Rows(2, 2, 4), generator=generator_for(3))
    assert torch.equal(both[2:], later)  # another process's rows are cut where one process cuts them
    for image, square in zip(images, both, strict=True):
        row, column = ((image[0] == square[0, 0, 0]).nonzero())[0].tolist()
        assert torch.equal(square, image[:, row : row + 8, column : column + 8])
    assert len({float(square[0, 0, 0] - image[0, 0, 0]) for image, square in zip(images, both, strict=True)}) > 1


def test_tokens_left_out_do_not_count():
    """The loss and the gradients of a partial step do not depend on the pixels that were left out."""
    denoiser = new_denoiser("dit-16", (1, 12, 12), None, "v", seed=0)
    with torch.no_grad():
        for number, item in enumerate(denoiser.model.parameters()):
            item += 0.05 * torch.randn(item.shape, generator=generator_for(number))
    objective, rows = Objective(denoiser, weighting="constant", keep=0.4), Rows(0, 2, 2)
    images = torch.randn(2, 1, 12, 12, generator=generator_for(1))
    with objective.parts.masked(rows, generator=generator_for(0)) as mask:
        pass
    assert mask is not None
    assert mask.float().mean() == pytest.approx(4 / 9)

    def step(clean):
        # The generator of the step draws the noise before the tokens: these are taken from the last draws.
        losses, _ = objective.losses((clean, None), torch.tensor([300, 600]), partial=True, rows=rows,
                                     generator=generator_for(5))  # fmt: skip
        return losses.detach()

    changed = [not torch.allclose(step(torch.where(place, 5.0, images)), step(images)) for place in _patches()]
    assert 4 <= sum(changed) <= 8  # of nine places two images keep four each


def _patches():
    for row in range(0, 12, 4):
        for column in range(0, 12, 4):
            place = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
            place[..., row : row + 4, column : column + 4] = True
            yield place


def test_a_loss_that_is_no_number_is_said(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        inner = DenoiseFitting._step

        def poisoned(self, *arguments):
            if self.spent.steps == 3:
                self.save()
                with torch.no_grad():
                    next(self.plain.parameters()).fill_(float("nan"))
            return inner(self, *arguments)

        patch.setattr(DenoiseFitting, "_step", poisoned)
        with pytest.raises(InputError, match=r"step 4; the last checkpoint is kept"):
            denoise_train(config(tmp_path / "run"), data=tiny)
    receipt = denoise_train(config(tmp_path / "run", resume=True), data=tiny)
    assert math.isfinite(receipt.quality["test_loss"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0.05}, "--keep near one of"),
        ({"keep": 0.95}, "0.44"),
        ({"keep": 0.0}, "--keep above 0"),
        ({"adapter": "nola"}, "--start MODEL"),
        ({"model": "unet-9"}, "multiple of 8"),
        ({"batch_size": 97}, "batch size up to 96"),
        ({"steps": None, "flops": 1.0}, "at least one step"),
        ({"ema": 1.0}, "--ema"),
        ({"label_dropout": 1.0}, "--label-dropout"),
        ({"lr": 0.0}, "--lr above 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tiny, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        denoise_train(config(tmp_path / "run", **settings), data=tiny)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prediction": "v"}, "drop the flag"),
        ({"size": 8}, "--size 12"),
        ({"adapter": "nola", "adapter_bytes": 100}, "at least .* bytes"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused(base, tiny, tmp_path, settings, said):
    with pytest.raises(InputError, match=said):
        denoise_train(config(tmp_path / "run", start=base, **settings), data=tiny)


def test_other_images_than_the_model_s_are_refused(base, tiny, tmp_path):
    two = ImageData(tiny.train, tiny.test, CLASSES[:2], "two", (0.2,), (0.2,))
    with pytest.raises(InputError, match="3 classes"):
        denoise_train(config(tmp_path / "run", start=base), data=two)
    wide = small_images(20, 0, 16)
    with pytest.raises(InputError, match="images of 1x12x12"):
        denoise_train(config(tmp_path / "run", start=base), data=ImageData(wide, wide, CLASSES, "w", (0.2,), (0.2,)))


def test_the_command_line_is_the_configuration():
    found = tyro.cli(DenoiseTrainConfig, args=["cifar10", "--model", "unet-16", "--keep", "0.4", "--no-classes"])
    assert (found.data, found.model, found.keep, found.classes) == ("cifar10", "unet-16", 0.4, False)
    assert found.part("prediction") == "v"
    assert found.part("keep") == 0.4


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert main(["denoise", "train", "builtin", "--model", "vae-8", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "scrimp: expected a model named unet-WIDTH, dit-WIDTH or dit-WIDTH/PATCH; got 'vae-8'; such as dit-64"
    ]
