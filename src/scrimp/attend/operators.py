"""What the family's operators share: the rule under vmap, and gradients given back as the inputs came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def over_batch(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule: the mapped dimension joins the batch, in which every sample is on its own."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        joined = [
            _join(value, dim, size) if isinstance(value, Tensor) else value
            for value, dim in zip(args, in_dims, strict=True)
        ]
        outputs = op(*joined)
        return tuple(part.unflatten(0, (size, -1)) for part in outputs), (0,) * len(outputs)

    return rule


def _join(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    first = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return first.flatten(0, 1)


def as_inputs(grads: Iterable[Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of every head as those of query, key and value: summed over the heads that share a key head, cast.

    Columns beyond the input's, which fill registers, are left out.
    """
    made = []
    for grad, like in zip(grads, inputs, strict=True):
        grad = cut(grad, like.shape[3])
        if grad.shape[1] != like.shape[1]:
            grad = grad.unflatten(1, (like.shape[1], -1)).sum(2)
        made.append(grad.to(like.dtype))
    return made[0], made[1], made[2]


def fake_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients without numbers, for tracing."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def cut(tensor: Tensor, columns: int) -> Tensor:
    """The first ``columns`` of the last dimension, in one piece."""
    return tensor if tensor.shape[-1] == columns else tensor[..., :columns].contiguous()
