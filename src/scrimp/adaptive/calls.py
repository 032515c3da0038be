"""One call of a model's attention, and how it runs on dense, masked and packed tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.adaptive.stream import Plan, Stream
from scrimp.primitives.errors import InputError

SDPA: Callable[..., Tensor] = functional.scaled_dot_product_attention


class Call(NamedTuple):
    """The arguments of ``torch.nn.functional.scaled_dot_product_attention``, in its order.

    Query, key and value are [images or 1, heads, rows, dim]; a mask is over the tokens of the original sequence.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def checked(self) -> Call:
        """The call with its mask as numbers to add, [images or 1, heads or 1, rows, keys].

        Raises:
            InputError: causal attention, or grouped heads.
        """
        if self.is_causal or self.enable_gqa:
            saw = "causal attention" if self.is_causal else "grouped query heads"
            raise InputError("attention of all tokens to all", saw, "this model cannot lose tokens; restore_ it")
        mask = self.attn_mask
        if mask is None:
            return self
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=self.query.dtype).masked_fill_(~mask, -torch.inf)
        return self._replace(attn_mask=mask[(None,) * (4 - mask.ndim)])

    def run(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """torch's attention with this call's other arguments."""
        return SDPA(query, key, value, attn_mask=bias, dropout_p=self.dropout_p, scale=self.scale)


def attend(call: Call, stream: Stream, plan: Plan | None) -> Tensor:
    """The call's output in the rows of its query; those that do not go on by ``plan`` may be anything."""
    if stream.layout == "masked" or (stream.layout == "dense" and (plan is None or plan.stream.layout == "dense")):
        return _batched(call, stream, plan)
    if plan is None and stream.uniform and stream.width and call.attn_mask is None:
        query, key, value = (_unpacked(tensor, stream.images) for tensor in call[:3])
        out = call.run(query, key, value, None)
        return out.transpose(1, 2).reshape(1, -1, out.shape[1], out.shape[3]).transpose(1, 2)
    plain = call.attn_mask is None and stream.sizes is None
    return (_nested if plain and call.query.device.type != "cpu" else _by_image)(call, stream, plan)


def settled(shape: torch.Size, sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments to reshape a tensor without rows: a -1 that torch cannot tell there is what it would be for one row."""
    wanted = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
    if -1 not in wanted or 0 not in wanted:
        return tuple(wanted)
    known = math.prod(size or 1 for size in wanted if size != -1)
    return tuple(math.prod(size or 1 for size in shape) // known if size == -1 else size for size in wanted)


def _batched(call: Call, stream: Stream, plan: Plan | None) -> Tensor:
    bias = bias_of(call, stream)
    if plan is None or plan.rows is None:
        return call.run(call.query, call.key, call.value, bias)
    start = torch.arange(stream.images, device=plan.rows.device)[:, None] * stream.width
    index = plan.rows.view(stream.images, -1) - start
    rows = index[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[3])
    if bias is not None and bias.shape[2] > 1:
        bias = bias.expand(stream.images, -1, -1, -1)
        bias = bias.gather(2, index[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
    out = call.run(call.query.gather(2, rows), call.key, call.value, bias)
    index = index[:, :, None, None].expand(-1, -1, out.shape[1], out.shape[3])
    full = out.new_zeros(stream.images, stream.width, out.shape[1], out.shape[3])
    return full.scatter(1, index, out.transpose(1, 2)).transpose(1, 2)


def _unpacked(tensor: Tensor, images: int) -> Tensor:
    """[images, heads, rows, dim] of the packed rows of images of one length."""
    return tensor[0].unflatten(1, (images, -1)).transpose(0, 1)


def _by_image(call: Call, stream: Stream, plan: Plan | None) -> Tensor:
    """Image after image: no row is padded. Written by rows, the order in which the model goes on to read."""
    batch, heads, rows, _ = call.query.shape
    make = call.value.new_zeros if torch.is_grad_enabled() else call.value.new_empty  # what is never read has gradients
    full = make(batch, rows, heads, call.value.shape[3])
    kept = None if plan is None else plan.by_image(stream)
    for image in range(stream.images):
        query, key, value = (piece(tensor, stream, image) for tensor in call[:3])
        if not key.shape[2]:
            continue
        bias = bias_of(call, stream, image)
        if kept is not None:
            query = query.index_select(2, kept[image])
            bias = bias if bias is None or bias.shape[2] == 1 else bias.index_select(2, kept[image])
        out = call.run(query, key, value, bias)[0].transpose(0, 1)
        into = full[image] if stream.layout == "dense" else full[0].narrow(0, stream.starts[image], len(key[0, 0]))
        if kept is None:
            into.copy_(out)
        else:
            into.index_copy_(0, kept[image], out.to(into.dtype))
    return full.transpose(1, 2)


def _nested(call: Call, stream: Stream, plan: Plan | None) -> Tensor:
    """All images in one call of torch's attention on nested tensors; what `_by_image` gives, without a loop."""
    batch, heads, rows, _ = call.query.shape
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in call[:3])
    lengths = (stream.width,) * stream.images if stream.lengths is None else stream.lengths
    chosen, asked = (None, lengths) if plan is None else (plan.rows, plan.stream.lengths or ())
    if chosen is not None:
        query = query.index_select(0, chosen)
    nested = call.run(_jagged(query, asked), _jagged(key, lengths), _jagged(value, lengths), None)
    out: Tensor = nested.transpose(1, 2).values()
    if chosen is not None:
        full = call.value.new_zeros(batch * rows, heads, out.shape[2])
        out = full.index_copy(0, chosen, out.to(full.dtype))
    return out.view(batch, rows, heads, -1).transpose(1, 2)


def _jagged(tensor: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Rows [sum(lengths), heads, dim] as a nested tensor, heads first; its lengths are not asked of the device."""
    offsets = torch.tensor([0, *accumulate(lengths)], device=tensor.device)
    ends: dict[str, Any] = {"min_seqlen": min(lengths), "max_seqlen": max(lengths)}
    nested: Tensor = torch.nested.nested_tensor_from_jagged(tensor.contiguous(), offsets, **ends)
    return nested.transpose(1, 2)


def piece(tensor: Tensor, stream: Stream, image: int) -> Tensor:
    """Rows of one image, [1, heads, rows, dim], a view."""
    if stream.lengths is None:
        return tensor[image : image + 1]
    return tensor.narrow(2, stream.starts[image], stream.lengths[image])


def bias_of(call: Call, stream: Stream, image: int | None = None) -> Tensor | None:
    """What is added to the logits, of all images or of one: the model's own bias, the merged tokens', the mask's."""
    bias = call.attn_mask
    if bias is not None and stream.positions is not None:
        bias = _moved(bias, stream, image)
    elif bias is not None and image is not None and bias.shape[0] > 1:
        bias = bias[image : image + 1]
    if stream.sizes is not None:  # proportional attention, Bolya et al. 2023, section 3
        weights = stream.sizes.log()[:, None, None].to(call.query.dtype)
        weights = weights if image is None else weights[image : image + 1]
        bias = weights if bias is None else bias + weights
    if stream.alive is not None:
        dead = torch.zeros_like(stream.alive, dtype=call.query.dtype).masked_fill_(~stream.alive, -torch.inf)
        bias = dead[:, None, None] if bias is None else bias + dead[:, None, None]
    return bias


def _moved(bias: Tensor, stream: Stream, image: int | None) -> Tensor:
    """A bias by place, [1, heads or 1, tokens or 1, tokens], for rows that are at other places by now."""
    assert stream.positions is not None
    if bias.shape[0] > 1:
        raise InputError("an attention bias shared by all images", f"shape {list(bias.shape)}", "pass no mask")
    if image is None:
        places = stream.positions
    elif stream.lengths is not None:
        places = stream.positions.narrow(0, stream.starts[image], stream.lengths[image])[None]
    else:
        places = stream.positions[image : image + 1]
    if bias.shape[2] == 1:
        return bias[0, :, 0][:, places].transpose(0, 1)[:, :, None]
    return bias[0][:, places[:, :, None], places[:, None, :]].transpose(0, 1)


def received(call: Call, stream: Stream, *, by_class: bool) -> Tensor:
    """Attention each token receives, summed over heads: from the class token, or on average from all tokens.

    Returns:
        [images, width] of the padded view, float32 or wider; 0 where there is no token.
    """
    if stream.layout != "packed":
        return _weights(call, call.query, call.key, bias_of(call, stream), stream, by_class)
    parts = []
    for image in range(stream.images):
        query, key = piece(call.query, stream, image), piece(call.key, stream, image)
        parts.append(_weights(call, query, key, bias_of(call, stream, image), stream, by_class))
    return stream.padded(torch.cat(parts, 1))


def _weights(call: Call, query: Tensor, key: Tensor, bias: Tensor | None, stream: Stream, by_class: bool) -> Tensor:
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    query = query[:, :, :1] if by_class else query
    logits = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + (bias[:, :, :1] if by_class else bias)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).sum(1)
    if by_class:
        return weights[:, 0]
    if stream.alive is not None:  # rows that are gone ask nothing
        return (weights * stream.alive[:, :, None]).sum(1) / stream.alive.sum(1, keepdim=True)
    return weights.mean(1)
