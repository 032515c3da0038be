"""Ways of several stages: unlabelled images to an encoder, to a small network, to a classifier, under one budget."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from test_distributed import HERE, torchrun

from conftest import CLASSES, draw
from scrimp.adapt import load_adapter_
from scrimp.data import ImageData, TensorImages
from scrimp.jobs import stages, stages_adapt, stages_probe
from scrimp.jobs.adapt_models import image_subject
from scrimp.jobs.adapt_run import ADAPTER
from scrimp.jobs.config import StudyConfig
from scrimp.jobs.distill_fit import DistillFitting
from scrimp.jobs.encoders import features_of, load_encoder
from scrimp.jobs.engine import accelerated, finish, start
from scrimp.jobs.evaluate import ready
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.labels import labelled_rows
from scrimp.jobs.models import create_model, load_weights_
from scrimp.jobs.pretrain import usable_labels_of
from scrimp.jobs.pretrain_config import PretrainConfig
from scrimp.jobs.setup import prepare
from scrimp.jobs.stages_label import chosen_rows
from scrimp.jobs.stages_probe import PROBE, load_probe
from scrimp.jobs.study import study
from scrimp.jobs.ways import find_ways
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt
from scrimp.report import find_receipts, render_table, write_report
from scrimp.represent.linear import fit_linear_probe

WAYS = (
    "uniform",
    "pretrain+probe",
    "pretrain+distill+probe",
    "pretrain+uniform",
    "pretrain+distill+history",
    "pretrain+adapt",
    "pretrain+label",
)
BUDGET = 4e8
USUAL = {
    "model": "convnet-4",
    "batch_size": 16,
    "evaluations": 2,
    "probe": 64,
    "labelled": 0.1,
    "flops": BUDGET,
    "seeds": 1,
    "json": True,
    "device": "cpu",
}


def config(out: Path, **settings) -> StudyConfig:
    if any("distill" in way for way in settings.get("ways", ())):
        settings = {"encoder": "convnet-8", **settings}
    return StudyConfig(**{**USUAL, **settings}, out=out)


@pytest.fixture(scope="module")
def done(shapes, tmp_path_factory):
    """A study of every kind of way: its folder, and its receipts by way."""
    torch.set_num_threads(1)  # a fixture of a module comes before those of a test
    folder, receipts = study(config(tmp_path_factory.mktemp("stages") / "study", ways=WAYS), data=shapes)
    return folder, {receipt.way: receipt for receipt in receipts}


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


def stage_receipts(folder: Path, way: str) -> dict[str, object]:
    return {name: load_receipt(folder / way / "seed-0" / "stages" / name / RECEIPT) for name in way.split("+")}


def test_every_way_ends_in_one_receipt(done):
    folder, receipts = done
    assert tuple(receipts) == WAYS
    for way, receipt in receipts.items():
        assert receipt.name == receipts["uniform"].name
        assert receipt.baseline == (way == "uniform")
        assert set(receipt.quality) == {"test_accuracy", "train_loss", "test_loss"}
        assert receipt.quality["test_accuracy"] > 0.4  # a third by chance
        assert receipt.cost.flops.missed == ()
        # A probe's classifier comes on top: its steps are counted once they are made.
        # Nor are those of clusters foreseen, which weigh much beside a network as small as this.
        above = 1.02 if "probe" in way else 1.5 if "label" in way else 1
        assert 0.85 * BUDGET < receipt.cost.flops.value <= BUDGET * above
        assert receipt.config["budget_flops"] == BUDGET
        assert not list((folder / way).rglob(CHECKPOINT))
    found = {receipt.way: receipt for receipt in find_receipts([folder])}
    assert len(find_receipts([folder])) == len(WAYS)
    assert {way: found[way].to_dict() for way in WAYS} == {way: receipts[way].to_dict() for way in WAYS}


@pytest.mark.parametrize("way", WAYS[1:])
def test_costs_are_those_of_the_stages_together(done, way):
    folder, receipts = done
    cost, parts = receipts[way].cost, stage_receipts(folder, way)
    for field in ("flops", "seconds", "cpu_seconds", "samples"):
        each = [getattr(part.cost, field).value for part in parts.values()]
        assert getattr(cost, field).value == pytest.approx(sum(each))
        assert getattr(cost, field).how == getattr(receipts["uniform"].cost, field).how
    assert cost.peak_bytes.value == max(part.cost.peak_bytes.value for part in parts.values())
    assert cost.labels.value == 39
    noted = receipts[way].notes["stages"]
    assert list(noted) == list(parts)
    for name, part in parts.items():
        assert (noted[name]["flops"], noted[name]["seconds"]) == (part.cost.flops.value, part.cost.seconds.value)
        assert part.name != receipts[way].name
        assert not part.baseline
    home = folder / way / "seed-0"
    files = [home / name for name in (WEIGHTS, PROBE) if (home / name).is_file()]
    assert len(files) == (2 if way.endswith(("probe", "label")) else 1)
    assert cost.stored_bytes.value == sum(file.stat().st_size for file in files)


def test_shares_of_the_budget(done):
    """Each stage ends with the last step that its share pays for."""
    probed = {way: stage_receipts(done[0], way)["probe"].cost.flops.value for way in WAYS if way.endswith("probe")}
    rest = {way: BUDGET - flops for way, flops in probed.items()}
    shares = {
        "pretrain+probe": (rest["pretrain+probe"],),
        "pretrain+distill+probe": (0.6 * rest["pretrain+distill+probe"], 0.4 * rest["pretrain+distill+probe"]),
        "pretrain+uniform": (0.8 * BUDGET, 0.2 * BUDGET),
        "pretrain+distill+history": (0.48 * BUDGET, 0.32 * BUDGET, 0.2 * BUDGET),
        "pretrain+adapt": (0.8 * BUDGET, 0.2 * BUDGET),
    }
    for way, wanted in shares.items():
        for part, most in zip(stage_receipts(done[0], way).values(), wanted, strict=False):
            step = 16 * part.cost.flops.value / part.cost.samples.value
            # The probe's classifier is counted, and no stage's share knows of it before.
            assert most - 1.1 * step < part.cost.flops.value <= 1.01 * most


@pytest.mark.parametrize("way", WAYS[1:])
def test_curves_run_on_from_stage_to_stage(done, way):
    receipt = done[1][way]
    for axis in ("flops", "seconds", "cpu_seconds", "samples"):
        values = [point[axis] for point in receipt.curve]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(getattr(receipt.cost, axis).value, rel=0.01)
    assert receipt.curve[-1]["test_accuracy"] == receipt.quality["test_accuracy"]
    # The loss of pretraining is no cross-entropy.
    assert all("train_loss" not in point for point in receipt.curve if "test_accuracy" not in point)
    assert any("knn1_accuracy" in point for point in receipt.curve)


def test_the_model_and_its_probe_can_be_used(shapes, done):
    """The receipt's accuracy from the two files, by the formula that is written down, in another library."""
    folder, receipts = done
    home = folder / "pretrain+distill+probe" / "seed-0"
    encoder = load_encoder(home)
    assert (encoder.name, encoder.mean) == ("convnet-4", (0.2,))
    features = features_of(encoder, shapes.test, device="cpu")
    file = load_file(home / PROBE)
    rows = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    logits = (rows - file["mean"]) / file["std"] @ file["weight"].T + file["bias"]
    right = (logits.argmax(1) == shapes.test.labels.numpy()).mean()
    assert right == pytest.approx(receipts["pretrain+distill+probe"].quality["test_accuracy"])
    torch.testing.assert_close(load_probe(home / PROBE).logits(features), torch.from_numpy(logits))
    with safe_open(home / PROBE, "pt") as opened:
        assert opened.metadata()["classes"].split("\n") == list(CLASSES)


