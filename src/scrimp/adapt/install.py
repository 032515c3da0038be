"""The state of an adapted model: what is installed, what is kept, and how to change it without half-done steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scrimp.adapt.doors import Adapter, fit_, unfit_
from scrimp.adapt.methods import Method
from scrimp.adapt.targets import Target, Where, find_targets, find_tuned, named_targets, tensor_of, tensors_of
from scrimp.primitives.errors import InputError

_STATE = "_scrimp_adapters"


@dataclass(frozen=True)
class Recipe:
    """All that fixes an adapter's form: two of one recipe differ in their numbers only.

    Attributes:
        method: see `scrimp.adapt.methods.Method`.
        names: adapted weights.
        also: parameters and buffers trained in full.
    """

    method: Method
    names: tuple[str, ...]
    also: tuple[str, ...]


@dataclass
class Values:
    """The numbers of an adapter: ``factors`` flat float32 in the order of the weights, ``also`` by name."""

    factors: Tensor
    also: dict[str, Tensor]


@dataclass
class Adapters:
    """All adapters of a model: one may be live, the others are kept as numbers.

    Attributes:
        recipe: of what is installed.
        pairs: the installed adapters and their weights.
        name: of the live adapter; ``None``: the model acts without.
        originals: what the tensors trained in full were.
        trainable: which parameters required gradients.
        kept: numbers of the named adapters that are not live.
    """

    recipe: Recipe
    pairs: list[tuple[Target, Adapter]]
    originals: dict[str, Tensor]
    trainable: dict[str, bool]
    name: str | None = None
    kept: dict[str, tuple[Recipe, Values]] = field(default_factory=dict)


def find_state(model: nn.Module) -> Adapters | None:
    """The adapters of a model, if it has any."""
    return getattr(model, _STATE, None)


def state_of(model: nn.Module) -> Adapters:
    """The adapters of a model.

    Raises:
        InputError: it has none.
    """
    state = find_state(model)
    if state is None:
        raise InputError("a model with an adapter", "one without", "attach_ one first")
    return state


def recipe_for(model: nn.Module, method: Method, where: Where, also: str | None) -> Recipe:
    """What `attach_` was asked for, in names of this bare model.

    Raises:
        InputError: nothing to train, or a weight that would be adapted and trained in full at once.
    """
    tuned = find_tuned(model, method, also)
    targets = find_targets(model, where) if method.factors([(1, 1)]) else []
    inside = {id(tensor_of(model, name)) for name in tuned}
    both = [target.name for target in targets if id(target.weight) in inside]
    if both and (where is not None or len(both) == len(targets)):
        raise InputError("weights adapted or trained in full", f"{both[0]}, which is both", "narrow `where` or `also`")
    names = tuple(target.name for target in targets if target.name not in both)
    if not names and not tuned:
        raise InputError("something to train", f"method {method.name} alone", "name the head's parameters with `also`")
    return Recipe(method, names, tuned)


def exchange_(model: nn.Module, name: str, make: Callable[[], tuple[Recipe, Values | None]]) -> None:
    """Keep what is live, make another adapter and make it live; what goes wrong leaves the model as it was.

    An adapter of the installed recipe takes over its parts, so that parameters stay the same objects.

    Args:
        model: any.
        name: of the other adapter.
        make: called on the bare model; gives the recipe and the numbers, ``None`` for those of a start.

    Raises:
        InputError: the model is sharded; and what ``make`` raises.
    """
    _refuse_sharded(model)
    old = find_state(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    live = None if old is None or old.name is None else values_of(model)
    if old is not None:
        uninstall_(model)
    try:
        _make_(model, old, make)
    except BaseException:
        if find_state(model) is not None:
            uninstall_(model)
        if old is not None:
            _again_(model, old, live)
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        raise
    state = state_of(model)
    if old is not None and old.name is not None and live is not None:
        state.kept[old.name] = (old.recipe, live)
    state.kept.pop(name, None)
    state.name = name


def _make_(model: nn.Module, old: Adapters | None, make: Callable[[], tuple[Recipe, Values | None]]) -> None:
    recipe, values = make()
    if old is not None and recipe == old.recipe:
        refit_(model, old)
        switch_(old, on=True)
        load_values_(model, values or _start(old))
        return
    install_(model, recipe, {} if old is None else old.kept)
    if values is not None:
        load_values_(model, values)


def _again_(model: nn.Module, old: Adapters, live: Values | None) -> None:
    refit_(model, old)
    switch_(old, on=live is not None)
    if live is not None:
        load_values_(model, live)


def _start(state: Adapters) -> Values:
    """The numbers an adapter of the installed recipe starts with."""
    factors = state.recipe.method.factors([target.shape for target, _ in state.pairs])
    parts = [number.detach().float().flatten() for part in factors for number in part.parameters()]
    return Values(torch.cat(parts) if parts else torch.zeros(0), state.originals)


def install_(model: nn.Module, recipe: Recipe, kept: dict[str, tuple[Recipe, Values]]) -> None:
    """Put an adapter of this form on a bare model, at its start.

    Raises:
        InputError: a weight that is not there.
    """
    targets = named_targets(model, list(recipe.names))
    factors = recipe.method.factors([target.shape for target in targets])
    tensors = tensors_of(model)
    originals = {name: tensors[name].detach().clone() for name in recipe.also}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = Adapters(recipe, [], originals, trainable, kept=kept)
    setattr(model, _STATE, state)
    _freeze_(model, recipe)
    for target, part in zip(targets, factors, strict=True):
        adapter = Adapter(part, target.door)
        fit_(target.module, adapter)
        state.pairs.append((target, adapter))


def refit_(model: nn.Module, state: Adapters) -> None:
    """Put the parts of an adapter back on the bare model they were taken off."""
    setattr(model, _STATE, state)
    _freeze_(model, state.recipe)
    for target, adapter in state.pairs:
        fit_(target.module, adapter)


def _freeze_(model: nn.Module, recipe: Recipe) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in recipe.also:
        tensor = tensor_of(model, name)
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            tensor.requires_grad_(True)


def uninstall_(model: nn.Module) -> None:
    """Leave the model bare, its tensors and flags as before; parts and what is kept stay in the state.

    Raises:
        InputError: no adapter, or a model that is sharded.
    """
    state = state_of(model)
    _refuse_sharded(model)
    for target, adapter in state.pairs:
        unfit_(target.module, adapter)
    put_(model, state.originals)
    for name, trained in state.trainable.items():
        tensor_of(model, name).requires_grad_(trained)
    delattr(model, _STATE)


def keep_live(model: nn.Module) -> None:
    """Keep the live adapter's numbers under its name."""
    state = state_of(model)
    if state.name is not None:
        state.kept[state.name] = (state.recipe, values_of(model))


