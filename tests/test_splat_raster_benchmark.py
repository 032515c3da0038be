"""The benchmark of the rasteriser: its peers draw what they claim to draw, and its figures say what was timed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt, save_receipt
from scrimp.splats.loss import image_loss_twin
from scrimp.splats.projection import project
from scrimp.splats.reference import rasterize_reference
from scrimp.splats.scene import Splats

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    yield importlib.import_module("splat_raster")
    torch.set_num_threads(threads)


@pytest.fixture
def tables(bench: ModuleType) -> ModuleType:
    return importlib.import_module("splat_raster_peers.tables")


def small(bench: ModuleType, *, width: int = 37, height: int = 21) -> tuple[Any, dict[str, Tensor]]:
    """A room of 40 Gaussians in float64 whose tensors want a gradient, in a picture of no whole number of tiles."""
    sight = bench.room(40, 16)
    leaves = {name: values.double().requires_grad_() for name, values in sight.splats.tensors().items()}
    return bench.Sight(Splats(**leaves), sight.camera.scaled(width, height)), leaves


def test_tiled_torch_draws_what_the_reference_draws(bench: ModuleType) -> None:
    sight, leaves = small(bench)
    wanted = [values for name, values in leaves.items() if name != "harmonics"]
    pull = torch.randn(21, 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = bench.tiled.draw(sight.splats, sight.camera)
    ours = rasterize_reference(sight.splats, sight.camera, degree=0)[0]
    torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=0)
    found, expected = (torch.autograd.grad(image, wanted, pull) for image in (theirs, ours))
    assert max(float(grad.abs().max()) for grad in expected) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("separable", [False, True])
def test_the_loss_by_convolutions_is_ours(bench: ModuleType, separable: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(13, 19, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    theirs, ours = bench.tiled.image_loss(x, y, separable=separable), image_loss_twin(x, y)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (theirs, ours)))


def test_four_fifths_of_a_room_are_in_sight_and_cover_it_as_often(bench: ModuleType) -> None:
    few, many = bench.room(2_000, 64), bench.room(8_000, 64)
    for sight in (few, many):
        assert 0.7 < float((project(sight.splats, sight.camera).radii > 0).double().mean()) < 0.9
    areas = [float((2 * sight.splats.scales[:, 0]).exp().sum()) for sight in (few, many)]
    assert areas[1] / areas[0] == pytest.approx(1, abs=0.05)
    assert torch.equal(bench.room(2_000, 64).splats.means, few.splats.means)


def test_a_side_that_draws_something_else_is_refused(bench: ModuleType) -> None:
    sight = bench.room(50, 24)
    assert bench.likeness_of(bench.draw_tiled, sight) > 60

    def mirrored(splats: Splats, camera: Any) -> tuple[Tensor, list[Tensor]]:
        image, wanted = bench.draw_ours(splats, camera)
        return image.flip(1), wanted

    with pytest.raises(InputError, match="the same picture"):
        bench.likeness_of(mirrored, sight)


def test_opensplat_is_given_our_camera_and_dense_depths(bench: ModuleType) -> None:
    """Its own arithmetic of places: half a pixel less than ours, by a matrix that it is given."""
    sight = bench.room(40, 24)
    camera = replace(sight.camera.scaled(30, 20), focal=(33.0, 21.0))

    class Operators:
        @staticmethod
        def project(means: Tensor, scales: Tensor, turned: Tensor, view: Tensor, full: Tensor, *rest: Any) -> Any:
            lens, height, width = rest
            assert lens == [33.0, 21.0, 15.0, 10.0]
            torch.testing.assert_close(turned.norm(dim=1), torch.ones(40))
            clip = torch.cat([means, torch.ones(40, 1)], 1) @ full.T
            places = clip[:, :2] / clip[:, 3:]
            pixels = ((places + 1) * torch.tensor([width, height]) - 1) / 2
            return [pixels, scales, scales, scales, (clip / clip[:, 3:])[:, 2]]

    found = bench.opensplat.project(Operators, sight.splats, camera)
    seen = project(sight.splats, camera)
    torch.testing.assert_close(found[0] + 0.5, seen.means, atol=1e-4, rtol=1e-5)
    assert found[-1].is_contiguous()
    assert torch.equal(found[-1].argsort(), seen.depths.argsort())


def test_a_library_that_is_none_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a built OpenSplat"):
        bench.opensplat.load_opensplat(tmp_path / "opensplat.so")
    (tmp_path / "opensplat.so").write_text("no library")
    with pytest.raises(InputError, match="for this torch"):
        bench.opensplat.load_opensplat(tmp_path / "opensplat.so")


def test_every_command_leaves_a_receipt_that_the_tables_read(
    bench: ModuleType, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tables.card(tmp_path) == "Not measured yet."
    monkeypatch.setattr(bench, "SIZES", (16, 32))
    orders = {
        bench.run_peers: bench.Peers(gaussians=30, fox=False, rounds=2),
        bench.run_scaling: bench.Scaling(gaussians=(20, 40), sizes=(16,), usual=50, rounds=2),
        bench.run_threads: bench.Threads(gaussians=30, rounds=2),
        bench.run_loss: bench.Loss(width=12, height=15, rounds=2),
    }
    for run, order in orders.items():
        path = tmp_path / "splat-raster" / f"{type(order).__name__.lower()}.json"
        save_receipt(run(order), path)
        assert load_receipt(path).cost.cpu_seconds.value > 0, path
    rows = [line.split(" | ") for line in tables.card(tmp_path).splitlines() if line.startswith("| ")]
    assert rows[0][1:] == ["30 at 16 x 16", "30 at 32 x 32 |"]
    assert rows[3] == ["| OpenSplat", "-", "- |"]
    assert [row[:2] for row in rows[-3:]] == [["| 20", "640,000"], ["| 40", "640,000"], ["| 50", "256"]]
    found = load_receipt(tmp_path / "splat-raster" / "loss.json").notes["gradients apart, relative"]
    assert max(found.values()) < 1e-4
    assert "30 at 32 x 32" in tables.threads(load_receipt(tmp_path / "splat-raster" / "threads.json"))


def spread(median: float) -> dict[str, Any]:
    return {"median": median, "low": median, "high": median, "count": 1}


def side(milliseconds: float, ratio: float) -> dict[str, Any]:
    return {"cpu_seconds": spread(milliseconds / 1e3), "cpu_seconds over scrimp": spread(ratio)}


def test_the_figures_are_the_medians(bench: ModuleType, tables: ModuleType) -> None:
    order = bench.Peers()
    times = {"scrimp": side(80, 1), "OpenSplat": side(720, 9.04), tables.TORCH: side(5200, 65.4)}
    scenes = {"100,000 at 800 x 800": {"times": times, "psnr to ours": {"OpenSplat": 46.9}}}
    assert tables.peers(bench.receipt_of(order, 0.08, "", {"scenes": scenes})) == (
        "100,000 at 800 x 800: 80 ms (OpenSplat 9.0x, torch 65x)"
    )
    views = {
        "100,000 Gaussians": {"gaussians": 100_000, "pixels": 640_000, "cpu_seconds": spread(0.08)},
        "1,000,000 Gaussians": {"gaussians": 1_000_000, "pixels": 640_000, "cpu_seconds": spread(0.6)},
        "800 x 800": {"gaussians": 100_000, "pixels": 640_000, "cpu_seconds": spread(0.08)},
        "2000 x 2000": {"gaussians": 100_000, "pixels": 4_000_000, "cpu_seconds": spread(0.25)},
    }
    assert tables.scaling(bench.receipt_of(order, 0.6, "", {"views": views})) == (
        "1,000,000 Gaussians 600 ms, 0.60 µs a Gaussian, 0.75x that of 100,000; 4 megapixels 250 ms, 62 ns a pixel, "
        "0.50x that of 800 x 800"
    )
    times = {"scrimp": side(4.4, 1), "torch": side(73, 16.6)}
    assert tables.loss(bench.receipt_of(order, 0.0044, "", {"times": times})) == "4.4 ms of CPU; torch 17x"
