"""Scene files: .splat and .ksplat against bytes built here, formats told by content; see test_fuzz."""

from __future__ import annotations

import math
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from splat_scenes import same, scene

from scrimp.primitives.errors import InputError
from scrimp.splats.files import read, write
from scrimp.splats.ksplat import read_ksplat
from scrimp.splats.morton import morton_order
from scrimp.splats.reading import Cursor, inflate
from scrimp.splats.scene import COUNTS, SH_C0, Splats
from scrimp.splats.splat_file import read_splat, write_splat


def test_splat_is_rounded_to_its_nearest_bytes() -> None:
    splats = scene(7)
    data = write_splat(splats)
    assert len(data) == 7 * 32
    for row in range(7):
        *numbers, r, g, b, a, w, x, y, z = struct.unpack_from("<6f8B", data, 32 * row)
        assert numbers == pytest.approx([*splats.means[row].tolist(), *splats.scales[row].exp().tolist()], rel=1e-6)
        rgb = (0.5 + SH_C0 * splats.colors[row].double()).clamp(0, 1) * 255
        assert max(abs(code - value) for code, value in zip((r, g, b), rgb.tolist(), strict=True)) <= 0.5
        assert abs(a - 255 / (1 + math.exp(-splats.opacities[row].item()))) <= 0.5
        unit = torch.nn.functional.normalize(splats.quaternions[row].double(), dim=0) * 128
        stored = torch.tensor([w, x, y, z]) - 128
        assert (unit * (unit @ stored.double()).sign() - stored).abs().max() <= 0.5
    found = read_splat(data, "a.splat")
    assert torch.equal(found.means, splats.means)
    assert torch.allclose(found.scales, splats.scales, atol=1e-5)
    again = write_splat(found)
    assert all(again[at + 24 : at + 28] == data[at + 24 : at + 28] for at in range(0, 7 * 32, 32))


def test_splat_reads_the_ends_and_refuses_losses() -> None:
    row = struct.pack("<6f8B", 1, 2, 3, 0, 1, 2, 0, 128, 255, 255, 128, 128, 128, 0)
    found = read_splat(row + row, "a.splat")
    assert found.finite().all()
    assert found.scales[0].tolist() == pytest.approx([-20, 0, math.log(2)])
    assert found.opacities.sigmoid().tolist() == pytest.approx([1, 1], abs=2e-6)
    assert (SH_C0 * found.colors[0] + 0.5).tolist() == pytest.approx([0, 128 / 255, 1], abs=1e-6)
    assert found.quaternions[0].tolist() == [0, 0, 0, -1]
    assert len(read_splat(b"", "a.splat")) == len(read_splat(write_splat(scene(0)), "a.splat")) == 0
    lost = replace(scene(2, 1), extra={"label": torch.zeros(2)})
    with pytest.raises(InputError, match="degree 1 and extra numbers label"):
        write_splat(lost)
    assert write_splat(lost, lossy=True) == write_splat(replace(lost.of_degree(0), extra={}))
    for damaged in (row[:-1], row + b"\0"):
        with pytest.raises(InputError, match="no multiple of 32"):
            read_splat(damaged, "a.splat")