def numbers_of(state: Adapters) -> list[nn.Parameter]:
    """The trained numbers of the installed factors, in the order of files; shared ones once."""
    return [number for _, adapter in state.pairs for number in adapter.factors.parameters()]


def values_of(model: nn.Module) -> Values:
    """A copy of the live adapter's numbers; of sharded ones the whole, on every rank."""
    _settle_(model)
    state = state_of(model)
    parts = [_whole(number.detach()).float().flatten() for number in numbers_of(state)]
    flat = torch.cat(parts) if parts else torch.zeros(0)
    return Values(flat, {name: _whole(tensor_of(model, name).detach()).clone() for name in state.recipe.also})


def load_values_(model: nn.Module, values: Values) -> None:
    """Give the installed adapter these numbers; where it is sharded, called on every rank."""
    _settle_(model)
    numbers = numbers_of(state_of(model))
    with torch.no_grad():
        for number, part in zip(numbers, values.factors.split([item.numel() for item in numbers]), strict=True):
            _fill_(number, part.view(number.shape))
    put_(model, values.also)


def put_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into parameters and buffers of these names."""
    with torch.no_grad():
        for name, value in tensors.items():
            _fill_(tensor_of(model, name), value)


def switch_(state: Adapters, *, on: bool) -> None:
    """Let the installed adapter act, or not."""
    for _, adapter in state.pairs:
        adapter.on = on


def _refuse_sharded(model: nn.Module) -> None:
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise InputError("a whole model", "one sharded over processes", "attach_ before fully_shard, detach_ never")


def _settle_(model: nn.Module) -> None:
    """Sharded modules may hold a whole copy from the last pass, and throw away what is written there."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _fill_(tensor: Tensor, value: Tensor) -> None:
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device, tensor.dtype), mesh, tensor.placements)  # type: ignore[attr-defined]
    tensor.copy_(value)
