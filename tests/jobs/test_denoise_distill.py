"""`scrimp denoise distill`: learning, pairs kept and taken up, resuming to the same bytes, mistakes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file

from scrimp.denoise.solvers import calls
from scrimp.jobs import denoise_distill as module
from scrimp.jobs.denoise_distill import denoise_distill
from scrimp.jobs.denoise_distill_config import DenoiseDistillConfig
from scrimp.jobs.denoise_distill_fit import (
    DenoiseDistillFitting,
    few_step_images,
    student_of,
    warmed_average,
)
from scrimp.jobs.denoise_distill_pairs import HELD_OUT, PAIRS, Teacher
from scrimp.jobs.denoise_distill_plan import grids_of, plan_of
from scrimp.jobs.denoise_models import Denoiser, load_denoiser, new_denoiser, save_denoiser
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.pixels_generate import SAMPLES
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt

pytest.importorskip("diffusers")

HERE = Path(__file__).parent
METHODS = ("reflow", "consistency", "flow-map")
SMALL = {"pairs": 32, "held_out": 5, "teacher_steps": 3, "reference_steps": 8, "batch_size": 8, "evaluations": 2}
WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"


def config(model: Path, out: Path, **settings) -> DenoiseDistillConfig:
    """Runs that make the same pairs share them, which saves most of their time."""
    usual = {**SMALL, "steps": 8, "samples": 3, "json": True, "device": "cpu", "lr": 3e-3}
    if not {*SMALL, "seed", "solver", "guidance"} & {*settings} - {"batch_size", "evaluations"}:
        usual["pairs_folder"] = model.parent / "kept"
    return DenoiseDistillConfig(**{**usual, **settings}, model=model, out=out)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A network without training is a map from noise to images like any other, and a smooth one."""
    folder = tmp_path_factory.mktemp("teacher") / "v"
    save_denoiser(new_denoiser("unet-8", (1, 8, 8), None, "v", seed=1), folder)
    return folder


@pytest.fixture(scope="module")
def curved(tmp_path_factory) -> Path:
    """A flow whose paths bend so much that a single step of it goes astray."""
    folder = tmp_path_factory.mktemp("teacher") / "flow"
    made = new_denoiser("unet-8", (1, 8, 8), None, "flow", seed=1)
    with torch.no_grad():
        made.model.conv_out.weight *= 4
    save_denoiser(made, folder)
    return folder


