"""The distillation benchmark: its teachers are what their packages hold, and its receipts say what the runs did."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.data import ImageData, TensorImages
from scrimp.jobs.encoders import Encoder, encode, load_encoder
from scrimp.jobs.models import create_model
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
PUBLISHED = FOLDER.parent / "receipts" / "distillation"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def teachers() -> Any:
    return importlib.import_module("distillation_teachers")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The benchmark, with an empty folder in the place of the published receipts."""
    module = importlib.import_module("distillation")
    monkeypatch.setattr(module, "RECEIPTS", tmp_path / "receipts")
    return module


def images(count: int, seed: int) -> TensorImages:
    """Grey images of two classes, one of them brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 160, (count, 1, 16, 16), generator=generator)
    return TensorImages((pixels + 90 * labels[:, None, None, None]).to(torch.uint8), labels)


@pytest.fixture
def tiny(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark on 40 images with two small teachers of random weights."""
    data = ImageData(images(40, 0), images(20, 1), ("dark", "bright"), "grey", (0.4,), (0.2,))

    def teacher(width: int) -> Encoder:
        with torch.random.fork_rng([]):
            torch.manual_seed(width)
            model = create_model(f"convnet-{width}", classes=0, channels=1, size=16).eval()
        return Encoder(model=model, name="net", dim=16 * width, channels=1, size=16, mean=(0.2,), std=(0.3,))

    monkeypatch.setattr(bench, "SETTINGS", {"grey": bench.Setting("grey images", lambda: data, 2, 2)})
    monkeypatch.setattr(bench, "TEACHERS", {"lite0": lambda: teacher(6), "vit-s14": lambda: teacher(4)})
    monkeypatch.setattr(bench, "RECIPE", bench.RECIPE | {"model": "convnet-2", "batch_size": 10})
    threads = torch.get_num_threads()
    yield bench
    torch.set_num_threads(threads)


def made(bench: Any, way: str) -> Receipt:
    return load_receipt(bench.path_of("grey", way, 0))


def flops(receipt: Receipt) -> float:
    assert receipt.cost.flops.value is not None
    return receipt.cost.flops.value


def test_every_way_leaves_a_receipt_that_charges_what_it_uses(tiny: Any, tmp_path: Path) -> None:
    ways = ("head-4", "head-1", "scratch-1pct", "live", "two-teachers")
    tiny.run(tiny.Run(settings=("grey",), ways=ways, seeds=(0,), folder=tmp_path / "runs"))
    found = {way: made(tiny, way) for way in ways}
    for way, receipt in found.items():
        assert (receipt.kind, receipt.way, receipt.name) == ("benchmark", way, "distillation/grey")
        assert receipt.config["out"] is receipt.config["cache_folder"] is None
        assert receipt.config["data"] == "grey"
        assert receipt.baseline == (way == "scratch-1pct")
        student = receipt.notes["student FLOPs an image"] * (receipt.cost.samples.value or 0)
        assert receipt.notes["teacher FLOPs share"] == pytest.approx(1 - student / flops(receipt))
        assert str(tmp_path) not in tiny.path_of("grey", way, 0).read_text()
    one = found["head-4"].notes["teacher FLOPs an image"]
    for way in ("head-4", "head-1"):  # two views of 40 images, and 80 through the student
        wanted = 80 * one + 80 * found[way].notes["student FLOPs an image"]
        assert flops(found[way]) == pytest.approx(wanted)
    assert "earlier run" in found["head-1"].cost.flops.how
    assert "earlier run" not in found["head-4"].cost.flops.how
    live = found["live"]
    assert flops(live) == pytest.approx(80 * (one + live.notes["student FLOPs an image"]))
    both = found["two-teachers"].notes["teacher FLOPs an image"]
    student = found["two-teachers"].notes["student FLOPs an image"]
    assert both > one
    assert flops(found["two-teachers"]) == pytest.approx(80 * (both + student))
    scratch = found["scratch-1pct"]
    step = 10 * scratch.notes["student FLOPs an image"]
    assert flops(found["head-4"]) - step < flops(scratch) <= flops(found["head-4"]) * (1 + 1e-9)
    assert scratch.cost.labels.value == 2  # one of each class
    assert scratch.notes["passes"] > 2 == live.notes["passes"]
    check_quality(tiny, found["head-4"], tmp_path / "runs" / "grey" / "head-4-seed0")


def check_quality(tiny: Any, receipt: Receipt, folder: Path) -> None:
    """1-NN by hand from the weights file; few labels can give no more than the range of a share."""
    data = tiny.SETTINGS["grey"].data()
    encoder = load_encoder(folder)
    options = {"mean": encoder.mean, "std": encoder.std, "device": "cpu"}
    train, test = (encode(encoder.model, part, **options) for part in (data.train, data.test))
    right = 0
    for row, label in zip(test, data.test.labels, strict=True):
        likeness = [float(torch.cosine_similarity(row, other, 0)) for other in train]
        right += int(data.train.labels[likeness.index(max(likeness))] == label)
    assert receipt.quality["knn1_accuracy"] == right / 20
    assert set(tiny.COLUMNS) - {"test_accuracy"} <= set(receipt.quality)
    assert 0 <= receipt.quality["linear_1pct_accuracy"] <= 1


