"""`scrimp splats`: a scene made small within what was asked, told truly; converted, drawn and shown."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scrimp.cli import main, parse
from scrimp.jobs import splats_compress as job
from scrimp.jobs import splats_render as render_job
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.splats_compress import Compressed, splats_compress
from scrimp.jobs.splats_config import SplatsCompressConfig, SplatsInfoConfig, SplatsRenderConfig
from scrimp.jobs.splats_errors import field_errors, rotation_errors
from scrimp.jobs.splats_info import splats_info
from scrimp.jobs.splats_ladder import ladder_of, reaching, within
from scrimp.jobs.splats_pages import as_sog
from scrimp.jobs.splats_plain import pack_plain, unpack_plain
from scrimp.primitives.errors import InputError
from scrimp.receipts import load_receipt
from scrimp.splats.camera import Camera
from scrimp.splats.files import read, write
from scrimp.splats.orbit import UPS, Orbit, orbit_cameras, orbit_of, up_of_cameras
from scrimp.splats.ply import write_ply
from scrimp.splats.render import render
from scrimp.splats.scene import COUNTS, Splats

SMALL = ["--views", "2", "--width", "32", "--device", "cpu"]


def scene(n: int = 301, degree: int = 1) -> Splats:
    """A ball of Gaussians a tenth as wide, some of them unseen."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    means = torch.nn.functional.normalize(normal(n, 3), dim=1) + torch.tensor([3.0, -1.0, 2.0])
    opacities = (3 * normal(n)).clamp(min=-4)
    opacities[: n // 10] = -7
    harmonics = 0.2 * normal(n, COUNTS[degree], 3)
    return Splats(means, normal(n, 4), 0.3 * normal(n, 3) - 2.3, opacities, normal(n, 3), harmonics)


@pytest.fixture
def ply(tmp_path: Path) -> Path:
    return write(scene(), tmp_path / "ball.ply")


def compress(tmp_path: Path, ply: Path, **settings) -> Compressed:
    given = {"views": 2, "width": 32, "device": "cpu", "json": True, "out": tmp_path / "run"} | settings
    return splats_compress(SplatsCompressConfig(scene=ply, **given))


def psnr_by_hand(path: Path) -> list[float]:
    """Of the file against the scene, from the cameras that the job must have taken."""
    before, after = scene(), read(path)
    found = []
    for camera in orbit_cameras(orbit_of(before), 2, width=32, height=32):
        a, b = (render(each, camera).clamp(0, 1).double() for each in (before, after))
        found.append(10 * math.log10(1 / float((a - b).square().mean())))
    return found


@pytest.mark.parametrize("format", ["sog", "spz", "sgs", "compressed.ply"])
def test_what_is_told_is_true(tmp_path, ply, format):
    done = compress(tmp_path, ply, format=format, prune=True)
    plain, receipt = done.receipts
    assert done.path == tmp_path / "run" / f"scene.{format}"
    assert receipt.cost.stored_bytes.value == done.path.stat().st_size
    by_hand = psnr_by_hand(done.path)
    assert receipt.quality["psnr"] == pytest.approx(sum(by_hand) / 2, abs=0.01)
    assert receipt.quality["worst_psnr"] == pytest.approx(min(by_hand), abs=0.01)
    assert receipt.notes["pruned Gaussians"] == 30
    assert len(read(done.path)) == 271
    assert receipt.notes["bytes of a .ply"] == ply.stat().st_size
    errors = receipt.notes["errors"]
    assert errors["alpha"]["largest"] < 0.3  # of Gaussians in another order it is near 1
    assert errors["position"]["rms"] < 0.1
    assert errors["harmonics"]["largest"] < 1
    assert (plain.baseline, receipt.baseline, plain.way) == (True, False, job.PLAIN)
    assert plain.cost.stored_bytes.value == len(pack_plain(scene()))
    assert load_receipt(tmp_path / "run" / "receipt.json").quality == receipt.quality
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<img src="data:image/png') == 3
    assert "Errors by field" in page


def test_the_finest_rungs_are_matched_row_by_row():
    whole = scene()
    for format in ("sgs", "ply", "spz"):
        ladder = ladder_of(whole, format)
        last = len(ladder.told) - 1
        errors = {e.field: e for e in field_errors(ladder.matched(last), ladder.decode(ladder.encode(last)))}
        assert errors["rotation"].seen < 2, format
        assert max(errors[name].seen for name in ("position", "alpha", "size")) < 0.03, format


def test_a_size_is_kept_and_used(tmp_path, ply):
    most = 4500
    done = compress(tmp_path, ply, format="sgs", size="4.5kB")
    size, ladder = done.path.stat().st_size, ladder_of(scene(), "sgs")
    assert 0.97 * most < size <= most
    rung = ladder.told.index(done.receipts[1].notes["setting"])
    assert len(ladder.encode(rung)) == size
    assert len(ladder.encode(rung + 1)) > most
    with pytest.raises(InputError, match="--size of at least"):
        compress(tmp_path / "other", ply, format="sgs", size="200")
    assert not (tmp_path / "other").exists()


def test_a_psnr_is_reached_by_the_smallest(tmp_path, ply):
    done = compress(tmp_path, ply, format="spz", psnr=36.0)
    told = ladder_of(scene(), "spz").told
    rung = told.index(done.receipts[1].notes["setting"])
    assert done.receipts[1].quality["psnr"] >= 36
    assert 0 < rung < len(told) - 1
    below = tmp_path / "below.spz"
    below.write_bytes(ladder_of(scene(), "spz").encode(rung - 1))
    assert sum(psnr_by_hand(below)) / 2 < 36
    with pytest.raises(InputError, match="at most"):
        compress(tmp_path / "other", ply, format="spz", psnr=99.0)


def test_the_search_finds_the_edge():
    sizes = [10, 20, 30, 40, 50]
    assert [within(sizes.__getitem__, 5, most) for most in (10, 29, 50, 99)] == [0, 1, 4, 4]
    assert [reaching(sizes.__getitem__, 5, least) for least in (1, 11, 30, 50)] == [0, 1, 2, 4]
    with pytest.raises(InputError, match="10 bytes"):
        within(sizes.__getitem__, 5, 9)
    with pytest.raises(InputError, match="50"):
        reaching(sizes.__getitem__, 5, 51)


@pytest.mark.parametrize("format", ["sog", "spz", "sgs", "splat"])
def test_named_qualities_are_in_order(format):
    ladder = ladder_of(scene(600, 2), format)
    small, medium, high = (ladder.named[name] for name in ("small", "medium", "high"))
    assert 0 <= small <= medium <= high < len(ladder.told)
    assert len(ladder.encode(small)) <= len(ladder.encode(high))


def test_rotations_are_compared_as_rotations():
    half = math.sqrt(0.5)
    before = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    tiny = math.radians(1e-4) / 2
    after = torch.tensor(
        [[-3.0, 0, 0, 0], [half, half, 0, 0], [half, 0, half, 0], [math.cos(tiny), 0, 0, math.sin(tiny)]]
    )
    assert rotation_errors(before, after).tolist() == pytest.approx([0, 90, 90, 1e-4], abs=1e-6)


def test_the_plain_way_is_float16():
    whole = scene(7, 1)
    data = pack_plain(whole)
    back = unpack_plain(data, whole)
    assert len(zlib.decompress(data)) == 7 * 23 * 2
    for name, values in whole.tensors().items():
        assert torch.equal(getattr(back, name), values.half().float()), name


def test_resume_reads_what_is_done_and_refuses_another_command(tmp_path, ply, monkeypatch):
    first = compress(tmp_path, ply, format="splat")
    monkeypatch.setattr(job, "ladder_of", None)  # nothing is encoded again
    again = compress(tmp_path, ply, format="splat", resume=True)
    assert [receipt.to_dict() for receipt in again.receipts] == [receipt.to_dict() for receipt in first.receipts]
    with pytest.raises(InputError, match="format"):
        compress(tmp_path, ply, format="sgs", resume=True)
    with pytest.raises(InputError, match="--out"):
        compress(tmp_path, ply, format="splat")


def test_an_interrupted_compression_leaves_nothing(tmp_path, ply, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "field_errors", stop)
    assert main(["splats", "compress", str(ply), *SMALL, "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_orbits_look_at_the_middle_from_outside():
    ball = scene(2001, 0)
    far = dataclasses.replace(ball, means=ball.means.clone())
    far.means[::40] *= 1e4  # strays do not move it
    for splats in (ball, far):
        orbit = orbit_of(splats, up=UPS["z-up"])
        assert orbit.centre.tolist() == pytest.approx([3, -1, 2], abs=0.2)
        assert orbit.radius == pytest.approx(1.2, abs=0.15)
    cameras = orbit_cameras(orbit_of(ball, up=(0, 0, 5)), 3, width=40, height=20, elevation=30)
    assert up_of_cameras(cameras) == pytest.approx((0, 0, 3 * math.cos(math.radians(30))), abs=1e-3)
    middle = orbit_of(ball).centre.float()
    for camera in cameras:
        seen = camera.world_to_camera[:3, :3] @ middle + camera.world_to_camera[:3, 3]
        assert seen.tolist() == pytest.approx([0, 0, float(seen[2])], abs=1e-5)
        assert float(seen[2]) == pytest.approx(orbit_of(ball).radius / 0.5, rel=1e-5)
        assert float(camera.position[2]) - float(middle[2]) == pytest.approx(float(seen[2]) / 2, rel=1e-4)  # above
    narrow = Orbit(middle.double(), 1.0, torch.tensor([0.0, -1, 0], dtype=torch.float64))
    assert narrow.distance(10, 20, 60) > narrow.distance(20, 20, 60) == pytest.approx(2)


def test_degenerate_scenes_have_an_orbit_or_say_why():
    one = scene(1, 0)
    assert orbit_of(one).radius == pytest.approx(3 * math.exp(float(one.scales.max())), rel=1e-6)
    with pytest.raises(InputError, match="Gaussian"):
        orbit_of(one.take(torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(InputError, match="upwards"):
        orbit_of(one, up=(0, 0, 0))
    with pytest.raises(InputError, match="camera"):
        orbit_cameras(orbit_of(one), 0, width=2, height=2)
    assert up_of_cameras([]) == UPS["y-down"]


def test_decompress_refuses_what_it_would_lose(tmp_path, ply, capsys):
    sgs, splat = tmp_path / "a.sgs", tmp_path / "a.splat"
    assert main(["splats", "decompress", str(ply), "--out", str(sgs)]) == 0
    assert len(read(sgs)) == 301  # none is pruned
    assert main(["splats", "decompress", str(sgs)]) == 0
    assert len(read(tmp_path / "a.ply")) == 301
    capsys.readouterr()
    for arguments, words in (
        ([str(sgs)], "a.ply"),
        ([str(sgs), "--out", str(splat)], "--lossy"),
        ([str(sgs), "--out", str(tmp_path / "a.foo")], "ends with"),
        ([str(tmp_path / "absent.ply"), "--out", str(splat)], "absent"),
    ):
        assert main(["splats", "decompress", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("scrimp: expected ")
        assert words in line
        assert not splat.exists()
    assert main(["splats", "decompress", str(sgs), "--out", str(splat), "--lossy", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["gaussians"], told["bytes_after"], told["bytes_before"]) == (301, 301 * 32, sgs.stat().st_size)


def test_info_counts(tmp_path, capsys):
    whole = scene()
    whole.means[3, 1], whole.quaternions[4] = math.nan, 0
    whole = dataclasses.replace(whole, extra={"age": torch.arange(301.0)})
    path = tmp_path / "odd.ply"
    path.write_bytes(write_ply(whole))
    info = splats_info(SplatsInfoConfig(file=path))
    assert info.not_finite == {"means": 1, "quaternions": 1}
    assert (info.gaussians, info.degree, info.extra) == (301, 1, ["age"])
    assert info.bytes_a_gaussian == path.stat().st_size / 301
    invisible = int((torch.special.expit(whole.opacities.double()) < 1 / 255).sum())
    assert info.nearly_invisible == pytest.approx(invisible / 301)
    y = whole.means[:, 1].numpy()
    assert info.ranges["y"] == pytest.approx((float(np.nanmin(y)), float(np.nanmax(y))))
    assert info.ranges["size"] == pytest.approx((math.exp(whole.scales.min()), math.exp(whole.scales.max())))
    assert info.ranges["age"] == (0, 300)
    assert main(["splats", "info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_finite"]["means"] == 1
    assert main(["splats", "info", str(path)]) == 0
    assert "quaternions of 1" in capsys.readouterr().out


def test_render_draws_what_the_cameras_see(tmp_path, ply, monkeypatch):
    out = tmp_path / "pictures"
    config = SplatsRenderConfig(scene=ply, out=out, orbit=3, width=24, height=16, device="cpu", json=True)
    asked = iter([False, True])
    with monkeypatch.context() as stopped:
        stopped.setattr(render_job, "stop_requests", lambda: nullcontext(lambda: next(asked)))
        with pytest.raises(Interrupted):
            render_job.splats_render(config)
    assert sorted(path.name for path in out.glob("*.png")) == ["000.png", "001.png"]
    first = (out / "000.png").stat().st_mtime_ns
    paths = render_job.splats_render(dataclasses.replace(config, resume=True))
    assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
    assert (out / "000.png").stat().st_mtime_ns == first
    whole = scene()
    for path, camera in zip(paths, orbit_cameras(orbit_of(whole), 3, width=24, height=16), strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(path)).copy())
        assert pixels.shape == (16, 24, 3)
        wanted = render(whole, camera).clamp(0, 1) * 255
        assert float((pixels.float() - wanted).abs().max()) <= 0.51
        assert int(pixels.max()) > 50


def test_render_takes_the_cameras_of_photographs(tmp_path, ply):
    motion = torch.eye(4)
    motion[:3, 3] = -orbit_of(scene()).centre.float()
    motion[2, 3] += 4
    pose = torch.linalg.inv(motion) @ torch.diag(torch.tensor([1.0, -1, -1, 1]))
    for name in ("b.png", "a.png"):
        Image.new("RGB", (20, 10)).save(tmp_path / name)
    frames = [{"file_path": name, "transform_matrix": pose.tolist()} for name in ("b.png", "a.png", "gone.png")]
    (tmp_path / "t.json").write_text(json.dumps({"fl_x": 15, "w": 20, "h": 10, "frames": frames}))
    config = SplatsRenderConfig(
        scene=ply, out=tmp_path / "o", cameras=tmp_path / "t.json", height=20, device="cpu", json=True
    )
    paths = render_job.splats_render(config)
    assert [path.name for path in paths] == ["a.png", "b.png"]
    wanted = render(scene(), Camera(40, 20, (30.0, 30.0), (20.0, 10.0), motion)).clamp(0, 1) * 255
    assert np.abs(np.asarray(Image.open(paths[0])) - wanted.numpy()).max() < 1.01


def test_pictures_of_two_folders_do_not_replace_one_another():
    assert render_job.file_names(["a/1.jpg", "b/2.jpg"]) == ["1.png", "2.png"]
    assert render_job.file_names(["a/1.jpg", "b/1.jpg"]) == ["0000-1.png", "0001-1.png"]


def test_pages(tmp_path, ply, capsys):
    done = compress(tmp_path, ply, format="sog")
    assert as_sog(scene(), done.path) == done.path.read_bytes()
    assert main(["splats", "view", str(ply), "--width", "32", "--device", "cpu"]) == 0
    page = (tmp_path / "ball.html").read_text()
    assert "301 Gaussians" in page
    assert "takes" in page
    out = ["--out", str(tmp_path / "both.html")]
    assert main(["splats", "compare", str(ply), str(done.path), *SMALL, *out]) == 0
    page = (tmp_path / "both.html").read_text()
    assert f"{sum(psnr_by_hand(done.path)) / 2:.2f} dB" in page
    assert "CPU time" in page  # of the run folder
    assert main(["splats", "compare", str(ply), str(done.path), *SMALL, *out]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.ply"], "absent"),
        (["ball.ply", "--size", "2X"], "2MB"),
        (["ball.ply", "--size", "0"], "2MB"),
        (["ball.ply", "--size", "1MB", "--psnr", "40"], "one of"),
        (["ball.ply", "--psnr", "400"], "100 dB"),
        (["ball.ply", "--views", "0"], "--views"),
        (["ball.ply", "--out", "a.sog"], "folder"),
        (["ball.ply", "--cameras", "absent.json"], "absent.json"),
        (["half.ply"], "half.ply"),
        (["none.ply"], "Gaussian"),
        (["ball.ply", "--device", "cuda"], "--device cpu"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(tmp_path, ply, monkeypatch, capsys, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    Path("half.ply").write_bytes(ply.read_bytes()[:-500])
    write(scene(0), "none.ply")
    assert main(["splats", "compress", *arguments, "--width", "32"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("scrimp: expected ")
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ball.ply", "half.ply", "none.ply"]


def test_sizes_are_read_as_people_write_them():
    given = {"2MB": 2_000_000, "1.5 MiB": 1_572_864, "600kB": 600_000, "700": 700, "3b": 3}
    for size, count in given.items():
        assert SplatsCompressConfig(scene=Path("s"), size=size).most_bytes() == count


def test_the_shell_fills_the_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("size: 600kB\nviews: 3\ncameras: cams\n")
    got = parse(
        ["splats", "compress", "a.ply", "--config", str(tmp_path / "c.yaml"), "--format", "sgs", "--up", "z-up"]
    )
    wanted = SplatsCompressConfig(
        scene=Path("a.ply"), size="600kB", views=3, cameras=Path("cams"), format="sgs", up="z-up"
    )
    assert got == wanted
