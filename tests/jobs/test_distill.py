"""`scrimp distill`: teacher and student see the same view, live or from kept features; costs, baselines, resuming."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_distributed import HERE, torchrun
from torch import nn

from scrimp.cli import main
from scrimp.data import ImageData, TensorImages, draw_crops, view_of
from scrimp.data.views import CHANCES
from scrimp.jobs.distill import distill
from scrimp.jobs.distill_config import DistillConfig
from scrimp.jobs.distill_fit import DistillFitting, among
from scrimp.jobs.distill_plan import PLAN, Outlay, plan_for
from scrimp.jobs.distill_prepare import Preparation
from scrimp.jobs.distill_student import follow_logits, make_student
from scrimp.jobs.distill_teachers import Teacher, data_fingerprint
from scrimp.jobs.distill_views import FixedViews, view_named
from scrimp.jobs.encoders import Encoder, encode, encoder_metadata, load_encoder
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.models import create_model
from scrimp.meter import count_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import load_receipt
from scrimp.represent.linear import fit_linear_probe

USUAL = {
    "model": "convnet-4",
    "batch_size": 16,
    "evaluations": 2,
    "probe": 64,
    "epochs": 3.0,
    "precision": "fp32",
    "json": True,
    "device": "cpu",
}
METHODS = {
    "kept": {},
    "ram": {"cache": "ram", "cache_dtype": "float32", "view": "strong"},
    "live": {"cache": "none"},
    "linear": {"head_layers": 1, "accumulate": 2},
    "logits": {"method": "logits", "labelled": 0.5},
    "scratch": {"method": "scratch", "labelled": 0.2},
}


def config(out: Path, **settings) -> DistillConfig:
    return DistillConfig(**{**USUAL, **settings}, out=out)


def encoder(width: int = 8, seed: int = 0) -> Encoder:
    """A teacher of random weights: what it gives still differs from image to image."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = create_model(f"convnet-{width}", classes=0, channels=1, size=16).eval()
    return Encoder(model=model, name=f"net-{width}", dim=16 * width, channels=1, size=16, mean=(0.2,), std=(0.3,))


