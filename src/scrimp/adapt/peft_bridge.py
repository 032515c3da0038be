"""NOLA as a method of peft: importing this module registers it.

``get_peft_model(model, NolaConfig(...))``, ``save_pretrained`` and ``PeftModel.from_pretrained`` then work as for
peft's own methods. Whoever loads such a folder imports this module first; `scrimp.adapt.to_lora` writes one that needs
no more than peft. Saved are the coefficients alone, two tensors a weight, whose names take some hundred bytes; a file
of `scrimp.adapt.save_adapter` is smaller.

The bases of a weight are streams ``2 t`` and ``2 t + 1`` of the generator, with t its place among the adapted ones in
the model's order: those of `attach_` for the same weights, rank, bases and seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adapt.basis import GENERATOR
from scrimp.adapt.cache import Cache
from scrimp.adapt.doors import Door, doors_of
from scrimp.adapt.export import passes_by
from scrimp.adapt.names import Named, fold
from scrimp.adapt.nola import COMBINES, Nola, NolaFactors, nola
from scrimp.primitives.errors import InputError, require

_peft: Any = require("peft", "peft")
_tuners: Any = require("peft.tuners.tuners_utils", "peft")
_utils: Any = require("peft.utils", "peft")


def _peft_type(name: str) -> Any:
    """The member of peft's list of methods, added to it where it is missing: registering asks for one."""
    kinds = _peft.PeftType
    if name not in kinds.__members__:
        member = str.__new__(kinds, name)
        member._name_ = member._value_ = name
        kinds._member_names_.append(name)
        kinds._member_map_[name] = kinds._value2member_map_[name] = member
        type.__setattr__(kinds, name, member)
    return kinds[name]


NOLA = _peft_type("NOLA")


