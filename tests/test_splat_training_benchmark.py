"""The benchmark of training scenes: what ways share, what is done once, and what tables make of receipts."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.splats.camera import look_at
from scrimp.splats.container import decode
from scrimp.splats.dataset import Dataset, View
from scrimp.splats.distortion import Lens
from scrimp.splats.fit import Fitting
from scrimp.splats.quality import evaluate
from scrimp.splats.quantised import ContainerQuantiser
from scrimp.splats.render import render
from scrimp.splats.scene import Splats

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Pictures so small that threads wait for one another longer than they work."""
    chosen = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(chosen)


@dataclass(frozen=True, eq=False)
class Drawn(Dataset):
    """Photographs of a scene that is known."""

    pictures: dict[str, Tensor]

    def load(self, view: View) -> Tensor:
        return self.pictures[view.name]


def drawn() -> Drawn:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, *shape, generator=draw) for shape in ((3,), (4,), (3,), (), (3,), (0, 3))]
    splats = replace(Splats(*parts), scales=0.3 * parts[2] - 1.5, opacities=parts[3] + 2)
    lens = Lens.__new__(Lens)  # no file is read, so that no lens is asked
    views = []
    for turn in range(5):
        place = 4 * torch.tensor([math.sin(turn / 4), -0.3, math.cos(turn / 4)])
        down = torch.tensor([0.0, -1.0, 0.0])
        seen = look_at(place, torch.zeros(3), up=down, width=24, height=24, field_of_view=50.0)
        views.append(View(str(turn), seen, Path(str(turn)), None, lens))
    shown = {view.name: (render(splats, view.camera).clamp(0, 1) * 255).round().byte() for view in views}
    return Drawn((*views[:2], *views[3:]), (views[2],), splats.means, None, (0.0, 0.0, 0.0), shown)


def test_ways_share_plain_trainings_beginning_and_are_done_once(
    module: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, dataset = module("splat_training"), drawn()
    monkeypatch.setattr(bench, "open_dataset", lambda *_, **__: dataset)
    ways, places = ("plain", "thin-aware+1"), {"out": tmp_path / "out", "work": tmp_path / "work"}
    order = bench.Run(ways=ways, seeds=(3,), steps=20, cap=60, count=50, data=tmp_path, **places)
    bench.run(order)

    names = ["plain-s3", "plain-sgs-s3", "plain-sog-s3", "plain-spz-s3", "thin-aware+1-s3"]
    assert sorted(path.stem for path in order.out.iterdir()) == sorted(names)
    way = bench.WAYS["thin-aware+1"]
    quantiser = ContainerQuantiser(bench.settings_of(way))
    whole = Fitting(dataset, steps=20, settings=bench.settings(order, way), seed=3, quantiser=quantiser)
    while whole.done < 16:
        whole.step()
    whole.settings = bench.settings(order, way, rates=bench.LATE_RATES)
    while whole.done < 20:
        whole.step()
    encoded = whole.encode()
    assert encoded is not None
    found = load_receipt(order.out / "thin-aware+1-s3.json")
    assert found.quality["bytes"] == len(encoded)
    assert found.quality["psnr"] == pytest.approx(evaluate(decode(encoded), dataset).psnr, abs=1e-4)
    assert (
        found.quality["gaussians"] == len(whole.model) < load_receipt(order.out / "plain-s3.json").quality["gaussians"]
    )
    assert all(found.quality[f"{base}_sized_bytes"] <= len(encoded) for base in ("plain", "thin"))
    spent = [load_receipt(order.out / f"{name}-s3.json").cost.cpu_seconds.value for name in ways]
    half = bench.read(order.work / "plain-s3-10.pt").cpu
    assert all(0 < half < one for one in spent)
    assert all(str(tmp_path) not in path.read_text(encoding="utf-8") for path in order.out.iterdir())

    def refuse(_: Fitting) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Fitting, "step", refuse)
    before = {path.name: path.read_bytes() for path in order.out.iterdir()}
    bench.run(order)
    assert before == {path.name: path.read_bytes() for path in order.out.iterdir()}
    (order.out / "thin-aware+1-s3.json").unlink()
    bench.run(order)  # from the scenes that were kept
    assert load_receipt(order.out / "thin-aware+1-s3.json").quality == found.quality


def test_tables_of_receipts(module: Load, tmp_path: Path) -> None:
    tables = module("splat_training_tables")
    assert tables.card(tmp_path) == tables.UNMEASURED
    assert [figure([]) for figure in (tables.quality, tables.files, tables.halved)] == ["not measured yet"] * 3
    found = []
    for seed, shift in enumerate((0.0, 0.2)):
        base = {"psnr": 28 + shift, "ssim": 0.85}
        qualities = {
            "thin-aware+1": {**base, "psnr": 27.9, "gaussians": 50, "bytes": 2000, "plain_sized_psnr": 27 - shift},
            "plain": {**base, "gaussians": 100, "bytes": None},
            "thin": {**base, "psnr": 27.9 + shift, "gaussians": 50, "bytes": None},
        }
        qualities["thin-aware+1"] |= {"thin_sized_psnr": 27.4, "thin_same_psnr": 27.3}
        cost = Cost(cpu_seconds=Reading(100.0 + 10 * seed, "counted"))
        found += [Receipt("benchmark", tables.NAME, way, seed, quality=q, cost=cost) for way, q in qualities.items()]
        curve = [{"setting": 1.0, "bytes": 1000.0 + 500 * seed, "psnr": 27.0 + seed}]
        found.append(Receipt("benchmark", tables.NAME, "plain-sgs", seed, curve=curve))
    assert (
        tables.quality(found) == "28.10 ± 0.14 dB, 2 seeds, 0.20 dB from the worst to the best; 105 CPU s; SSIM 0.850"
    )
    assert tables.halved(found) == "50 % of the Gaussians, -0.10 ± 0.00 dB (2 seeds)"
    assert tables.files(found) == (
        "thin-aware+1: 2 kB, -0.20 ± 0.14 dB to unquantised, +1.00 ± 0.14 dB over rounding afterwards at the same "
        "size, +0.50 ± 0.00 over the thinned scene rounded afterwards (2 seeds)"
    )
    for one in found:
        save_receipt(one, tmp_path / tables.NAME / f"{one.way}-s{one.seed}.json")
    text = tables.card(tmp_path)
    assert "| thin-aware+1 | 27.90 ± 0.00 | 0.850 | 50 | 2 | 27.40, 27.30 | 105 | 2 |" in text
    assert "| plain | .sgs, rung | 1: 1, 27.50 |" in text