class Statistics(nn.Module):
    """Gives numbers of its pixels that tell one view from another."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((1, 2)), images.mean((1, 3)), images.amax((1, 2, 3))[:, None] + 1], 1)


def statistics(size: int = 16) -> Encoder:
    facts = {"dim": 2 * size + 1, "channels": 1, "size": size, "mean": (0.0,), "std": (1.0,)}
    return Encoder(model=Statistics(), name="statistics", **facts)


@pytest.fixture(scope="module")
def small(shapes) -> ImageData:
    """A part of the shapes whose number no batch divides."""
    return replace(shapes, train=shapes.train.take(torch.arange(70)), test=shapes.test.take(torch.arange(24)))


@pytest.fixture(scope="module")
def even(shapes) -> ImageData:
    """A third of the shapes, which batches of 16 divide."""
    return replace(shapes, train=shapes.train.take(torch.arange(128)), test=shapes.test.take(torch.arange(24)))


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "net.safetensors"
    told = encoder_metadata("convnet-8", channels=1, size=16, mean=(0.2,), std=(0.3,), dim=128)
    path.write_bytes(pack_weights(encoder().model.state_dict(), told))
    return path


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


def watched(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """For every part of a step from here on: what the student saw, as pixels, its labels, and the targets."""
    seen = []
    losses = DistillFitting._losses

    def watching(self, images, labels):
        shown, marked = [], []
        hook = self.model.register_forward_pre_hook(lambda module, given: shown.append(given[0][0]))
        teaching = self.teaching

        def objective(outputs, targets, some):
            marked.append(targets)
            return teaching.objective(outputs, targets, some)

        self.teaching = replace(teaching, objective=objective)
        found = losses(self, images, labels)
        hook.remove()
        self.teaching = teaching
        mean, std = torch.tensor(self.data.mean), torch.tensor(self.data.std)
        seen.append((shown[0] * std.view(-1, 1, 1) + mean.view(-1, 1, 1), labels, marked[0]))
        return found

    monkeypatch.setattr(DistillFitting, "_losses", watching)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_writes_what_it_says(even, tmp_path, name):
    settings = {**METHODS[name], "epochs": 8.0, "lr": 0.01}
    receipt = distill(config(tmp_path / "run", **settings), data=even, teachers=[encoder()])
    losses = [point["train_loss"] for point in receipt.curve]
    assert losses[-1] < losses[0]
    assert receipt.way == {"linear": "regression-1-layer", "logits": "logits", "scratch": "scratch"}.get(
        name, "regression"
    )
    assert receipt.cost.samples.value == 8 * 128
    assert receipt.cost.flops.value == pytest.approx(receipt.config["budget_flops"], rel=1e-6)
    assert receipt.curve[-1]["flops"] == receipt.cost.flops.value
    assert receipt.cost.flops.missed == ()
    share = METHODS[name].get("labelled", 0)
    each = even.train.labels.bincount().tolist()
    assert receipt.cost.labels.value == sum(round(share * count) for count in each)
    assert ("test_accuracy" in receipt.quality) == (name in ("logits", "scratch"))
    assert {"train_loss", "knn1_accuracy", "knn20_accuracy"} <= set(receipt.quality)
    assert load_receipt(tmp_path / "run" / RECEIPT).quality == receipt.quality
    written = {item.name for item in (tmp_path / "run").iterdir()}
    assert written == {CONFIG, RECEIPT, WEIGHTS, REPORT, "neighbours.png"}


@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_teacher_and_student_see_the_same_view(small, tmp_path, monkeypatch, view, cache):
    """A teacher that gives statistics of its pixels vouches for them: they are those of what the student saw."""
    seen = watched(monkeypatch)
    settings = {"cache": cache, "view": view, "cache_dtype": "float32", "cache_views": 2}
    distill(config(tmp_path / "run", **settings), data=small, teachers=[statistics()])
    assert len(seen) == 13  # 3 passes over 70 images in steps of 16
    for pixels, _, (given,) in seen:
        expected = nn.functional.normalize(Statistics()(pixels), dim=1)
        assert float((given - expected).abs().max()) < 1e-5
        assert float((given - expected.roll(1, 0)).abs().amax(1).min()) > 1e-3  # no other image's would do


def test_kept_views_come_back_and_differ(small, tmp_path, monkeypatch):
    """Pass 0 and pass 2 of two kept views show an image alike, pass 1 does not; live passes never do."""
    images = small.train.pixels.float().flatten(1)

    def passes(cache: str) -> list[dict[int, torch.Tensor]]:
        seen = watched(monkeypatch)
        rows = []
        prepare = DistillFitting._prepare

        def preparing(self, given, labels, number, indices):
            rows.append(indices)
            return prepare(self, given, labels, number, indices)

        with monkeypatch.context() as patch:
            patch.setattr(DistillFitting, "_prepare", preparing)
            settings = {"cache": cache, "cache_views": 2, "epochs": 3.0, "flops": None}
            distill(config(tmp_path / cache, **settings), data=small, teachers=[encoder()])
        found: list[dict[int, torch.Tensor]] = [{} for _ in range(4)]
        for turn, (pixels, _, _) in enumerate(seen):
            found[turn // 4] |= dict(zip(rows[turn].tolist(), pixels, strict=True))
        return found

    assert len(images) == 70
    for cache, again in (("ram", True), ("none", False)):
        first, second, third, _ = passes(cache)
        both = sorted(set(first) & set(second) & set(third))
        assert len(both) > 30
        assert all(torch.allclose(first[row], third[row], atol=1e-6) == again for row in both)
        assert not any(torch.allclose(first[row], second[row], atol=1e-3) for row in both)


@pytest.mark.parametrize("view", ["weak", "strong"])
def test_fixed_views_do_not_depend_on_company(small, view):
    images, rows = small.train, torch.tensor([5, 3, 69, 3])
    made = FixedViews(images, view_named(view, 16), seed=1)
    whole = made.made(images.batch(torch.arange(70)), torch.arange(70), 2)
    made.made(images.batch(rows), rows, 1)
    assert torch.equal(made.made(images.batch(rows), rows, 2), whole[rows])
    assert not torch.equal(made.made(images.batch(rows), rows, 1), whole[rows])
    assert not torch.equal(
        FixedViews(images, view_named(view, 16), seed=2).made(images.batch(rows), rows, 2), whole[rows]
    )


@pytest.mark.parametrize("name", ["weak", "strong"])
def test_a_view_is_made_again_from_its_numbers(small, name):
    images, view = small.train.batch(torch.arange(9)), view_named(name, 16)
    made = view_of(images, view, generator=generator_for(5))
    generator = generator_for(5)
    crops = draw_crops(9, view, height=16, width=16, generator=generator)
    chances = torch.rand(9, CHANCES, generator=generator)
    assert torch.equal(view_of(images, view, generator=generator, crops=crops, chances=chances), made)
    with pytest.raises(InputError, match="chances"):
        view_of(images, view, generator=generator, chances=chances[:8])


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("float16", 2**-11)])
def test_kept_features_are_the_live_teachers(small, tmp_path, monkeypatch, dtype, bound):
    kept = tmp_path / "kept"
    distill(config(tmp_path / "run", cache_folder=kept, cache_dtype=dtype), data=small, teachers=[encoder()])
    (file,) = kept.glob("*.npy")
    (index,) = kept.glob("*.json")
    assert json.loads(index.read_text())["finished"] == 3 * 70
    found = torch.from_numpy(np.load(file, allow_pickle=False)).float()
    assert found.shape == (4, 70, 128)
    teacher, views = Teacher(encoder(), torch.device("cpu")), FixedViews(small.train, view_named("weak", 16), seed=0)
    everything = torch.arange(70)
    for view in range(3):
        made = views.made(small.train.batch(everything), everything, view)
        live = teacher(made, autocast=torch.no_grad)
        assert float((found[view] - live).abs().max()) <= bound
    assert not found[3].any()  # three passes use three views


def test_a_teacher_agrees_with_the_encoder_it_is_of(small):
    """Against the features of `encode`, at the encoder's own size, channels, mean and std."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = create_model("convnet-4", classes=0, channels=3, size=24).eval()
    facts = Encoder(model=model, name="rgb", dim=144, channels=3, size=24, mean=(0.1, 0.2, 0.3), std=(0.4, 0.3, 0.2))
    pixels = small.train.batch(torch.arange(9)).float() / 255
    found = Teacher(facts, torch.device("cpu"))(pixels, autocast=torch.no_grad)
    expected = encode(model, small.train.take(torch.arange(9)), mean=facts.mean, std=facts.std, device="cpu", size=24)
    assert torch.allclose(found, nn.functional.normalize(expected, dim=1), atol=1e-5)


