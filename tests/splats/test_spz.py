""".spz: against bytes taken apart one by one, every version, the axes, and damaged files."""

from __future__ import annotations

import gzip
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splat_scenes import scene

from scrimp.primitives.errors import InputError, MissingExtraError
from scrimp.splats.files import read, write
from scrimp.splats.harmonics import harmonic_basis
from scrimp.splats.morton import morton_order
from scrimp.splats.orbit import orbit_cameras, orbit_of
from scrimp.splats.render import render
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.spz import flip_axes, read_spz, write_spz
from scrimp.splats.spz_streams import AXES, stream_sizes, unpack_spz


def by_hand(plain: bytes) -> list[dict[str, list[float]]]:
    """Gaussians of an uncompressed .spz of version 2 or 3."""
    _, version, n, degree, bits, *_ = struct.unpack_from("<4sIIBBBB", plain)
    rest, turn = COUNTS[degree], 3 if version == 2 else 4
    starts, offset = [], 16
    for size in (9, 1, 3, 3, turn, 3 * rest):
        starts.append(offset)
        offset += n * size
    assert offset == len(plain)
    found = []
    for i in range(n):
        place = [plain[starts[0] + 9 * i + 3 * j :][:3] for j in range(3)]
        mean = [int.from_bytes(part, "little", signed=True) / 2**bits for part in place]
        raw = plain[starts[4] + turn * i :][:turn]
        if version == 2:
            xyz = [byte / 127.5 - 1 for byte in raw]
            x, y, z, w = *xyz, math.sqrt(max(0.0, 1 - sum(v * v for v in xyz)))
        else:
            word, parts = int.from_bytes(raw, "little"), [0.0] * 4
            for j, k in enumerate([k for k in range(4) if k != word >> 30]):
                level = word >> (20 - 10 * j) & 1023
                parts[k] = (-1 if level & 512 else 1) * (level & 511) / 511 / math.sqrt(2)
            parts[word >> 30] = math.sqrt(1 - sum(v * v for v in parts))
            x, y, z, w = parts
        sh = plain[starts[5] + 3 * rest * i :][: 3 * rest]
        found.append(
            {
                "means": mean,
                "quaternions": [w, x, y, z],
                "alpha": [plain[starts[1] + i] / 255],
                "colors": [(byte / 255 - 0.5) / 0.15 for byte in plain[starts[2] + 3 * i :][:3]],
                "scales": [byte / 16 - 10 for byte in plain[starts[3] + 3 * i :][:3]],
                "harmonics": [(byte - 128) / 128 for byte in sh],
            }
        )
    return found


def apart(a: Splats, b: Splats) -> dict[str, float]:
    """Largest difference of each field; quaternions up to their length and sign, opacities as shares."""
    unit = torch.nn.functional.normalize(a.quaternions, dim=1)
    unit = torch.where((unit * b.quaternions).sum(1, keepdim=True) < 0, -unit, unit)
    first = a.tensors() | {"quaternions": unit, "opacities": a.opacities.sigmoid()}
    second = b.tensors() | {"opacities": b.opacities.sigmoid()}
    return {name: float((first[name] - second[name]).abs().amax()) if first[name].numel() else 0.0 for name in first}


def test_the_bytes_are_those_of_the_format() -> None:
    given = scene(3, 3)
    for version in (2, 3):
        data = write_spz(given, version=version)
        found = read_spz(data, "a.spz")
        for row, wanted in enumerate(by_hand(gzip.decompress(data))):
            alpha = wanted.pop("alpha")[0]
            assert found.opacities[row].sigmoid().item() == pytest.approx(alpha, abs=1e-5)
            for name, values in wanted.items():
                assert getattr(found, name)[row].flatten().tolist() == pytest.approx(values, abs=1e-5), name


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(("n", "degree"), [(0, 1), (1, 0), (2, 4), (65, 3)])
def test_numbers_come_back_within_half_a_step(version: int, n: int, degree: int) -> None:
    if version == 4:
        pytest.importorskip("zstandard")
    given = scene(n, degree)
    given = replace(given, colors=given.colors.clamp(-3, 3), harmonics=given.harmonics.clamp(-0.99, 0.99))
    data = write_spz(given, version=version, sh_bits=(8, 6))
    found = read_spz(data, "a.spz")
    assert (len(found), found.degree) == (n, degree)
    far = apart(given.take(morton_order(given.means)), found)
    assert far["means"] <= 2**-13
    assert far["scales"] <= 1 / 32 + 1e-6
    assert far["colors"] <= 0.5 / (0.15 * 255) + 1e-5
    assert far["opacities"] <= 0.5 / 255 + 1e-6
    # What is left out is recovered from three with an error each, and may be half the whole.
    assert far["quaternions"] <= (1.5 / 511 / math.sqrt(2) + 1e-6 if version > 2 else 0.09)
    assert far["harmonics"] <= 2 / 128 + 1e-6
    if degree and n:
        low = given.take(morton_order(given.means)).harmonics[:, :3] - found.harmonics[:, :3]
        assert low.abs().max() <= 0.5 / 128 + 1e-6
    assert write_spz(found, version=version, sh_bits=(8, 6), fractional_bits=unpack_spz(data, "").fractional_bits)


