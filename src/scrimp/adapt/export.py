"""Adapters as ordinary LoRA: folders that peft, diffusers and vLLM read without this library."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adapt.doors import doors_of
from scrimp.adapt.install import Values, state_of, values_of
from scrimp.adapt.methods import Method
from scrimp.adapt.targets import Target
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic, write_json
from scrimp.primitives.weights import pack_weights

_PREFIX = "base_model.model."
_MERGE = "use merge_ and save the whole model, or leave it out with `where`"


def to_lora(model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write the live adapter as a LoRA of its rank, in peft's format and of LoRA's size.

    The folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, for ``PeftModel.from_pretrained(model,
    folder)``; for diffusers' ``load_lora_adapter(folder, prefix="base_model.model",
    weight_name="adapter_model.safetensors")``, which ignores what was trained in full; and for vLLM where nothing was.
    peft is not needed to write it. Modules with parameters trained in full become ``modules_to_save``.

    Args:
        model: with a live adapter of `nola` or `lora`.
        folder: made if missing; files of these names are replaced, each at once.
        base: name or folder of the base model to write down; by default what transformers calls the model.

    Returns:
        The folder.

    Raises:
        InputError: no live adapter, or one that is no LoRA for peft: nothing but parameters trained in full, layers
            with a forward pass of their own, separate or output projections of ``nn.MultiheadAttention`` (peft up to
            0.21 adds the latter twice), convolutions that are dilated or pad otherwise than with zeros, parameters
            in full that are no module's of their own. Nothing is written.
    """
    state = state_of(model)
    if state.name is None:
        raise InputError("a live adapter to export", "none", "choose one with use_")
    targets = [target for target, _ in state.pairs]
    if not targets:
        got = f"{state.recipe.method.name}, which trains existing parameters only"
        raise InputError("an adapter with factors, of nola or lora", got, "save the model itself")
    values = values_of(model)
    for target in targets:
        _refuse_foreign(model, target)
    tensors, ranks = _tensors(targets, factors_of(state.recipe.method, targets, values))
    names = _bare_names(model, targets)
    saved = _modules_to_save(names, targets, list(values.also))
    for name in saved:
        own = {f"{name}.{key}": value for key, value in model.get_submodule(name).state_dict().items()}
        tensors |= own | {key: values.also[key] for key in own if key in values.also}
    config = _config(names, targets, ranks) | {
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "modules_to_save": saved or None,
    }
    whole = {_PREFIX + key: value.detach().cpu() for key, value in tensors.items()}
    path = Path(folder)
    write_atomic(path / "adapter_model.safetensors", pack_weights(whole, {"format": "pt"}))
    write_json(path / "adapter_config.json", config)
    return path


def factors_of(method: Method, targets: list[Target], values: Values) -> list[tuple[Tensor, Tensor]]:
    """``a`` [r, in] and ``b`` [out, r] of every weight from its numbers: whole and on the CPU wherever the model is."""
    made: list[Any] = method.factors([target.shape for target in targets])
    numbers = [number for part in made for number in part.parameters()]
    with torch.no_grad():
        for number, part in zip(numbers, values.factors.cpu().split([item.numel() for item in numbers]), strict=True):
            number.copy_(part.view_as(number))
        return [part() for part in made]


def passes_by(parent: nn.Module, child: str) -> bool:
    """Whether a forward pass takes this child's weight without calling the child, so that peft would change nothing.

    Looked at are functions with "forward" in their name: others, such as those that fuse layers, do not run then.
    """
    for kind in type(parent).__mro__:
        for name, function in vars(kind).items():
            if "forward" in name and inspect.isfunction(function) and kind is not nn.Module:
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):
                    continue
                if re.search(rf"\bself\.{re.escape(child)}\.weight\b(?!\.(dtype|device|shape))", source):
                    return True
    return False