def test_the_teacher_is_left_as_it_was(small, tmp_path):
    teacher = encoder()
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    distill(config(tmp_path / "run"), data=small, teachers=[teacher])
    assert all(torch.equal(before[key], value) for key, value in teacher.model.state_dict().items())
    assert all(item.requires_grad for item in teacher.model.parameters())


def test_costs_are_the_teachers_passes_and_the_students_steps(even, tmp_path):
    images, batch = 128, 16
    runs = {
        name: distill(config(tmp_path / name, epochs=8.0, cache=name), data=even, teachers=[encoder()])
        for name in ("disk", "none")
    }
    model = encoder().model
    with torch.random.fork_rng([]):
        backbone = create_model("convnet-4", classes=0, channels=1, size=16)
    a_pass = count_flops(lambda: model(torch.zeros(batch, 1, 16, 16))).value / batch
    student = make_student(backbone, 64, config(tmp_path), dims=[128], classes=3)
    step = count_flops(lambda: student([torch.zeros(batch, 1, 16, 16)])[0].mean().backward()).value / batch
    assert runs["disk"].cost.flops.value == pytest.approx(4 * images * a_pass + 8 * images * step, rel=1e-6)
    assert runs["none"].cost.flops.value == pytest.approx(8 * images * (a_pass + step), rel=1e-6)
    share = 4 * a_pass / (4 * a_pass + 8 * step)
    assert runs["disk"].notes["teacher FLOPs share"] == pytest.approx(share, rel=1e-3)
    assert runs["none"].notes["teacher FLOPs share"] == pytest.approx(a_pass / (a_pass + step), rel=1e-3)
    assert runs["disk"].notes["cache bytes"] == 4 * images * 128 * 2
    assert runs["none"].notes["teacher features"] == "live"


