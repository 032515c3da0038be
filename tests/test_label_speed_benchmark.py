"""The benchmark of choosing labels: what is timed is what is asked for, and memory is that of a fresh process."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scrimp.receipts import load_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("label_speed")


def test_a_receipt_says_what_was_chosen_from(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = bench.LabelSpeed(
        images=300,
        width=8,
        classes=4,
        labelled=20,
        budget=10,
        repeats=3,
        threads=1,
        strategies=("centres",),
        folder=tmp_path,
    )
    features, probabilities, labelled = bench.pool_of(order)
    assert (features.shape, probabilities.shape, len(labelled.unique())) == ((300, 8), (300, 4), 20)
    assert torch.allclose(features.norm(dim=1), torch.ones(300))
    monkeypatch.setattr(bench, "added_bytes", lambda *_: bench.Reading(5.0, "told"))
    monkeypatch.setattr(bench.tyro, "cli", lambda *_, **__: order)
    threads = torch.get_num_threads()
    bench.main()
    torch.set_num_threads(threads)
    receipt = load_receipt(tmp_path / "centres.json")
    assert receipt.way == "centres"
    assert receipt.cost.seconds.value == sorted(receipt.notes["every_seconds"])[1]
    assert receipt.cost.peak_bytes.value == 5
    assert receipt.config["budget"] == 10


def test_memory_is_what_a_round_adds(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def peak(name: str, settings: dict, way: str) -> object:
        asked.append((name, settings["images"], way))
        return bench.Reading(700.0 if way else 500.0)

    monkeypatch.setattr(bench, "peak_resident", peak)
    assert bench.added_bytes(bench.LabelSpeed(images=9), "badge").value == 200
    assert asked == [("label_speed:once", 9, "badge"), ("label_speed:once", 9, "")]