def _refuse_foreign(model: nn.Module, target: Target) -> None:
    """peft adds to a layer's output what this library may have added to its weight: not the same for every layer."""
    if target.door.apply is not None or target.door.name == "in_proj_weight":
        return
    owner, _, child = target.name.rpartition(".")
    beside = any(door.apply is not None for door in doors_of(target.module))
    if not beside or passes_by(model.get_submodule(owner), child):
        raise InputError("layers that are called, with torch's own forward pass, as in peft", target.name, _MERGE)


def _tensors(targets: list[Target], pairs: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """peft's tensors by name, and the rank it has to give every module."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for target, (a, b) in zip(targets, pairs, strict=True):
        made = _as_peft(target, a, b)
        owner = target.name
        if isinstance(target.module, nn.MultiheadAttention):  # peft adapts both of its weights
            owner = owner.removesuffix(".in_proj_weight")
            made |= {"base_layer.out_proj.lora_A.weight": torch.zeros_like(a)}
            made |= {"base_layer.out_proj.lora_B.weight": torch.zeros_like(a.T)}
        tensors |= {f"{owner}.{key}": value for key, value in made.items()}
        ranks[owner] = next(value.shape[0] for key, value in made.items() if "_A" in key)
    return tensors, ranks


def _as_peft(target: Target, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    module: Any = target.module
    if isinstance(module, nn.Embedding):
        return {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
    if not hasattr(module, "kernel_size"):
        return {"lora_A.weight": a, "lora_B.weight": b}
    if any(size != 1 for size in module.dilation) or module.padding_mode != "zeros":
        raise InputError("convolutions without dilation that pad with zeros, as in peft", target.name, _MERGE)
    return {"lora_A.weight": _grouped(a, module), "lora_B.weight": b.view(*b.shape, *(1 for _ in module.kernel_size))}


def _grouped(a: Tensor, module: Any) -> Tensor:
    """The first convolution. peft groups only the second, so that here each group gets r channels of its own."""
    thin = a.view(a.shape[0], -1, *module.kernel_size)
    rank, width = thin.shape[:2]
    wide = thin.new_zeros(module.groups * rank, module.groups * width, *module.kernel_size)
    for group in range(module.groups):
        wide[group * rank : (group + 1) * rank, group * width : (group + 1) * width] = thin
    return wide


def _bare_names(model: nn.Module, targets: list[Target]) -> list[str]:
    """Names of the modules there are without the adapter."""
    ours = tuple(f"{target.name}.adapter." for target in targets)
    names = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(ours)]
    return [name for name in names if "parametrizations" not in name.split(".")]


def _modules_to_save(names: list[str], targets: list[Target], also: list[str]) -> list[str]:
    """The modules that own what was trained in full; peft takes all whose names end alike, so these are in it, too."""
    owners = {name.rpartition(".")[0] for name in also}
    if "" in owners:
        loose = next(name for name in also if "." not in name)
        raise InputError("parameters in full that belong to a module", f"{loose}, the whole model's own", _MERGE)
    saved = [name for name in names if name.endswith(tuple(owners))] if owners else []
    for target in targets:
        # peft adapts nothing whose name has one of these in it.
        clash = [name for name in saved if re.match(rf"(.*\.)?{re.escape(name)}($|\.)", target.name)]
        if clash:
            got = f"{clash[0]} and {target.name} in it, or named alike"
            raise InputError("modules adapted or in full, as in peft", got, "narrow `where` or `also`")
    return saved


def _config(names: list[str], targets: list[Target], ranks: dict[str, int]) -> dict[str, Any]:
    rank = min(ranks.values())
    alike = any(name.endswith(f".{target}") for target in ranks for name in names if name not in ranks)
    other = {re.escape(name): value for name, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(type(target.module).__name__ == "Conv1D" for target in targets),
        # peft takes a list for endings of names; where those would take more, a pattern for the whole name.
        "target_modules": "|".join(re.escape(name) for name in ranks) if alike else list(ranks),
    }
