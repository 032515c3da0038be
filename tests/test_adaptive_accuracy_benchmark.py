"""The benchmark of adaptive models' accuracy: what its receipts hold is what the methods give, and is gone on with."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scrimp.adaptive import image_costs, keep_tokens_, restore_, token_sampling_
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.models import create_model
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt
from scrimp.represent.linear import fit_linear_probe

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("adaptive_accuracy")
    torch.set_num_threads(threads)


@pytest.fixture
def tables(bench: Any) -> Any:
    return importlib.import_module("adaptive_accuracy_tables")


def blots(count: int, seed: int, side: int = 16) -> TensorImages:
    """Bright on the left, or on the right."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, side, side), generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, : side // 2] += 60
    images[labels == 1, :, :, side // 2 :] += 60
    return TensorImages(images.to(torch.uint8), labels)


def data_of(train: int, test: int) -> ImageData:
    parts = {"train": blots(train, 0), "test": blots(test, 1)}
    return ImageData(**parts, classes=("left", "right"), name="blots", mean=(0.4,) * 3, std=(0.2,) * 3)


def test_a_seed_is_trained_once_thinned_and_gone_on_with(
    bench: Any, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"batch_size": 8, "probe": 8}
    monkeypatch.setattr(bench, "BASE", {**bench.BASE, **small, "model": "small-vit-32", "epochs": 2})
    monkeypatch.setattr(bench, "TUNING", {**bench.TUNING, **small})
    monkeypatch.setattr(bench, "SHARE", 0.5)
    monkeypatch.setattr(bench, "METHODS", {"keep": bench.Method({"ratio": (0.7,)}, {"ratio": (0.9, 0.5)})})
    data, small_ = data_of(32, 12), bench.small
    monkeypatch.setattr(bench, "small", lambda order, method, seed: small_(order, method, seed, data))
    order = bench.Run(tasks=("cifar10",), methods=("keep",), seeds=(3,), out=tmp_path / tables.NAME, work=tmp_path)
    bench.run(order)
    dense, keep = (load_receipt(order.out / "cifar10" / f"{name}-s3.json") for name in ("dense", "keep"))
    base = load_receipt(tmp_path / "cifar10" / "s3" / "dense" / "receipt.json")
    assert [item["trained"] for item in dense.notes["points"]] == [True, False]
    assert dense.notes["points"][1]["accuracy"] == base.quality["test_accuracy"]
    assert (dense.baseline, dense.seed, dense.quality["flops_share"], keep.baseline) == (True, 3, 1.0, False)
    assert [item["way"] for item in keep.notes["points"]] == ["keep-0.7", "keep-0.9", "keep-0.5"]
    spent = keep.notes["fine-tuning"]["flops"]["value"]
    assert 0.3 < spent / base.config["budget_flops"] <= 0.5 + 1e-6
    assert keep.quality["flops_share"] == pytest.approx(share_of("small-vit-32", 0.7), rel=1e-9)
    assert "| keeping | keep-0.7 |" in tables.card(tmp_path)
    monkeypatch.setattr(bench, "thin", lambda *args, **options: pytest.fail("measured again"))
    bench.run(order)
    with pytest.raises(InputError, match="methods out of keep"):
        bench.run(replace(order, methods=("kept",)))


def share_of(name: str, ratio: float) -> float:
    with torch.random.fork_rng([]):
        model = create_model(name, classes=2, channels=3, size=16).eval()
    images, costs = torch.zeros(2, 3, 16, 16), []
    for part in (1.0, ratio):
        keep_tokens_(model, part, blocks=(1, 3, 4))
        costs.append(float(image_costs(model, images)[0]))
        restore_(model)
    return costs[1] / costs[0]


def test_the_packaged_transformer_keeps_the_classifier_or_gets_its_own(
    bench: Any, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SIDE", 16), ("LABELLED", 20), ("SHOWN", 9), ("ROWS", 4)):
        monkeypatch.setattr(bench, name, value)
    attach = lambda model, samples, example: token_sampling_(model, samples, blocks=(2,), least=2)  # noqa: E731
    monkeypatch.setattr(bench, "LADDERS", {"ats": bench.Ladder(attach, (6, 3), 3)})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = create_model("small-vit-32", classes=0, channels=3, size=16).eval()
    large = bench.Large(data_of(60, 30), model)
    order = bench.Run(out=tmp_path / tables.NAME)
    large.measure(order, "ats", 5)
    dense, ats = (load_receipt(order.out / "vit-s14" / f"{name}-s5.json") for name in ("dense", "ats"))
    wanted = by_hand(bench, large, model, samples=None), by_hand(bench, large, model, samples=3)
    assert dense.notes["points"][0]["accuracy"] == dense.notes["points"][1]["accuracy"] == wanted[0][0]
    fitted, six, three = ats.notes["points"]
    assert [item["way"] for item in (fitted, six, three)] == ["ats-3", "ats-6", "ats-3"]
    assert (fitted["accuracy"], three["accuracy"]) == wanted[1]
    assert three["share"] < six["share"] < 1
    assert not hasattr(model, "_scrimp_adaptive")


def by_hand(bench: Any, large: Any, model: nn.Module, *, samples: int | None) -> tuple[float, float]:
    """Accuracy with a classifier of its own, and with that of all tokens."""
    found = []
    for use in dict.fromkeys((None, samples)):
        if use is not None:
            token_sampling_(model, use, blocks=(2,), least=2)
        parts = []
        for seed in (5, None):
            rows = large._rows(seed)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                features = [model(large._images(seed, part)).float() for part in rows.split(bench.ROWS)]
            parts.append((torch.cat(features), large._part(seed).labels[rows]))
        found.append(parts)
        if use is not None:
            restore_(model)
    probes = [fit_linear_probe(*parts[0], classes=2, l2=bench.L2) for parts in found]
    features, labels = found[-1][1]
    own, whole = (accuracy_of(probe.logits(features), labels) for probe in (probes[-1], probes[0]))
    return own, whole


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def receipts_of(method: str, accuracies: list[float], share: float, *, trained: bool = True) -> list[Receipt]:
    flops = {"mean": 100 * share, "worst": 110 * share}
    points = [
        {"way": f"{method}-1", "trained": trained, "accuracy": value, "share": share, "flops": flops}
        for value in accuracies
    ]
    notes = [{"points": [item], "test images": 10_000} for item in points]
    return [Receipt("benchmark", "adaptive-accuracy/cifar10", method, seed=s, notes=n) for s, n in enumerate(notes)]


def test_points_are_paired_by_seed_and_ties_are_told(tables: Any, tmp_path: Path) -> None:
    assert tables.accuracy([]) == tables.card(tmp_path) == tables.UNMEASURED
    dense = receipts_of("dense", [0.50, 0.60, 0.70], 1.0)
    merged = receipts_of("tome", [0.504, 0.598, 0.698], 0.66)
    kept = receipts_of("keep", [0.49, 0.59, 0.689], 0.7)
    said = tables.accuracy([*kept, *dense, *merged])
    assert "merging +0.0 ± 0.3 (tie) at 34 % fewer FLOPs, keeping -1.0 ± 0.1 at 30 % fewer FLOPs" in said
    assert "3 seeds" in said
    assert "1 of 2 within 0.5 points at 30 % fewer or more" in said
    row = tables.Row()
    for item, base in zip(kept, (0.5, 0.6, 0.7), strict=True):
        row.add(item.notes["points"][0], base)
    assert row.dearest == pytest.approx(0.77)
    assert math.isclose(row.fewer(), 30)
    table = tables.table_text([*dense, *kept], "cifar10", trained=True)
    assert "| all tokens | - | 60.0 ± 10.0 | - | 100 % | 110 % | 3 |" in table
    assert tables.table_text(kept, "cifar10", trained=False) == ""