def test_a_finished_run_is_skipped(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_receipt(Receipt("benchmark", "distillation/grey", "head-4"), tiny.path_of("grey", "head-4", 0))
    monkeypatch.setattr(tiny, "run_one", lambda *args, **options: pytest.fail("ran"))
    tiny.run(tiny.Run(settings=("grey",), ways=("head-4",), seeds=(0,)))
    with pytest.raises(pytest.fail.Exception):
        tiny.run(tiny.Run(settings=("grey",), ways=("head-4",), seeds=(0, 1)))


def test_labels_alone_get_the_flops_of_another_run(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="head-4"):
        bench.config_of("cifar10-10k", "scratch-1pct", 0, kept=tmp_path)
    other = Receipt("benchmark", "distillation/cifar10-10k", "head-4", cost=Cost(flops=Reading(7e9, "by hand")))
    save_receipt(other, bench.path_of("cifar10-10k", "head-4", 0))
    config = bench.config_of("cifar10-10k", "scratch-1pct", 0, kept=tmp_path)
    assert (config.flops, config.epochs, config.cache_folder) == (7e9, None, None)


def test_ways_differ_in_what_they_say_alone(bench: Any, tmp_path: Path) -> None:
    plain = bench.config_of("cifar10-10k", "head-4", 3, kept=tmp_path)
    for way, chosen in bench.WAYS.items():
        if chosen.like is not None:
            continue
        config = bench.config_of("cifar10-10k", way, 3, kept=tmp_path)
        config.check()
        assert config.cache_folder == (None if way == "live" else tmp_path)
        assert replace(config, cache_folder=tmp_path) == replace(plain, **chosen.settings)
        assert set(chosen.teachers) <= set(bench.TEACHERS)


def test_the_table_has_means_and_spreads(bench: Any) -> None:
    for seed, value in enumerate((0.40, 0.44)):
        receipt = Receipt(
            "benchmark",
            "distillation/cifar10-10k",
            "head-1",
            seed=seed,
            quality={"knn1_accuracy": value, "test_accuracy": None},
            cost=Cost(flops=Reading(2e12, "by hand")),
            notes={"passes": 6.0},
        )
        save_receipt(receipt, bench.path_of("cifar10-10k", "head-1", seed))
    (row,) = [line for line in bench.table_text().splitlines() if "linear head" in line]
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["2.0", "6.0", "42.0 ± 2.8", "-", "-", "-", "-", "2"]


def test_weights_are_taken_by_place(teachers: Any) -> None:
    wanted = {"stem.weight": torch.zeros(2, 3), "bn.bias": torch.zeros(2)}
    saved = {"_stem.weight": torch.ones(2, 3), "_bn0.bias": torch.ones(2), "_fc.weight": torch.ones(5, 2)}
    found = teachers.by_place(saved, wanted)
    assert list(found) == list(wanted)
    assert all(bool((value == 1).all()) for value in found.values())


@pytest.mark.parametrize(
    "saved",
    [
        {"_stem.weight": torch.ones(3, 2), "_bn0.bias": torch.ones(2)},
        {"_stem.weight": torch.ones(2, 3), "_bn0.weight": torch.ones(2)},
        {"_stem.weight": torch.ones(2, 3)},
    ],
)
def test_weights_of_another_network_are_refused(teachers: Any, saved: dict[str, Tensor]) -> None:
    with pytest.raises(InputError):
        teachers.by_place(saved, {"stem.weight": torch.zeros(2, 3), "bn.bias": torch.zeros(2)})


def test_a_transformer_is_cut_short_where_timm_cuts_it(teachers: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=28, patch_size=14, embed_dim=12, depth=3, num_heads=2, num_classes=0).eval()
        shown = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        tokens = model.forward_intermediates(shown, indices=[1], norm=True, intermediates_only=True, output_fmt="NLC")
        found = teachers.MeanOfTokens(model, blocks=2)(shown)
        assert not torch.allclose(teachers.MeanOfTokens(model, blocks=3)(shown), found, atol=1e-3)
    torch.testing.assert_close(found, tokens[0].mean(1))


PLACES = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}


def test_every_convolution_of_the_package_is_where_its_name_says(teachers: Any) -> None:
    """Names that say where in a block a convolution stands, on both sides; the first block has none to expand."""
    from pretrained.fetch import folder_of

    if not folder_of(f"{teachers.LITE0}-{teachers.VERSION}").is_dir():
        pytest.skip(f"{teachers.LITE0} is not unpacked")
    saved = torch.load(teachers.lite0_file(), map_location="cpu", weights_only=True)
    encoder = teachers.lite0()
    state = encoder.model.state_dict()
    numbers = [int(match[1]) for name in saved if (match := re.match(r"_blocks\.(\d+)\._depthwise", name))]
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in state if name.startswith("blocks.")))
    assert len(numbers) == len(blocks) == 16
    for number, block in zip(numbers, blocks, strict=True):
        for theirs, ours in PLACES.items():
            if number == 0 and theirs != "_depthwise_conv":
                continue
            name = f"_blocks.{number}.{theirs}.weight"
            assert torch.equal(state[f"{block}.{ours}.weight"], saved[name])
    assert torch.equal(state["conv_head.weight"], saved["_conv_head.weight"])
    with torch.no_grad():
        assert encoder.model(torch.zeros(2, 3, 80, 80)).shape == (2, encoder.dim)


def test_published_runs_of_a_seed_are_a_pair() -> None:
    paths = sorted(PUBLISHED.glob("*/*.json"))
    if not paths:
        pytest.skip("no receipts of this benchmark yet")
    found = {path: load_receipt(path) for path in paths}
    for path, receipt in found.items():
        assert path.stem == f"{receipt.way}-seed{receipt.seed}"
        assert receipt.config["seed"] == receipt.seed
        beside = found.get(path.with_stem(f"head-4-seed{receipt.seed}"))
        if beside is None or receipt.way == "scratch-1pct":
            continue
        assert receipt.cost.samples == beside.cost.samples
        assert receipt.notes["training images"] == beside.notes["training images"]
