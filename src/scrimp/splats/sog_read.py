"""Scenes of PlayCanvas read: a .sog, the same unpacked in a folder, or a folder streamed by lod-meta.json."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.levels import CODES
from scrimp.splats.reading import damaged
from scrimp.splats.scene import COUNTS, Splats
from scrimp.splats.sog_fields import MOST_ENTRIES, SogFields, dequantise
from scrimp.splats.sog_images import decode_image
from scrimp.splats.sog_write import IN_A_ROW

Get = Callable[[str], bytes]
"""The content of a file beside meta.json."""
_MOST_META = 1 << 20
_MOST_FILE = 1 << 30
_A_BYTE, _SPARE = 4, 1 << 16  # Gaussians that a byte can stand for; real scenes take some 14 bytes each


def read_sog(source: str | os.PathLike[str] | bytes | memoryview, name: str | None = None) -> Splats:
    """Read a SOG, version 2.

    Args:
        source: bytes of a .sog, or the path of a .sog, of a meta.json or lod-meta.json, or of a folder that holds one.
        name: for errors; by default the path.

    Returns:
        Float32. Of a streamed scene the finest level of every part, and its surroundings.

    Raises:
        InputError: nothing there, damaged, of another version, or larger than its bytes can account for.
    """
    if isinstance(source, bytes | memoryview):
        return dequantise(_read_zip(bytes(source), name or "these bytes"))
    path = Path(source)
    if path.is_dir():
        inside = [path / title for title in ("lod-meta.json", "meta.json") if (path / title).is_file()]
        path = inside[0] if inside else path / "meta.json"
    if not path.is_file():
        raise InputError("a .sog, meta.json or lod-meta.json", f"{path}, which is absent", "check the path")
    if path.name == "lod-meta.json":
        from scrimp.splats.sog_lod import read_lod

        return read_lod(path)
    if path.suffix == ".json":
        return dequantise(read_unpacked(path, name or str(path)))
    return dequantise(_read_zip(path.read_bytes(), name or str(path)))


def read_unpacked(path: Path, name: str) -> SogFields:
    """Fields of a meta.json and the images beside it."""

    def get(title: str) -> bytes:
        place = inside(path.parent, title, name)
        try:
            if place.stat().st_size > _MOST_FILE:
                raise damaged(".sog", name, f"{title} of more than {_MOST_FILE} bytes")
            return place.read_bytes()
        except OSError as error:
            raise damaged(".sog", name, f"no file {title[:80]!r} that can be read") from error

    return read_fields(get, path.name, name)


def inside(folder: Path, title: str, name: str) -> Path:
    """The path of a file that a .json names, refused where it leads out of the folder."""
    place = PurePosixPath(title)
    if place.is_absolute() or ".." in place.parts or any(letter in title for letter in "\\:\0"):
        raise damaged(".sog", name, f"a file {title[:80]!r} outside its folder")
    return folder / place


def _read_zip(data: bytes, name: str) -> SogFields:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:

            def get(title: str) -> bytes:
                entry = archive.getinfo(title)
                if entry.file_size > _A_BYTE * len(data) + _SPARE:
                    raise damaged(".sog", name, f"{title[:80]} of {entry.file_size} bytes in {len(data)}")
                with archive.open(entry) as file:  # zipfile hands out no more than the size just checked
                    return file.read()

            return read_fields(get, "meta.json", name)
    except InputError:
        raise
    except KeyError as error:
        raise damaged(".sog", name, f"no file {str(error)[:120]}") from error
    except Exception as error:  # zipfile raises errors of seven kinds on damaged archives
        raise damaged(".sog", name, f"a .zip that cannot be read ({type(error).__name__})") from error


def read_fields(get: Get, title: str, name: str) -> SogFields:
    """Fields of a meta.json and its images."""
    meta = Meta(parse_json(get(title), name, most=_MOST_META), name)
    if meta.value.get("version") != 2:
        got = f"{name} of version {str(meta.value.get('version'))[:20]}"
        raise InputError("a SOG of version 2", got, "convert it with the program that made it")
    count, harmonics = meta.whole("count", 1 << 28), meta.value.get("shN")
    files = [title for part in ("means", "scales", "quats", "sh0") for title in meta.part(part).files(part)]
    raw = {title: get(title) for title in files}
    if count > _A_BYTE * sum(map(len, raw.values())) + _SPARE:
        raise damaged(".sog", name, f"{count} Gaussians in {sum(map(len, raw.values()))} bytes")
    low, high, scales, quats, base = (_pixels(raw[title], count, f"{name}: {title}") for title in files)
    if count and int(quats[:, 3].min()) < 252:
        raise damaged(".sog", name, "a rotation without the number of its largest component")
    palette, codebook, labels = _palette(get, meta.part("shN"), count) if harmonics else _no_palette(count)
    means = low[:, :3].astype(np.int32) | high[:, :3].astype(np.int32) << 8
    return SogFields(
        means=torch.from_numpy(means),
        lowest=meta.part("means").numbers("mins", 3),
        highest=meta.part("means").numbers("maxs", 3),
        largest=torch.from_numpy(quats[:, 3] - 252),
        rotations=torch.from_numpy(quats[:, :3].copy()),
        scales=torch.from_numpy(scales[:, :3].copy()),
        scale_codebook=meta.part("scales").codebook(),
        colors=torch.from_numpy(base[:, :3].copy()),
        color_codebook=meta.part("sh0").codebook(),
        opacities=torch.from_numpy(base[:, 3].copy()),
        palette=palette,
        palette_codebook=codebook,
        labels=labels,
        antialiased=meta.value.get("antialias") is True,
    )


def _pixels(data: bytes, count: int, name: str) -> np.ndarray:
    return decode_image(data, count, name)[0][:count]


def _no_palette(count: int) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.zeros(0, 0, 3, dtype=torch.uint8)
    return empty, torch.zeros(CODES), torch.zeros(count, dtype=torch.int32)


def _palette(get: Get, meta: Meta, count: int) -> tuple[Tensor, Tensor, Tensor]:
    entries, degree = meta.whole("count", MOST_ENTRIES), meta.whole("bands", 3)
    if degree == 0:
        return _no_palette(count)
    first, second = meta.files("shN")
    bands = COUNTS[degree]
    # A writer may claim more entries than it found, and store no more rows than those take.
    pixels, width = decode_image(get(first), 0, f"{meta.name}: {first}", most=IN_A_ROW * bands * (MOST_ENTRIES // 64))
    labels = _pixels(get(second), count, f"{meta.name}: {second}")[:, :2].astype(np.int32)
    label = labels[:, 0] | labels[:, 1] << 8
    there = min(entries, len(pixels) // bands)
    if width != IN_A_ROW * bands or (count and int(label.max()) >= there):
        raise damaged(".sog", meta.name, f"a palette of {there} entries, {width} pixels wide, that does not fit")
    table = torch.from_numpy(pixels[: there * bands, :3].reshape(there, bands, 3).copy())
    return table, meta.codebook(), torch.from_numpy(label)


class Meta:
    """Part of a meta.json: every value is asked for by its kind, and what is of another is damage."""

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise damaged(".sog", name, "its .json without the parts that it must have")
        self.value: dict[str, Any] = value
        self.name = name

    def part(self, key: str) -> Meta:
        """A part of this part."""
        return Meta(self.value.get(key), self.name)

    def whole(self, key: str, most: int) -> int:
        """A whole number from 0 to ``most``."""
        value = self.value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise damaged(".sog", self.name, f"{key} {str(value)[:20]}, where 0 to {most} is needed")
        return value

    def numbers(self, key: str, count: int) -> Tensor:
        """So many finite numbers, float64."""
        values = self.value.get(key)
        if not isinstance(values, list) or len(values) != count or not all(map(_moderate, values)):
            raise damaged(".sog", self.name, f"{key} of other than {count} finite numbers")
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    def codebook(self) -> Tensor:
        """[256] float32."""
        return self.numbers("codebook", CODES).float()

    def files(self, part: str) -> list[str]:
        """Names of this part's images, as many as it must have."""
        values, count = self.value.get("files"), 2 if part in ("means", "shN") else 1
        if not isinstance(values, list) or len(values) != count or not all(isinstance(value, str) for value in values):
            raise damaged(".sog", self.name, f"{part} without the names of its {count} files")
        return list(values)


def parse_json(data: bytes, name: str, *, most: int) -> Any:
    """JSON of at most ``most`` bytes."""
    if len(data) > most:
        raise damaged(".sog", name, f"a .json of {len(data)} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(".sog", name, "a .json that cannot be read") from error


def _moderate(value: Any) -> bool:
    """Whether it is a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -3e38 < value < 3e38
