""".sog: against pixels taken apart one by one, bounds of every field, folders, streamed scenes, and damaged files."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from splat_scenes import same, scene
from test_smallest import covariances

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats.canonical import canonical
from scrimp.splats.files import read
from scrimp.splats.morton import morton_order
from scrimp.splats.scene import Splats
from scrimp.splats.sog import Palette, dequantise, quantise, read_sog, write_sog
from scrimp.splats.sog_write import sog_files

SIZES = [(0, 0), (1, 3), (2, 0), (65, 1), (70, 3)]


def files_of(splats: Splats) -> dict[str, bytes]:
    return sog_files(quantise(splats, palette_size=64))


def zipped(files: dict[str, bytes], *, packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_meta(files: dict[str, bytes], change: Callable[[Any], Any]) -> dict[str, bytes]:
    meta = json.loads(files["meta.json"])
    return files | {"meta.json": json.dumps(change(meta) or meta).encode()}


def lay(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def by_hand(data: bytes, row: int) -> dict[str, list[float]]:
    """One Gaussian as the specification reads it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        content = {name: archive.read(name) for name in archive.namelist()}
    meta = json.loads(content["meta.json"])

    opened = {name: Image.open(io.BytesIO(image)).convert("RGBA") for name, image in content.items() if "webp" in name}

    def pixel(part: str, at: int, image: int = 0) -> tuple[int, ...]:
        picture = opened[meta[part]["files"][image]]
        return picture.getpixel((at % picture.width, at // picture.width))

    means = []
    for axis in range(3):
        low, high = meta["means"]["mins"][axis], meta["means"]["maxs"][axis]
        level = pixel("means", row)[axis] + 256 * pixel("means", row, 1)[axis]
        bent = low + (high - low) * level / 65535
        means.append(math.copysign(math.exp(abs(bent)) - 1, bent))
    *levels, tag = pixel("quats", row)
    quaternion = [(level / 255 - 0.5) * math.sqrt(2) for level in levels]
    quaternion.insert(tag - 252, math.sqrt(1 - sum(part * part for part in quaternion)))
    *codes, alpha = pixel("sh0", row)
    found = {"means": means, "quaternions": quaternion, "colors": [meta["sh0"]["codebook"][code] for code in codes]}
    found["scales"] = [meta["scales"]["codebook"][code] for code in pixel("scales", row)[:3]]
    found["opacities"] = [math.log(alpha / (255 - alpha))]
    low, high, _, _ = pixel("shN", row, 1)
    bands = (meta["shN"]["bands"] + 1) ** 2 - 1
    entry = low + 256 * high
    first = entry // 64 * 64 * bands + entry % 64 * bands
    codes = [code for k in range(bands) for code in pixel("shN", first + k)[:3]]
    return found | {"harmonics": [meta["shN"]["codebook"][code] for code in codes]}


def test_the_pixels_are_those_of_the_format() -> None:
    given = replace(scene(70, 2), opacities=scene(70).opacities.clamp(-3, 3))
    data = write_sog(given, palette_size=67)
    found = read_sog(data)
    for row in (0, 12, 69):
        for name, values in by_hand(data, row).items():
            assert getattr(found, name)[row].flatten().tolist() == pytest.approx(values, abs=1e-5), name
    assert write_sog(given, palette_size=67) == data
    trained = replace(given, scales=given.scales.clone().requires_grad_())
    assert write_sog(trained, palette_size=67) == data


@pytest.mark.parametrize(("n", "degree"), SIZES)
def test_no_gaussian_is_dropped_and_every_field_is_near(n: int, degree: int) -> None:
    given = scene(n, degree)
    found = read_sog(write_sog(given, palette_size=256))
    wanted = canonical(given.take(morton_order(given.means)))
    assert (len(found), found.degree) == (n, degree)
    if not n:
        return
    bent, again = (part.double().sign() * part.double().abs().log1p() for part in (wanted.means, found.means))
    assert ((bent - again).abs() <= (bent.amax(0) - bent.amin(0)) / 65535 / 2 + 1e-7).all()
    assert (wanted.opacities.sigmoid() - found.opacities.sigmoid()).abs().max() <= 0.5 / 255 + 1e-6
    assert (wanted.quaternions - found.quaternions).abs().max() <= 1.5 * math.sqrt(2) / 255 + 1e-5
    for name in ("scales", "colors", "harmonics"):
        exact, near = getattr(wanted, name), getattr(found, name)
        gap = (exact.amax() - exact.amin()).item() / 64 if exact.numel() > 256 else 1e-6
        assert exact.numel() == 0 or (exact - near).abs().max() <= gap, name
    size = covariances(wanted).abs().amax((1, 2))
    assert ((covariances(found) - covariances(wanted)).abs().amax((1, 2)) <= 0.35 * size).all()


def test_a_palette_of_ones_own_is_used_as_it_is() -> None:
    given = scene(9, 1)
    centroids = torch.arange(-9, 9.0).reshape(2, 3, 3) / 9
    labels = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 1])
    fields = quantise(given, palette=Palette(centroids, labels), keep_order=True)
    assert torch.equal(dequantise(fields).harmonics, centroids[labels])
    assert fields.labels.tolist() == (1 - labels).tolist()  # the commonest first
    for wrong in (labels[:8], labels + 1, labels - 1):
        with pytest.raises(InputError, match="labels"):
            quantise(given, palette=Palette(centroids, wrong))
    with pytest.raises(InputError, match="palette"):
        quantise(given, palette_size=0)