def test_a_file_that_is_no_probe(done):
    folder, _ = done
    for file in (folder / "uniform" / "seed-0" / WEIGHTS, folder / "absent.safetensors"):
        with pytest.raises(InputError, match="linear probe"):
            load_probe(file)


def test_the_taught_network_is_the_studys_and_the_teacher_the_encoder(done):
    home = done[0] / "pretrain+distill+history" / "seed-0" / "stages"
    assert [load_encoder(home / name).name for name in ("pretrain", "distill")] == ["convnet-8", "convnet-4"]
    assert load_receipt(home / "distill" / RECEIPT).notes["teachers"] == ["convnet-8"]


def test_training_on_starts_from_the_encoder(done, monkeypatch, tmp_path, shapes):
    started = []

    def seen(setup, task, report, *, resume):
        started.append(setup.build_model(task.seed).state_dict())
        raise Killed

    monkeypatch.setattr(stages, "run_task", seen)
    with pytest.raises(Killed):
        study(config(tmp_path / "study", ways=("pretrain+uniform",)), data=shapes)
    encoder = load_file(tmp_path / "study" / "pretrain+uniform" / "seed-0" / "stages" / "pretrain" / WEIGHTS)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        fresh = create_model("convnet-4", classes=3, channels=1, size=16).state_dict()
    assert len(encoder) == len(fresh) - 2
    for key, value in started[0].items():
        wanted = fresh[key].numpy() if key.startswith("head.") else encoder[key]
        np.testing.assert_array_equal(value.numpy(), wanted)
    assert any((fresh[key].numpy() != value).any() for key, value in encoder.items())


