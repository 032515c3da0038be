"""Sparse models of COLMAP (Schönberger and Frahm 2016), binary or text; see "Output Format" in its documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.distortion import Lens, lens_of
from scrimp.splats.photos import Photo, Posed, find_file, fit_lens, rigid
from scrimp.splats.reading import Cursor, damaged

# In the order of COLMAP's numbers; None: known by name, not supported.
_MODELS: dict[str, str | None] = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
    "OPENCV_FISHEYE": "fx fy cx cy k1 k2 k3 k4",
    "FULL_OPENCV": "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    "FOV": None,
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
    "THIN_PRISM_FISHEYE": None,
    "RAD_TAN_THIN_PRISM_FISHEYE": None,
}
_CAMERA = np.dtype([("id", "<u4"), ("model", "<i4"), ("width", "<u8"), ("height", "<u8")])
_IMAGE = np.dtype([("id", "<u4"), ("pose", "<f8", 7), ("camera", "<u4")])
_POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")])
_KEYPOINT_BYTES, _TRACK_BYTES = 24, 8
_LONGEST_NAME = 4096
_FOLDERS = ("images", "images_2", "images_4", "images_8")


class _Image(NamedTuple):
    name: str
    pose: list[float]  # quaternion w x y z, then shift: from world to camera
    camera: int


def find_model(path: Path, folders: tuple[str, ...]) -> Path | None:
    """The first of these folders below a path that holds a sparse model."""
    for folder in (path / name for name in folders):
        if _ending(folder) is not None:
            return folder
    return None


def read_colmap(model: Path, root: Path, *, images: str | None = None) -> Posed:
    """Cameras, poses and points of a sparse model, and the photographs it was made of.

    Masks are taken from ``masks`` beside the photographs' folder: the photograph's name with ``.png`` added, as COLMAP
    has them, or any image of the photograph's name.

    Args:
        model: folder with ``cameras``, ``images`` and mostly ``points3D``, each ``.bin`` or ``.txt``.
        root: folder of the photographs' folder.
        images: name of that; by default the first there is of ``images``, ``images_2``, ``images_4``, ``images_8``.

    Raises:
        InputError: a damaged file, a lens that is not supported, no such folder, or photographs of another shape.
    """
    ending = _ending(model)
    if ending is None:
        raise InputError("cameras and images, .bin or .txt", f"{model} without", "pass a sparse model of COLMAP")
    cameras, stated, points = _BINARY if ending == ".bin" else _TEXT
    lenses = dict(cameras(model / f"cameras{ending}"))
    folder = _image_folder(root, images)
    photos, missing = [], []
    for image in stated(model / f"images{ending}"):
        file = find_file(folder, image.name)
        if file is None:
            missing.append(image.name)
        else:
            photos.append(_photo(image, lenses, file, root / "masks"))
    cloud = model / f"points3D{ending}"
    where, colors = points(cloud) if cloud.is_file() else (None, None)
    return Posed(photos, missing, None, where, colors)


def _ending(folder: Path) -> str | None:
    for ending in (".bin", ".txt"):
        if all((folder / f"{name}{ending}").is_file() for name in ("cameras", "images")):
            return ending
    return None


def _image_folder(root: Path, images: str | None) -> Path:
    for name in _FOLDERS if images is None else (images,):
        if (root / name).is_dir():
            return root / name
    wanted = "a folder of photographs" if images is None else f"the folder {images}"
    raise InputError(wanted, f"{root} without", "pass images, the name of the folder that holds them")


def _photo(image: _Image, lenses: dict[int, Lens], file: Path, masks: Path) -> Photo:
    if image.camera not in lenses:
        got = f"camera {image.camera} of {image.name}, which is not among them"
        raise InputError("images taken by the model's cameras", got, "export the model again")
    w, x, y, z, *shift = image.pose
    motion = rigid(_rotation(w, x, y, z), torch.tensor(shift, dtype=torch.float64), name=image.name)
    return Photo(image.name, file, fit_lens(lenses[image.camera], file), motion, find_file(masks, image.name))


def _rotation(w: float, x: float, y: float, z: float) -> Tensor:
    """[3, 3] float64 of a quaternion of any length; NaN of one without."""
    square = w * w + x * x + y * y + z * z
    double = torch.tensor([w, x, y, z], dtype=torch.float64)
    pairs = 2 * double[:, None] * double / square
    (_, wx, wy, wz), (_, xx, xy, xz), (_, _, yy, yz), (_, _, _, zz) = pairs.tolist()
    rows = [[1 - yy - zz, xy - wz, xz + wy], [xy + wz, 1 - xx - zz, yz - wx], [xz - wy, yz + wx, 1 - xx - yy]]
    return torch.tensor(rows, dtype=torch.float64)


def _lens(model: str, width: int, height: int, numbers: list[float]) -> Lens:
    names = (_MODELS.get(model) or "").split()
    if not names:
        able = ", ".join(name for name, known in _MODELS.items() if known)
        raise InputError(f"a camera model out of {able}", model[:40], "undistort the photographs by COLMAP")
    if len(numbers) != len(names):
        raise InputError(f"{len(names)} numbers for a {model} camera", f"{len(numbers)}", "export the model again")
    return lens_of(width, height, dict(zip(names, numbers, strict=True)), fisheye="FISHEYE" in model)


def _cursor(path: Path) -> Cursor:
    return Cursor(path.read_bytes(), format="COLMAP", name=str(path))


def _binary_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    cursor, known = _cursor(path), list(_MODELS)
    for _ in range(cursor.number("<u8")):
        number, model, width, height = cursor.array(_CAMERA, 1)[0].item()
        name = known[model] if 0 <= model < len(known) else f"model number {model}"
        count = len((_MODELS.get(name) or "").split())
        yield number, _lens(name, width, height, cursor.array("<f8", count).tolist())


def _binary_images(path: Path) -> Iterator[_Image]:
    cursor = _cursor(path)
    for _ in range(cursor.number("<u8")):
        row = cursor.array(_IMAGE, 1)[0]
        name = _name(cursor)
        cursor.take(cursor.number("<u8") * _KEYPOINT_BYTES)
        yield _Image(name, row["pose"].tolist(), int(row["camera"]))


def _name(cursor: Cursor) -> str:
    """Bytes up to the next 0."""
    start = cursor.offset
    head = bytes(cursor.take(min(_LONGEST_NAME, cursor.left))).partition(b"\0")
    if not head[1]:
        raise cursor.wrong(f"a name without end at offset {start}")
    cursor.offset = start + len(head[0]) + 1
    try:
        return head[0].decode()
    except UnicodeDecodeError as error:
        raise cursor.wrong(f"a name at offset {start} that is no text") from error


def _binary_points(path: Path) -> tuple[Tensor, Tensor]:
    data = path.read_bytes()
    cursor = Cursor(data, format="COLMAP", name=str(path))
    count, size = cursor.number("<u8"), _POINT.itemsize
    rows, offset, view = bytearray(), cursor.offset, memoryview(data)
    for row in range(count):
        end = offset + size
        rows += view[offset:end]
        offset = end + _TRACK_BYTES * int.from_bytes(view[end - 8 : end], "little")
        if offset > len(data):
            raise cursor.wrong(f"{len(data)} bytes, which end within point {row} of {count}")
    found = np.frombuffer(rows, _POINT)
    return _cloud(found["xyz"], found["rgb"], path)


def _cloud(xyz: np.ndarray, rgb: np.ndarray, path: Path) -> tuple[Tensor, Tensor]:
    with np.errstate(over="ignore", invalid="ignore"):
        points, colors = xyz.astype(np.float32), rgb.astype(np.uint8)
    if not np.isfinite(points).all() or not np.array_equal(colors, rgb):
        raise damaged("COLMAP", str(path), "points that are not finite, or colours beyond 0 to 255")
    return torch.from_numpy(points), torch.from_numpy(colors)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, comments left out."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if not line.startswith("#"))
    except UnicodeDecodeError as error:
        raise damaged("COLMAP", str(path), "bytes that are no text") from error


def _numbers(words: list[str], count: int, path: Path, line: int) -> list[float]:
    try:
        numbers = [float(word) for word in words[:count]]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise damaged("COLMAP", str(path), f"line {line}, where {count} numbers were to be")
    return numbers


def _whole(value: float, path: Path, line: int) -> int:
    if not 0 <= value < 2**53 or value != int(value):
        raise damaged("COLMAP", str(path), f"line {line} with {value} for a whole number")
    return int(value)


def _text_cameras(path: Path) -> Iterator[tuple[int, Lens]]:
    for line, text in _lines(path):
        words = text.split()
        if not words:
            continue
        model = words.pop(1) if len(words) > 1 else ""
        number, width, height = (_whole(value, path, line) for value in _numbers(words, 3, path, line))
        yield number, _lens(model, width, height, _numbers(words[3:], len(words) - 3, path, line))


def _text_images(path: Path) -> Iterator[_Image]:
    lines = _lines(path)
    for line, text in lines:
        words = text.split(maxsplit=9)
        if not words:
            continue
        if len(words) < 10:
            raise damaged("COLMAP", str(path), f"line {line}, which is no image's")
        pose, camera = _numbers(words[1:], 7, path, line), _numbers(words[8:], 1, path, line)
        yield _Image(words[9].strip(), pose, _whole(camera[0], path, line))
        next(lines, None)  # its key points, of which there may be none: an empty line


def _text_points(path: Path) -> tuple[Tensor, Tensor]:
    rows = [
        _numbers(words[1:], 6, path, line)
        for line, words in ((line, text.split(maxsplit=7)) for line, text in _lines(path))
        if words
    ]
    values = np.array(rows, np.float64).reshape(-1, 6)
    return _cloud(values[:, :3], values[:, 3:], path)


_Readers = tuple[
    Callable[[Path], Iterator[tuple[int, Lens]]],
    Callable[[Path], Iterator[_Image]],
    Callable[[Path], tuple[Tensor, Tensor]],
]
_BINARY: _Readers = (_binary_cameras, _binary_images, _binary_points)
_TEXT: _Readers = (_text_cameras, _text_images, _text_points)