def test_what_it_cannot_hold_is_refused() -> None:
    given = scene(5, 4)
    with pytest.raises(InputError, match="degree 4"):
        write_sog(given)
    assert read_sog(write_sog(given, lossy=True)).degree == 3
    with pytest.raises(InputError, match="means of 1"):
        write_sog(replace(scene(2), means=torch.tensor([[0, 0, 0], [0, torch.inf, 0]])))


def test_folders_and_deflated_archives_are_the_same_scene(tmp_path: Path) -> None:
    files = files_of(scene(20, 1))
    wanted = read_sog(zipped(files))
    folder = lay(files, tmp_path / "scene")
    (tmp_path / "a.sog").write_bytes(zipped(files, packing=zipfile.ZIP_DEFLATED))
    for path in (folder, folder / "meta.json", tmp_path / "a.sog"):
        assert same(read(path), wanted)
    png = {"quats.webp": io.BytesIO()}
    Image.open(io.BytesIO(files["quats.webp"])).save(png["quats.webp"], "PNG")
    assert same(read_sog(zipped(files | {"quats.webp": png["quats.webp"].getvalue()})), wanted)


def test_a_streamed_scene_is_its_finest_parts(tmp_path: Path) -> None:
    parts = [scene(n, degree, seed=n) for n, degree in ((12, 1), (7, 0), (4, 1), (3, 0))]
    for title, part in zip(("0_0", "0_1", "1_0", "env"), parts, strict=True):
        lay(files_of(part), tmp_path / title)
    fine, other, coarse, far = (read_sog(tmp_path / title) for title in ("0_0", "0_1", "1_0", "env"))
    leaves = [
        {"lods": {"0": {"file": 0, "offset": 5, "count": 7}, "1": {"file": 2, "offset": 0, "count": 1}}},
        {"lods": {"0": {"file": 1, "offset": 0, "count": 7}}, "children": []},
        {"lods": {"1": {"file": 2, "offset": 1, "count": 2}}},
        {"lods": {"0": {"file": 0, "offset": 0, "count": 2}}},
    ]
    names = ["0_0/meta.json", "0_1/meta.json", "1_0/meta.json"]
    meta = {
        "version": 1,
        "lodLevels": 2,
        "environment": "env/meta.json",
        "filenames": names,
        "tree": {"children": leaves},
    }
    index = tmp_path / "lod-meta.json"
    index.write_text(json.dumps(meta))
    found = read(tmp_path)
    pieces = [fine.means[[0, 1, *range(5, 12)]], other.means, coarse.means[1:3], far.means]
    assert sorted(found.means.tolist()) == sorted(torch.cat(pieces).tolist())
    assert found.degree == 1
    wrong: list[dict[str, Any]] = [
        {"filenames": ["0_0/meta.json", "../x/meta.json", "1_0/meta.json"]},
        {"filenames": names[:2]},
        {"tree": {"children": [{"lods": {"0": {"file": 0, "offset": 6, "count": 7}}}]}},
        {"tree": {"children": 3}},
        {"version": 2},
    ]
    for change in wrong:
        index.write_text(json.dumps(meta | change))
        with pytest.raises(InputError):
            read_sog(tmp_path)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    files, draw = files_of(scene(9, 1)), random.Random(0)
    whole = zipped(files)
    wide = io.BytesIO()
    Image.new("RGBA", (3000, 3000)).save(wide, "WEBP", lossless=True)
    changes: list[Callable[[Any], Any]] = [
        lambda meta: meta.update(version=1),
        lambda meta: meta.update(count=2**28),
        lambda meta: meta.update(count=-1),
        lambda meta: meta.update(count=True),
        lambda meta: meta.update(means=None),
        lambda meta: meta["means"].update(mins=[0, 0, 1e999]),
        lambda meta: meta["means"].update(maxs=[0, 0]),
        lambda meta: meta["sh0"].update(codebook=["0"] * 256),
        lambda meta: meta["sh0"].update(codebook=[10**400] * 256),
        lambda meta: meta["quats"].update(files=[3]),
        lambda meta: meta["scales"].update(files=["../meta.json"]),
        lambda meta: meta["shN"].update(count=3),
        lambda meta: meta["shN"].update(bands=2),
        lambda meta: meta["shN"].update(files=["shN_labels.webp"]),
        lambda meta: [meta],
    ]
    cases = [zipped(with_meta(files, change)) for change in changes]
    cases += [zipped({key: value for key, value in files.items() if key != name}) for name in files]
    cases += [zipped(files | {name: files["sh0.webp"][:40]}) for name in files]
    cases += [zipped(files | {"sh0.webp": wide.getvalue()}), zipped(files | {"quats.webp": files["means_u.webp"][:-1]})]
    cases += [
        zipped(files | {"meta.json": b"[" * 100_000}),
        b"",
        b"PK\3\4",
        *(whole[:cut] for cut in range(1, len(whole), 300)),
    ]
    bomb = zipped(files | {"sh0.webp": bytes(1 << 24)}, packing=zipfile.ZIP_DEFLATED)
    for case in [*cases, bomb]:
        with pytest.raises(InputError):
            read_sog(case)
    for _ in range(150):
        bent = bytearray(whole)
        bent[draw.randrange(len(bent))] ^= 1 << draw.randrange(8)
        try:
            read_sog(bytes(bent))
        except InputError:
            continue
    folder = lay(with_meta(files, lambda meta: meta["sh0"].update(files=["/etc/hostname"])), tmp_path / "a")
    for path in (folder, tmp_path / "none.sog", tmp_path):
        with pytest.raises(InputError):
            read_sog(path)