def test_positions_are_as_fine_as_small_gaussians_and_the_extent_allow() -> None:
    given = scene(50)
    bits = [unpack_spz(write_spz(part), "").fractional_bits for part in (
        given, replace(given, scales=given.scales - 8), replace(given, means=given.means * 1000)
    )]  # fmt: skip
    assert bits[0] == 12
    assert bits[1] > 15
    assert bits[2] == math.floor(math.log2((2**23 - 1) / float(1000 * given.means.abs().max()))) < 12
    with pytest.raises(InputError, match="positions up to 1024"):
        write_spz(replace(given, means=given.means * 1000), fractional_bits=13)


@pytest.mark.parametrize("axes", [None, *AXES])
def test_axes_are_named_and_understood(axes: str | None) -> None:
    given = scene(4, 2)
    data = write_spz(given, axes=axes, sh_bits=(8, 8))
    found = read_spz(data, "a.spz", axes=axes or "RDF")
    assert max(apart(given.take(morton_order(given.means)), found).values()) < 0.05
    assert unpack_spz(data, "").axes == axes
    if axes in (None, "RDF"):
        raw = gzip.decompress(data)
        assert int.from_bytes(raw[16:19], "little", signed=True) / 2**12 == pytest.approx(
            found.means[0, 0].item(), abs=1e-6
        )


def test_a_mirrored_scene_has_mirrored_colours_and_shapes() -> None:
    given = scene(5, 3)
    turned = flip_axes(given, "RDF", "RUB")
    mirror = torch.diag(torch.tensor([1.0, -1, -1]))
    directions = torch.nn.functional.normalize(scene(5, seed=3).means, dim=1)
    seen = [
        (harmonic_basis(d, 3)[:, :, None] * s.harmonics).sum(1)
        for s, d in ((given, directions), (turned, directions @ mirror))
    ]
    assert torch.allclose(*seen, atol=1e-5)
    w, x, y, z = given.quaternions.unbind(1)
    assert torch.equal(turned.quaternions, torch.stack([w, x, -y, -z], 1))
    assert torch.equal(turned.means, given.means @ mirror)


def test_what_it_cannot_hold_is_refused() -> None:
    given = scene(3)
    with pytest.raises(InputError, match="opacities of 1"):
        write_spz(replace(given, opacities=torch.tensor([0.0, torch.nan, 0.0])))
    with pytest.raises(InputError, match="extra numbers age"):
        write_spz(replace(given, extra={"age": torch.zeros(3)}))
    assert len(read_spz(write_spz(replace(given, extra={"age": torch.zeros(3)}), lossy=True), "")) == 3
    for options in ({"version": 1}, {"sh_bits": (0, 4)}, {"sh_bits": (5, 9)}, {"axes": "RFU"}, {"fractional_bits": 25}):
        with pytest.raises(InputError):
            write_spz(given, **options)