def test_adapting_leaves_the_encoder_and_a_merged_classifier(shapes, done):
    """The adapter on the pretrained encoder answers as the weights that the way ends in."""
    home = done[0] / "pretrain+adapt" / "seed-0"
    parts = home / "stages"
    model = image_subject(load_encoder(parts / "pretrain"), CLASSES).build(7)
    load_adapter_(model, parts / "adapt" / ADAPTER)
    merged = create_classifier(home / WEIGHTS)
    shown = ready(shapes.test.batch(torch.arange(96)), shapes, torch.device("cpu"))
    with torch.no_grad():
        ours, theirs = model.eval()(shown), merged.eval()(shown)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    accuracy = float((theirs.argmax(1) == shapes.test.labels).float().mean())
    assert accuracy == pytest.approx(done[1]["pretrain+adapt"].quality["test_accuracy"], abs=0.02)
    encoder, final = load_file(parts / "pretrain" / WEIGHTS), load_file(home / WEIGHTS)
    moved = {key for key, value in encoder.items() if (final[key] != value).any()}
    assert moved == {f"features.{place}.weight" for place in (0, 3, 7)}
    assert done[1]["pretrain+adapt"].notes["trained numbers"] > 0


def create_classifier(path: Path) -> torch.nn.Module:
    with torch.random.fork_rng([]):
        model = create_model("convnet-4", classes=3, channels=1, size=16)
    assert load_weights_(model, path) == []
    return model


