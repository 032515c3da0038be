"""Sets described by ``transforms.json``: instant-ngp's, nerfstudio's, and those of NeRF's synthetic scenes.

Their poses go from the camera to the world, the camera's axes as in OpenGL: x to the right, y up, z backwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.distortion import Lens, lens_of
from scrimp.splats.photos import Photo, Posed, find_file, fit_lens, image_size, rigid
from scrimp.splats.ply_header import parse_header, read_elements

_FISHEYE = "OPENCV_FISHEYE"
_MODELS = ("OPENCV", "FULL_OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", _FISHEYE)
_COEFFICIENTS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_LISTS = ("train_filenames", "val_filenames", "test_filenames")


def read_transforms(path: Path, *, images: str | None = None) -> Posed:
    """What one file states: numbers of the whole set, overruled by those of a frame.

    Held out are the photographs that nerfstudio's ``train_filenames`` leaves out, or else those of
    ``val_filenames`` and ``test_filenames``. Points are those of the .ply that ``ply_file_path`` names.

    Args:
        images: name of another folder beside the file that has the same photographs in another size, in place of
            the folder that the frames name.

    Raises:
        InputError: not such a file, a lens that is not supported, or photographs of another shape.
    """
    stated = _parse(path)
    frames = stated.get("frames")
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise InputError("frames, a list of objects", f"{path} without", "pass a transforms.json")
    photos, missing = [], []
    for frame in frames:
        values = {**stated, **frame}
        name, file = _file(values, path, images)
        if file is None:
            missing.append(name)
        else:
            photos.append(_photo(name, file, values, path))
    points, colors = _points(stated, path)
    return Posed(photos, missing, _held_out(stated, {photo.name for photo in photos}), points, colors)


def _parse(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError("a transforms.json", f"{path} ({error})", "export it again") from error
    if not isinstance(stated, dict):
        raise InputError("a transforms.json", f"{path} that holds no object", "export it again")
    return stated


def _file(values: Mapping[str, Any], path: Path, images: str | None) -> tuple[str, Path | None]:
    """A frame's name, and its file."""
    name = _text(values, "file_path", path)
    if name is None:
        raise InputError("a file_path in each frame", f"{path} with a frame without", "export it again")
    plain = PurePosixPath(name.replace("\\", "/"))
    if images is None:
        return str(plain), find_file(path.parent, str(plain))
    below = plain.parts[1:] if len(plain.parts) > 1 and not plain.is_absolute() else (plain.name,)
    return str(plain), find_file(path.parent / images, str(PurePosixPath(*below)))


def _photo(name: str, file: Path, values: Mapping[str, Any], path: Path) -> Photo:
    stated = _text(values, "mask_path", path)
    mask = None if stated is None else find_file(path.parent, stated)
    if stated is not None and mask is None:
        raise InputError(f"the mask {stated}", f"{path.parent} without", "restore it, or take mask_path out")
    return Photo(name, file, fit_lens(_lens(values, file, path), file), _motion(values, name), mask)