def test_flops_buy_fewer_steps_where_the_teacher_must_be_paid(even, tmp_path):
    found = {
        name: distill(config(tmp_path / name, epochs=None, flops=3e8, **settings), data=even, teachers=[encoder()])
        for name, settings in (("kept", {}), ("scratch", {"method": "scratch"}))
    }
    for receipt in found.values():
        assert 0.97 * 3e8 < receipt.cost.flops.value <= 3e8 * (1 + 1e-8)
    assert found["kept"].cost.samples.value < 0.8 * found["scratch"].cost.samples.value


def test_minutes_leave_room_for_the_teacher(even, tmp_path, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.distill_setup.seconds_a_step", lambda *_, **__: 0.01)
    settings = {"epochs": None, "minutes": 0.1}
    taught = distill(config(tmp_path / "taught", **settings), data=even, teachers=[encoder()])
    alone = distill(config(tmp_path / "alone", **settings, method="scratch"), data=even)
    assert 0 < taught.cost.samples.value < alone.cost.samples.value
    assert alone.cost.samples.value <= 6 / 0.01 * 16  # no more steps than fit in six seconds


def test_finished_features_are_used_again_and_charged_once(even, tmp_path):
    settings = {"cache_folder": tmp_path / "kept", "epochs": 4.0}
    first = distill(config(tmp_path / "first", **settings), data=even, teachers=[encoder()])
    (file,) = (tmp_path / "kept").glob("*.npy")
    stamp = file.stat().st_mtime_ns
    again = distill(config(tmp_path / "again", **settings), data=even, teachers=[encoder()])
    assert file.stat().st_mtime_ns == stamp
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "first" / WEIGHTS).read_bytes()
    key = "teacher FLOPs if no features were found"
    assert first.notes[key] == again.notes[key] == 4 * 128 * first.notes["teacher FLOPs an image"]
    assert first.cost.flops.value - again.cost.flops.value == pytest.approx(first.notes[key])
    assert again.notes["teacher FLOPs share"] == 0
    other = distill(config(tmp_path / "other", **settings, seed=1), data=even, teachers=[encoder()])
    assert other.cost.flops.value == first.cost.flops.value
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [({"view": "strong"}, "view"), ({"cache_views": 2}, "views"), ({"cache_dtype": "float32"}, "dtype"), ({}, "data")],
)
def test_features_of_another_making_are_refused(shapes, small, tmp_path, change, word):
    settings = {"cache_folder": tmp_path / "kept"}
    distill(config(tmp_path / "first", **settings, epochs=1.0), data=small, teachers=[encoder()])
    data = small if change else replace(small, train=shapes.train.take(torch.arange(1, 71)))
    with pytest.raises(InputError, match=f"features made with {word} ") as caught:
        distill(config(tmp_path / "second", **settings, **change), data=data, teachers=[encoder()])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_another_teacher_gets_a_file_of_its_own(small, tmp_path):
    settings = {"cache_folder": tmp_path / "kept", "epochs": 1.0}
    for seed in (0, 1):
        distill(config(tmp_path / f"{seed}", **settings), data=small, teachers=[encoder(seed=seed)])
    assert len(list((tmp_path / "kept").glob("net-8-*.npy"))) == 2


