"""Which weights of a model are to be adapted, and which of its tensors trained in full."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from scrimp.adapt.doors import Adapter, Door, doors_of, onto_weight, raw_weight
from scrimp.adapt.methods import Method
from scrimp.primitives.errors import InputError

Where = str | type[nn.Module] | tuple[type[nn.Module], ...] | None
_HEADS = ("head", "heads", "fc", "classifier", "score", "lm_head", "qa_outputs", "classification_head", "pre_logits")


class Target(NamedTuple):
    """One weight: ``name`` is the module's, for packed attention projections with the weight's behind it."""

    name: str
    module: nn.Module
    door: Door

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        return self.door.matrix(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight itself, below any adapter, in its own layout."""
        weight: Tensor = raw_weight(self.module, self.door.name)
        return weight

    @property
    def own(self) -> nn.Parameter | None:
        """The weight, if it is a parameter, and not computed or packed in some other way."""
        return self.module._parameters.get(self.door.name)


def find_targets(model: nn.Module, where: Where) -> list[Target]:
    """The weights that ``where`` takes, in the model's order.

    Args:
        model: any, adapted or not.
        where: a regular expression searched for in dotted module names, or module types, or ``None`` for every
            Linear, convolution and transformers ``Conv1D`` but the classifier.

    Raises:
        InputError: a broken pattern, nothing taken, or a weight that several modules share.
    """
    every = adaptable(model)
    heads = _heads(model)
    chosen = [target for target in every if _taken(target, where, heads)]
    if not chosen:
        near = ", ".join(target.name for target in every[:3]) or "none at all"
        raise InputError(
            "a `where` that takes a Linear, convolution, Embedding, Conv1D or MultiheadAttention",
            _what_else(model, where),
            f"this model has {len(every)}, such as: {near}",
        )
    _refuse_tied(model, chosen)
    _refuse_computed(chosen)
    return chosen


def named_targets(model: nn.Module, names: list[str]) -> list[Target]:
    """The weights of these names.

    Raises:
        InputError: the model has no such adaptable weight.
    """
    every = {target.name: target for target in adaptable(model)}
    missing = [name for name in names if name not in every]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        wanted = f"a model with the adapted module '{missing[0]}'{more}"
        raise InputError(wanted, "one without", "load it onto the base it was made for")
    chosen = [every[name] for name in names]
    _refuse_tied(model, chosen)
    _refuse_computed(chosen)
    return chosen


