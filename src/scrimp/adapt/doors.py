"""How a delta of a weight reaches a module's output: factored beside the forward pass, or added to the weight.

A *door* knows one kind of module: the shape [out, in] its weight has as a matrix, how to add ``x -> B A x`` to its
output, and how to write a [out, in] delta in the weight's own layout. An *adapter* is what goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from scrimp.primitives.errors import InputError

CHILD = "adapter"
_CONVS: dict[type, Any] = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}
Apply = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Door(NamedTuple):
    """One way in.

    Attributes:
        matrix: module -> (out, in) of its weight as a matrix.
        apply: (module, input, a [r, in], b [out, r]) -> what to add to the output; ``None``: the delta is added to the
            weight whenever it is read.
        weight: delta [out, in], weight -> the delta in the layout of this weight.
        name: the weight's attribute.
    """

    matrix: Callable[[nn.Module], tuple[int, int]]
    apply: Apply | None
    weight: Callable[[Tensor, Tensor], Tensor]
    name: str = "weight"


class Adapter(nn.Module):
    """What an adapted module carries: the numbers, and whether they act.

    Args:
        factors: gives ``a`` [r, in] and ``b`` [out, r], the scale in ``b``.
        door: how their product reaches the module.
    """

    def __init__(self, factors: nn.Module, door: Door) -> None:
        super().__init__()
        self.factors, self.door, self.on = factors, door, True
        self.handle: RemovableHandle | None = None

    def delta(self) -> Tensor:
        """The change of the weight as a matrix, float32 [out, in]."""
        a, b = self.factors()
        if a.is_meta:  # of which autocast knows nothing
            return b @ a  # type: ignore[no-any-return]
        with torch.autocast(a.device.type, enabled=False):
            return b @ a  # type: ignore[no-any-return]

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        if not self.on:
            return weight
        return weight + self.door.weight(self.delta(), weight).to(weight.dtype)


def fit_(module: nn.Module, adapter: Adapter) -> None:
    """Put an adapter on a module, by its door.

    Raises:
        InputError: the module has something of that name.
    """
    child = _child(adapter.door)
    if hasattr(module, child):
        raise InputError(f"modules without a part named '{child}'", f"{type(module).__name__} with one", "rename it")
    adapter.to(raw_weight(module, adapter.door.name).device)
    adapter.train(module.training)
    module.add_module(child, adapter)
    if adapter.door.apply is None:
        module.__class__ = _reading(*_bare(module), adapter.door.name)
    else:
        # The handle travels with the module: unpickled, it keeps torch from giving the hook's number to another one.
        adapter.handle = module.register_forward_hook(_beside, with_kwargs=True)


def unfit_(module: nn.Module, adapter: Adapter) -> None:
    """Take an adapter off its module."""
    if adapter.handle is not None:
        adapter.handle.remove()
        adapter.handle = None
    elif adapter.door.apply is None:
        base, *names = _bare(module)
        names.remove(adapter.door.name)  # type: ignore[arg-type]
        module.__class__ = _reading(base, *names) if names else base
    delattr(module, _child(adapter.door))


def _child(door: Door) -> str:
    """Under what name the adapter hangs in the module: one of several takes the weight's initial to it."""
    return CHILD if door.name in ("weight", "in_proj_weight") else f"{CHILD}_{door.name[0]}"


def raw_weight(module: nn.Module, name: str) -> Any:
    """The weight below an adapter, or below a parametrization: to compute that may change the module."""
    own = module._parameters.get(name)
    if own is not None:
        return own
    computed: Any = module._modules.get("parametrizations", {})
    if name in computed:
        return next(computed[name].parameters(recurse=False), None)
    return getattr(module, name, None)


def _bare(module: nn.Module) -> tuple[Any, ...]:
    """The module's own class, and which of its weights are read through an adapter."""
    kind = type(module)
    return vars(kind).get("_scrimp_read", (kind,))


@cache
def _reading(base: type[nn.Module], *names: str) -> type[nn.Module]:
    """A class like ``base`` whose weights of these names are the changed ones, wherever they are read.

    Like a torch parametrization, but the parameters keep their names and places, copies share nothing that one of
    them could take away (torch removes a parametrization from the class of all copies), and models can be pickled.
    """
    members: dict[str, Any] = {name: property(_reader(name)) for name in names}
    members |= {"_scrimp_read": (base, *names), "__reduce_ex__": _reduce, "__module__": base.__module__}
    return type(base.__name__, (base,), members)


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    child = _child(Door(_matrix, None, _alike, name))

    def read(module: nn.Module) -> Any:
        weight, adapter = module._parameters[name], module._modules[child]
        # Between passes it is FSDP that reads its shards.
        if adapter is None or all(hasattr(item, "device_mesh") for item in (weight, *adapter.parameters())):
            return weight
        return adapter(weight)

    return read


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base, *names = _bare(module)
    _, arguments, *state = base.__reduce_ex__(module, protocol)
    return _blank, (base, names, *arguments[1:]), *state


