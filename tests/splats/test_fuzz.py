"""A corpus of damaged files for every reader: each is refused in one line, or read as no more than its bytes allow."""

from __future__ import annotations

import gzip
import io
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from splat_scenes import scene
from test_kmeans_folder import write_folder
from test_sog import files_of
from test_splat_files import ksplat

from scrimp.primitives.errors import InputError
from scrimp.splats.files import read, write

HOSTILE = [bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\xc0\x7f", b"\1\0\0\0", b"\0\0\0\1"]
WORDS = [b"-1", b"999999999999", b"1e999", b"NaN", b"null", b"[]", b"0", b'"a"', b"4294967296", b"1.5"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Cut off, one bit turned, four bytes of an extreme number, a piece doubled or left out, or a number exchanged."""
    kind, place = draw.randrange(6), draw.randrange(len(data) + 1)
    size = 1 + draw.randrange(12)
    if kind == 0:
        return data[:place]
    if kind == 1 and place < len(data):
        return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + draw.choice(HOSTILE) + data[place + 4 :]
    if kind == 3:
        return data[:place] + data[place : place + size] + data[place:]
    numbers = [found.span() for found in re.finditer(rb"-?\d+(\.\d+)?", data[:3000])]
    if kind == 4 and numbers:
        start, stop = draw.choice(numbers)
        return data[:start] + draw.choice(WORDS) + data[stop:]
    return data[:place] + data[place + size :]


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, inside in files.items():
            archive.writestr(name, inside)
    return content.getvalue()


def plain(name: str, **options: object) -> Callable[[Path, random.Random | None], Path]:
    def make(folder: Path, draw: random.Random | None) -> Path:
        if not (folder / name).exists():
            write(scene(9, 0 if name == "a.splat" else 1), folder / name, **options)
        data = (folder / name).read_bytes()
        bad = folder / f"bad_{name}"
        bad.write_bytes(mutated(data, draw) if draw else data)
        return bad

    return make


def old_level(folder: Path, draw: random.Random | None) -> Path:
    data = ksplat(1)[0]
    # Most of it is room that nothing is read from: strike where something is, half of the time.
    if draw and draw.random() < 0.5:
        place = draw.choice([*range(48), *range(4096, 4138), *range(5120, 5162)])
        data = data[:place] + draw.choice(HOSTILE) + data[place + 4 :]
    elif draw:
        data = mutated(data, draw)
    (folder / "a.ksplat").write_bytes(data)
    return folder / "a.ksplat"


def squeezed(version: int) -> Callable[[Path, random.Random | None], Path]:
    def make(folder: Path, draw: random.Random | None) -> Path:
        """Damaged before it is compressed, so that the checksum is right."""
        if not (folder / "a.spz").exists():
            write(scene(9, 1), folder / "a.spz", version=version)
        data = gzip.decompress((folder / "a.spz").read_bytes())
        head = mutated(data[:16], draw) + data[16:] if draw and draw.random() < 0.5 else data
        data = mutated(data, draw) if draw and head is data else head
        (folder / "bad.spz").write_bytes(gzip.compress(data, 1))
        return folder / "bad.spz"

    return make


def in_a_zip(folder: Path, draw: random.Random | None) -> Path:
    files = _sog(folder)
    if draw:
        name = draw.choice([*files, *["meta.json"] * 5])
        files[name] = mutated(files[name], draw)
    (folder / "bad.sog").write_bytes(zipped(files))
    return folder / "bad.sog"


def streamed(folder: Path, draw: random.Random | None) -> Path:
    files = _sog(folder)
    part = folder / "0_0"
    part.mkdir(exist_ok=True)
    for name, content in files.items():
        if not (part / name).exists():
            (part / name).write_bytes(content)
    levels = b'{"0":{"file":0,"offset":2,"count":7},"1":{"file":0,"offset":0,"count":1}}'
    tree = b'{"version":1,"lodLevels":2,"filenames":["0_0/meta.json"],"tree":{"children":[{"lods":%s}]}}' % levels
    (folder / "lod-meta.json").write_bytes(mutated(tree, draw) if draw else tree)
    return folder / "lod-meta.json"


def _sog(folder: Path) -> dict[str, bytes]:
    """Made once: k-means takes longer than all of reading it."""
    if not (folder / "whole").is_dir():
        (folder / "whole").mkdir()
        for name, content in files_of(scene(9, 1)).items():
            (folder / "whole" / name).write_bytes(content)
    return {file.name: file.read_bytes() for file in sorted((folder / "whole").iterdir())}


def codes(folder: Path, draw: random.Random | None) -> Path:
    whole, bad = folder / "whole", folder / "bad"
    if not whole.is_dir():
        whole.mkdir()
        write_folder(whole, 9, wide=True)
        bad.mkdir()
    hit = draw.choice(sorted(file.name for file in whole.iterdir() if file.suffix != ".npy")) if draw else None
    for file in whole.iterdir():
        data = file.read_bytes()
        (bad / file.name).write_bytes(mutated(data, draw) if draw and file.name == hit else data)
    return bad


CORPUS = {
    "ply": (plain("a.ply"), 200),
    "compressed ply": (plain("a.compressed.ply"), 200),
    "splat": (plain("a.splat"), 100),
    "ksplat": (old_level, 150),
    "spz 2": (squeezed(2), 150),
    "spz 3": (squeezed(3), 200),
    "spz 4": (plain("a.spz", version=4), 200),
    "sog": (in_a_zip, 100),
    "streamed sog": (streamed, 100),
    "sgs": (plain("a.sgs"), 100),
    "codes": (codes, 80),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_damaged_file_is_refused_or_read(name: str, tmp_path: Path) -> None:
    if name == "spz 4":
        pytest.importorskip("zstandard")
    make, count = CORPUS[name]
    whole = len(read(make(tmp_path, None), on_bad="keep"))
    assert whole > 0
    draw, found = random.Random(7), 0
    refused: list[str] = []
    for _ in range(count):
        path = make(tmp_path, draw)
        try:
            splats = read(path, on_bad="drop")
        except InputError as error:
            refused.append(str(error))
        else:
            found += 1
            assert len(splats) <= 3 * whole
            assert splats.finite().all()
    assert len(refused) > count // 5
    assert not [said for said in refused if "\n" in said or len(said) > 800]
    assert found or name == "sgs"  # its checksum notices everything
