"""Weights as safetensors whose bytes depend on nothing but their content."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def pack_weights(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of ``state``; the same content gives the same bytes.

    The library writes the metadata in the order of a randomly seeded hash map, so its header is written again in order.
    """
    content = save({key: value.contiguous() for key, value in state.items()}, metadata=dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