def _motion(values: Mapping[str, Any], name: str) -> Tensor:
    """World to camera, its axes turned to x to the right, y down, z forwards."""
    try:
        pose = torch.tensor(values.get("transform_matrix"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pose = torch.zeros(0)
    if pose.shape not in ((4, 4), (3, 4)):
        raise InputError("a transform_matrix [4, 4] in each frame", f"none for {name}", "export the poses again")
    motion = rigid((pose[:3, :3] * pose.new_tensor([1, -1, -1])).T, pose[:3, 3], name=name)
    motion[:3, 3] = -motion[:3, :3] @ motion[:3, 3]
    return motion


def _lens(values: Mapping[str, Any], file: Path, path: Path) -> Lens:
    model = _text(values, "camera_model", path) or "OPENCV"
    if model not in _MODELS:
        raise InputError(
            f"a camera_model out of {', '.join(_MODELS)}", f"{model[:40]} in {path}", "undistort them first"
        )
    fisheye = model == _FISHEYE or values.get("is_fisheye") is True
    numbers = {key: value for key in _COEFFICIENTS if (value := _number(values, key, path)) is not None}
    if model != "FULL_OPENCV" and not fisheye and any(numbers.pop(key, 0.0) for key in ("k4", "k5", "k6")):
        # Programs disagree on what they mean: a power more, or the divisor of FULL_OPENCV.
        raise InputError("k1 to k3, p1, p2 for OPENCV", f"k4, k5 or k6 in {path}", "name FULL_OPENCV if it is meant")
    width, height = _size(values, file, path)
    across, down = _focal(values, width, height, path)
    middle = {"cx": width / 2, "cy": height / 2}
    centre = {key: value for key in middle if (value := _number(values, key, path)) is not None}
    return lens_of(width, height, {**numbers, "fx": across, "fy": down, **middle, **centre}, fisheye=fisheye)


def _size(values: Mapping[str, Any], file: Path, path: Path) -> tuple[int, int]:
    stated = [_number(values, key, path) for key in ("w", "h")]
    if None in stated:
        return image_size(file)
    width, height = (round(side) for side in stated if side is not None)
    return width, height


def _focal(values: Mapping[str, Any], width: int, height: int, path: Path) -> tuple[float, float]:
    """In pixels, or from the angle of view in radians; one of the two axes may go without."""
    found = []
    for key, angle, side in (("fl_x", "camera_angle_x", width), ("fl_y", "camera_angle_y", height)):
        focal, view = _number(values, key, path), _number(values, angle, path)
        if focal is None and view is not None and 0 < view < math.pi:
            focal = 0.5 * side / math.tan(0.5 * view)
        found.append(focal)
    across, down = found
    both = (across if across is not None else down, down if down is not None else across)
    if both[0] is None or both[1] is None:
        raise InputError("fl_x or camera_angle_x", f"{path} without", "export it again")
    return both[0], both[1]


def _text(values: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"text for {key}", f"{str(value)[:40]} in {path}", "export it again")
    return value


def _number(values: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise InputError(f"a number for {key}", f"{str(value)[:40]} in {path}", "export it again")
    return float(value)


def _held_out(stated: Mapping[str, Any], names: set[str]) -> frozenset[str] | None:
    lists = [stated.get(key) for key in _LISTS]
    train, *others = [
        None if found is None else {str(PurePosixPath(str(name).replace("\\", "/"))) for name in found}
        for found in (found if isinstance(found, list) else None for found in lists)
    ]
    if train is not None:
        return frozenset(names - train)
    held_out = [found for found in others if found is not None]
    return frozenset(set().union(*held_out)) if held_out else None


def _points(stated: Mapping[str, Any], path: Path) -> tuple[Tensor | None, Tensor | None]:
    name = _text(stated, "ply_file_path", path)
    if name is None:
        return None, None
    file = find_file(path.parent, name)
    if file is None:
        raise InputError(f"the points {name}", f"{path.parent} without", "restore it, or take ply_file_path out")
    return read_points(file)


def read_points(path: Path) -> tuple[Tensor, Tensor | None]:
    """A cloud of points in a .ply file.

    Returns:
        float32 [n, 3], and uint8 [n, 3] where the file has red, green and blue (of floats, from 0 to 1).

    Raises:
        InputError: damaged, no points, or points that are not finite.
    """
    data = path.read_bytes()
    rows = read_elements(data, parse_header(data, str(path)), ["vertex"], str(path))["vertex"]
    titles = rows.dtype.names or ()
    if not {"x", "y", "z"} <= set(titles):
        raise InputError("points with x, y and z", f"{path} without", "export the points again")
    with np.errstate(over="ignore", invalid="ignore"):
        points = np.stack([rows[axis].astype(np.float32) for axis in "xyz"], 1)
    if not np.isfinite(points).all():
        raise InputError("points that are finite", f"{path} with others", "export the points again")
    if not {"red", "green", "blue"} <= set(titles):
        return torch.from_numpy(points), None
    columns = np.stack([rows[color] for color in ("red", "green", "blue")], 1)
    if columns.dtype.kind == "f":
        columns = np.nan_to_num(columns).clip(0, 1) * 255 + 0.5
    return torch.from_numpy(points), torch.from_numpy(columns.clip(0, 255).astype(np.uint8))