def test_several_teachers_teach_at_once(even, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    teachers = [encoder(8), encoder(2, seed=1), statistics(24)]
    receipt = distill(config(tmp_path / "run", epochs=2.0), data=even, teachers=teachers)
    assert receipt.notes["teacher dims"] == [128, 32, 49]
    assert receipt.notes["cache bytes"] == 2 * 128 * (128 + 32 + 49) * 2
    assert [list(item.shape) for item in seen[0][2]] == [[16, 128], [16, 32], [16, 49]]
    assert receipt.curve[-1]["train_loss"] < receipt.curve[0]["train_loss"]


@pytest.mark.parametrize(("layers", "linear"), [(1, 1), (2, 2), (4, 4)])
def test_heads_have_as_many_layers_as_asked(tmp_path, layers, linear):
    with torch.random.fork_rng([]):
        backbone = create_model("convnet-4", classes=0, channels=1, size=16)
        student = make_student(backbone, 64, config(tmp_path, head_layers=layers), dims=[5, 7], classes=3)
    for head, dim in zip(student.heads, (5, 7), strict=True):
        found = [module for module in head if isinstance(module, nn.Linear)]
        assert len(found) == linear
        assert (found[0].in_features, found[-1].out_features) == (64, dim)


def test_no_head_at_all_needs_equal_widths(small, tmp_path):
    receipt = distill(config(tmp_path / "run", head_layers=0, epochs=1.0), data=small, teachers=[encoder(4, seed=3)])
    assert receipt.way == "regression-0-layer"
    with pytest.raises(InputError, match="equally wide"):
        distill(config(tmp_path / "other", head_layers=0), data=small, teachers=[encoder(8)])


def test_logits_follow_a_probe_on_the_labels_that_may_be_used(shapes, tmp_path, monkeypatch):
    """The probe is rebuilt here from the same labelled images; the loss against the textbook's formula."""
    asked = []
    plain = Preparation.plain

    def watching(self, teacher, rows):
        asked.append(rows)
        return plain(self, teacher, rows)

    monkeypatch.setattr(Preparation, "plain", watching)
    receipt = distill(
        config(tmp_path / "run", method="logits", labelled=0.1, epochs=0.5), data=shapes, teachers=[encoder()]
    )
    (rows,) = asked
    assert len(rows) == receipt.cost.labels.value == 39
    assert shapes.train.labels[rows].bincount().tolist() == [13, 13, 13]
    features = encode(encoder().model, shapes.train.take(rows), mean=(0.2,), std=(0.3,), device="cpu")
    probe = fit_linear_probe(features, shapes.train.labels[rows], classes=3)
    outputs, targets = torch.randn(4, 3, generator=generator_for(1)), features[:4]
    found = follow_logits([probe], temperature=2.0)([outputs], [targets], torch.zeros(4, dtype=torch.int64))
    theirs, ours = (probe.logits(targets) / 2).softmax(1), (outputs / 2).softmax(1)
    assert torch.allclose(found, 4 * (theirs * (theirs / ours).log()).sum(1), atol=1e-5)


def test_scratch_sees_labelled_images_alone(shapes, tmp_path, monkeypatch):
    rows = []
    prepare = DistillFitting._prepare

    def preparing(self, images, labels, number, indices):
        rows.append(indices)
        assert torch.equal(labels, self.data.train.labels[indices])
        return prepare(self, images, labels, number, indices)

    monkeypatch.setattr(DistillFitting, "_prepare", preparing)
    distill(config(tmp_path / "run", method="scratch", labelled=0.1, epochs=1.0), data=shapes)
    counts = torch.cat(rows).bincount()
    assert int((counts > 0).sum()) == 39
    assert int(counts.sum()) == 384
    assert int(counts[counts > 0].max() - counts[counts > 0].min()) <= 2


def test_a_policy_among_some_rows():
    plan = among(torch.tensor([3, 8]))(None, 5, generator=generator_for(0))
    assert sorted(plan.indices.tolist()) in ([3, 3, 3, 8, 8], [3, 3, 8, 8, 8])
    assert plan.weights.tolist() == [1.0] * 5


def test_labels_teach_a_student_from_scratch(shapes, tmp_path):
    receipt = distill(config(tmp_path / "run", method="scratch", epochs=8.0, lr=0.01), data=shapes)
    assert receipt.quality["test_accuracy"] > 0.8


def die_at(monkeypatch, step: int, *, save_at: int) -> None:
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == save_at:
            self.save()
        if self.spent.steps == step:
            raise Killed
        return pause(self, begin, stop)

    monkeypatch.setattr(Fitting, "_pause", dying)


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_resumes_to_the_same_bytes(small, tmp_path, monkeypatch, name):
    def run(folder: str, **more):
        return distill(config(tmp_path / folder, **METHODS[name], **more), data=small, teachers=[encoder()])

    whole = run("whole")
    with monkeypatch.context() as patch:
        die_at(patch, 9, save_at=6)
        with pytest.raises(Killed):
            run("killed")
    receipt = run("killed", resume=True)
    assert receipt.notes["resumed"] == 1
    assert receipt.quality == whole.quality
    assert receipt.cost.flops == whole.cost.flops
    assert [point["flops"] for point in receipt.curve] == [point["flops"] for point in whole.curve]
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert {item.name for item in (tmp_path / "killed").iterdir()} == {
        item.name for item in (tmp_path / "whole").iterdir()
    }
    again = run("killed", resume=True)
    assert again.created == receipt.created
    assert not (tmp_path / "killed" / PLAN).exists()


@pytest.mark.parametrize("gently", [True, False], ids=["SIGINT", "kill"])
def test_an_interrupted_teacher_goes_on_where_it_stopped(even, tmp_path, monkeypatch, gently):
    teacher, calls = encoder(), []
    monkeypatch.setattr("scrimp.jobs.distill_prepare._BLOCK", 20)
    ask = Teacher.__call__

    def stopping(self, views, **options):
        calls.append(len(views))
        if len(calls) == 9:  # the second view has begun: 7 blocks a view, the last one smaller
            if not gently:
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)
        return ask(self, views, **options)

    settings = {"checkpoint_seconds": 1e-9, "epochs": 2.0}
    whole = distill(config(tmp_path / "whole", **settings), data=even, teachers=[teacher])
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", stopping)
        with pytest.raises(Interrupted if gently else Killed):
            distill(config(tmp_path / "run", **settings), data=even, teachers=[teacher])
        (index,) = (tmp_path / "run" / "teacher").glob("*.json")
        assert json.loads(index.read_text())["finished"] == 128 + (40 if gently else 20)
        done = len(calls)
        receipt = distill(config(tmp_path / "run", **settings, resume=True), data=even, teachers=[teacher])
    assert sum(calls[done:]) == 128 - (40 if gently else 20)
    assert receipt.cost.flops == whole.cost.flops
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_damaged_features_stop_a_resumed_run(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 9, save_at=6)
        with pytest.raises(Killed):
            distill(config(tmp_path / "run"), data=small, teachers=[encoder()])
    (file,) = (tmp_path / "run" / "teacher").glob("*.npy")
    content = bytearray(file.read_bytes())
    content[5000] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match="CRC-32") as caught:
        distill(config(tmp_path / "run", resume=True), data=small, teachers=[encoder()])
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run" / CHECKPOINT).exists()


