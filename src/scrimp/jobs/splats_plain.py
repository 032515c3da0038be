"""What one would do without a codec: every number in half precision, field by field, deflated."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from scrimp.splats.scene import Splats

_LARGEST = 65504.0  # of float16


def pack_plain(splats: Splats) -> bytes:
    """One column after another, deflated; larger numbers than float16 has become its largest."""
    columns = [values.reshape(len(splats), -1).T for values in splats.tensors().values()]
    halves = [column.clamp(-_LARGEST, _LARGEST).half().cpu().numpy() for column in columns]
    return zlib.compress(b"".join(np.ascontiguousarray(half).tobytes() for half in halves))


def unpack_plain(data: bytes, like: Splats) -> Splats:
    """The scene of `pack_plain`, float32, with the shapes of ``like``; without its extra numbers."""
    numbers = torch.from_numpy(np.frombuffer(zlib.decompress(data), np.float16).astype(np.float32))
    found, place = {}, 0
    for name, values in like.tensors().items():
        count = values.numel()
        found[name] = numbers[place : place + count].reshape(-1, len(like)).T.reshape(values.shape)
        place += count
    return Splats(**found, extra={}, antialiased=like.antialiased)