def _blank(base: type[nn.Module], names: list[str], *arguments: Any) -> nn.Module:
    kind: Any = _reading(base, *names)  # type: ignore[arg-type]
    return kind.__new__(kind, *arguments)  # type: ignore[no-any-return]


def _beside(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
    """Forward hook: the output and, beside it, that of the factored delta."""
    adapter: Adapter = module.adapter  # type: ignore[assignment]
    apply = adapter.door.apply
    if not adapter.on or apply is None:
        return output
    given = inputs[0] if inputs else next(iter(named.values()))
    kind = given.dtype if given.is_floating_point() else output.dtype
    a, b = adapter.factors()
    return output + apply(module, given, a.to(kind), b.to(kind)).to(output.dtype)


def doors_of(module: nn.Module) -> list[Door]:
    """The ways into this module's own weights; none for a module that cannot be adapted."""
    if isinstance(module, nn.MultiheadAttention):
        packed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [_inside(name) for name in packed if raw_weight(module, name) is not None]
    if isinstance(module, nn.Linear):
        return [_LINEAR if _plain(module, nn.Linear) else _inside("weight")]
    if isinstance(module, nn.Embedding):
        # Beside the table there is no way to renew its rows' norms, or to count how often each occurs.
        odd = module.max_norm is not None or module.scale_grad_by_freq
        return [_EMBEDDING if _plain(module, nn.Embedding) and not odd else _inside("weight")]
    for kind in _CONVS:
        if isinstance(module, kind):
            return [_CONV if _plain(module, kind) else _inside("weight")]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers', a Linear with its weight turned
        return [_TURNED]
    return []


def onto_weight(module: nn.Module, door: Door) -> Door:
    """The same door, leading to the weight instead of the output; where that is packed, as it was."""
    return door if hides_weight(module, door.name) else door._replace(apply=None)


def hides_weight(module: nn.Module, name: str) -> bool:
    """Whether the weight is packed (quantised), so that nothing can be added to it: beside it is the only way."""
    weight = raw_weight(module, name)
    if not isinstance(weight, Tensor):
        return True
    return not weight.is_floating_point() or weight.dtype.itemsize < 2 or type(weight) not in (nn.Parameter, Tensor)


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the forward pass is torch's own, or hides the weight."""
    return type(module).forward is kind.forward or hides_weight(module, "weight")


def _inside(name: str) -> Door:
    return Door(partial(_matrix, name=name), None, _alike, name)


def _matrix(module: nn.Module, name: str = "weight") -> tuple[int, int]:
    weight = raw_weight(module, name)
    return weight.shape[0], weight[0].numel()


def _features(module: Any) -> tuple[int, int]:
    """Of a Linear by its own word: a quantised one holds its weight in another shape."""
    return module.out_features, module.in_features


def _entries(module: Any) -> tuple[int, int]:
    return module.num_embeddings, module.embedding_dim


def _kernels(module: Any) -> tuple[int, int]:
    inn = module.in_channels // module.groups
    for side in module.kernel_size:
        inn *= side
    return module.out_channels, inn


def _turned(module: Any) -> tuple[int, int]:
    return module.weight.shape[1], module.weight.shape[0]


def _alike(delta: Tensor, weight: Tensor) -> Tensor:
    return delta.view_as(weight)


def _turn(delta: Tensor, weight: Tensor) -> Tensor:
    return delta.T


def _thin(a: Tensor, b: Tensor) -> bool:
    """Whether two thin products cost less than one with the whole delta."""
    return a.shape[0] * (a.shape[1] + b.shape[0]) < a.shape[1] * b.shape[0]


def _linear(module: nn.Module, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if _thin(a, b):
        return functional.linear(functional.linear(inputs, a), b)
    return functional.linear(inputs, b @ a)


def _embedding(module: Any, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    change = functional.embedding(inputs, b) @ a
    if module.padding_idx is None:
        return change
    # The row of padding gives its output and takes no gradient; here that is one for both factors.
    return torch.where((inputs == module.padding_idx)[..., None], change.detach(), change)


def _conv(module: Any, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution to r channels and a 1x1 from there; groups have no common first factor, they take the delta."""
    if module.groups > 1 or not _thin(a, b):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        change: Tensor = module._conv_forward(inputs, (b @ a).view(shape), None)
        return change
    inner = module._conv_forward(inputs, a.view(a.shape[0], -1, *module.kernel_size), None)
    out: Tensor = _CONVS[_kind(module)](inner, b.view(*b.shape, *(1,) * len(module.kernel_size)))
    return out


def _kind(module: nn.Module) -> type:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]  # type: ignore[arg-type]


_LINEAR = Door(_features, _linear, _alike)
_EMBEDDING = Door(_entries, _embedding, _alike)
_CONV = Door(_kernels, _conv, _alike)
_TURNED = Door(_turned, _linear, _turn)