def test_damaged_files_are_refused_in_one_line() -> None:
    draw, plain = random.Random(0), gzip.decompress(write_spz(scene(3, 1)))
    whole = gzip.compress(plain)
    cases = [whole[:cut] for cut in range(0, len(whole), 7)] + [
        gzip.compress(plain[:cut]) for cut in range(0, len(plain), 5)
    ]
    cases += [gzip.compress(plain[:8] + struct.pack("<I", count) + plain[12:]) for count in (4, 2**31, 2**32 - 1)]
    cases += [gzip.compress(plain[:4] + struct.pack("<I", version) + plain[8:]) for version in (1, 4, 9)]
    cases += [gzip.compress(plain[:12] + b"\x05" + plain[13:]), gzip.compress(plain + bytes(1 << 17)), b"", b"NGSP"]
    cases += [
        gzip.compress(plain[:14] + b"\x02" + plain[15:] + struct.pack("<III", 0xADBE0003, size, 9)) for size in (4, 99)
    ]
    for case in cases:
        with pytest.raises(InputError):
            read_spz(case, "a.spz")
    for _ in range(200):
        bent = bytearray(whole)
        bent[draw.randrange(len(bent))] ^= 1 << draw.randrange(8)
        try:
            read_spz(bytes(bent), "a.spz")
        except InputError:
            continue


def test_damaged_frames_are_refused_in_one_line() -> None:
    zstandard = pytest.importorskip("zstandard")
    draw, whole = random.Random(0), write_spz(scene(3, 1), version=4)
    cases = [whole[:cut] for cut in range(0, len(whole), 7)] + [whole + b"\0"]
    cases += [whole[:8] + struct.pack("<I", count) + whole[12:] for count in (4, 2**32 - 1)]
    cases += [whole[:16] + struct.pack("<I", offset) + whole[20:] for offset in (0, 31, 33, 2**32 - 1)]
    bomb = zstandard.compress(bytes(1 << 22))
    sizes = list(stream_sizes(4, 3, 1).values())
    lengths = b"".join(struct.pack("<QQ", len(bomb), size) for size in sizes)
    cases.append(whole[:32] + lengths + bomb * 6)
    for case in cases:
        with pytest.raises(InputError):
            read_spz(case, "a.spz")
    for _ in range(200):
        bent = bytearray(whole)
        bent[draw.randrange(len(bent))] ^= 1 << draw.randrange(8)
        try:
            read_spz(bytes(bent), "a.spz")
        except InputError:
            continue


def test_version_4_names_the_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"scrimp\[splats\]"):
        write_spz(scene(2), version=4)


@pytest.fixture
def reference_tool() -> str:
    found = os.environ.get("SPLAT_TRANSFORM") or shutil.which("splat-transform")
    if not found:
        pytest.skip("no splat-transform: npm install @playcanvas/splat-transform, or name it in $SPLAT_TRANSFORM")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    said = told.stdout + told.stderr
    if not re.search(r"\bv?([3-9]|\d\d)\.\d+\.\d+", said):
        pytest.skip(f"splat-transform {said.strip()}, which turns .spz about; pass version 3 or later")
    return found


def likeness(one: Splats, other: Splats) -> float:
    """PSNR in dB of the worst of three pictures that show something."""
    found = []
    for camera in orbit_cameras(orbit_of(one), 3, width=96, height=80):
        a, b = (render(each, camera).clamp(0, 1).double() for each in (one, other))
        assert a.std() > 0.05
        found.append(-10 * math.log10(max(1e-12, float((a - b).square().mean()))))
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["3.spz", "4.spz", ".sog"])
def test_the_reference_tool_reads_ours_and_we_read_its(ending: str, reference_tool: str, tmp_path: Path) -> None:
    def convert(*names: str) -> None:
        command = [reference_tool, "-q", "-w", *names]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)

    options = {"version": int(ending[0])} if ending.endswith(".spz") else {"palette_size": 64}
    given = scene(2000, 3)
    write(given, tmp_path / f"ours{ending}", **options)
    convert(f"ours{ending}", "ours.ply")
    seen, ours = read(tmp_path / "ours.ply", on_bad="clamp"), read(tmp_path / f"ours{ending}")
    assert max(apart(seen, ours).values()) < 1e-5
    assert likeness(seen, ours) > 45
    write(given, tmp_path / "plain.ply")
    convert("plain.ply", *(["--spz-version", ending[0]] if options.get("version") else ["-g", "cpu"]), f"its{ending}")
    convert(f"its{ending}", "its.ply")
    seen, its = read(tmp_path / "its.ply", on_bad="clamp"), read(tmp_path / f"its{ending}")
    assert max(apart(seen, its).values()) < 1e-5
    assert likeness(seen, its) > 45
