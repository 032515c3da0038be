"""The .splat of antimatter15's viewer: 32 bytes a Gaussian, no header, no harmonics."""

from __future__ import annotations

import numpy as np
import torch

from scrimp.splats.activations import alphas_of, coefficients_of, logits_of, logs_of, rgb_of
from scrimp.splats.checks import refuse_bad, refuse_loss
from scrimp.splats.reading import Cursor, damaged, splats_of
from scrimp.splats.scene import Splats

_ROW = np.dtype([("mean", "<f4", 3), ("size", "<f4", 3), ("color", "u1", 4), ("quaternion", "u1", 4)])
_MOST_SCALE = 88.0  # beyond, the size is no float32


def read_splat(data: bytes | memoryview, name: str) -> Splats:
    """Read a .splat. Quaternions are as the bytes have them, not of length 1.

    Alphas of 0 and 1 and sizes of 0 are read as `scrimp.splats.activations` says.

    Raises:
        InputError: its length is no multiple of 32 bytes.
    """
    if len(data) % _ROW.itemsize:
        raise damaged(".splat", name, f"{len(data)} bytes, which is no multiple of {_ROW.itemsize}")
    rows = Cursor(data, format=".splat", name=name).array(_ROW, len(data) // _ROW.itemsize)
    units = np.arange(256) / 255
    found = {
        "means": np.array(rows["mean"], np.float32),
        "quaternions": (rows["quaternion"].astype(np.float32) - 128) / 128,
        "scales": logs_of(rows["size"]),
        "opacities": logits_of(units)[rows["color"][:, 3]],
        "colors": coefficients_of(units)[rows["color"][:, :3]],
        "harmonics": np.zeros((len(rows), 0, 3), np.float32),
    }
    return splats_of(found)


def write_splat(splats: Splats, *, lossy: bool = False) -> bytes:
    """A .splat, in the order of the scene, every field rounded to the nearest that can be stored.

    Colours are clamped to 0 to 1, alphas and colours have steps of 1/255, quaternions of 1/128.

    Args:
        lossy: leave out harmonics and extra numbers, for which the format has no place.

    Raises:
        InputError: numbers that are not finite, quaternions of length 0, or without ``lossy`` something to leave out.
    """
    refuse_loss(splats, "a .splat", degree=0, lossy=lossy)
    splats = splats.to(torch.float32)
    refuse_bad(splats, "a .splat")
    arrays = {field: values.detach().cpu().numpy() for field, values in splats.tensors().items()}
    rows = np.empty(len(splats), _ROW)
    rows["mean"] = arrays["means"]
    rows["size"] = np.exp(arrays["scales"].clip(None, _MOST_SCALE))
    colors = np.column_stack([rgb_of(arrays["colors"]), alphas_of(arrays["opacities"])])
    rows["color"] = np.rint(colors.clip(0, 1) * 255)
    units = arrays["quaternions"].astype(np.float64)
    units /= np.sqrt((units * units).sum(1, keepdims=True))
    # A byte holds -1 but not 1, and both signs are the same rotation.
    largest = np.take_along_axis(units, np.abs(units).argmax(1)[:, None], 1)
    rows["quaternion"] = np.rint(np.where(largest > 0, -units, units) * 128 + 128)
    return rows.tobytes()
