"""Exact nearest neighbours by inner product, in pieces: no table of all pairs is ever held."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

CHUNK = 8192
"""Keys compared at a time."""
_BLOCK = 64  # keys whose largest similarity is looked at first


def nearest(
    queries: Tensor, keys: Tensor, k: int, *, allowed: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The ``k`` keys of largest inner product with each query, the largest first.

    Exact: in each piece of the keys only the ``k`` blocks of 64 whose maxima are largest are searched, and the k best
    of a piece can lie nowhere else. Memory beyond the inputs is ``n * chunk`` numbers. Nothing is normalised.

    Args:
        queries: [n, dim].
        keys: [m, dim], of the same device and type.
        k: neighbours, 1 to m.
        allowed: bool [m]; keys that may be found, all where omitted.
        chunk: keys compared at a time.

    Returns:
        Similarities [n, k], float32 or wider, and indices [n, k] (int64). Where fewer than k keys are allowed the rest
        is ``-inf`` with index 0. Among equals the order is torch.topk's, that is, unspecified.

    Raises:
        InputError: shapes that do not fit, or a ``k`` out of its range.
    """
    _check(queries, keys, k, allowed)
    wide = torch.promote_types(queries.dtype, torch.float32)
    best = torch.full((len(queries), 0), -torch.inf, dtype=wide, device=queries.device)
    found = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
    for start in range(0, len(keys), chunk):
        piece = keys[start : start + chunk]
        with torch.autocast(queries.device.type, enabled=False):  # else float32 is compared in half precision
            similar = (queries @ piece.T).to(wide)
        if allowed is not None:
            similar.masked_fill_(~allowed[start : start + chunk], -torch.inf)
        values, places = _best_of(similar, min(k, len(piece)))
        best, found = torch.cat([best, values], 1), torch.cat([found, places + start], 1)
        if start:
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            found = found.gather(1, kept)
    return best, torch.where(best == -torch.inf, 0, found)


def _best_of(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``topk`` along the rows of [n, m], by way of the maxima of blocks where that saves work."""
    rows, width = similar.shape
    blocks = width // _BLOCK
    if blocks < 4 * k:
        return similar.topk(k, dim=1)
    whole = similar[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK)
    chosen = whole.amax(2).topk(k, dim=1, sorted=False).indices
    candidates = whole.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    places = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=similar.device)).flatten(1)
    rest = torch.arange(blocks * _BLOCK, width, device=similar.device).expand(rows, -1)
    values, kept = torch.cat([candidates, similar[:, blocks * _BLOCK :]], 1).topk(k, dim=1)
    return values, torch.cat([places, rest], 1).gather(1, kept)


def _check(queries: Tensor, keys: Tensor, k: int, allowed: Tensor | None) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        got = f"{list(queries.shape)} and {list(keys.shape)}"
        raise InputError("queries [n, dim] and keys [m, dim]", got, "flatten them to the same width")
    if not 1 <= k <= len(keys):
        raise InputError(f"1 to {len(keys)} neighbours, as many as there are keys", f"{k}", "lower k or add keys")
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != keys.shape[:1]):
        got = f"{str(allowed.dtype).removeprefix('torch.')} {list(allowed.shape)}"
        raise InputError(f"allowed as bool [{len(keys)}]", got, "pass one truth value a key")