def ksplat(level: int, *, degrees: tuple[int, ...] = (1, 3), seed: int = 0) -> tuple[bytes, Splats]:
    """A file of sections, each of 5 Gaussians with room for 6: two full buckets of 2, one of 1; and what it holds."""
    draw = random.Random(seed)
    header, body, parts = bytearray(4096), b"", []
    struct.pack_into(
        "<BB2xIIIIH", header, 0, 0, 1, len(degrees), len(degrees), 6 * len(degrees), 5 * len(degrees), level
    )
    struct.pack_into("<2f", header, 36, -2.0, 1.0)
    sections = b""
    for degree in degrees:
        sections += struct.pack("<4IfHxxIIIIH", 5, 6, 2, 3, 8.0, 12, 1000, 0, 2, 1, degree).ljust(1024, b"\0")
        centres = [[draw.uniform(-9, 9) for _ in range(3)] for _ in range(3)]
        body += struct.pack("<I9f", 1, *(value for centre in centres for value in centre))
        for row in range(6):
            data, one = _ksplat_row(draw, level, degree, centres[min(row // 2, 2)])
            body += data
            parts += [one] if row < 5 else []
    columns = (torch.tensor([part[i] for part in parts]) for i in range(5))
    harmonics = torch.zeros(len(parts), COUNTS[max(degrees)], 3)
    for row, part in enumerate(parts):
        for k, colors in enumerate(part[5]):
            harmonics[row, k] = torch.tensor(colors)
    return bytes(header) + sections + body, Splats(*columns, harmonics)


def _ksplat_row(draw: random.Random, level: int, degree: int, centre: list[float]) -> tuple[bytes, list]:
    half = "f" if level == 0 else "e"
    kept = np.float32 if level == 0 else np.float16
    codes = [draw.randrange(2001) for _ in range(3)]
    mean = [code / 7 for code in codes] if level == 0 else [
        centre[axis] + (codes[axis] - 1000) * 4.0 / 1000 for axis in range(3)
    ]  # fmt: skip
    size, quaternion = [[float(kept(draw.uniform(0.1, 2))) for _ in range(n)] for n in (3, 4)]
    color = [draw.randrange(1, 255) for _ in range(4)]
    rest = [[[draw.randrange(256) for _ in range(3)] for _ in range(2 * band + 1)] for band in range(1, degree + 1)]
    stored = [coefficient[channel] for band in rest for channel in range(3) for coefficient in band]
    low, step = (-2.0, 3 / 255) if level == 2 else (0.0, 1.0)
    data = struct.pack("<3f" if level == 0 else "<3H", *(mean if level == 0 else codes))
    data += struct.pack(f"<7{half}4B", *size, *quaternion, *color)
    data += struct.pack(f"<{len(stored)}{'B' if level == 2 else half}", *stored)
    alpha = color[3] / 255
    return data, [
        mean,
        quaternion,
        [math.log(value) for value in size],
        math.log(alpha / (1 - alpha)),
        [(value / 255 - 0.5) / SH_C0 for value in color[:3]],
        [[low + step * value for value in coefficient] for band in rest for coefficient in band],
    ]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_ksplat_of_every_level(level: int) -> None:
    data, wanted = ksplat(level)
    found = read_ksplat(data, "a.ksplat")
    for name, values in wanted.tensors().items():
        assert torch.allclose(getattr(found, name), values, rtol=1e-6, atol=2e-6), name
    assert len(read_ksplat(data[:4] + bytes(4092), "empty.ksplat")) == 0
    few = bytearray(ksplat(level, degrees=(1, 2))[0])  # whose last section, of a higher degree, is made empty
    struct.pack_into("<I", few, 16, 5)
    struct.pack_into("<I", few, 5120, 0)
    assert torch.equal(read_ksplat(bytes(few), "few.ksplat").means, found.means[:5])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((0, 1), (1, 0), (4, 2**32 - 1), (16, 11), (20, 3), (4096, 7), (4100, 2**32 - 1), (4104, 1)),
        *((4108, 2**32 - 1), (4116, 8), (4128, 2**32 - 1), (4132, 2**32 - 1), (4136, 9)),
    ],
)
def test_ksplat_refuses_damage(at: int, value: int) -> None:
    data = bytearray(ksplat(1)[0])
    struct.pack_into("<B" if at < 4 else "<H" if at in (20, 4116, 4136) else "<I", data, at, value)
    with pytest.raises(InputError, match=r"whole \.ksplat file"):
        read_ksplat(bytes(data), "a.ksplat")


@pytest.mark.parametrize("ending", [".ply", ".compressed.ply", ".splat"])
def test_files_are_written_by_ending_and_read_by_content(tmp_path: Path, ending: str) -> None:
    path = write(scene(5), tmp_path / "new" / f"A{ending.upper()}")
    found = read(path)
    other = path.rename(tmp_path / ("b.splat" if ending == ".splat" else "b.anything"))
    assert same(read(other), found)
    assert torch.allclose(found.means.sort(0)[0], scene(5).means.sort(0)[0], atol=0.02)
    (tmp_path / "c").write_bytes(ksplat(0)[0])
    assert len(read(tmp_path / "c")) == 10


def test_files_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    for name, said in (("a.obj", "ends with one of: .compressed.ply, .ply"), ("a.ksplat", "ends with one of")):
        with pytest.raises(InputError, match=said):
            write(scene(1), tmp_path / name)
    with pytest.raises(InputError, match=r"options of \.ply: normals; got lossy"):
        write(scene(1), tmp_path / "a.ply", lossy=True)
    (tmp_path / "b.ply").write_bytes(b"solid")
    for path, said in (("b.ply", "whose bytes are of none"), ("c.ply", "absent"), (".", "with none of")):
        with pytest.raises(InputError, match=said):
            read(tmp_path / path)


def test_files_read_the_last_iteration_of_a_training_folder(tmp_path: Path) -> None:
    for iteration in (7000, 30000, 900):
        write(scene(1, seed=iteration), tmp_path / f"point_cloud/iteration_{iteration}/point_cloud.ply")
    assert same(read(tmp_path), scene(1, seed=30000))


def test_bad_gaussians_are_refused_clamped_dropped_or_kept(tmp_path: Path) -> None:
    splats = scene(6)
    splats.opacities[:2] = torch.tensor([math.inf, -math.inf])
    splats.scales[1, 2] = -math.inf
    path = write(splats, tmp_path / "a.ply")
    with pytest.raises(InputError, match=r"scales of 1, opacities of 2 out of 6; pass on_bad=clamp, drop or keep"):
        read(path)
    assert same(read(path, on_bad="keep"), splats)
    assert same(read(path, on_bad="drop"), splats.take(torch.arange(2, 6)))
    clamped = read(path, on_bad="clamp")
    assert clamped.opacities[:2].sigmoid().tolist() == pytest.approx([1, 0], abs=2e-6)
    assert clamped.scales[1, 2] == -20
    assert same(clamped.take(torch.arange(2, 6)), splats.take(torch.arange(2, 6)))
    splats.means[3, 1] = math.nan
    splats.quaternions[4] = 0
    write(splats, path)
    with pytest.raises(InputError, match=r"means of 1, quaternions of 1 out of 6; pass on_bad=drop or keep"):
        read(path, on_bad="clamp")
    assert same(read(path, on_bad="drop"), splats.take(torch.tensor([2, 5])))
    with pytest.raises(InputError, match="refuse, clamp, drop, keep"):
        read(path, on_bad="ignore")


def test_morton_order_against_bits_one_by_one() -> None:
    means = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50, 0])
    values = means.double().numpy()
    cells = np.rint((values - values.min(0)) / np.maximum(np.ptp(values, 0), 1e-30) * (2**21 - 1))
    codes = [
        sum((int(cell) >> bit & 1) << (3 * bit + axis) for axis, cell in enumerate(row) for bit in range(21))
        for row in cells.tolist()
    ]
    assert morton_order(means).tolist() == sorted(range(60), key=codes.__getitem__)
    means[[5, 20], [0, 1]] = torch.tensor([math.nan, math.inf])
    assert morton_order(means)[-2:].tolist() == [5, 20]
    assert sorted(morton_order(means).tolist()) == list(range(60))
    assert morton_order(torch.full((3, 3), 2.0)).tolist() == [0, 1, 2]
    assert morton_order(torch.zeros(0, 3)).shape == (0,)