def test_resuming_with_another_teacher_is_refused(small, tmp_path, monkeypatch, teacher_file):
    with monkeypatch.context() as patch:
        die_at(patch, 9, save_at=6)
        with pytest.raises(Killed):
            distill(config(tmp_path / "run", teacher=(str(teacher_file),)), data=small)
    other = tmp_path / "other.safetensors"
    other.write_bytes(teacher_file.read_bytes())
    with pytest.raises(InputError, match="the interrupted run's teacher"):
        distill(config(tmp_path / "run", teacher=(str(other),), resume=True), data=small)


def test_the_same_steps_in_parts_as_whole(small, tmp_path):
    """No batch statistics in a group-normed student and a linear head: parts must add up to the whole."""
    settings = {"head_layers": 1, "optimizer": "sgd", "epochs": 1.0}
    for name, parts in (("whole", 1), ("parts", 4)):
        distill(config(tmp_path / name, **settings, accumulate=parts), data=small, teachers=[encoder()])
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


def test_weights_load_back_and_teach_in_turn(small, tmp_path, teacher_file):
    distill(config(tmp_path / "run", teacher=(str(teacher_file),), epochs=1.0), data=small)
    encoder(4).model.load_state_dict(load_file(tmp_path / "run" / WEIGHTS))
    loaded = load_encoder(tmp_path / "run")
    assert (loaded.name, loaded.dim, loaded.size, loaded.mean) == ("convnet-4", 64, 16, (0.2,))
    receipt = distill(config(tmp_path / "next", teacher=(str(tmp_path / "run"),), epochs=1.0), data=small)
    assert receipt.notes["teachers"] == ["convnet-4"]


