"""Scenes as .ply, plain and compressed: held against bytes built or taken apart here number by number."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splat_scenes import same, scene, values_of

from scrimp.primitives.errors import InputError
from scrimp.splats.compressed_ply import read_compressed_ply, write_compressed_ply
from scrimp.splats.morton import morton_order
from scrimp.splats.ply import read_ply, write_ply
from scrimp.splats.scene import SH_C0, Splats


def reference_ply(splats: Splats, order: str, *, seed: int = 0) -> bytes:
    """A .ply with its properties shuffled, normals, an element before and one of lists after."""
    names = [*values_of(scene(1, splats.degree), 0), "nx", "ny", "nz", "label"]
    random.Random(seed).shuffle(names)
    form = {"<": "binary_little_endian", ">": "binary_big_endian", "": "ascii"}[order]
    head = ["ply", f"format {form} 1.0", "comment made here", "element camera 2", "property short id"]
    head += [f"element vertex {len(splats)}"]
    head += [f"property {'uchar' if name == 'label' else 'float'} {name}" for name in names]
    head += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    rows = [values_of(splats, row) | {"nx": 7, "ny": 7, "nz": 7, "label": row % 256} for row in range(len(splats))]
    if order == "":
        lines = ["1", "2", *(" ".join(repr(row[name]) for name in names) for row in rows), "3 0 0 0"]
        return ("\n".join(head[:-1] + lines) + "\n").encode()
    body = struct.pack(f"{order}2h", 1, 2)
    for row in rows:
        body += b"".join(struct.pack(f"{order}{'B' if name == 'label' else 'f'}", row[name]) for name in names)
    return "\n".join(head).encode() + body + struct.pack(f"{order}B3i", 3, 0, 0, 0)


@pytest.mark.parametrize("order", ["<", ">", ""])
@pytest.mark.parametrize(("n", "degree"), [(0, 1), (1, 0), (5, 2), (3, 4)])
def test_ply_reads_any_order_of_properties_and_bytes(order: str, n: int, degree: int) -> None:
    splats = scene(n, degree)
    wanted = replace(splats, extra={"label": torch.arange(n).to(torch.uint8)})
    found = read_ply(reference_ply(splats, order, seed=n), "a.ply")
    assert same(found, wanted)
    assert same(read_ply(write_ply(found), "b.ply"), wanted)
    assert same(read_ply(write_ply(found, normals=True), "c.ply"), wanted)


def test_ply_blocks_of_rows_and_line_ends_do_not_matter() -> None:
    splats = scene(4097 * 2, 1)
    data = write_ply(splats)
    assert same(read_ply(data, "a.ply"), splats)
    head, body = data.split(b"end_header\n", 1)
    assert same(read_ply(head.replace(b"\n", b"\r\n") + b"end_header\r\n" + body + b"\n", "a.ply"), splats)
    text = reference_ply(scene(2, 1), "")
    assert same(read_ply(text.replace(b"\n", b"\r\n"), "a.ply"), read_ply(text, "a.ply"))


def test_ply_keeps_doubles_and_types_of_extra_numbers() -> None:
    splats = scene(3).to(torch.float64)
    kinds = (torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.float32, torch.float64)
    extra = {f"of_{kind}": torch.tensor([1, 2, 100]).to(kind) for kind in kinds}
    splats = replace(splats, means=splats.means + 1e-12, extra=extra)
    assert same(read_ply(write_ply(splats), "a.ply"), splats)


def test_ply_refuses_what_it_cannot_hold() -> None:
    for name in ("x", "nx", "f_rest_0", "a b", ""):
        with pytest.raises(InputError, match="extra name"):
            write_ply(replace(scene(2), extra={name: torch.zeros(2)}))
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(InputError, match=r"of a type that \.ply has"):
            write_ply(scene(2).to(dtype))


GOOD = b"ply\nformat ascii 1.0\nelement vertex 1\n"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"ply\n",
        b"ply\nformat ascii 1.0\nend_header\n",
        b"ply\nelement vertex 1\nproperty float x\nend_header\n1\n",
        GOOD + b"property float x\nproperty float x\nend_header\n1 1\n",
        GOOD + b"property float x\nend_header\n1\n",
        GOOD + b"property half x\nend_header\n1\n",
        GOOD + b"element vertex 2\nend_header\n1\n",
        GOOD.replace(b"1\n", b"999999999999999\n") + b"end_header\n1\n",
        GOOD.replace(b"vertex 1", b"vertex -1") + b"end_header\n1\n",
        GOOD.replace(b"ascii", b"utf8") + b"end_header\n1\n",
        reference_ply(scene(2, 1), "").replace(b"f_rest_8", b"f_rest_9"),
        reference_ply(scene(2, 1), "").replace(b"f_rest_8", b"f_rest_08"),
        reference_ply(scene(2, 1), "").replace(b"element vertex 2", b"element vertex 3"),
        reference_ply(scene(2, 1), "").replace(b"\n1\n2\n", b"\n1\nx\n"),
        reference_ply(scene(2, 1), "").replace(b"\n1\n2\n", b"\n1\n99999\n"),
        reference_ply(scene(2, 1), "<").replace(b"element vertex 2", b"element vertex 999999999999"),
        reference_ply(scene(2, 1), "<").replace(b"element camera 2", b"element camera 999999999999999"),
        reference_ply(scene(2, 1), "<").replace(b"property short id", b"property list uchar short id"),
    ],
)
def test_ply_refuses_damage_in_one_line(head: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.ply") as caught:
        read_ply(head, "a.ply")
    assert "\n" not in str(caught.value)


def test_ply_header_of_endless_names_takes_no_endless_time() -> None:
    many = b"".join(b"property char p%d\n" % i for i in range(40000))
    with pytest.raises(InputError, match="without x, y, z"):
        read_ply(GOOD + many + b"end_header\n", "a.ply")
    with pytest.raises(InputError):  # rows of nothing, of which a short file may have any number
        read_ply(
            b"ply\nformat ascii 1.0\nelement a 999999999999999\nelement vertex 1\nproperty int x\nend_header\n", "a"
        )


def reference_compressed(data: bytes) -> list[dict[str, float]]:
    """Takes a compressed .ply apart number by number."""
    head, body = data.split(b"end_header\n", 1)
    counts = {line.split()[1]: int(line.split()[2]) for line in head.decode().split("\n") if line.startswith("element")}
    wide = 18 if b"min_r" in head else 12
    rest = head.count(b"f_rest_")
    words = counts["chunk"] * wide * 4
    found = []
    for i in range(counts["vertex"]):
        chunk = struct.unpack_from(f"<{wide}f", body, i // 256 * wide * 4)
        position, rotation, scale, color = struct.unpack_from("<4I", body, words + 16 * i)
        one: dict[str, float] = {}
        for names, word, at in ((("x", "y", "z"), position, 0), (("scale_0", "scale_1", "scale_2"), scale, 6)):
            for axis, (shift, most) in enumerate(((21, 2047), (11, 1023), (0, 2047))):
                share = (word >> shift & most) / most
                one[names[axis]] = chunk[at + axis] * (1 - share) + chunk[at + 3 + axis] * share
        three = [((rotation >> shift & 1023) / 1023 - 0.5) * math.sqrt(2) for shift in (20, 10, 0)]
        three.insert(rotation >> 30, math.sqrt(max(0, 1 - sum(value * value for value in three))))
        one |= {f"rot_{axis}": value for axis, value in enumerate(three)}
        for axis, shift in enumerate((24, 16, 8)):
            share = (color >> shift & 255) / 255
            low, high = (chunk[12 + axis], chunk[15 + axis]) if wide == 18 else (0, 1)
            one[f"f_dc_{axis}"] = (low * (1 - share) + high * share - 0.5) / SH_C0
        alpha = min(max((color & 255) / 255, 1e-6), 1 - 1e-6)
        one["opacity"] = math.log(alpha / (1 - alpha))
        for k in range(rest):
            code = body[words + 16 * counts["vertex"] + i * rest + k]
            one[f"f_rest_{k}"] = {0: -4.0, 255: 4.0}.get(code, (code + 0.5) / 32 - 4)
        found.append(one)
    return found


@pytest.mark.parametrize(("n", "degree"), [(0, 0), (1, 3), (257, 1), (512, 0), (600, 2)])
def test_compressed_ply_within_half_a_step_of_every_field(n: int, degree: int) -> None:
    splats = scene(n, degree)
    data = write_compressed_ply(splats)
    found = read_compressed_ply(data, "a.compressed.ply")
    for row, wanted in enumerate(reference_compressed(data)):
        assert values_of(found, row) == pytest.approx(wanted, rel=1e-5, abs=2e-6)
    check_half_steps(splats.take(morton_order(splats.means)), found)


def check_half_steps(splats: Splats, found: Splats) -> None:
    assert len(splats) == len(found)
    assert splats.degree == found.degree
    splats = splats.to(torch.float64)
    for start in range(0, len(splats), 256):
        one, other = (each.take(torch.arange(start, min(start + 256, len(splats)))) for each in (splats, found))
        for field, most in (("means", (2047, 1023, 2047)), ("scales", (2047, 1023, 2047)), ("colors", (255,) * 3)):
            a, b = getattr(one, field), getattr(other, field)
            slack = 1e-6 * a.abs().amax() + 1e-7
            steps = (a.amax(0) - a.amin(0)) / torch.tensor(most)
            assert ((a - b).abs() <= 0.5 * steps + slack).all(), field
    assert ((splats.opacities.sigmoid() - found.opacities.sigmoid()).abs() <= 0.5 / 255 + 1e-6).all()
    unit = torch.nn.functional.normalize(splats.quaternions, dim=1)
    unit = unit * (unit * found.quaternions).sum(1, keepdim=True).sign()
    off, largest = (unit - found.quaternions).abs(), unit.abs().argmax(1)
    assert (off.scatter(1, largest[:, None], 0) <= 0.5 * math.sqrt(2) / 1023 + 1e-6).all()
    assert ((splats.harmonics - found.harmonics).abs() <= 0.5 / 32 + 1e-6).all()


def test_compressed_ply_holds_the_ends_of_each_range() -> None:
    splats = scene(300, 1)
    ends = torch.tensor([-9.0, -4, -3.98, -3.96, 3.96, 3.98, 4, 9, 0])
    splats.harmonics[0] = ends.view(3, 3)
    splats = replace(splats, opacities=splats.opacities.clone().fill_(40), scales=splats.scales.clone())
    splats.scales[1] = torch.tensor([-50.0, 0, 50])
    order = morton_order(splats.means)
    data = write_compressed_ply(splats)
    found = read_compressed_ply(data, "a")
    nearest = torch.tensor([-4, -4, -4, -4 + 1.5 / 32, 4 - 1.5 / 32, 4, 4, 4, 1 / 64])
    assert torch.equal(found.harmonics[order == 0].flatten(), nearest)
    assert found.scales[order == 1].flatten().tolist() == pytest.approx([-20, 0, 20], abs=40 / 1023)
    assert found.finite().all()
    assert (found.opacities > 13).all()
    alike = replace(splats.take(torch.zeros(3, dtype=torch.int64)), scales=torch.zeros(3, 3))
    assert torch.equal(read_compressed_ply(write_compressed_ply(alike), "a").means, alike.means)


def test_compressed_ply_without_bounds_of_color() -> None:
    data = write_compressed_ply(scene(300))
    head, body = data.split(b"end_header\n", 1)
    head = b"".join(line for line in head.splitlines(True) if line.rstrip()[-2:] not in (b"_r", b"_g", b"_b"))
    old = head + b"end_header\n" + body[:48] + body[72:120] + body[144:]
    found = read_compressed_ply(old, "old")
    for row, wanted in enumerate(reference_compressed(old)):
        assert values_of(found, row) == pytest.approx(wanted, rel=1e-5, abs=2e-6)


def test_compressed_ply_refuses_what_it_cannot_hold() -> None:
    bad = replace(scene(3), opacities=torch.tensor([0, math.inf, 0]))
    extra = replace(scene(3, 4), extra={"label": torch.zeros(3)})
    for wrong, said in ((bad, "opacities of 1 out of 3"), (extra, "degree 4 and extra numbers label")):
        with pytest.raises(InputError, match=said):
            write_compressed_ply(wrong)
    assert read_compressed_ply(write_compressed_ply(extra, lossy=True), "a").degree == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"element chunk 2", b"element chunk 1"),
        (b"element sh 300", b"element sh 200"),
        (b"element sh 300", b"element sh 900"),
        (b"uchar f_rest_3", b"char f_rest_3"),
        (b"f_rest_8", b"f_rest_9"),
        (b"float min_y", b"int min_y"),
        (b"float min_scale_x", b"float min_scale_w"),
        (b"uint packed_scale", b"int packed_scale"),
        (b"packed_color", b"packed_colour"),
        (b"element vertex 300", b"element vertex 4294967295"),
    ],
)
def test_compressed_ply_refuses_damage(old: bytes, new: bytes) -> None:
    data = write_compressed_ply(scene(300, 1))
    with pytest.raises(InputError, match=r"whole \.ply file"):
        read_compressed_ply(data.replace(old, new, 1), "a")


def test_real_ply_bit_for_bit(shared_data: Path) -> None:
    data = (shared_data / "scenes" / "fox60k.ply").read_bytes()
    found = read_ply(data, "fox60k.ply")
    assert (len(found), found.degree) == (60_000, 3)
    assert write_ply(found, normals=True) == data


def test_real_compressed_ply_within_half_a_step(shared_data: Path) -> None:
    data = (shared_data / "scenes" / "biker.compressed.ply").read_bytes()
    found = read_compressed_ply(data, "biker").take(torch.arange(0, 152_746, 40))
    check_half_steps(found.take(morton_order(found.means)), read_compressed_ply(write_compressed_ply(found), "again"))