def test_a_lie_about_an_images_size_costs_no_memory() -> None:
    files = files_of(scene(4))
    lying = bytearray(files["sh0.webp"])
    place = lying.index(b"VP8L") + 9  # after the chunk's length and its signature byte
    bits = struct.unpack_from("<I", lying, place)[0]
    struct.pack_into("<I", lying, place, bits & ~0xFFFFFFF | 16382 << 14 | 16382)
    with pytest.raises(InputError, match=r"16383 x 16383|cannot be read"):
        read_sog(zipped(files | {"sh0.webp": bytes(lying)}))


def test_a_real_scene_is_small(shared_data: Path) -> None:
    path = shared_data / "scenes" / "fox60k.ply"
    if not path.is_file() or not native.available():
        pytest.skip(f"no {path}, or k-means would take a minute for want of the native library")
    given = read(path)
    given = given.take(torch.arange(0, len(given), 6))
    data = write_sog(given)
    assert len(data) < 17.5 * len(given)
    found = read_sog(data)
    wanted = canonical(given.take(morton_order(given.means)))
    far = {name: getattr(found, name) - getattr(wanted, name) for name in ("scales", "colors", "harmonics")}
    assert far["scales"].square().mean().sqrt() < 0.02
    assert far["colors"].square().mean().sqrt() < 0.01
    assert far["harmonics"].square().mean() < 0.4 * wanted.harmonics.square().mean()
