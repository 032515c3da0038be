"""Whether two models have the same weights, by a few entries of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_SAMPLES = 64  # entries of a tensor that are looked at
_NAN = 0x7FC0  # devices differ in which of the many they give


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """16 hexadecimal digits over names, shapes and values of a model's weights, in whatever order they come.

    SHA-256 over up to 64 evenly spaced entries of each tensor, rounded to bfloat16: a float32 or float64 model and its
    bfloat16 copy agree, on any device and in any memory layout; a float16 copy agrees where rounding twice makes no
    difference. A change too small for bfloat16 at every place that is looked at is not seen.

    Args:
        tensors: names and weights, such as ``model.named_parameters()``.

    Returns:
        The digits, or ``None`` for unknown: a tensor is quantised (integers, 8-bit floats, a packed kind of its own),
        sharded, sparse, or on the meta device.
    """
    digest = hashlib.sha256(b"scrimp-weights-1")
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        if not _plain(tensor):
            return None
        header = json.dumps([name, list(tensor.shape)]).encode()
        digest.update(len(header).to_bytes(8, "little") + header + _sampled(tensor.detach()))
    return digest.hexdigest()[:16]


def _plain(tensor: Tensor) -> bool:
    """Ordinary floating numbers that can be read here."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return ordinary and tensor.is_floating_point() and tensor.itemsize > 1 and tensor.device.type != "meta"


def _sampled(tensor: Tensor) -> bytes:
    """bfloat16 patterns of the entries looked at, little-endian. Only these leave the device."""
    count = tensor.numel()
    taken = min(count, _SAMPLES)
    places = torch.arange(taken) * (count - 1) // max(taken - 1, 1)
    # By coordinates: flattening a transposed or channels-last weight would copy all of it.
    found = tensor[torch.unravel_index(places, tensor.shape)] if tensor.ndim else tensor.reshape(1)
    rounded = found.cpu().float().bfloat16()
    patterns = torch.where(rounded.isnan(), _NAN, rounded.view(torch.int16)).tolist()
    return b"".join((pattern & 0xFFFF).to_bytes(2, "little") for pattern in patterns)