def test_from_the_shell(shape_folder, tmp_path, teacher_file, capsys):
    usual = ["--student", "convnet-4", "--epochs", "1", "--batch-size", "16", "--device", "cpu", "--json"]
    run = ["distill", str(shape_folder), "--teacher", str(teacher_file), *usual, "--out", str(tmp_path / "run")]
    assert main(run) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert (receipt["way"], receipt["notes"]["teachers"]) == ("regression", ["convnet-8"])
    assert main(["distill", str(shape_folder), *usual, "--out", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("scrimp: expected a teacher")
    assert "\n" not in said


@pytest.mark.touches_global_rng
def test_a_timm_student_loads_back_in_timm(small, tmp_path):
    import timm

    settings = {"model": "resnet10t", "batch_size": 4, "epochs": 0.2}
    distill(config(tmp_path / "run", **settings), data=small, teachers=[encoder()])
    model = timm.create_model("resnet10t", num_classes=0, in_chans=1)
    model.load_state_dict(load_file(tmp_path / "run" / WEIGHTS))
    with safe_open(tmp_path / "run" / WEIGHTS, "pt") as file:
        assert (file.metadata()["kind"], file.metadata()["dim"]) == ("encoder", "512")


def test_the_global_generator_is_left_alone(small, tmp_path):
    before = torch.get_rng_state()
    distill(config(tmp_path / "run", epochs=0.5), data=small, teachers=[encoder()])
    assert torch.equal(before, torch.get_rng_state())


def colours(data: ImageData) -> ImageData:
    parts = [TensorImages(part.pixels.expand(-1, 3, -1, -1), part.labels) for part in (data.train, data.test)]
    return replace(data, train=parts[0], test=parts[1], mean=(0.2,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"teacher": ()}, "a teacher"),
        ({"teacher": ("absent.safetensors",)}, "absent"),
        ({"teacher": ("resnet18",)}, "resnet18"),
        ({"batch_size": 1000}, "batch"),
        ({"head_layers": -1}, "--head-layers"),
        ({"labelled": 0.0}, "--labelled"),
        ({"temperature": 0.0}, "--temperature"),
        ({"cache_views": 0}, "--cache-views"),
        ({"cache": "ram", "cache_folder": Path("kept")}, "--cache-folder"),
        ({"unlabelled": True, "method": "logits"}, "--unlabelled"),
        ({"model": "resnet-none"}, "timm"),
        ({"epochs": None, "flops": 1e7}, "teachers' passes"),
        ({"epochs": 0.001}, "one step"),
        ({"epochs": None, "minutes": 0.0001}, "seconds"),
        ({"parallel": "fsdp"}, "several processes"),
    ],
)
def test_unusable_settings_say_so_and_leave_nothing(small, tmp_path, teacher_file, settings, word):
    with pytest.raises(InputError, match=word) as caught:
        distill(config(tmp_path / "run", **{"teacher": (str(teacher_file),), **settings}), data=small)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_an_error_leaves_the_next_job_free_to_choose_its_precision(small, tmp_path):
    with pytest.raises(InputError, match="a teacher"):
        distill(config(tmp_path / "run", precision="bf16"), data=small)
    receipt = distill(config(tmp_path / "run", precision="fp32", epochs=1.0), data=small, teachers=[encoder()])
    assert receipt.notes["precision"] == "no"


