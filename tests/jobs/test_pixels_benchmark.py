"""The benchmark of generation runs, in small, and finds what must hold at any size."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_benchmark_of_generation_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    generation = importlib.import_module("generation")
    order = generation.Generation(
        grey=(6, 2),
        colour=(5, 1),
        heads=2,
        head_dim=8,
        linear_batches=(2, 4),
        softmax_batches=(1, 2),
        none_batches=(1,),
        rounds=3,
        window=0.001,
        threads=1,
        out=tmp_path / "generation.json",
    )
    generation.keep(generation.run(order), order.out)
    found = json.loads(order.out.read_text())
    assert "images a second" in capsys.readouterr().out
    assert {key.rsplit("_", 2)[1] for key in found["quality"]} == {"36", "75"}
    assert all(figure > 0 for figure in found["quality"].values())
    small = found["notes"]["36 pixels, 2 layers, float weights"]
    assert small["best"]["linear batch"] in (2, 4)
    places = small["microseconds a pixel by place"]["linear"]
    assert places.keys() == {"0.1", "0.3", "0.5", "0.7", "0.9", "0.05", "0.95"}


def test_a_ratio_is_that_of_each_round(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    generation = importlib.import_module("generation")
    assert generation.ratio([4.0, 9.0, 10.0], [2.0, 3.0, 10.0])["median"] == pytest.approx(2)
