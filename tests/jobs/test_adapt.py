"""`scrimp adapt` on images: every method, size and baseline; what is frozen stays; the same bytes after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import HERE, torchrun
from torch.nn import functional

from conftest import CLASSES, draw
from scrimp.adapt import load_adapter_
from scrimp.cli import main
from scrimp.data import ImageData, TensorImages, normalise
from scrimp.jobs.adapt import BASELINE, adapt
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.adapt_images import Repeated
from scrimp.jobs.adapt_labels import shot_rows
from scrimp.jobs.adapt_models import Subject, image_model, image_subject
from scrimp.jobs.adapt_run import ADAPTER
from scrimp.jobs.checkpoint import load_checkpoint
from scrimp.jobs.encoders import create_encoder, encoder_metadata, features_of, load_encoder
from scrimp.jobs.fit import Fitting
from scrimp.jobs.folder import CHECKPOINT, CONFIG, RECEIPT, REPORT, WEIGHTS, read_yaml
from scrimp.jobs.stages_probe import PROBE
from scrimp.meter import count_flops
from scrimp.primitives.errors import InputError
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import load_receipt
from scrimp.represent.linear import linear_accuracy

METHODS = ("nola", "lora", "bias", "linear", "full")
TOGETHER = {"epochs": 2.0, "baseline": "none", "optimizer": "sgd", "lr": 0.05}
PARALLEL = {"nola": {"method": "nola", "bases": 8}, "lora": {"method": "lora", "rank": 2}}
USUAL = {"data": "shapes", "batch_size": 16, "evaluations": 2, "probe": 64, "epochs": 2.0, "precision": "fp32"}


def config(out: Path, **settings) -> AdaptConfig:
    return AdaptConfig(**{**USUAL, "json": True, "device": "cpu", **settings}, out=out)


def shapes_of(train: int, test: int) -> ImageData:
    sets = TensorImages(*draw(train, 0)), TensorImages(*draw(test, 1))
    return ImageData(train=sets[0], test=sets[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))


def untrained(folder: Path, name: str, *, channels: int = 1, seed: int = 3) -> Path:
    """The weights of an encoder as `scrimp pretrain` writes them, as they are drawn."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = create_encoder(name, channels=channels, size=16)
        dim = model.eval()(torch.zeros(1, channels, 16, 16)).shape[1]
    facts = encoder_metadata(name, channels=channels, size=16, mean=(0.2,) * channels, std=(0.2,) * channels, dim=dim)
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(pack_weights(model.state_dict(), facts))
    return folder


class Killed(BaseException):
    """Stands for kill -9: nothing gets to run after it."""


@contextmanager
def stop_after(steps: int) -> Iterator[None]:
    """Die one step after a checkpoint at this one."""
    pause = Fitting._pause

    def dying(self, begin, stop):
        if self.spent.steps == steps:
            self.save()
        if self.spent.steps == steps + 1:
            raise Killed
        return pause(self, begin, stop)

    Fitting._pause = dying
    try:
        yield
    finally:
        Fitting._pause = pause


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("bases") / "convnet", "convnet-8")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("bases") / "resnet", "small-resnet18-4")


@pytest.fixture(scope="module")
def small() -> ImageData:
    return shapes_of(96, 48)


def subject_of(base: Path) -> Subject:
    return image_subject(load_encoder(base), CLASSES)