def test_unusable_teachers_are_refused(small, tmp_path):
    with pytest.raises(InputError, match="one of them twice"):
        distill(config(tmp_path / "run"), data=small, teachers=[encoder(), encoder()])
    with pytest.raises(InputError, match="3 channels"):
        distill(config(tmp_path / "run"), data=colours(small), teachers=[encoder()])
    with pytest.raises(InputError, match=r"features \[n, 12\]"):
        distill(config(tmp_path / "run"), data=small, teachers=[replace(statistics(), dim=12)])
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_tell_teachers_and_data_apart(shapes, small):
    cpu = torch.device("cpu")
    found = {
        Teacher(item, cpu).fingerprint
        for item in (encoder(), encoder(seed=1), replace(encoder(), mean=(0.1,)), statistics(), encoder(4))
    }
    assert len(found) == 5
    assert Teacher(encoder(), cpu).fingerprint in found
    changed = small.train.pixels.clone()
    changed[69, 0, 15, 15] ^= 1
    given = [
        small.train,
        shapes.train,
        TensorImages(changed, small.train.labels),
        small.train.take(torch.arange(69, -1, -1)),
    ]
    assert len({data_fingerprint(images) for images in given}) == 4
    assert data_fingerprint(small.train) == data_fingerprint(small.train.take(torch.arange(70)))


@pytest.mark.parametrize("total", [1e3, 3e3, 1e4, 2.2e4, 1e5])
@pytest.mark.parametrize("finished", [(0, 0), (100, 0), (400, 400)])
def test_a_plan_spends_no_more_than_its_budget_and_keeps_no_view_in_vain(total, finished):
    outlay = Outlay(images=100, teachers=(2.0, 3.0), finished=finished, probed=10, most=4)
    plan = plan_for(total, outlay, image_flops=10.0, step_flops=80.0)
    assert plan.training + plan.before == pytest.approx(total)
    assert plan.training >= 80
    missing = [max(0, plan.views * 100 - done) + 10 for done in finished]
    assert plan.before == 2 * missing[0] + 3 * missing[1]
    assert plan.views == 1 or plan.views <= plan.training / 1000 + 0.5
    if plan.views < 4:  # one view more could not have been used
        assert (total - outlay.flops(plan.views + 1)) / 1000 < plan.views + 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the same runs by one process and by two."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for processes, folder in enumerate(folders, 1):
        torchrun(processes, str(HERE / "distill_worker.py"), str(folder), cwd=folder)
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
    one, other = (load_file(runs[1] / f"{name}-ddp" / WEIGHTS) for name in ("kept", "scratch"))
    assert any(float((one[key] - other[key]).abs().max()) > 1e-2 for key in one)


def test_two_processes_keep_the_same_features_and_figures(runs):
    one, two = (np.load(next((folder / "kept").glob("*.npy")), allow_pickle=False) for folder in runs)
    assert np.abs(one.astype(np.float32) - two.astype(np.float32)).max() < 1e-3
    first, second = (load_receipt(folder / "kept-ddp" / RECEIPT) for folder in runs)
    assert second.notes["processes"] == 2
    assert first.cost.flops == second.cost.flops
    assert first.quality["train_loss"] == pytest.approx(second.quality["train_loss"], abs=1e-2)
