"""The .ply of 3DGS (Kerbl et al. 2023): one row of plain numbers a Gaussian."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from scrimp.primitives.errors import InputError
from scrimp.splats.ply_header import NAMES, Element, header_bytes, parse_header, read_elements
from scrimp.splats.reading import damaged
from scrimp.splats.scene import COUNTS, Splats

_BLOCK = 1024
_NORMALS = ("nx", "ny", "nz")
_FIELDS = {
    "means": ("x", "y", "z"),
    "colors": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacities": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quaternions": ("rot_0", "rot_1", "rot_2", "rot_3"),
}
_REST = re.compile(r"f_rest_\d+")
_OWN = {*_NORMALS, *(name for names in _FIELDS.values() for name in names)}


def read_ply(data: bytes | memoryview, name: str) -> Splats:
    """Read a 3DGS .ply: binary of either byte order or text, properties in any order, harmonics of degree 0 to 4.

    Numbers are as the file has them: quaternions of any length, NaN where there is NaN. Normals are dropped; further
    properties of numbers go to `Splats.extra` in their own types. Other elements are skipped.

    Args:
        data: the whole file.
        name: of the file, for errors.

    Returns:
        Tensors of float32; of float64 where one of the file's own is double.

    Raises:
        InputError: damaged, truncated, or no scene of Gaussians.
    """
    header = parse_header(data, name)
    element = header.find("vertex")
    if element is None:
        raise damaged(".ply", name, "no element 'vertex' in its header")
    layout = _layout(element, name)
    rows = read_elements(data, header, ["vertex"], name)["vertex"]
    own = [title for places in layout.values() for title in places]
    dtype = np.float64 if any(rows.dtype[title].itemsize == 8 for title in own) else np.float32
    found = {field: np.empty((len(rows), len(places)), dtype) for field, places in layout.items()}
    others = [title for title in element.names if title not in own and title not in _NORMALS]
    extra = {title: np.empty(len(rows), rows.dtype[title].newbyteorder("=")) for title in others}
    for part in blocks(len(rows)):
        for field, places in layout.items():
            for column, title in enumerate(places):
                found[field][part, column] = rows[title][part]
        for title, values in extra.items():
            values[part] = rows[title][part]
    tensors = {field: torch.from_numpy(values) for field, values in found.items()}
    return Splats(
        **tensors | {"opacities": tensors["opacities"][:, 0], "harmonics": tensors["harmonics"].unflatten(1, (-1, 3))},
        extra=MappingProxyType({title: torch.from_numpy(values) for title, values in extra.items()}),
    )


def write_ply(splats: Splats, *, normals: bool = False) -> bytes:
    """A 3DGS .ply, binary little-endian, every number as it is.

    Args:
        normals: with nx, ny, nz of 0, which some older programs ask for.

    Raises:
        InputError: numbers of a type that .ply has not, or an extra one whose name it cannot hold.
    """
    columns = {title: values for title, values in _columns(splats) if normals or title not in _NORMALS}
    rows = np.empty(len(splats), [(title, values.dtype.newbyteorder("<")) for title, values in columns.items()])
    for part in blocks(len(rows)):
        for title, values in columns.items():
            rows[title][part] = values[part]
    return b"".join([header_bytes([("vertex", rows)]), rows.view(np.uint8).data])


def rest_names(coefficients: int) -> list[str]:
    """What files call harmonics [n, k, 3], in that order: theirs go by channel, all of red first."""
    return [f"f_rest_{channel * coefficients + k}" for k in range(coefficients) for channel in range(3)]


def count_rest(element: Element, name: str) -> int:
    """How many coefficients above degree 0 an element's f_rest properties make.

    Raises:
        InputError: they are not those of a whole degree.
    """
    found = {title for title in element.names if _REST.fullmatch(title)}
    count = len(found) // 3
    if found != set(rest_names(count)) or count not in COUNTS:
        raise damaged(".ply", name, f"{len(found)} properties f_rest, which make no whole degree of harmonics")
    return count


def _layout(element: Element, name: str) -> dict[str, list[str]]:
    """Which properties hold each tensor, column by column."""
    layout = {field: list(places) for field, places in _FIELDS.items()}
    missing = [title for places in layout.values() for title in places if title not in element.names]
    if missing:
        got = f"{name} without {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}"
        raise InputError("a .ply of Gaussian splats", got, "check that it is no mesh or plain point cloud")
    return layout | {"harmonics": rest_names(count_rest(element, name))}


def _columns(splats: Splats) -> Iterator[tuple[str, Any]]:
    """Names and numbers in the order in which 3DGS writes them."""
    arrays = {field: _array(values, field) for field, values in splats.tensors().items()}
    rest = splats.harmonics.shape[1]
    zero = np.broadcast_to(np.zeros(1, np.float32), len(splats))
    yield from zip(_FIELDS["means"], arrays["means"].T, strict=True)
    yield from ((title, zero) for title in _NORMALS)
    yield from zip(_FIELDS["colors"], arrays["colors"].T, strict=True)
    yield from ((f"f_rest_{i}", arrays["harmonics"][:, i % rest, i // rest]) for i in range(3 * rest))
    yield "opacity", arrays["opacities"]
    yield from zip(_FIELDS["scales"], arrays["scales"].T, strict=True)
    yield from zip(_FIELDS["quaternions"], arrays["quaternions"].T, strict=True)
    for title, values in splats.extra.items():
        if title in _OWN or _REST.fullmatch(title) or not re.fullmatch(r"[!-~]+", title):
            raise InputError("an extra name of plain characters that .ply does not use", repr(title), "rename it")
        yield title, _array(values, title)


def _array(values: torch.Tensor, name: str) -> np.ndarray:
    try:
        array = values.detach().cpu().numpy()
    except TypeError as error:  # bfloat16, which numpy has not
        raise _unknown(name, values.dtype) from error
    if array.dtype.str[1:] not in NAMES:
        raise _unknown(name, values.dtype)
    return array


def _unknown(name: str, dtype: torch.dtype) -> InputError:
    return InputError("numbers of a type that .ply has", f"{name} of {dtype}", "convert them with .to(torch.float32)")


def blocks(count: int) -> Iterator[slice]:
    """Slices of so many rows, few enough that all their columns stay in the cache while they are gathered."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))