def accuracy_of(model: torch.nn.Module, data: ImageData) -> float:
    """One image at a time."""
    right = 0
    with torch.no_grad():
        for row, label in enumerate(data.test.labels.tolist()):
            image = normalise(data.test.batch(torch.tensor([row])), (0.2,), (0.2,))
            right += int(model.eval()(image).argmax()) == label
    return right / len(data.test)


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_writes_what_it_says(base, shapes, tmp_path, method):
    folder = tmp_path / "run"
    receipt, *rest = adapt(config(folder, model=str(base), method=method, epochs=3.0, lr=0.01), data=shapes)
    assert receipt.quality["train_loss"] < 0.95 * torch.tensor(3.0).log()
    assert receipt.quality["test_accuracy"] > 0.45  # a third by chance
    assert receipt.cost.samples.value == 3 * 384
    assert receipt.cost.labels.value == 384
    assert receipt.cost.flops.missed == ()
    assert receipt.cost.stored_bytes.value == (folder / ADAPTER).stat().st_size
    assert [item.way for item in rest] == ([] if method == "linear" else ["linear"])
    written = {CONFIG, RECEIPT, REPORT, ADAPTER} | ({BASELINE} if rest else set())
    assert {item.name for item in folder.iterdir()} == written
    assert load_receipt(folder / RECEIPT).quality == receipt.quality
    model = subject_of(base).build(5)  # another classifier: the file has the trained one
    load_adapter_(model, folder / ADAPTER)
    assert accuracy_of(model, shapes) == pytest.approx(receipt.quality["test_accuracy"], abs=1 / 96)


def test_the_count_of_numbers(base, small, tmp_path):
    found = {}
    sizes = {
        "numbers": {"numbers": 120},
        "shared": {"numbers": 10},
        "bases": {"bases": 5, "rank": 2},
        "lora": {"method": "lora", "numbers": 900},
        "bytes": {"bytes": 1000, "bits": 8},
        "where": {"numbers": 60, "where": r"features\.3"},
    }
    for name, settings in sizes.items():
        run = config(tmp_path / name, model=str(base), baseline="none", epochs=0.2, **settings)
        (receipt,) = adapt(run, data=small)
        found[name] = receipt.notes["trained numbers"]
        assert receipt.notes["trained numbers of the classifier"] == 3 * 128 + 3
    model = subject_of(base).build(0)
    sides = [sum((conv.weight.shape[0], conv.weight[0].numel())) for conv in convolutions(model)]
    assert 100 <= found["numbers"] <= 120
    assert found["shared"] == 10
    assert found["bases"] == 5 * 2 * len(sides)
    assert found["lora"] == 900 // sum(sides) * sum(sides) > 0
    assert found["where"] == 60
    classifier = 4 * (3 * 128 + 3)
    entries = 200  # at most, of the classifier in the file's header
    assert 800 < (tmp_path / "bytes" / ADAPTER).stat().st_size - classifier <= 1000 + entries