@pytest.fixture(scope="module")
def class_teacher(tmp_path_factory) -> Path:
    """A transformer of noise that tells its three labels, and that for none, apart."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    made = new_denoiser("dit-16", (1, 8, 8), 3, "v", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_denoiser(dataclasses.replace(made, names=("bar", "cross", "ring")), folder)
    return folder


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


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_writes_what_it_says(curved, tmp_path, method):
    run = config(curved, tmp_path / "run", method=method, steps=30, ema=0.9, evaluations=6, pairs_folder=None)
    receipt = denoise_distill(run)
    quality = receipt.quality
    assert quality["paired_error_1"] < 0.9 * quality["teacher_paired_error_1"]
    assert len(receipt.curve) == 6
    assert quality["train_loss"] < receipt.curve[0]["train_loss"] or method == "flow-map"  # another loss at first
    assert quality["teacher_paired_error_16"] < quality["teacher_paired_error_4"] < quality["teacher_paired_error_1"]
    assert {name.removeprefix("teacher_paired_error_") for name in quality if name.startswith("teacher")} == {
        "1", "2", "4", "8", "16"
    }  # fmt: skip
    assert receipt.cost.samples.value == 30 * 8
    making, training = receipt.notes["pairs"], receipt.notes["training"]
    assert making["calls"] == 32 * 3
    assert receipt.cost.flops.value == pytest.approx(making["flops"] + training["flops"])
    assert receipt.cost.seconds.value == pytest.approx(making["seconds"] + training["seconds"])
    assert making["seconds"] > 0
    assert receipt.notes["steps on straight paths"] == (30 if method == "reflow" else 15)
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == quality
    names = {item.name for item in (tmp_path / "run").iterdir()}
    assert names == {CONFIG, RECEIPT, "model", PAIRS, SAMPLES}


def test_the_folder_holds_the_student_that_was_measured(teacher, tmp_path):
    run = tmp_path / "run"
    receipt = denoise_distill(config(teacher, run, ema=0.5, pairs_folder=run / PAIRS))
    student = load_denoiser(run)
    assert student.process.prediction == "flow"
    assert student.process.levels == 1000
    kept = load_file(run / PAIRS / HELD_OUT)
    for steps in (1, 2, 4):
        made = few_step_images(student, kept["noise"], None, steps, autocast=torch.no_grad)
        error = (made - kept["reference"]).square().mean((1, 2, 3)).sqrt().mean() / kept["reference"].std(correction=0)
        assert float(error) == pytest.approx(receipt.quality[f"paired_error_{steps}"], rel=1e-4)
    one = kept["noise"] - student.predict(kept["noise"], 1000.0)
    assert torch.allclose(few_step_images(student, kept["noise"], None, 1, autocast=torch.no_grad), one, atol=1e-5)


def test_pairs_are_what_the_teacher_makes(teacher, tmp_path):
    settings = config(teacher, tmp_path / "run", pairs_folder=None)
    denoise_distill(settings)
    found = load_file(tmp_path / "run" / PAIRS / "00000.safetensors")
    asked = Teacher(settings, torch.device("cpu"), torch.no_grad)
    made = asked.images(found["noise"][:8], None, 3, each=lambda: None)
    assert torch.equal(made, found["clean"][:8])
    assert abs(float(found["noise"].mean())) < 0.1
    held = load_file(tmp_path / "run" / PAIRS / HELD_OUT)
    assert not any(torch.equal(noise, other) for noise in held["noise"] for other in found["noise"])


def test_guidance_is_built_into_the_pairs(class_teacher, tmp_path):
    plain, guided = (config(class_teacher, tmp_path, guidance=factor) for factor in (1.0, 3.0))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    made = []
    for settings in (plain, guided):
        asked = Teacher(settings, torch.device("cpu"), torch.no_grad)
        made.append(asked.images(noise, labels, 1, each=lambda: None))
        assert asked.calls(4) == calls("dpm++", 4) * (2 if settings is guided else 1)
    unlabelled = Teacher(plain, torch.device("cpu"), torch.no_grad).images(noise, None, 1, each=lambda: None)
    # A step of v is affine in the network's answer, so that guidance of the answer is guidance of the image.
    bounded = (made[1].abs() < 1) & (made[0].abs() < 1) & (unlabelled.abs() < 1)
    assert int(bounded.sum()) > 10
    expected = unlabelled + 3 * (made[0] - unlabelled)
    assert torch.allclose(made[1][bounded], expected[bounded], atol=1e-4)
    assert not torch.allclose(made[1], made[0], atol=1e-2)


def test_a_model_with_classes_is_distilled_with_its_labels(class_teacher, tmp_path):
    receipt = denoise_distill(config(class_teacher, tmp_path / "run", guidance=2.0))
    found = load_file(tmp_path / "run" / PAIRS / "00000.safetensors")
    assert set(found["labels"].tolist()) == {0, 1, 2}
    assert receipt.notes["pairs"]["calls"] == 32 * 3 * 2
    student = load_denoiser(tmp_path / "run")
    assert (student.classes, student.null_label, student.names) == (3, 3, ("bar", "cross", "ring"))


def test_labels_stay_with_their_pairs(class_teacher, tmp_path, monkeypatch):
    """The pairs of a batch are put in another order; each must keep its label and its image."""
    kept, seen = {}, []
    losses = DenoiseDistillFitting._losses

    def looking(self, images, labels):
        seen.append(images)
        return losses(self, images, labels)

    monkeypatch.setattr(DenoiseDistillFitting, "_losses", looking)
    denoise_distill(config(class_teacher, tmp_path / "run", steps=3, straight=0.0, pairs_folder=None))
    found = load_file(tmp_path / "run" / PAIRS / "00000.safetensors")
    for clean, noise, label in zip(found["clean"], found["noise"], found["labels"], strict=True):
        kept[tuple(noise.flatten().tolist())] = clean, label
    for lesson in seen:
        assert lesson.jumps.tolist() == sorted(lesson.jumps.tolist(), reverse=True)
        assert lesson.jumps.tolist() == [3, 2, 1, 1, 0, 0, 0, 0]
        for clean, noise, label in zip(lesson.clean, lesson.noise, lesson.labels, strict=True):
            wanted = kept[tuple(noise.flatten().tolist())]
            assert torch.equal(wanted[0], clean)
            assert int(wanted[1]) == int(label)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_to_the_same_bytes(teacher, tmp_path, monkeypatch, method):
    settings = {"steps": 9, "method": method, "evaluations": 3}
    denoise_distill(config(teacher, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        kill_at(7, patch, save_at=6)
        with pytest.raises(Killed):
            denoise_distill(config(teacher, tmp_path / "killed", **settings))
    receipt = denoise_distill(config(teacher, tmp_path / "killed", **settings, resume=True))
    assert receipt.notes["resumed"] == 1
    for name in (WEIGHTS, SAMPLES):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole = load_receipt(tmp_path / "whole" / RECEIPT)
    assert [point["train_loss"] for point in receipt.curve] == [point["train_loss"] for point in whole.curve]
    assert not (tmp_path / "killed" / CHECKPOINT).exists()
    again = denoise_distill(config(teacher, tmp_path / "killed", **settings, resume=True))
    assert again.created == receipt.created


@pytest.mark.parametrize("where", ["pairs", "held-out", "step"])
def test_an_interrupted_run_resumes_to_the_same_bytes(teacher, tmp_path, monkeypatch, where):
    settings = {"pairs": 600, "teacher_steps": 1, "batch_size": 100, "steps": 4}
    denoise_distill(config(teacher, tmp_path / "whole", **settings))
    inner, seen = Teacher.images, []

    def interrupting(self, noise, labels, steps, *, each):
        seen.append(steps)
        if (where == "pairs" and len(seen) == 4) or (where == "held-out" and steps == 16):
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, noise, labels, steps, each=each)

    step = DenoiseDistillFitting._step

    def stepping(self, *arguments):
        if where == "step" and self.spent.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "images", interrupting)
        patch.setattr(DenoiseDistillFitting, "_step", stepping)
        with pytest.raises(Interrupted):
            denoise_distill(config(teacher, tmp_path / "stopped", **settings))
    left = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / PAIRS).iterdir()}
    assert len(left) == {"pairs": 1, "held-out": 3, "step": 4}[where]
    denoise_distill(config(teacher, tmp_path / "stopped", **settings, resume=True))
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / PAIRS).iterdir()}
    assert {name: after[name] for name in left} == left
    assert len(after) == 4


def test_another_run_takes_the_pairs_and_no_other_teacher_may(teacher, class_teacher, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    first = denoise_distill(config(teacher, tmp_path / "1", pairs_folder=kept))
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "images", None)
        second = denoise_distill(config(teacher, tmp_path / "2", pairs_folder=kept, method="reflow"))
    assert second.notes["pairs"] == first.notes["pairs"]
    for changed in ({"teacher_steps": 2}, {"seed": 1}, {"solver": "unipc"}):
        with pytest.raises(InputError, match="--pairs-folder"):
            denoise_distill(config(teacher, tmp_path / f"x{list(changed)}", pairs_folder=kept, **changed))
    with pytest.raises(InputError, match="--pairs-folder"):
        denoise_distill(config(class_teacher, tmp_path / "3", pairs_folder=kept))
    path = kept / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="whole file of pairs"):
        denoise_distill(config(teacher, tmp_path / "4", pairs_folder=kept))


def test_the_global_generator_and_the_teacher_are_left_alone(teacher, tmp_path):
    before, weights = torch.get_rng_state(), (teacher / "unet" / WEIGHTS.name).read_bytes()
    denoise_distill(config(teacher, tmp_path / "run", steps=2))
    assert torch.equal(before, torch.get_rng_state())
    assert (teacher / "unet" / WEIGHTS.name).read_bytes() == weights


@pytest.mark.parametrize("method", METHODS)
def test_the_flops_of_a_step_are_those_it_does(teacher, tmp_path, monkeypatch, method):
    counted, step = [], DenoiseDistillFitting._backward

    def counting(self, *arguments):
        counted.append((count_flops(lambda: step(self, *arguments)).value, self.plan.flops(self.spent.steps)))

    monkeypatch.setattr(DenoiseDistillFitting, "_backward", counting)
    denoise_distill(config(teacher, tmp_path / "run", method=method, steps=4))
    assert len(counted) == 4
    for found, said in counted:
        assert found == pytest.approx(said, rel=0.02)


def test_the_plan_gives_each_part_its_steps(teacher):
    settings = config(teacher, Path("none"), jumps=(1, 3), straight=0.25, batch_size=8)
    plan = plan_of(settings, 8, module.StepCost(3.0, 1.0))
    assert [plan.lesson(number) for number in range(8)] == ["reflow"] * 2 + ["flow-map"] * 6
    assert plan.turns() == [(1, 0), (3, 0), (3, 1), (3, 2)] * 2
    assert plan.flops(0) == 24
    assert plan.flops(2) == 24 + 6
    assert plan.budget == pytest.approx(2 * 24 + 6 * 30)
    grids = grids_of([1, 3], 3)
    assert torch.allclose(grids, torch.tensor([[1, 0, 0, 0], [1, 2 / 3, 1 / 3, 0]]))


def test_the_table_has_a_row_for_each_number_of_steps(curved, tmp_path, capsys):
    receipt = denoise_distill(config(curved, tmp_path / "run", jumps=(1, 3), steps=2, json=False))
    shown = capsys.readouterr().err
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()[:1].isdigit()}
    assert set(lines) >= {"1", "2", "3", "4", "8", "16"}
    assert f"{receipt.quality['paired_error_3']:.3f} (3 calls)" in lines["3"]
    assert lines["3"].split()[1] == "-"
    assert f"{receipt.quality['teacher_paired_error_8']:.3f} (8 calls)" in lines["8"]
    assert lines["8"].split()[-1] == "-"


def test_the_average_forgets_its_start():
    average, value = [torch.zeros(2)], [torch.ones(2)]
    update_ = warmed_average(0.9)
    update_(average, value, torch.tensor(0))
    assert float(average[0][0]) == pytest.approx(0.9)
    average = [torch.zeros(2)]
    update_(average, value, torch.tensor(1000))
    assert float(average[0][0]) == pytest.approx(0.1)


def test_the_student_starts_as_a_copy(teacher):
    known: Denoiser = load_denoiser(teacher)
    student = student_of(known)
    assert student.process.prediction == "flow"
    assert known.process.prediction == "v"
    for parameter, other in zip(student.model.parameters(), known.model.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert parameter.data_ptr() != other.data_ptr()
        assert parameter.requires_grad
    assert dataclasses.replace(student, model=known.model).model is known.model


def test_the_minutes_become_steps(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "seconds_a_step", lambda *_, **__: 0.01)
    receipt = denoise_distill(config(teacher, tmp_path / "run", steps=None, minutes=0.019, method="reflow"))
    calls_made = 32 * 3 + 5 * (1 + 2 + 4 + 8 + 16 + 8 + 2 * 7)
    expected = (1.14 - 0.5 - calls_made / 8 * 0.01) / 0.01
    assert receipt.cost.samples.value / 8 == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"pairs": 0}, "--pairs"),
        ({"jumps": ()}, "--jumps"),
        ({"jumps": (0,)}, "--jumps"),
        ({"straight": 1.0}, "--straight"),
        ({"ema": 1.0}, "--ema"),
        ({"batch_size": 64}, "batch size"),
        ({"solver": "ddpm"}, "draws no noise"),
        ({"solver": "euler"}, "v prediction"),
        ({"solver": "magic"}, "magic"),
        ({"guidance": 2.0}, "guidance"),
        ({"steps": None, "epochs": 0.1}, "one step"),
        ({"steps": None, "minutes": 0.0001}, "seconds"),
    ],
)
def test_unusable_settings_say_so(teacher, tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        denoise_distill(config(teacher, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_no_model_and_other_settings_are_refused(teacher, tmp_path):
    with pytest.raises(InputError, match=r"model_index\.json"):
        denoise_distill(config(tmp_path, tmp_path / "run"))
    with pytest.raises(InputError, match="resume"):
        denoise_distill(config(teacher, tmp_path / "run", resume=True))
    with pytest.raises(InputError, match="finite losses"):
        denoise_distill(config(teacher, tmp_path / "run", lr=1e30, clip=1e30, warmup=0.0, method="reflow"))
    with pytest.raises(InputError, match="lr"):
        denoise_distill(config(teacher, tmp_path / "run", method="reflow", resume=True))


def test_the_flags_make_the_configuration():
    found = tyro.cli(DenoiseDistillConfig, args=["runs/x", "--method", "reflow", "--jumps", "1", "3", "--pairs", "9"])
    assert (found.model, found.method, found.jumps, found.pairs) == (Path("runs/x"), "reflow", (1, 3), 9)


def test_two_processes_make_the_same_pairs_and_students(teacher, tmp_path):
    for processes in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [*launcher, str(HERE / "denoise_distill_worker.py"), str(teacher), str(tmp_path / str(processes))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    for method in METHODS[1:]:  # which begin with the first one
        runs = [tmp_path / str(processes) / method for processes in (1, 2)]
        for name in ("00000.safetensors", "00001.safetensors", HELD_OUT):
            one, two = (load_file(run / PAIRS / name) for run in runs)
            assert all(torch.equal(one[key], two[key]) for key in one)
        one, two = (load_file(run / WEIGHTS) for run in runs)
        assert one.keys() == two.keys()
        assert all(float((one[key] - two[key]).abs().max()) < 1e-3 for key in one)
        first, second = (load_receipt(run / RECEIPT) for run in runs)
        assert (first.notes["processes"], second.notes["processes"]) == (1, 2)
        assert second.quality == pytest.approx(first.quality, rel=1e-2)
        assert second.cost.flops.value == pytest.approx(first.cost.flops.value)