@dataclass
class NolaConfig(_peft.PeftConfig):  # type: ignore[misc]
    """What `scrimp.adapt.nola` takes, and which modules, in peft's words.

    Attributes:
        r: rank.
        bases: how many a factor; where a factor has fewer entries, that many.
        seed: of the bases, in [0, 2^64).
        nola_alpha: of the scale ``nola_alpha / r``; by default the rank.
        kind: of bases, "orthogonal" or, as in the paper, "independent".
        shared: one set of ``2 * bases`` numbers for all weights together.
        bits: train at 8, 4, 3 or 2 bits a number (straight-through).
        target_modules: as in ``peft.LoraConfig``: endings of names, a regular expression for whole names, or
            "all-linear". Linear, convolutions, Embedding and transformers' ``Conv1D`` can be adapted.
        exclude_modules: as in ``peft.LoraConfig``.
        modules_to_save: modules trained and saved in full, such as a new classifier.
        layers_to_transform: as in ``peft.LoraConfig``.
        layers_pattern: as in ``peft.LoraConfig``.
        generator: version of the generator of the bases.
        weights: names and shapes of the adapted weights, written when saving: the bases depend on their order.

    Raises:
        InputError: a setting out of its range, or another generator.
    """

    r: int = 4
    bases: int = 64
    seed: int = 0
    nola_alpha: float | None = None
    kind: str = "orthogonal"
    shared: bool = False
    bits: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    generator: str = field(default=GENERATOR)
    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NOLA
        self.placed: str | None = None
        if self.generator != GENERATOR:
            got = f"{self.generator}, unknown to this version"
            raise InputError(f"bases of generator {GENERATOR}", got, "install the version that wrote the adapter")
        if self.kind not in COMBINES:
            raise InputError(f"kind of bases out of: {', '.join(COMBINES)}", self.kind, "correct it")
        self.method()

    def method(self) -> Nola:
        """The same as `scrimp.adapt` has it."""
        return nola(
            self.r, self.bases, self.seed, alpha=self.nola_alpha, combine=COMBINES[self.kind], shared=self.shared,
            bits=self.bits,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the weights that were adapted."""
        return asdict(self) | {"weights": self.weights or self.placed}


class NolaLayer(nn.Module, _tuners.BaseTunerLayer):  # type: ignore[misc]
    """A layer with adapters beside it.

    Args:
        base_layer: the layer.
        door: the way into it.
    """

    adapter_layer_names = ("nola_factors",)
    get_base_layer: Any
    set_adapter: Any
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(self, base_layer: nn.Module, door: Door) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.nola_factors = nn.ModuleDict()
        self.merged_adapters: Any = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.door = door
        self.out_features, self.in_features = door.matrix(self.get_base_layer())

    def update_layer(self, adapter_name: str, factors: NolaFactors) -> None:
        """Add an adapter of this name, or put it in the place of one."""
        weight = self.get_base_layer().weight
        if not any(number.is_meta for number in factors.parameters()):
            factors.to(weight.device)
        self.nola_factors[adapter_name] = factors
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, float32 in the weight's layout."""
        a, b = self.nola_factors[adapter]()
        with torch.autocast(a.device.type, enabled=False):
            return self.door.weight(b @ a, self.get_base_layer().weight)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters, by default the active ones, to the weight.

        Raises:
            InputError: a quantised weight.
            ValueError: ``safe_merge`` and a weight that would not be finite.
        """
        for name in _tuners.check_adapters_to_merge(self, adapter_names) or []:
            if name in self.nola_factors:
                self._add_(self.get_delta_weight(name), check=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters off the weight again, up to rounding."""
        while self.merged_adapters:
            self._add_(-self.get_delta_weight(self.merged_adapters.pop()), check=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output and, beside it, those of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        given = args[0] if args else next(iter(kwargs.values()))
        kind = given.dtype if given.is_floating_point() else result.dtype
        assert self.door.apply is not None
        for name in self.active_adapters:
            if name in self.nola_factors:
                a, b = self.nola_factors[name]()
                change = self.door.apply(self.get_base_layer(), given, a.to(kind), b.to(kind))
                result = result + change.to(result.dtype)
        return result

    def _add_(self, delta: Tensor, *, check: bool) -> None:
        weight = self.get_base_layer().weight
        if not weight.is_floating_point():
            kind = str(weight.dtype).removeprefix("torch.")
            raise InputError("floating-point weights to merge into", kind, "load the base unquantised")
        with torch.no_grad():
            changed = (weight.float() + delta).to(weight.dtype)
            if check and not bool(torch.isfinite(changed).all()):
                raise ValueError("expected a finite weight after merging; got NaN or infinity; look at the adapter")
            weight.copy_(changed)

    def __repr__(self) -> str:
        return "nola." + super().__repr__()


class NolaModel(_tuners.BaseTuner):  # type: ignore[misc]
    """peft's tuner: finds the layers, and gives each its place in the order of streams."""

    prefix = "nola_"
    tuner_layer_cls = NolaLayer
    target_module_mapping = _utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As peft's; then compares the adapted weights with those that a loaded adapter was made for.

        Raises:
            InputError: other weights, or in another order.
        """
        self._now: list[tuple[Named, NolaFactors]] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        config.placed = fold([named for named, _ in self._now])
        if config.weights is not None and config.weights != config.placed:
            raise InputError(
                f"an adapter's own weights {config.weights[:300]}", config.placed[:300], "load it onto its own base"
            )

    def _create_and_replace(
        self,
        nola_config: NolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, NolaLayer) else NolaLayer(target, _door(target, parent, current_key))
        method, number = nola_config.method(), len(self._now)
        first = self._now[0][1] if self._now else None
        cache = Cache(bytes=method.cache_bytes) if first is None else first.cache
        shape = (layer.out_features, layer.in_features)
        owner = first if method.shared else None
        factors = NolaFactors(method, shape, number, cache=cache, owner=owner)
        self._now.append(((current_key, shape), factors))
        layer.update_layer(adapter_name, factors)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)


def _door(target: Any, parent: nn.Module, name: str) -> Door:
    """The one way beside this layer.

    Raises:
        InputError: there is none.
    """
    base = target.get_base_layer() if isinstance(target, _tuners.BaseTunerLayer) else target
    doors = [door for door in doors_of(base) if door.apply is not None]
    if not doors or passes_by(parent, name.rpartition(".")[2]):
        wanted = "Linear, convolution, Embedding or Conv1D layers that are called, with torch's own forward pass"
        raise InputError(wanted, f"{name}, a {type(base).__name__}", "take scrimp.adapt.attach_, or exclude_modules")
    return doors[0]


def _register() -> None:
    mapping: Any = require("peft.mapping", "peft").PEFT_TYPE_TO_CONFIG_MAPPING
    if NOLA not in mapping:
        _utils.register_peft_method(name="nola", config_cls=NolaConfig, model_cls=NolaModel, prefix=NolaModel.prefix)
    elif mapping[NOLA].__module__ != __name__:
        raise InputError("a peft without a method named nola", "one with its own", "use that one")


_register()
