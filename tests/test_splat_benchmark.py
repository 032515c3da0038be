"""The benchmarks of splats: other programs run and given up, CompGS' bytes, and what tables make of receipts."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.splats.files import write
from scrimp.splats.scene import Splats

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def scene(count: int, harmonics: int = 0) -> Splats:
    draw = torch.Generator().manual_seed(0)
    means, quaternions, scales, opacities, colors, rest = (
        torch.randn(count, *shape, generator=draw) for shape in ((3,), (4,), (3,), (), (3,), (harmonics, 3))
    )
    return Splats(means, quaternions, 0.3 * scales - 2, opacities, colors, 0.2 * rest)


CURVE = [
    {"setting": 0.0, "bytes": 100.0, "psnr": 30.0, "change": -1.0, "encode_cpu_seconds": 1.0},
    {"setting": 1.0, "bytes": 400.0, "psnr": 50.0, "change": -0.1, "encode_cpu_seconds": 1.0},
    {"setting": 2.0, "bytes": 300.0, "psnr": 25.0, "change": -2.0, "encode_cpu_seconds": 1.0},
]


def test_between_points_the_logarithm_of_the_bytes_is_linear(module):
    tables = module("splat_tables")
    assert tables.bytes_at(CURVE, 40.0) == pytest.approx(200.0)  # the third point shows less than smaller ones
    assert tables.figure_at(CURVE, 200.0) == pytest.approx(40.0)
    assert tables.bytes_at(CURVE, 50.0) == pytest.approx(400)
    assert tables.bytes_at(CURVE, 20.0) == 100
    assert tables.bytes_at(CURVE, 50.1) is None
    assert tables.figure_at(CURVE, 99.0) is None
    assert tables.figure_at(CURVE, 1e9) == 50
    assert tables.bytes_at(CURVE, -0.55, "change") == pytest.approx(200.0)
    assert tables.bytes_at([], 20.0) is None


def receipt(way: str, curve: list, **notes) -> Receipt:
    facts = {"Gaussians": 10, "held out, the scene itself": 23.8, "problem": "", **notes}
    return Receipt("benchmark", "splats/fox60k", way, curve=curve, notes=facts)


def test_figures_are_those_of_the_receipts(module, tmp_path):
    tables = module("splat_tables")
    million = [{**point, "bytes": 1e4 * point["bytes"]} for point in CURVE]
    peer = {"setting": None, "bytes": 8e6, "psnr": 40.0, "change": -0.4, "encode_cpu_seconds": 2.0}
    ways = [
        receipt("sgs", million),
        receipt("sog", million),
        receipt("compgs", [peer]),
        receipt("other-spz", [peer]),
        receipt("other-best", [{**peer, "bytes": 5e6, "psnr": 51.0}]),
        receipt("gave-up", [], problem="given up after 300 CPU seconds"),
    ]
    said = tables.beside_peers(ways)
    assert "0.25x other-spz's at 40.0 dB" in said
    assert "beyond the ladder other-best (51.0 dB)" in said
    size = 1e6 * 4 ** (15 / 20)  # of 45 dB
    assert f"at 45 dB {size / 1e6:.3f} MB, {size / 5e6:.2f}x other-best's" in said
    assert said.count("not measured yet") == 2
    held = tables.held_out(ways)
    assert "8.000 MB at -0.40 dB, .sgs at half of that -0.10 dB (0.25x of that)" in held
    assert tables.held_out(ways[1:]) == "fox60k: not measured yet"
    for one in ways:
        save_receipt(one, tmp_path / "fox60k" / f"{one.way}.json")
    rows = tables.card(tmp_path).splitlines()
    assert "| gave-up | - | - | - | - | given up after 300 CPU seconds |" in rows
    assert "| scrimp .sgs, rung 0 | 1.000 | 100000.0 | 30.00 | -1.00 dB | 1.0 |" in rows
    assert "| other-spz | 8.000 | 800000.0 | 40.00 | -0.40 dB | 2.0 |" in rows
    assert any(row.startswith("biker") and row.endswith("not measured yet.") for row in rows)


def test_the_source_s_own_format_counts_for_nothing(module):
    tables = module("splat_tables")
    rows = {way: receipt(way, CURVE[:1]) for way in ("x-compressed", "x-spz", "sgs", "compgs")}
    assert set(tables.peers_of(rows, "biker")) == {"x-spz"}
    assert set(tables.peers_of(rows, "fox60k")) == {"x-compressed", "x-spz"}


def test_compgs_bytes_are_those_of_its_paper(module, monkeypatch):
    peers = module("splat_peers")
    splats = scene(100, 15)
    found, size, _ = peers.seed_scene(splats)
    assert size == math.ceil(100 * (128 + 4 * 7) / 8) + 4 * 100 * (3 + 4 + 3 + 45)
    assert torch.equal(found.means, splats.means)
    assert torch.equal(found.opacities, splats.opacities)
    torch.testing.assert_close(found.harmonics, splats.harmonics)  # as many codes as rows lose nothing
    assert peers._SEED_CODES == {"scales": 4096, "quaternions": 4096, "colors": 4096, "harmonics": 512}
    monkeypatch.setattr(peers, "_SEED_CODES", {"scales": 16, "quaternions": 16, "colors": 16})
    found, size, _ = peers.seed_scene(splats, short=True)
    assert size == math.ceil(100 * (56 + 3 * 4) / 8) + 4 * 16 * 10
    width = splats.means.amax(0) - splats.means.amin(0)
    assert ((found.means - splats.means).abs() <= 0.51 * width / 65535 + 1e-6).all()
    assert len(found.scales.unique(dim=0)) == 16


def test_programs_are_run_kept_and_given_up(module, tmp_path):
    peers = module("splat_peers")
    source = tmp_path / "source.ply"
    source.write_bytes(b"abc")
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    tools = peers.Tools("", sys.executable)

    def ran(name: str, code: str):
        return peers.run_peer(peers.Peer(name, "x", "", (), code), tools, source, tmp_path / name, limit=1.0)

    done = ran("copies", copy)
    assert (done.stored, done.problem) == (3, "")
    assert done.cpu_seconds > 0
    source.write_bytes(b"abcdef")
    assert ran("copies", copy) == done
    failed = ran("fails", "raise SystemExit('no such thing')")
    assert (failed.stored, failed.problem) == (None, "no such thing")
    assert ran("says-nothing", "pass").problem == "exit code 0"
    assert ran("loops", "while True: pass").problem == "given up after 1 CPU seconds"
    assert peers.run_peer(peers.PEERS[0], tools, source, tmp_path / "none", limit=1.0) is None


def test_a_run_leaves_a_receipt_a_way(module, tmp_path, capsys):
    rate = module("splat_rate")
    write(scene(40), tmp_path / "guitar.compressed.ply")
    tools = module("splat_peers").Tools("", "")
    rate.run(rate.Run(("guitar",), tools=tools, data=tmp_path, work=tmp_path / "work", views=1, out=tmp_path / "out"))
    found = {path.stem: load_receipt(path) for path in (tmp_path / "out" / "guitar").glob("*.json")}
    assert {"sgs", "sog", "spz3", "compgs", "compgs-short"} <= set(found)
    curve = found["sgs"].curve
    assert [point["setting"] for point in curve] == [-2, -1, 0, 1, 2, 3, 4, 5, 6]
    assert curve[-1]["psnr"] > curve[2]["psnr"] > 20
    assert found["compgs"].curve[0]["psnr"] > 60  # as many codes as Gaussians
    assert "sogpy-sog passed over, sogpy is not there" in capsys.readouterr().out


def test_larger_scenes_hold_no_gaussian_twice(module):
    cost = module("splat_cost")
    splats = scene(50, 3)
    many = cost.grown(splats, 1001, 1)
    assert many.harmonics.shape == (1001, 3, 3)
    assert torch.equal(many.means[:50], splats.means)
    assert torch.equal(many.harmonics[:50], splats.harmonics)
    for values in many.tensors().values():
        assert len(values.reshape(1001, -1).unique(dim=0)) == 1001
    assert cost.grown(splats, 30, 0).harmonics.shape == (30, 0, 3)


def test_medians_of_calls_are_left(module, tmp_path):
    calls = []
    module("splat_cost")._timed(
        str(tmp_path / "times"), lambda: calls.append(sum(range(100_000 * (len(calls) % 2)))), 3
    )
    assert len(calls) == 3
    spent = json.loads((tmp_path / "times").read_text(encoding="utf-8"))
    assert set(spent) == {"cpu", "seconds"}
    assert 0 <= spent["cpu"] < 1