def test_an_adapted_run_that_was_killed_before_its_merge_goes_on(shapes, tmp_path, monkeypatch):
    settings = {"ways": ("uniform", "pretrain+adapt"), "flops": 1.5e8}

    def dying(setup, context):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stages_adapt, "_write_merged", dying)
        with pytest.raises(Killed):
            study(config(tmp_path / "killed", **settings), data=shapes)
    study(config(tmp_path / "killed", **settings, resume=True), data=shapes)
    study(config(tmp_path / "whole", **settings), data=shapes)
    killed, whole = (tmp_path / name / "pretrain+adapt" / "seed-0" / WEIGHTS for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


def test_the_same_labelled_images_for_every_way(shapes, tmp_path, monkeypatch):
    """And for pretraining by itself with as many labels of that seed; others for another seed."""
    trained, probed = {}, {}
    run_task, fit = stages.run_task, stages_probe.fit_linear_probe

    def training(setup, task, report, *, resume):
        trained[task.way, task.seed] = setup.data.train.pixels
        assert setup.config.batch_size == 12
        return run_task(setup, task, report, resume=resume)

    def probing(features, labels, **options):
        probed.setdefault(len(probed), (labels, len(features), len(options["unlabelled"])))
        return fit(features, labels, **options)

    monkeypatch.setattr(stages, "run_task", training)
    monkeypatch.setattr(stages_probe, "fit_linear_probe", probing)
    settings = {
        "labelled": 12 / 384,
        "seeds": 2,
        "flops": 1.5e8,
        "ways": ("prune", "pretrain+presample", "pretrain+probe"),
    }
    folder, receipts = study(config(tmp_path / "study", **settings), data=shapes)
    one, other = (load_file(folder / "pretrain+probe" / f"seed-{seed}" / WEIGHTS) for seed in (0, 1))
    assert any((one[key] != other[key]).any() for key in one)
    assert {receipt.cost.labels.value for receipt in receipts} == {12}
    told = [PretrainConfig(constraint="labels", labelled=12 / 384, seed=seed) for seed in (0, 1)]
    rows = [(usable_labels_of(one, shapes) >= 0).nonzero().flatten() for one in told]
    assert not torch.equal(*rows)
    assert shapes.train.labels[rows[0]].bincount().tolist() == [4, 4, 4]
    for seed in (0, 1):
        for way in ("prune", "presample"):
            assert torch.equal(trained[way, seed], shapes.train.pixels[rows[seed]])
    labels, count, unlabelled = probed[0]
    assert torch.equal(labels, shapes.train.labels[rows[0]])
    assert (count, unlabelled) == (12, 384)


def test_a_probe_looks_at_labelled_and_some_other_images(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(stages_probe, "_STATISTICS", 100)
    found = {}
    for labelled in (0.1, 0.5):
        context = stages.Context(
            setup=type("Setup", (), {"data": shapes, "config": config(tmp_path, labelled=labelled)})(),
            study="", way="", baseline=False, seed=0, budget=1.0, folder=tmp_path, report=print,
        )  # fmt: skip
        rows, known = stages_probe.encoded_rows(context), context.labelled
        assert torch.equal(rows[: len(known)], known)
        assert len(rows.unique()) == len(rows)
        found[labelled] = len(rows)
    assert found == {0.1: 100, 0.5: 192}


def test_labels_are_chosen_by_features_and_only_those_chosen_are_read(shapes, done):
    folder, receipts = done
    spent = {way: receipt.cost.labels.value for way, receipt in receipts.items()}
    assert spent == dict.fromkeys(WAYS, len(labelled_rows(shapes, 0.1, seed=0)))
    encoder = load_encoder(folder / "pretrain+label" / "seed-0" / "stages" / "pretrain")
    features = features_of(encoder, shapes.train, device="cpu")
    count = int(spent["pretrain+label"])

    def chosen(data: ImageData) -> torch.Tensor:
        setup = SimpleNamespace(data=data)
        return chosen_rows(features, SimpleNamespace(setup=setup, labelled=torch.arange(count), seed=0))

    rows = chosen(shapes)
    assert len(rows.unique()) == len(rows) == count
    probe = fit_linear_probe(features[rows], shapes.train.labels[rows], classes=3, unlabelled=features)
    kept = load_probe(folder / "pretrain+label" / "seed-0" / PROBE)
    assert torch.allclose(kept.weight, probe.weight, atol=1e-4)
    hidden = torch.zeros_like(shapes.train.labels)
    hidden[rows] = shapes.train.labels[rows]
    assert torch.equal(chosen(dataclasses.replace(shapes, train=TensorImages(shapes.train.pixels, hidden))), rows)


def test_a_probes_flops_are_counted(shapes, done):
    folder, _ = done
    home = folder / "pretrain+probe" / "seed-0" / "stages"
    encoder, probe = load_encoder(home / "pretrain"), load_receipt(home / "probe" / RECEIPT)
    alone = count_flops(lambda: encoder.model(torch.zeros(1, 1, 16, 16))).value
    assert 384 * alone < probe.cost.flops.value < 1.2 * 384 * alone
    matrix, right = torch.eye(6), torch.ones(6, 4)
    assert count_flops(lambda: torch.linalg.cholesky(matrix)).value == 6**3 // 3
    assert count_flops(lambda: torch.cholesky_solve(right, matrix)).value == 2 * 6 * 6 * 4


def test_a_killed_study_goes_on_in_its_second_stage(shapes, tmp_path, monkeypatch):
    way, settings = "pretrain+distill+probe", {"labelled": 0.2}
    study(config(tmp_path / "whole", ways=("uniform", way), **settings), data=shapes)
    pause = Fitting._pause

    def dying(self, begin, stop):
        if isinstance(self, DistillFitting) and self.spent.steps == 4:
            self.save()
        if isinstance(self, DistillFitting) and self.spent.steps == 7:
            raise Killed
        return pause(self, begin, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_pause", dying)
        with pytest.raises(Killed):
            study(config(tmp_path / "killed", ways=("uniform", way), **settings), data=shapes)
    home = tmp_path / "killed" / way / "seed-0"
    first = load_receipt(home / "stages" / "pretrain" / RECEIPT)
    assert not (home / RECEIPT).exists()
    _, receipts = study(config(tmp_path / "killed", ways=("uniform", way), **settings, resume=True), data=shapes)
    assert load_receipt(home / "stages" / "pretrain" / RECEIPT).to_dict() == first.to_dict()
    whole = load_receipt(tmp_path / "whole" / way / "seed-0" / RECEIPT)
    assert (receipts[1].quality, receipts[1].notes["resumed"]) == (whole.quality, 1)
    assert receipts[1].cost.flops == whole.cost.flops
    for file in (WEIGHTS, PROBE):
        assert (home / file).read_bytes() == (tmp_path / "whole" / way / "seed-0" / file).read_bytes()
    monkeypatch.setattr(Fitting, "run", lambda *_: pytest.fail("trained again"))
    _, again = study(config(tmp_path / "killed", ways=("uniform", way), **settings, resume=True), data=shapes)
    assert [item.created for item in again] == [item.created for item in receipts]


def test_the_bar_shows_the_stage(shapes, tmp_path, monkeypatch):
    said, shares = [], []

    class Progress:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_task(self, description, **_):
            return description

        def update(self, bar, *, completed=None, description=None, figures=""):
            shares.append(completed) if description is None else said.append(description)

        def advance(self, bar):
            pass

        def remove_task(self, bar):
            pass

    monkeypatch.setattr("scrimp.jobs.study.progress_bar", lambda *, shown: Progress())
    way = "pretrain+distill+probe"
    study(config(tmp_path / "study", ways=("uniform", way)), data=shapes)
    head = f"{way}, seed 0: "
    assert {line.removeprefix(head).split(",")[0] for line in said} == {"pretrain", "distill", "probe"}
    assert said[0] == head + "pretrain"
    start = shares.index(min(shares[-10:]))
    assert 0.8 < shares[-1] <= 1
    assert shares[start:] == sorted(shares[start:])


def test_tables_and_reports_bear_losses_that_are_unknown(done, tmp_path):
    receipts = [
        dataclasses.replace(receipt, quality={"test_accuracy": receipt.quality["test_accuracy"], "train_loss": None})
        if "probe" in way
        else receipt
        for way, receipt in done[1].items()
    ]
    render_table(receipts)
    text = write_report(receipts, tmp_path / REPORT).read_text()
    assert "pretrain+distill+probe" in text
    assert "in 2 ways" not in (done[0] / REPORT).read_text()  # every figure was obtained as the baseline's was


@pytest.mark.parametrize(
    ("way", "word"),
    [
        ("probe", "pretrain\\+probe"),
        ("distill", "pretrain\\+probe"),
        ("pretrain", "pretrain\\+probe"),
        ("pretrain+", "stages out of"),
        ("pretrain+polish", "'polish' in pretrain\\+polish"),
        ("pretrain+distill", "ends in probe"),
        ("pretrain+probe+distill", "ends in probe"),
        ("distill+probe", "pretrain before"),
        ("distill+pretrain+probe", "pretrain before"),
        ("uniform+probe", "pretrain before"),
        ("pretrain+probe+uniform", "nothing after probe"),
        ("pretrain+history+probe", "nothing after history"),
        ("adapt", "pretrain\\+adapt"),
        ("pretrain+adapt+probe", "nothing after adapt"),
        ("uniform+adapt", "pretrain before"),
        ("label", "pretrain\\+probe"),
        ("pretrain+label+adapt", "nothing after label"),
        ("pretrain+pretrain+probe", "at most once"),
        ("pretrain+distill+distill+probe", "at most once"),
    ],
)
def test_orders_that_mean_nothing(way, word):
    with pytest.raises(InputError, match=word) as raised:
        find_ways((way,))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"labelled": 0.0}, "--labelled"),
        ({"labelled": 1.5}, "--labelled"),
        ({"encoder": "convnet-8", "ways": ("uniform", "pretrain+probe")}, "--encoder"),
        ({"weights": Path("some.safetensors"), "ways": ("uniform", "pretrain+probe")}, "--weights"),
        ({"model": "none-such", "ways": ("pretrain+probe",)}, "timm"),
        ({"encoder": "none-such", "ways": ("pretrain+distill+probe",)}, "timm"),
        ({"flops": 6e6, "ways": ("uniform", "pretrain+probe")}, "budget above"),
        ({"flops": 1.9e7, "ways": ("uniform", "pretrain+uniform")}, "one step"),
        ({"batch_size": 4, "ways": ("uniform", "pretrain+uniform")}, "at least 5 images"),
        ({"ways": ("uniform", "pretrain+probe", "pretrain+probe")}, "different ways"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(shapes, tmp_path, settings, word):
    with pytest.raises(InputError, match=word):
        study(config(tmp_path / "study", **settings), data=shapes)
    assert not (tmp_path / "study").exists()


def test_an_encoder_of_another_architecture_is_refused(done, shapes, tmp_path):
    from scrimp.jobs.setup import load_backbone_

    with torch.random.fork_rng([]):
        model = create_model("convnet-4", classes=3, channels=1, size=16)
    with pytest.raises(InputError, match="same architecture"):
        load_backbone_(model, done[0] / "pretrain+distill+probe" / "seed-0" / "stages" / "pretrain" / WEIGHTS)


def test_a_budget_of_less_than_a_pass_keeps_no_features(shapes, tmp_path):
    """To go through all images with the teacher first would leave nothing for the student."""
    study(config(tmp_path / "study", ways=("uniform", "pretrain+distill+uniform"), flops=1.5e8), data=shapes)
    home = tmp_path / "study" / "pretrain+distill+uniform" / "seed-0" / "stages"
    assert load_receipt(home / "distill" / RECEIPT).notes["teacher features"] == "live"
    assert load_receipt(home / "distill" / RECEIPT).cost.samples.value >= 16


def few() -> ImageData:
    images = TensorImages(*draw(96, 0)), TensorImages(*draw(24, 1))
    return ImageData(train=images[0], test=images[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))


def run(out: Path) -> None:
    torch.set_num_threads(1)
    made = config(out, ways=WAYS[2:4], flops=1e8, labelled=0.25)
    accelerator = start(made)
    study(made, data=few(), accelerator=accelerator)
    finish(accelerator)


def test_two_processes_make_what_one_makes(tmp_path):
    study(config(tmp_path / "one", ways=WAYS[2:4], flops=1e8, labelled=0.25), data=few())
    torchrun(2, str(HERE / "test_stages.py"), str(tmp_path / "two"), cwd=tmp_path)
    for way in WAYS[2:4]:
        one, two = (tmp_path / name / way / "seed-0" for name in ("one", "two"))
        first, second = load_receipt(one / RECEIPT), load_receipt(two / RECEIPT)
        assert (first.notes["processes"], second.notes["processes"]) == (1, 2)
        for field in ("samples", "labels", "stored_bytes"):
            assert getattr(first.cost, field).value == getattr(second.cost, field).value
        # The classifier's optimum may be reached some steps earlier or later.
        assert first.cost.flops.value == pytest.approx(second.cost.flops.value, rel=1e-2)
        ours, theirs = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
        for key, value in ours.items():
            assert np.abs(value - theirs[key]).max() < 0.02, key


if __name__ == "__main__":
    run(Path(sys.argv[1]))


def test_minutes_are_shared_out_by_how_fast_each_way_is(shapes, monkeypatch):
    """A way whose FLOPs take longer leaves fewer of them to every run; one of plain training changes nothing."""
    from scrimp.jobs import study as module
    from scrimp.jobs.pretrain import Pretraining

    config = StudyConfig(ways=("uniform",), seeds=1, minutes=10.0, model="convnet-4", device="cpu", json=True)
    with accelerated(config) as accelerator:
        setup = prepare(config, shapes, accelerator)
        monkeypatch.setattr(type(setup), "timed", lambda self: (0.01, 0.01))
        usual = 0.01 / (setup.cost.train * config.batch_size)
        monkeypatch.setattr(Pretraining, "seconds_a_flop", lambda self: 3 * usual)
        monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0)
        budgets = []
        for names in (("uniform",), ("pretrain+probe",), ("uniform", "pretrain+probe")):
            order = dataclasses.replace(config, ways=names)
            used = dataclasses.replace(setup, config=order)
            budgets.append(module._budget(order, used, find_ways(names), 0.0))
        assert budgets[0] / budgets[1] == pytest.approx(3, rel=0.01)
        assert budgets[0] / budgets[2] == pytest.approx(4, rel=0.02)
