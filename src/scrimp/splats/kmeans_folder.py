"""The folder that CompGS writes (Navaneet et al. 2024, arXiv 2311.18159; github.com/UCDvision/compact3d), read.

- ``point_cloud.ply``: what was not quantised, positions and opacities at least;
- ``kmeans_centers.pth``: codebooks by field (scale, rot, dc, sh), in the order in which they were quantised;
- ``kmeans_inds.bin``: bits, the highest first: all codes of the first field, then of the next;
- ``kmeans_args.npy``: a pickle that only repeats what the others tell, so it is never opened.

The released writer gives every code ceil(log2(Gaussians)) bits, however few codes there are. Codes of
ceil(log2(codebook)) bits, which its papers count, are read too: the file's size tells which it is.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.splats.ply_header import parse_header, read_elements
from scrimp.splats.reading import damaged
from scrimp.splats.scene import COUNTS, Splats

_FORMAT = "k-means"
_WIDTHS = {"scale": 3, "rot": 4, "dc": 3}
_COLUMNS = {"scale": "scale_{}", "rot": "rot_{}", "dc": "f_dc_{}"}
_BLOCK = 1 << 18


def read_kmeans_folder(path: str | os.PathLike[str]) -> Splats:
    """Read such a folder without unpickling anything but tensors.

    Args:
        path: the folder that holds the files, such as ``point_cloud/iteration_30000``.

    Returns:
        Float32. Codes replaced by their centres.

    Raises:
        InputError: a file is absent or damaged, or they do not belong together.
    """
    folder = Path(path)
    name = str(folder)
    codebooks = _codebooks(_content(folder / "kmeans_centers.pth"), name)
    rows = _rows(_content(folder / "point_cloud.ply"), name)
    codes = _codes(_content(folder / "kmeans_inds.bin"), len(rows), codebooks, name)
    fields = {field: codebook[codes[field]] for field, codebook in codebooks.items()}
    for field in [field for field in _WIDTHS if field not in fields]:
        fields[field] = _columns(rows, [_COLUMNS[field].format(i) for i in range(_WIDTHS[field])], name)
    rest = fields.get("sh")
    return Splats(
        means=_columns(rows, ["x", "y", "z"], name),
        quaternions=fields["rot"],
        scales=fields["scale"],
        opacities=_columns(rows, ["opacity"], name)[:, 0],
        colors=fields["dc"],
        harmonics=_plain_rest(rows, name) if rest is None else rest.unflatten(1, (-1, 3)),
    )


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError("a folder of k-means codes", f"no {path}", "check the path")
    return path.read_bytes()


def _rows(data: bytes, name: str) -> np.ndarray:
    return read_elements(data, parse_header(data, name), ["vertex"], name)["vertex"]


def _codebooks(data: bytes, name: str) -> dict[str, Tensor]:
    """By field, in the order of the file: [codes, width] float32."""
    found = _tensors(data, name)
    if not isinstance(found, Mapping) or not found:
        raise damaged(_FORMAT, name, "no codebooks in kmeans_centers.pth")
    for field, values in found.items():
        width = _WIDTHS.get(field)
        good = isinstance(values, Tensor) and values.ndim == 2 and values.is_floating_point()
        # A few bytes can describe a tensor of any size by repeating one number.
        if not good or values.numel() * values.element_size() > len(data) or not len(values):
            raise damaged(_FORMAT, name, f"a codebook {str(field)[:20]!r} that is no table of numbers")
        known = field == "sh" and values.shape[1] in [3 * count for count in COUNTS]
        if not known and values.shape[1] != width:
            raise damaged(_FORMAT, name, f"a codebook {str(field)[:20]!r} of {values.shape[1]} columns")
    return {field: values.float().contiguous() for field, values in found.items()}


def _tensors(data: bytes, name: str) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > len(data):  # torch stores; what grows when read is none of its files
            raise damaged(_FORMAT, name, f"kmeans_centers.pth of {len(data)} bytes that claims {size}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch and zipfile raise errors of many kinds on damaged archives
        raise damaged(_FORMAT, name, f"kmeans_centers.pth cannot be read ({type(error).__name__})") from error


def _codes(data: bytes, count: int, codebooks: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """[count] int64 by field."""
    wide = [_bits(count)] * len(codebooks)
    narrow = [_bits(len(codebook)) for codebook in codebooks.values()]
    fitting = [widths for widths in (wide, narrow) if len(data) == -(-count * sum(widths) // 8)]
    if not fitting:
        got = f"{len(data)} bytes of codes for {count} Gaussians and codebooks of {[*map(len, codebooks.values())]}"
        raise damaged(_FORMAT, name, got)
    start, found = 0, {}
    for (field, codebook), width in zip(codebooks.items(), fitting[0], strict=True):
        values = _unpack(data, start, count, width)
        if count and int(values.max()) >= len(codebook):
            raise damaged(_FORMAT, name, f"code {int(values.max())} of {field}, which has {len(codebook)}")
        found[field], start = torch.from_numpy(values), start + count * width
    return found


def _bits(count: int) -> int:
    """ceil(log2(count)), 0 for one or none."""
    return max(0, count - 1).bit_length()


def _unpack(data: bytes, start: int, count: int, width: int) -> np.ndarray:
    """``count`` whole numbers of ``width`` bits from bit ``start`` on, the highest bit first."""
    found = np.zeros(count, np.int64)
    for row in range(0, count if width else 0, _BLOCK):
        size = min(_BLOCK, count - row)
        first = start + row * width
        piece = np.frombuffer(data, np.uint8)[first // 8 : -(-(first + size * width) // 8)]
        bits = np.unpackbits(piece)[first % 8 :][: size * width].reshape(size, width)
        for column in range(width):
            found[row : row + size] = found[row : row + size] * 2 + bits[:, column]
    return found


def _columns(rows: np.ndarray, titles: list[str], name: str) -> Tensor:
    missing = [title for title in titles if title not in (rows.dtype.names or ())]
    if missing:
        raise damaged(_FORMAT, name, f"neither a codebook nor point_cloud.ply with {', '.join(missing[:4])}")
    return torch.from_numpy(np.stack([rows[title].astype(np.float32) for title in titles], 1))


def _plain_rest(rows: np.ndarray, name: str) -> Tensor:
    """[n, k, 3] of harmonics that were not quantised; files go by channel, all of red first."""
    count = sum(title.startswith("f_rest_") for title in rows.dtype.names or ())
    if count % 3 or count // 3 not in COUNTS:
        raise damaged(_FORMAT, name, f"{count} properties f_rest, which make no whole degree of harmonics")
    if not count:
        return torch.zeros(len(rows), 0, 3)
    flat = _columns(rows, [f"f_rest_{i}" for i in range(count)], name)
    return flat.unflatten(1, (3, -1)).transpose(1, 2).contiguous()