def test_cursor_and_inflate_are_bounded() -> None:
    cursor = Cursor(b"\1\0\2\0\3", format=".x", name="a.x")
    assert cursor.array("<u2", 2).tolist() == [1, 2]
    for count in (2, -1, 2**70):
        with pytest.raises(InputError, match=r"a.x: 1 bytes at offset 4, where -?\d+ are needed"):
            cursor.take(count)
    with pytest.raises(InputError):
        cursor.array("<u8", 2**62, 4)
    with pytest.raises(InputError, match="1 bytes too many"):
        cursor.end()
    assert cursor.number("u1") == 3
    cursor.end()
    packed = zlib.compress(bytes(100))
    assert inflate(packed, 100, format=".x", name="a") == bytes(100)
    raw = zlib.compressobj(wbits=-15)
    assert inflate(raw.compress(b"abc") + raw.flush(), 3, format=".x", name="a", raw=True) == b"abc"
    for data, limit in ((packed, 99), (packed[:-1], 100), (b"", 9), (b"\0" * 9, 9), (packed, -1)):
        with pytest.raises(InputError, match=r"whole \.x file"):
            inflate(data, limit, format=".x", name="a")


def test_real_splat(shared_data: Path) -> None:
    found = read(shared_data / "scenes" / "plant.splat")
    assert len(found) == 113_648
    assert same(found.take(found.finite()), found)
