"""`attach_` and its ways back: adapters on a model whose code and modules stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from scrimp.adapt.doors import Adapter
from scrimp.adapt.install import (
    exchange_,
    find_state,
    keep_live,
    load_values_,
    put_,
    recipe_for,
    state_of,
    switch_,
    uninstall_,
)
from scrimp.adapt.methods import Method
from scrimp.adapt.targets import Target, Where, refuse_unmergeable, tensor_of
from scrimp.primitives.errors import InputError


def attach_(
    model: nn.Module, method: Method, *, where: Where = None, also: str | None = None, name: str = "default"
) -> list[str]:
    """Adapt a model in place: its weights are frozen, the method's numbers are trained, its code stays as it is.

    The adapted modules get a child ``adapter`` and a forward hook that adds the factored delta to their output. Weights
    that are read without a call of their module (packed attention projections, some models' attention), and layers with
    a forward pass of their own, are changed as they are read. The model starts as it was. Adapters attached before are
    kept as numbers; `use_` goes back to them.

    Args:
        model: any module.
        method: what `nola`, `lora`, `bias`, `linear` or `full` gave.
        where: which weights: a regular expression searched for in module names, module types, or ``None`` for every
            Linear, convolution and transformers ``Conv1D`` but the classifier and what ``also`` takes. Of no meaning
            to `bias`, `linear` and `full`.
        also: regular expression searched for in the names of parameters that are trained in full beside, such as
            ``r"^head\\."``.
        name: of the adapter.

    Returns:
        Names of the adapted weights.

    Raises:
        InputError: nothing taken, a name used before, tied weights, a model that is sharded already. The model is then
            as it was.
    """
    if name in adapters(model):
        raise InputError("a new adapter name", f"'{name}', which is there", "pass another name, or detach_ first")
    exchange_(model, name, lambda: (recipe_for(model, method, where, also), None))
    return list(state_of(model).recipe.names)


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's adapters, the live one first; none of a model without."""
    state = find_state(model)
    if state is None:
        return ()
    live = () if state.name is None else (state.name,)
    return live + tuple(state.kept)


def use_(model: nn.Module, name: str | None) -> None:
    """Switch the model to another of its adapters, or with ``None`` to itself without any.

    Between adapters of one recipe (method, weights, seed) only numbers are copied: parameters stay the same objects,
    and compiled code stays valid. Otherwise the parts are exchanged, and an optimiser has to be made again.

    Raises:
        InputError: no adapter of this name, or one of another recipe for a model that is sharded.
    """
    state = state_of(model)
    if name == state.name:
        return
    if name is not None and name not in state.kept:
        raise InputError(f"an adapter out of: {', '.join(adapters(model))}", f"'{name}'", "correct the name")
    if name is not None and state.kept[name][0] != state.recipe:
        exchange_(model, name, lambda: state.kept[name])
        return
    keep_live(model)
    if name is None:
        put_(model, state.originals)
    else:
        load_values_(model, state.kept.pop(name)[1])
    state.name = name
    switch_(state, on=name is not None)


def detach_(model: nn.Module) -> None:
    """Take all adapters off; the model is bit for bit what it was before the first one.

    Raises:
        InputError: the model has none, or is sharded.
    """
    tuned = state_of(model).recipe.also
    uninstall_(model)
    for name in tuned:
        tensor_of(model, name).grad = None  # of numbers that are no longer there


def merge_(model: nn.Module) -> None:
    """Add the live adapter to the weights, then take all adapters off: the same outputs at no further cost.

    Each delta is computed in float32 and rounded to the weight's type once.

    Raises:
        InputError: no live adapter, or weights that cannot be added to (quantised, sharded). The model is as it was.
    """
    state = state_of(model)
    if state.name is None:
        raise InputError("a live adapter to merge", "none", "choose one with use_")
    for target, _ in state.pairs:
        refuse_unmergeable(target)
    tuned = {name: tensor_of(model, name).detach().clone() for name in state.recipe.also}
    detach_(model)
    with torch.no_grad():
        for target, adapter in state.pairs:
            _add_(target, adapter)
    put_(model, tuned)


def _add_(target: Target, adapter: Adapter) -> None:
    weight = target.weight
    wide = weight if weight.dtype == torch.float64 else weight.float()
    weight.copy_(wide + target.door.weight(adapter.delta(), weight))
