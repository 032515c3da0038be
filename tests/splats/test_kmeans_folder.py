"""Folders of k-means codes: both widths of codes, what was left unquantised, and files that mean harm."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from splat_scenes import scene

from scrimp.primitives.errors import InputError
from scrimp.splats.files import read
from scrimp.splats.kmeans_folder import read_kmeans_folder
from scrimp.splats.ply_header import header_bytes
from scrimp.splats.scene import Splats

FIELDS = {"sh": "harmonics", "dc": "colors", "scale": "scales", "rot": "quaternions"}
TITLES = {"dc": ("f_dc_0", "f_dc_1", "f_dc_2"), "scale": ("scale_0", "scale_1", "scale_2")}


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def write_folder(folder: Path, n: int, *, wide: bool, fields: tuple[str, ...] = ("sh", "dc", "scale", "rot")) -> Splats:
    """As the released writer does, codes turned to bits one by one; returns what it means."""
    given, codes = scene(n, 2), scene(5, 2, seed=1)
    centers, tensors, bits = {}, given.tensors(), ""
    for place, field in enumerate(fields):
        table = getattr(codes, FIELDS[field]).flatten(1)[: 3 + place % 3]
        labels = [(7 * row + place) % len(table) for row in range(n)]
        width = max(0, ((n if wide else len(table)) - 1).bit_length())
        bits += "".join(format(label, f"0{width}b") if width else "" for label in labels)
        centers[field] = table
        tensors[FIELDS[field]] = table[labels].reshape(getattr(given, FIELDS[field]).shape)
    bits += "0" * (-len(bits) % 8)
    (folder / "kmeans_inds.bin").write_bytes(bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)))
    torch.save(centers, folder / "kmeans_centers.pth")
    columns = dict(zip("xyz", given.means.numpy().T, strict=True)) | {"opacity": given.opacities.numpy()}
    for field in set(TITLES) - set(fields):
        columns |= dict(zip(TITLES[field], getattr(given, FIELDS[field]).numpy().T, strict=True))
    rows = np.empty(n, [(title, "<f4") for title in columns])
    for title, values in columns.items():
        rows[title] = values
    (folder / "point_cloud.ply").write_bytes(header_bytes([("vertex", rows)]) + rows.tobytes())
    (folder / "kmeans_args.npy").write_bytes(pickle.dumps(Harm()))
    return Splats(**tensors)


@pytest.mark.parametrize(("n", "wide"), [(1, False), (2, False), (9, True), (9, False), (33, True)])
def test_codes_of_either_width_are_read(n: int, wide: bool, tmp_path: Path) -> None:
    wanted = write_folder(tmp_path, n, wide=wide)
    for found in (read_kmeans_folder(tmp_path), read(tmp_path)):
        for name, values in wanted.tensors().items():
            assert torch.equal(getattr(found, name), values), name


def test_fields_that_were_not_quantised_come_from_the_ply(tmp_path: Path) -> None:
    wanted = write_folder(tmp_path, 9, wide=True, fields=("rot", "sh"))
    found = read_kmeans_folder(tmp_path)
    for name, values in wanted.tensors().items():
        assert torch.equal(getattr(found, name), values), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kmeans_inds.bin", lambda data: data[:-1]),
        ("kmeans_inds.bin", lambda data: data + b"\0"),
        ("kmeans_inds.bin", lambda data: b"\xff" * len(data)),
        ("kmeans_centers.pth", lambda data: data[:-40]),
        ("kmeans_centers.pth", lambda data: data[:200] + b"\xff" * 60 + data[260:]),
        ("kmeans_centers.pth", lambda data: pickle.dumps(Harm())),
        ("kmeans_centers.pth", lambda data: b""),
        ("point_cloud.ply", lambda data: data[:-1]),
        ("point_cloud.ply", lambda data: data.replace(b"opacity", b"opacitx")),
    ],
)
def test_damaged_files_are_refused_in_one_line(name: str, change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_folder(tmp_path, 9, wide=True)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(InputError):
        read_kmeans_folder(tmp_path)


def test_nothing_is_executed_and_nothing_blown_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, 9, wide=True)
    read_kmeans_folder(tmp_path)  # whose arguments would do harm
    hostile = [
        {"sh": Harm()},
        {"rot": torch.zeros(1).expand(10_000_000, 4)},
        {"rot": torch.zeros(4, 3)},
        {"age": torch.zeros(4, 3)},
        {"sh": torch.zeros(4, 12)},
        {"rot": torch.zeros(0, 4)},
        [torch.zeros(3)],
        {},
    ]
    for content in hostile:
        torch.save(content, tmp_path / "kmeans_centers.pth")
        with pytest.raises(InputError, match="k-means"):
            read_kmeans_folder(tmp_path)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(InputError, match=r"no .*kmeans_centers\.pth"):
        read_kmeans_folder(tmp_path / "absent")
