"""What the benchmark of attacks publishes: a receipt without what each image cost, and figures out of such receipts."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from scrimp.receipts import load_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
KEYS = ("mean", "p50", "p95", "p99", "worst")
TRIALS = {"random patch": 0.01, "accuracy-only patch": -0.2, "patch 8 %": 0.5, "patch 8 %, preserve": 0.4}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("attack_runs")


@pytest.fixture
def tables(runs: ModuleType) -> ModuleType:
    return importlib.import_module("attack_tables")


def audited(success: float, accuracy: float = 0.8) -> dict[str, Any]:
    """An audit of a model whose clean images cost half of 1000, in the words of audit.json."""
    names = [*importlib.import_module("attack_tables").ROWS]
    found = []
    for name in names:
        share = TRIALS.get(name, 0.3) * (success / 0.5 if name == "patch 8 %" else 1)
        mean = 500 + 500 * share
        flops = {"mean": mean, "p50": mean, "p95": mean + 1, "p99": mean + 2, "worst": mean + 3}
        kind, threat = ("control", "T1") if "random" in name or "only" in name else ("attack", "T1")
        found.append({
            "name": name, "threat": threat, "kind": kind, "flops": flops, "accuracy": accuracy - 0.1, "success": share,
            "success_ceiling": 2 * share, "costs": [1, 2],
        })  # fmt: skip
    speed = [
        {"execution": execution, "batch": batch, "inputs": inputs, "seconds": {"p50": seconds}, "ratio": seconds}
        for execution in ("ragged", "padded", "masked", "dense")
        for batch in (1, 16)
        for inputs, seconds in (("clean", 1.0), ("patch 8 %", 1.5))
    ]
    budget = {"name": "hard budget", "clean_accuracy": accuracy, "clean_flops": 490.0, "success": 0.2,
              "adaptive_success": 0.25, "bound": 900, "kept": True}  # fmt: skip
    return {
        "full": 1000,
        "clean": {"costs": [1], "accuracy": accuracy, "flops": dict.fromkeys(KEYS, 500)},
        "trials": found,
        "speed": speed,
        "poisoning": [{"batch": 16, "factor": 1.2}],
        "defences": [budget],
        "energy": {"how": "not measured: no meter"},
        "model": "a folder of this machine",
    }  # fmt: skip


def leave(runs: ModuleType, folder: Path, way: str, seed: int, success: float, accuracy: float = 0.8) -> Path:
    file = folder / "attack" / "cifar10" / f"{way}-s{seed}.json"
    content = SimpleNamespace(content=audited(success, accuracy))
    runs.publish(file, "cifar10", way, seed, content, 120.0, {})
    return file


def test_a_receipt_has_no_list_of_costs_and_no_folder(runs: ModuleType, tmp_path: Path) -> None:
    file = leave(runs, tmp_path, "avit", 1, 0.5)
    receipt, text = load_receipt(file), file.read_text()
    assert '"costs"' not in text
    assert "a folder" not in text
    assert (receipt.seed, receipt.way) == (1, "avit")
    assert receipt.quality == {"test_accuracy": 0.8, "attack_success": 0.5}
    assert len(receipt.notes["audit"]["trials"]) == len(importlib.import_module("attack_tables").ROWS)


def test_figures_are_means_over_seeds(runs: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    files = [leave(runs, tmp_path, "avit", seed, success) for seed, success in enumerate((0.4, 0.5, 0.6))]
    files += [leave(runs, tmp_path, "avit-defended", seed, 0.2, accuracy=0.77) for seed in (0, 1)]
    found = [load_receipt(file) for file in files]
    first = tables.success(found)
    assert "halting (A-ViT), 3 seeds: 50.0 ± 10.0 % (100.0 ± 20.0 of the ceiling)" in first
    assert "keeping answers 40.0 ± 0.0 % at 10.0 ± 0.0 points" in first
    assert "random patch 1.0 ± 0.0, accuracy-only patch -20.0 ± 0.0" in first
    third = tables.defence(found)
    assert "halting (A-ViT), 2 seeds: 45.0 ± 7.1 to 20.0 ± 0.0 %, clean accuracy -3.0 ± 0.0 points" in third
    assert "kept by every image of 5 of 5 audits, attack success against one who knows it at most 25 %" in third
    assert "one image: dense 1.50 ± 0.00x" in tables.real_cost(found)
    assert tables.duration(found).startswith("2.0 minutes of one core, at most 2.0, for each of 5 audits")
    card = tables.card(tmp_path)
    assert "| patch 8 % | 50.0 ± 10.0 (70) |" in card
    assert (
        "| small transformer, CIFAR-10 | halting (A-ViT) | 16 | 1.00, 1.50 | 1.00, 1.50 | 1.00, 1.50 | 1.20 ± 0.00 |"
        in card
    )
    assert "trained with patches | -3.0 ± 0.0 | 50.0 ± 0.0 | 20.0 ± 0.0 | 40.0 ± 0.0 |" in card


def test_nothing_measured_is_said(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.card(tmp_path) == tables.UNMEASURED
    assert {figure([]) for figure in tables.FIGURES.values()} == {tables.UNMEASURED}


def test_the_head_gives_the_probes_logits(runs: ModuleType) -> None:
    models = importlib.import_module("attack_models")
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    probe = models.fit_linear_probe(features, labels, classes=3, l2=1.0)
    assert torch.allclose(models.Head(probe)(features).double(), probe.logits(features).double(), atol=1e-5)


def test_strange_tasks_are_refused_before_anything_runs(runs: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(runs.InputError, match="tasks out of cifar10, vit-s14"):
        runs.run(runs.Run(tasks=("imagenet",), out=tmp_path))
    with pytest.raises(runs.InputError, match="the models of adaptive_accuracy"):
        runs.run(
            runs.Run(tasks=("cifar10",), methods=("tome",), seeds=(0,), out=tmp_path, work=tmp_path, models=tmp_path)
        )
    assert not any(tmp_path.iterdir())
