"""One call of torch's attention, taken apart into what a member of the family is to be called with."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from scrimp.attend.precision import under_autocast
from scrimp.attend.reroute_masks import Meaning, read_mask
from scrimp.primitives.errors import InputError

Attention = Callable[..., Tensor]


class Asked(NamedTuple):
    """The arguments of ``torch.nn.functional.scaled_dot_product_attention``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


class Refusal(Exception):
    """Something the model asked for that the function cannot honour: what was seen, and the remedy."""

    def __init__(self, saw: str, remedy: str) -> None:
        super().__init__(saw)
        self.saw, self.remedy = saw, remedy


class Target:
    """A function that takes attention's place, and which keywords it understands.

    ``**keywords`` of a wrapper stand for the family's own (causal, key_lengths, scale), not for a mask or dropout.
    """

    def __init__(self, fn: Attention) -> None:
        if not callable(fn):
            raise InputError("a function (query, key, value, ...) -> output", type(fn).__name__, "pass a function")
        self.fn = fn
        self._named, self._open = _keywords(fn)
        self._latest: tuple[Any, int, Any] | None = None

    @property
    def name(self) -> str:
        inner = self.fn
        while isinstance(inner, functools.partial):
            inner = inner.func
        return getattr(inner, "__name__", type(inner).__name__)

    def takes(self, keyword: str) -> bool:
        return keyword in self._named or (self._open and keyword in ("causal", "key_lengths", "scale"))

    def keywords(self, asked: Asked) -> dict[str, Any]:
        """What to call ``fn`` with beside query, key and value, all of four axes; only what departs from the defaults.

        Raises:
            Refusal: ``fn`` cannot honour the call.
        """
        found = {**self._masking(asked), **self._scaling(asked)}
        if asked.dropout_p > 0:
            if not self.takes("dropout_p"):
                raise Refusal(
                    f"dropout {asked.dropout_p:g}", "call model.eval(), or pass a function that takes dropout_p"
                )
            found["dropout_p"] = asked.dropout_p
        return found

    def _masking(self, asked: Asked) -> dict[str, Any]:
        queries, keys = asked.query.shape[2], asked.key.shape[2]
        if asked.attn_mask is not None and asked.is_causal:
            raise Refusal("is_causal beside a mask", "pass one of the two")
        if asked.attn_mask is not None and self.takes("attn_mask"):
            return {"attn_mask": asked.attn_mask}
        meaning = Meaning(causal=asked.is_causal) if asked.attn_mask is None else self._read(asked)
        if isinstance(meaning, str):
            raise Refusal(meaning, "leave this layer out with where=, or pass a function that takes attn_mask")
        if meaning.causal and queries != keys:
            raise Refusal(
                f"causal attention of {queries} queries over {keys} keys", "run the whole sequence at once, uncached"
            )
        found: dict[str, Any] = {}
        if meaning.causal:
            found["causal"] = self._needs("causal", "causal attention", True)
        if meaning.key_lengths is not None:
            found["key_lengths"] = self._needs("key_lengths", "padded keys", meaning.key_lengths)
        return found

    def _read(self, asked: Asked) -> Meaning | str:
        """`read_mask`, which the layers of a model mostly ask about one and the same tensor."""
        mask = asked.attn_mask
        assert mask is not None
        if mask.is_inference():  # no version to know its changes by
            return _read(mask, asked)
        if self._latest is not None and self._latest[0]() is mask and self._latest[1] == mask._version:
            return self._latest[2]
        meaning = _read(mask, asked)
        self._latest = (weakref.ref(mask), mask._version, meaning)
        return meaning

    def _scaling(self, asked: Asked) -> dict[str, Any]:
        if asked.scale is None:
            return {}
        if self.takes("scale"):
            return {"scale": asked.scale}
        # What has no softmax has no scale of its own; the usual one is then understood to be meant for softmax.
        if math.isclose(asked.scale, asked.query.shape[3] ** -0.5, rel_tol=1e-6):
            return {}
        raise Refusal(f"scores scaled by {asked.scale:g}, not by dim ** -0.5", "pass a function that takes scale")

    def _needs(self, keyword: str, saw: str, value: Any) -> Any:
        if not self.takes(keyword):
            raise Refusal(saw, f"pass a function that takes {keyword}")
        return value


def run(target: Target, asked: Asked) -> Tensor:
    """Call the target in torch's place.

    Raises:
        Refusal: it cannot honour the call.
    """
    query, key, value = under_autocast(*asked[:3])  # as torch's own attention would have it
    asked = asked._replace(query=query, key=key, value=value)
    if any(tensor.is_nested for tensor in asked[:3]):
        raise Refusal("nested tensors", "pass padded tensors and a mask")
    shape = asked.query.shape
    whole = _four_axes(asked)
    out = target.fn(whole.query, whole.key, whole.value, **target.keywords(whole))
    wanted = (*whole.query.shape[:3], whole.value.shape[3])
    if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{target.name} to return a tensor {list(wanted)}", f"{got}", "correct the function")
    return out if len(shape) == 4 else out.reshape(*shape[:-1], out.shape[-1])


def _read(mask: Tensor, asked: Asked) -> Meaning | str:
    return read_mask(mask, batch=asked.query.shape[0], queries=asked.query.shape[2], keys=asked.key.shape[2])


def _four_axes(asked: Asked) -> Asked:
    """[heads, tokens, dim] as a batch of one; key and value of a single sample as views for all samples."""
    query, key, value = asked.query, asked.key, asked.value
    if any(tensor.dim() not in (3, 4) for tensor in (query, key, value)):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        raise Refusal(f"tensors of shape {shapes}", "pass [batch, heads, tokens, dim]")
    query, key, value = (tensor[None] if tensor.dim() == 3 else tensor for tensor in (query, key, value))
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (
        tensor.expand(batch, -1, -1, -1) if tensor.shape[0] == 1 else tensor for tensor in (query, key, value)
    )
    return asked._replace(query=query, key=key, value=value)


def _keywords(fn: Attention) -> tuple[frozenset[str], bool]:
    """Names ``fn`` can be given by keyword, and whether it takes any other."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), False
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = frozenset(item.name for item in parameters if item.kind in named)
    return names, any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)