def adaptable(model: nn.Module) -> list[Target]:
    """Every weight of the model that some door leads to."""
    found = []
    read = {
        id(child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if doors_of(child) and _reads_weight(type(parent), name)
    }
    for name, module in model.named_modules():
        for door in doors_of(module):
            way = onto_weight(module, door) if id(module) in read else door
            suffix = f".{way.name}" if isinstance(module, nn.MultiheadAttention) else ""
            found.append(Target(name + suffix, module, way))
    return found


def _reads_weight(parent: type[nn.Module], child: str) -> bool:
    """Whether a module's code takes a child's weight without calling the child, which no hook on the child sees.

    So do torch's and torchvision's attention and timm's BEiT and Swin V2. Looking at a weight's type or shape is
    nothing, and a wrong guess costs time only: the way onto the weight is always right.
    """
    pattern = rf"\bself\.{re.escape(child)}\.weight\b(?!\.(dtype|device|shape|size|ndim|requires_grad|is_))"
    return any(re.search(pattern, _source(kind)) for kind in parent.__mro__ if _is_foreign(kind))


def _is_foreign(kind: type) -> bool:
    # Every parametrized module has a class of its own, with no code of its own.
    return issubclass(kind, nn.Module) and kind is not nn.Module and kind.__module__ != "torch.nn.utils.parametrize"


@lru_cache(maxsize=4096)
def _source(kind: type) -> str:
    """The code of a class that runs in forward passes; empty where it is not to be had."""
    texts = []
    for name, function in vars(kind).items():
        if inspect.isfunction(function) and not re.search("init|reset|load", name):
            try:
                texts.append(inspect.getsource(function))
            except (OSError, TypeError):
                continue
    return "\n".join(texts)


def _taken(target: Target, where: Where, heads: set[int]) -> bool:
    if where is None:
        is_head = id(target.module) in heads or target.name.split(".")[0] in _HEADS
        return not isinstance(target.module, nn.Embedding) and not is_head
    if isinstance(where, str):
        return matches(where, target.name, "where")
    return isinstance(target.module, where)


def _heads(model: nn.Module) -> set[int]:
    """The output layers, by the ways timm and transformers have of naming them."""
    found = set()
    for ask in ("get_classifier", "get_output_embeddings"):
        given = getattr(model, ask, lambda: None)()
        heads = given if isinstance(given, tuple | list) else (given,)
        found |= {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    return found


def _what_else(model: nn.Module, where: Where) -> str:
    """Why ``where`` takes nothing: what it does take has no door, or there is no such thing."""
    if where is None:
        return "none beside the classifier"
    for name, module in model.named_modules():
        matching = matches(where, name, "where") if isinstance(where, str) else isinstance(module, where)
        if matching and name and any(True for _ in module.parameters(recurse=False)):
            return f"{where!r}, which takes '{name}', and no {type(module).__name__} can be adapted"
    return f"{where!r}, which takes none"


def _refuse_tied(model: nn.Module, chosen: list[Target]) -> None:
    """A shared weight would be changed for its other owners by a merge, and only for one by a hook."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for target in chosen:
        names = owners.get(id(target.own), [])
        if len(names) > 1:
            raise InputError(
                "weights of their own to adapt", f"{names[0]}, which is also {names[1]}", "leave it out with `where`"
            )


def _refuse_computed(chosen: list[Target]) -> None:
    for target in chosen:
        if target.door.apply is None and target.own is None:
            raise InputError(
                "weights without parametrizations", f"{target.name} with one", "remove it, or leave the weight out"
            )


def refuse_unmergeable(target: Target) -> None:
    """Only plain floating-point weights can be added to.

    Raises:
        InputError: a quantised, sharded or computed weight.
    """
    weight = target.own
    if (
        weight is None
        or type(weight) is not nn.Parameter
        or weight.dtype.itemsize < 2
        or not weight.is_floating_point()
    ):
        kind = "a computed weight" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        raise InputError(
            "plain floating-point weights to merge into",
            f"{target.name}: {kind}",
            "load the base unquantised and whole",
        )


def find_tuned(model: nn.Module, method: Method, also: str | None) -> tuple[str, ...]:
    """Names of the tensors trained in full, in the model's order, each by its first name.

    Buffers, such as batch statistics, come along where ``also`` names them, and with everything else.

    Raises:
        InputError: a broken pattern, or one that takes nothing.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise InputError("a model whose parameters have shapes", f"{lazy[0]} without one", "run it once before")
    everything = method.name == "full"
    first: dict[int, str] = {}
    by_user, by_method = set[str](), set[str]()
    for name, tensor in _every_name(model):
        known = first.setdefault(id(tensor), name)
        if also is not None and matches(also, name, "also"):
            by_user.add(known)
        own = method.also is not None and matches(method.also, name, "also")
        if own and (everything or isinstance(tensor, nn.Parameter)):
            by_method.add(known)
    if also is not None and not by_user:
        near = ", ".join(list(tensors_of(model))[-2:])
        raise InputError("an `also` that takes parameters", f"'{also}', which takes none", f"there are: ..., {near}")
    return tuple(name for name in first.values() if name in by_user | by_method)


def _every_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by all their names, but not those of adapters, then the buffers that a state dict has."""
    added = {id(item) for module in model.modules() if isinstance(module, Adapter) for item in module.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in added:
            yield name, parameter
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}".lstrip("."), buffer


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their first names."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name, as it is now: sharding exchanges the objects."""
    owner, _, key = name.rpartition(".")
    tensor: Tensor = raw_weight(model.get_submodule(owner), key)
    return tensor


def matches(pattern: str, name: str, argument: str) -> bool:
    """Whether the pattern occurs in the name.

    Raises:
        InputError: no regular expression; ``argument`` says whose.
    """
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise InputError(f"a regular expression as `{argument}`", f"'{pattern}' ({error})", "correct it") from error