def convolutions(model: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize(("method", "moves"), [("nola", False), ("bias", False), ("full", True)])
def test_batch_statistics_stay_unless_everything_is_trained(resnet, small, tmp_path, monkeypatch, method, moves):
    seen = []
    run_on = Fitting.run

    def watched(self, report):
        run_on(self, report)
        seen.append({name: value.clone() for name, value in self.plain.named_buffers() if "running" in name})

    monkeypatch.setattr(Fitting, "run", watched)
    adapt(config(tmp_path / "run", model=str(resnet), method=method, baseline="none", epochs=0.5), data=small)
    before = load_file(resnet / WEIGHTS)
    assert len(seen[0]) == 40
    assert all(torch.equal(value, before[name]) != moves for name, value in seen[0].items())


def test_gradients_of_frozen_weights_are_not_counted(base, small, tmp_path):
    """A classifier alone costs a forward pass and the gradient of its weight: 2 * dim * classes FLOPs."""
    found = {}
    for method in METHODS:
        run = config(tmp_path / method, model=str(base), method=method, baseline="none", epochs=1.0)
        (receipt,) = adapt(run, data=small)
        found[method] = receipt.cost.flops.value / receipt.cost.samples.value
    model = subject_of(base).build(0)
    with torch.no_grad():
        forward = count_flops(lambda: model(torch.zeros(1, 1, 16, 16))).value
    assert found["linear"] == forward + 2 * 128 * 3
    assert found["linear"] < found["bias"] < found["lora"] < found["full"] * 1.2
    assert found["bias"] < found["full"]


def test_the_linear_baseline_is_the_optimum_on_the_features(base, small, tmp_path):
    _, beside = adapt(config(tmp_path / "run", model=str(base), epochs=0.2), data=small)
    encoder = load_encoder(base)
    train, test = (features_of(encoder, part, device="cpu") for part in (small.train, small.test))
    assert beside.quality["test_accuracy"] == linear_accuracy(train, small.train.labels, test, small.test.labels)
    assert beside.baseline
    assert beside.cost.flops.missed == ()
    assert (tmp_path / "run" / BASELINE / PROBE).is_file()
    assert "in 2 ways" not in (tmp_path / "run" / REPORT).read_text()  # every figure was obtained as the other's was


@pytest.mark.parametrize("baseline", ["lora", "full"])
def test_other_baselines_have_the_same_budget(base, small, tmp_path, baseline):
    run = config(tmp_path / "run", model=str(base), numbers=100, baseline=baseline, epochs=2.0)
    ours, theirs = adapt(run, data=small)
    assert (ours.way, theirs.way) == ("nola", baseline)
    assert (ours.baseline, theirs.baseline) == (False, True)
    step = 16 * theirs.cost.flops.value / theirs.cost.samples.value
    assert ours.config["budget_flops"] - step < theirs.cost.flops.value <= ours.config["budget_flops"]
    assert theirs.notes["trained numbers"] > 10 * ours.notes["trained numbers"]


def test_coefficients_of_few_bits(base, small, tmp_path):
    found = {}
    for name, settings in {
        "float": {},
        "aware": {"bits": 4},
        "after": {"bits": 4, "quantize": "after"},
        "crude": {"bits": 2, "quantize": "after"},
        "half": {"bits": 16},
    }.items():
        run = config(tmp_path / name, model=str(base), bases=32, lr=0.05, baseline="none", epochs=3.0, **settings)
        (found[name],) = adapt(run, data=small)
    stored = {name: receipt.cost.stored_bytes.value for name, receipt in found.items()}
    numbers = found["float"].notes["trained numbers"]
    assert stored["float"] - stored["half"] == pytest.approx(2 * numbers, abs=40)
    assert stored["float"] - stored["after"] == pytest.approx(3.5 * numbers, abs=40)
    assert stored["aware"] == pytest.approx(stored["after"], abs=40)
    # What is reported is what the file gives, not what was trained.
    for name in ("aware", "after", "crude"):
        model = subject_of(base).build(0)
        load_adapter_(model, tmp_path / name / ADAPTER)
        with torch.no_grad():
            logits = model.eval()(normalise(small.test.batch(torch.arange(48)), (0.2,), (0.2,)))
        loss = float(functional.cross_entropy(logits, small.test.labels))
        assert found[name].quality["test_loss"] == pytest.approx(loss, rel=1e-4)
    trained = found["crude"].curve[-1]["test_loss"]
    assert abs(found["crude"].quality["test_loss"] - trained) > 1e-3


def test_shots(base, small, tmp_path):
    labels = torch.tensor([2, 0, 0, 2, 0, 2, 2, 0])
    few, more = shot_rows(labels, 2, seed=1), shot_rows(labels, 3, seed=1)
    assert labels[few].bincount().tolist() == [2, 0, 2]
    assert labels[more].bincount().tolist() == [3, 0, 3]
    assert set(few.tolist()) < set(more.tolist())
    assert {tuple(shot_rows(labels, 2, seed=seed).tolist()) for seed in range(20)} != {tuple(few.tolist())}
    with pytest.raises(InputError, match="at least 5"):
        shot_rows(labels, 5, seed=0)
    receipt, beside = adapt(config(tmp_path / "run", model=str(base), shots=4, epochs=1.0), data=small)
    assert receipt.cost.labels.value == beside.cost.labels.value == 12
    assert receipt.cost.samples.value == 12  # a batch of all there is


@pytest.mark.parametrize("method", ["nola", "full"])
def test_a_killed_run_resumes_to_the_same_bytes(base, resnet, small, tmp_path, method):
    model = {"nola": base, "full": resnet}[method]
    settings = {"model": str(model), "method": method, "augment": "crop", "epochs": 1.5}
    adapt(config(tmp_path / "whole", **settings), data=small)
    with stop_after(6), pytest.raises(Killed):
        adapt(config(tmp_path / "killed", **settings), data=small)
    kept = load_checkpoint(tmp_path / "killed" / CHECKPOINT)["model"]
    receipt, beside = adapt(config(tmp_path / "killed", **settings, resume=True), data=small)
    if method == "nola":  # and no frozen weight
        places = ("features.0", "features.3", "features.7")
        factors = {f"{place}.adapter.factors.{name}" for place in places for name in ("alpha", "beta")}
        assert set(kept) == factors | {"head.weight", "head.bias"}
    else:
        assert set(load_file(resnet / WEIGHTS)) < set(kept)
    assert receipt.notes["resumed"] == 1
    assert receipt.quality == load_receipt(tmp_path / "whole" / RECEIPT).quality
    for file in (ADAPTER, f"{BASELINE}/{PROBE}"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    names = [sorted(item.name for item in (tmp_path / run).rglob("*")) for run in ("killed", "whole")]
    assert names[0] == names[1]
    again, _ = adapt(config(tmp_path / "killed", **settings, resume=True), data=small)
    assert again.created == receipt.created
    assert beside.way == "linear"


def test_grey_images_for_a_model_of_colours(small, tmp_path):
    base = untrained(tmp_path / "base", "convnet-4", channels=3)
    receipt, _ = adapt(config(tmp_path / "run", model=str(base), epochs=0.5), data=small)
    assert receipt.quality["test_accuracy"] is not None
    rows = torch.tensor([3, 1])
    repeated = Repeated(small.train, 3)
    assert repeated.shape == (3, 16, 16)
    assert torch.equal(repeated.batch(rows), small.train.batch(rows).expand(2, 3, 16, 16))
    assert torch.equal(repeated.take(rows)[1][0], repeated.__getitems__([1])[0][0])
    colours = replace(small, train=Repeated(small.train, 3), test=Repeated(small.test, 3))
    grey = untrained(tmp_path / "grey", "convnet-4")
    with pytest.raises(InputError, match="1 channel"):
        adapt(config(tmp_path / "other", model=str(grey)), data=colours)


def test_a_timm_transformer_from_its_weights_file(small, tmp_path):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        vit = create_encoder("test_vit", channels=1, size=32)
    (tmp_path / "vit.safetensors").write_bytes(pack_weights(vit.state_dict(), {"format": "pt"}))
    big = replace(small, train=enlarged(small.train), test=enlarged(small.test))
    run = config(tmp_path / "run", model="test_vit", weights=tmp_path / "vit.safetensors", size=32, epochs=0.5)
    receipt, beside = adapt(replace(run, where="attn"), data=big)
    assert receipt.cost.flops.missed == beside.cost.flops.missed == ()
    names = load_adapter_(vit_with_head(tmp_path), tmp_path / "run" / ADAPTER)
    assert names
    assert all("attn" in name for name in names)


def enlarged(images: TensorImages) -> TensorImages:
    return TensorImages(images.pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), images.labels)


def vit_with_head(folder: Path) -> torch.nn.Module:
    facts = read_yaml(folder / "run" / CONFIG)["resolved"]["model"]
    assert (facts["architecture"], facts["channels"], facts["size"]) == ("test_vit", 1, 32)
    return image_model(facts, load_file(folder / "vit.safetensors"), seed=1)


def test_the_global_generator_is_left_alone(base, small, tmp_path):
    before = torch.get_rng_state()
    adapt(config(tmp_path / "run", model=str(base), epochs=0.5, augment="crop"), data=small)
    assert torch.equal(before, torch.get_rng_state())


def test_minutes_become_steps(base, small, tmp_path, monkeypatch):
    monkeypatch.setattr("scrimp.jobs.adapt_setup.seconds_a_step", lambda *_, **__: 0.02)
    run = config(tmp_path / "run", model=str(base), epochs=None, minutes=0.05, evaluations=1, baseline="none")
    (receipt,) = adapt(run, data=small)
    assert 0 < receipt.cost.samples.value <= 3 / 0.02 * run.batch_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{base}", "{data}", "--method", "lora", "--numbers", "10"], "rank 1"),
        (["{base}", "{data}", "--numbers", "1"], "at least 2"),
        (["{base}", "{data}", "--numbers", "10", "--parallel", "fsdp"], "all weights to share"),
        (["{base}", "{data}", "--numbers", "9999999"], "fewer"),
        (["{base}", "{data}", "--bytes", "20"], "bytes"),
        (["{base}", "{data}", "--numbers", "50", "--bytes", "2000"], "--numbers and --bytes"),
        (["{base}", "{data}", "--method", "full", "--numbers", "50"], "--numbers"),
        (["{base}", "{data}", "--method", "lora", "--bases", "5"], "--bases"),
        (["{base}", "{data}", "--method", "lora", "--bits", "4"], "--quantize after"),
        (["{base}", "{data}", "--method", "bias", "--where", "features"], "--where"),
        (["{base}", "{data}", "--method", "lora", "--baseline", "lora"], "--baseline"),
        (["{base}", "{data}", "--where", "attention"], "attention"),
        (["{base}", "{data}", "--where", "("], "regular expression"),
        (["{base}", "{data}", "--where", "^head$"], "classifier"),
        (["{base}", "{data}", "--shots", "1000"], "--shots"),
        (["{base}", "no/such/folder"], "no/such/folder"),
        (["resnet18", "{data}"], "--pretrained"),
        (["no/such/model", "{data}"], "weights"),
        (["{base}", "{data}", "--batch-size", "0"], "--batch-size"),
        (["{base}", "{data}", "--flops", "10"], "at least one step"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(base, shape_folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    filled = [item.format(base=base, data=shape_folder) for item in arguments]
    assert main(["adapt", *filled, "--device", "cpu", "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("scrimp: expected ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.rglob("*"))


def test_an_unknown_method_is_refused(base, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["adapt", str(base), "builtin", "--method", "magic"])
    assert stopped.value.code == 2
    assert "nola" in capsys.readouterr().err


def test_from_the_shell(base, shape_folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["adapt", str(base), str(shape_folder), "--numbers", "40", "--epochs", "0.5", "--device", "cpu"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["way"], second["way"]) == ("nola", "linear")
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert "linear" in capsys.readouterr().out


@pytest.fixture(scope="module")
def parallel(base, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the same jobs run by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    torchrun(2, str(HERE / "adapt_worker.py"), str(base), str(two), cwd=two)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixture of a module comes before those of a test
    for name, settings in PARALLEL.items():
        adapt(config(one / f"{name}-ddp", model=str(base), **TOGETHER, **settings), data=shapes_of(48, 24))
    torch.set_num_threads(threads)
    return one, two


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_the_same_numbers(base, parallel, name, how):
    runs = parallel[0] / f"{name}-ddp", parallel[1] / f"{name}-{how}"
    receipts = [load_receipt(run / RECEIPT) for run in runs]
    assert [receipt.notes["processes"] for receipt in receipts] == [1, 2]
    assert receipts[0].notes["trained numbers"] == receipts[1].notes["trained numbers"]
    assert receipts[0].cost.flops.value <= receipts[1].cost.flops.value  # factors are built on each
    one, two = (trained(run, base) for run in runs)
    assert one.keys() == two.keys()
    assert max(float(value.abs().max()) for name, value in one.items() if "factors" in name) > 1e-3
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)


def trained(run: Path, base: Path) -> dict[str, torch.Tensor]:
    """The numbers of an adapter, read back onto its base."""
    facts = read_yaml(run / CONFIG)["resolved"]["model"]
    model = image_model(facts, load_file(base / WEIGHTS))
    load_adapter_(model, run / ADAPTER)
    return {name: item.detach() for name, item in model.named_parameters() if item.requires_grad}


def test_shards_resume_to_the_same_bytes(parallel):
    whole, resumed = (parallel[1] / run for run in ("nola-fsdp", "resumed"))
    assert load_receipt(resumed / RECEIPT).notes["resumed"] == 1
    assert (resumed / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
