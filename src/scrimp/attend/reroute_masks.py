"""What an attention mask says, where that can be said as causal, as keys that end early, or as both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Meaning:
    """A mask in the family's words: ``causal``, and ``key_lengths`` [batch] or ``None``."""

    causal: bool = False
    key_lengths: Tensor | None = None


def read_mask(mask: Tensor, *, batch: int, queries: int, keys: int) -> Meaning | str:
    """Put a mask in words without loss, or say in a few words what it is instead.

    Args:
        mask: broadcastable to [batch, heads, queries, keys]; boolean (True takes part), or added to the scores.
    """
    while mask.dim() < 4:
        mask = mask[None]
    if mask.dim() > 4:
        return f"a mask of shape {list(mask.shape)}"
    mask = _distinct(mask)
    seen = _seen(mask)
    if isinstance(seen, str):
        return seen
    if seen.shape[1] > 1:
        if not bool((seen == seen[:, :1]).all()):
            return "a mask that differs between heads"
        seen = seen[:, :1]
    found = _read(seen[:, 0], batch=batch, queries=queries, keys=keys)
    lengths = None if isinstance(found, str) else found.key_lengths
    if mask.dtype != torch.bool and lengths is not None and bool((lengths == 0).any()) and not _infinite(mask):
        return "a sample without keys under a finite mask"  # softmax then looks at all keys alike, not at none
    return found


def _distinct(mask: Tensor) -> Tensor:
    """The mask without the copies that ``expand`` made of it along heads and queries."""
    for axis in (1, 2):
        if mask.shape[axis] > 1 and mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


def _seen(mask: Tensor) -> Tensor | str:
    """The mask as booleans, where it only ever shows or hides."""
    if mask.dtype == torch.bool:
        return mask
    if mask.requires_grad:
        return "a bias that is being trained"
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not bool((seen | hidden).all()):
        return "a bias added to the scores"
    return seen


def _infinite(mask: Tensor) -> bool:
    return bool(torch.isneginf(mask[mask != 0]).all())


def _read(seen: Tensor, *, batch: int, queries: int, keys: int) -> Meaning | str:
    """[batch or 1, queries or 1, keys or 1], True where a query sees a key."""
    if bool(seen.all()):
        return Meaning()
    seen = seen.expand(-1, -1, keys)
    any_query = seen.any(1)
    lengths = any_query.sum(-1)
    place = torch.arange(keys, device=seen.device)
    if not torch.equal(any_query, place < lengths[:, None]):
        return _holes(any_query)
    cut = None if bool((lengths == keys).all()) else lengths.expand(batch).contiguous()
    if bool((seen == any_query[:, None]).all()):
        return Meaning(key_lengths=cut)
    if seen.shape[1] == queries == keys:
        if torch.equal(seen, any_query[:, None] & (place <= place[:, None])):
            return Meaning(causal=True, key_lengths=cut)
        return "a mask that is neither causal nor padding at the end (a sliding window, blocks, a prefix, ...)"
    return f"a mask that shows {queries} queries different parts of {keys} keys"


def _holes(any_query: Tensor) -> str:
    """[batch, keys]: which keys anybody sees, when those are no leading run."""
    rising = bool((any_query[:, :-1] <= any_query[:, 1:]).all(-1).any())
    return "padding on the left" if rising else "keys hidden in the middle of the sequence"
