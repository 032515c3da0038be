"""The benchmarks of attention sampling: where patches fall, by chance too, and what tables make of receipts."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, save_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_a_patch_holds_the_middle_of_a_box(module):
    runs, items = module("zoom_runs"), module("zoom_items")
    item = items.Box(100, 40, 20, 10, "x")  # its middle is at 110, 45
    assert runs.holds([110, 45, 1, 1], item)
    assert runs.holds([61, 0, 50, 50], item)
    assert not runs.holds([60, 0, 50, 50], item)
    assert not runs.holds([111, 45, 50, 50], item)
    assert runs.grown([100, 40, 10, 10], 30) == [90, 30, 30, 30]


def test_chance_is_the_share_of_places(module):
    runs, items = module("zoom_runs"), module("zoom_items")
    inside = items.Box(490, 290, 20, 20, "x")
    assert runs.by_chance((1000, 600), 100, (inside,)) == pytest.approx(100 * 100 / (1000 * 600), rel=0.3)
    corner = items.Box(0, 0, 2, 2, "x")  # only a quarter of the places around it are in the image
    assert runs.by_chance((1000, 600), 100, (corner,)) == pytest.approx(50 * 50 / (1000 * 600), rel=0.5)
    generator = np.random.default_rng(0)
    places = generator.uniform((0, 0), (1000, 600), (200_000, 2))
    both = (inside, items.Box(600, 100, 40, 40, "x"))
    middles = np.array([(box.left + box.width / 2, box.top + box.height / 2) for box in both])
    drawn = (np.abs(places[:, None] - middles) <= 50).all(2).any(1).mean()
    assert runs.by_chance((1000, 600), 100, both) == pytest.approx(drawn, rel=0.25)
    assert runs.by_chance((1000, 600), 100, ()) == 0


def test_tables_of_receipts(module, tmp_path):
    tables = module("zoom_tables")
    notes = {"training images": 100, "flops an image, training": 2e9}
    curve = [{"samples": 100.0 * n, "test_accuracy": 0.1 * n} for n in (1, 2, 3)]
    for seed, accuracy in enumerate((0.9, 0.94)):
        quality = {"test_accuracy": accuracy, "hit_patches": 0.5, "hit_patches_chance": 0.01}
        quality |= {"hit_images": 0.9, "hit_images_chance": 0.1}
        found = Receipt("benchmark", "zoom/mnist", "zoom", seed=seed, quality=quality, notes=notes, curve=curve)
        save_receipt(found, tmp_path / "zoom" / "mnist" / f"zoom-s{seed}.json")
    whole = Receipt("benchmark", "zoom/mnist", "whole", seed=0, quality={"test_accuracy": 0.12}, notes=notes)
    save_receipt(whole, tmp_path / "zoom" / "mnist" / "whole-s0.json")
    cost = {
        "flops_train": 1e9,
        "peak_bytes_train": 5e7,
        "images_a_cpu_second_train": 8,
        "images_a_cpu_second_score": 20,
    }
    for way, factor in (("zoom", 1), ("whole", 50)):
        quality = {name: value * factor for name, value in cost.items()}
        found = Receipt("benchmark", "zoom/mnist/cost", way, quality=quality)
        save_receipt(found, tmp_path / "zoom" / "mnist" / f"cost-{way}.json")
    text = tables.table_text(tmp_path / "zoom", "mnist")
    assert "| attention sampling | 92.0 ± 2.8 % | 2 | 0.0 | 1.00 | 50 | 8.0 |" in text
    assert "| whole image | 12.0 % | 1 |" in text
    save_receipt(replace(found, way="abmil"), tmp_path / "zoom" / "mnist" / "cost-abmil.json")
    text = tables.table_text(tmp_path / "zoom", "mnist")
    assert "| attention pooling over all patches | - | 0 | - | 50.00 | 2500 | 400.0 |" in text
    receipts = [replace(tables.load_receipt(path)) for path in sorted((tmp_path / "zoom").rglob("*.json"))]
    line = tables.megapixel(receipts)
    for part in (
        "attention sampling 92.0 % +- 2.8 (2 seeds)",
        "left chance in pass 2",
        "FLOPs 0.020x",
        "(chance 1.0 %)",
    ):
        assert part in line
    assert tables.objects(receipts) == "signs: not measured yet; modules: not measured yet"
    assert tables.card(tmp_path, tmp_path / "none.png").count(tables.UNMEASURED.lower()) == 2


def test_prediction_from_a_tiled_file_reads_a_part_of_it(module, tmp_path):
    pytest.importorskip("tifffile", reason="tifffile is not installed")
    sizes, data = module("zoom_sizes"), module("zoom_data")
    pixels = np.zeros((1024, 1024), np.uint8)
    pixels[500:520, 300:330] = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    path = tmp_path / "one.tiff"
    write_atomic(path, data.tiff(pixels))
    plan, model = sizes.network()
    outputs, read = sizes.predict(str(path), plan, model)
    assert outputs.shape == (1, 10)
    assert 0 < read < path.stat().st_size
    assert sizes.decode(str(path)).shape == (1, 1024, 1024)
