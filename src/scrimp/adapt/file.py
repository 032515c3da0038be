"""Adapters in files of kilobytes: packed numbers, seed and names, in one safetensors file.

The tensor ``.numbers`` holds the packed numbers, those beside it parameters trained in full. The metadata are

- ``format``: `FORMAT`;
- ``method``: its name and settings as ``key=value``, those left out that are 0, none, orthogonal, or an alpha equal to
  the rank;
- ``weights``: the adapted weights and their shapes, as `scrimp.adapt.names` writes them;
- ``bits``: of a packed number; where left out, those it was trained at, or 32;
- ``base``: fingerprint of the weights the adapter leaves alone; unknown where left out;
- ``crc``: CRC-32 of the file with eight zeros in this place.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from scrimp.adapt.basis import GENERATOR
from scrimp.adapt.fingerprint import fingerprint
from scrimp.adapt.install import Recipe, Values, exchange_, find_state, numbers_of, state_of, values_of
from scrimp.adapt.lora import Lora, lora
from scrimp.adapt.methods import Method, bias, full, linear
from scrimp.adapt.names import Named, fold, unfold
from scrimp.adapt.nola import COMBINES, Nola, nola
from scrimp.adapt.quantize import pack, packed_bytes, unpack
from scrimp.adapt.targets import Target, named_targets, tensors_of
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights

FORMAT = "scrimp-adapter-1"
_NUMBERS = ".numbers"  # no parameter's name begins with a dot
_BITS = ("32", "16", "8", "4", "3", "2")
_MOST_METADATA = 1 << 24
_NO_CHECK = b'"crc":"00000000"'
_CHECK = re.compile(rb'"crc":"([0-9a-f]{8})"')
_METHODS: dict[str, Any] = {"nola": nola, "lora": lora, "bias": bias, "linear": linear, "full": full}
_LEFT_OUT = ("None", "False", "0", "orthogonal")
_WORD = re.compile(r"([a-z]{1,16})=([A-Za-z0-9.+-]{1,40})")
_READ: dict[str, Any] = {
    "rank": int, "bases": int, "seed": int, "alpha": float, "bits": int, "shared": int, "kind": str, "generator": str
}  # fmt: skip


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, bits: int | None = None) -> Path:
    """Write the live adapter: packed numbers, method and seed, adapted weights, fingerprint of the base.

    Parameters trained in full stand beside, as they are. The bytes depend on nothing but the adapter. Beside the
    numbers there are some 300 bytes, and at 8 bits and below 2 more for each factor.

    Args:
        model: with a live adapter.
        path: file to write, atomically.
        bits: 32, 16, or 8, 4, 3, 2 with one scale a factor; by default those the method trains at, else 32.

    Returns:
        The path.

    Raises:
        InputError: no live adapter, numbers that are not finite, bits of another kind, or a rank above the largest side
            of the weights.
    """
    return write_atomic(path, adapter_bytes(model, bits=bits))


def adapter_bytes(model: nn.Module, *, bits: int | None = None) -> bytes:
    """What `save_adapter` writes. Where the model is sharded, called on every rank."""
    state = state_of(model)
    if state.name is None:
        raise InputError("a live adapter to save", "none", "choose one with use_")
    method, values = state.recipe.method, values_of(model)
    bits = bits or method.bits or 32
    named: list[Named] = [(target.name, target.shape) for target, _ in state.pairs]
    _check_rank(method, named)
    tensors = {name: value.cpu() for name, value in values.also.items()}
    if named:
        lengths = [number.numel() for number in numbers_of(state)]
        tensors[_NUMBERS] = pack(list(values.factors.cpu().split(lengths)), bits)
    return _sealed(tensors, _metadata(method, named, bits=bits, base=_base(model, state.recipe)))


def file_bytes(method: Method, named: Sequence[Named], bits: int) -> int:
    """How large the file of an adapter is, beside what is trained in full."""
    numbers = torch.zeros(packed_bytes(_lengths(method, [shape for _, shape in named]), bits), dtype=torch.uint8)
    return len(_sealed({_NUMBERS: numbers}, _metadata(method, named, bits=bits, base="0" * 16)))


def load_adapter_(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", check_base: bool = True
) -> list[str]:
    """Attach the adapter of a file, under this name; it is live afterwards, its numbers those that were saved.

    Nothing in the file is executed, and nothing is made of it that is larger than the model. Adapters attached before
    are kept, see `use_`.

    Args:
        model: the base it was made for.
        path: a file of `save_adapter`.
        name: to give it.
        check_base: refuse a base of other weights. Names and shapes are checked in any case.

    Returns:
        Names of the adapted weights.

    Raises:
        InputError: no such file, truncated, damaged or of a later format, or made for another base. The model is as it
            was.
    """
    state = find_state(model)
    if state is not None and (name == state.name or name in state.kept):
        raise InputError("a new adapter name", f"'{name}', which is there", "pass another name, or detach_ first")
    stored = _Stored(Path(path))
    exchange_(model, name, lambda: _fit(model, stored, check_base=check_base))
    return list(state_of(model).recipe.names)


class _Stored:
    """A file's content, checked as far as that goes without a model."""

    def __init__(self, path: Path) -> None:
        metadata, self.also = _read(path)
        missing = [key for key in ("method", "weights") if key not in metadata]
        if missing:
            raise InputError(f"an adapter's metadata in {path}", f"no {missing[0]}", "save the adapter again")
        self.path = path
        self.method = _method(metadata["method"])
        self.weights = unfold(metadata["weights"])
        bits = metadata.get("bits", str(self.method.bits or 32))
        if bits not in _BITS:
            raise InputError(f"bits out of: {', '.join(_BITS)}", f"{bits[:20]} in {path}", "save the adapter again")
        self.bits = int(bits)
        self.base = metadata.get("base")
        self.packed = self.also.pop(_NUMBERS, None)


def _sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    content = pack_weights(tensors, metadata | {"crc": "0" * 8})
    return content.replace(_NO_CHECK, _NO_CHECK.replace(b"0" * 8, b"%08x" % zlib.crc32(content)), 1)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that is whole."""
    if not path.is_file():
        raise InputError("an adapter file", f"{path}, which is absent", "check the path")
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    try:
        tensors = safetensors.torch.load(content)
        metadata: dict[str, str] = json.loads(header).get("__metadata__", {})
    except Exception as error:  # safetensors' own error class has no stable home
        raise InputError("a whole .safetensors file", f"{path} ({error})", "copy it again") from error
    if metadata.get("format") != FORMAT or len(header) > _MOST_METADATA:
        raise InputError(f"an adapter of format {FORMAT}", f"{path} of {metadata.get('format')}", "see save_adapter")
    check = _CHECK.search(header)
    plain = content if check is None else content.replace(check[0], _NO_CHECK, 1)
    if check is None or int(check[1], 16) != zlib.crc32(plain):
        raise InputError("a file with the checksum it was written with", f"{path} with another", "copy it again")
    return metadata, tensors


def _metadata(method: Method, named: Sequence[Named], *, bits: int, base: str | None) -> dict[str, str]:
    settings = method.settings()
    words = [
        f"{key}={int(value) if isinstance(value, bool) else value}"
        for key, value in settings.items()
        if key in _READ and str(value) not in _LEFT_OUT and (key != "alpha" or value != settings["rank"])
    ]
    metadata = {"format": FORMAT, "method": " ".join([method.name, *words]), "weights": fold(named)}
    return (
        metadata
        | ({} if bits == (method.bits or 32) else {"bits": str(bits)})
        | ({} if base is None else {"base": base})
    )


def _method(text: str) -> Method:
    """The method a file names, its settings checked as if given by hand."""
    name, *words = text.split(" ")
    if name not in _METHODS:
        raise InputError(f"a method out of: {', '.join(_METHODS)}", name, "install the version that wrote the file")
    found = [_WORD.fullmatch(word) for word in words]
    try:
        settings = {match[1]: _READ[match[1]](match[2]) for match in found if match is not None}
        if None in found or len(settings) < len(found):
            raise InputError("settings as key=value, once each", text[:200], "save the adapter again")
        return _made(name, settings)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("a method's settings", f"{text[:200]} ({error!r})", "save the adapter again") from error


def _made(name: str, settings: dict[str, Any]) -> Method:
    if name != "nola":
        return _METHODS[name](**settings)
    generator = settings.pop("generator")
    if generator != GENERATOR:
        got = f"{generator}, unknown to this version"
        raise InputError(f"bases of generator {GENERATOR}", got, "install the version that wrote the file")
    return nola(
        combine=COMBINES[settings.pop("kind", "orthogonal")], shared=bool(settings.pop("shared", 0)), **settings
    )


def _fit(model: nn.Module, stored: _Stored, *, check_base: bool) -> tuple[Recipe, Values]:
    """The recipe and numbers for this bare model, or what differs."""
    names = [name for name, _ in stored.weights]
    if len(set(names)) < len(names):
        raise InputError("each weight once", f"one twice in {stored.path}", "save the adapter again")
    targets = named_targets(model, names)
    for target, (name, shape) in zip(targets, stored.weights, strict=True):
        if target.shape != shape:
            raise InputError(f"{name} of shape {list(shape)}", f"{list(target.shape)}", "load it onto its own base")
    _check_rank(stored.method, stored.weights)
    recipe = Recipe(stored.method, tuple(names), _also(model, targets, stored.also))
    own = _base(model, recipe)
    if check_base and stored.base is not None and own is not None and stored.base != own:
        raise InputError(
            f"a base with fingerprint {stored.base}",
            f"{own}: the same shapes, other weights",
            "load the weights it was trained on, or pass check_base=False",
        )
    lengths = _lengths(stored.method, [shape for _, shape in stored.weights])
    if bool(names) != bool(lengths) or bool(names) != (stored.packed is not None):
        raise InputError(
            "numbers for the adapted weights, and for none else", f"others in {stored.path}", "copy it again"
        )
    vectors = [] if stored.packed is None else unpack(stored.packed, lengths, stored.bits)
    return recipe, Values(torch.cat(vectors) if vectors else torch.zeros(0), stored.also)


def _also(model: nn.Module, targets: list[Target], also: dict[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors trained in full, in the model's order."""
    own = tensors_of(model)
    adapted = {id(target.weight) for target in targets}
    for name, value in also.items():
        if name not in own or own[name].shape != value.shape:
            got = f"shape {list(own[name].shape)}" if name in own else "none of that name"
            raise InputError(f"a parameter {name} of shape {list(value.shape)}", got, "load it onto its own base")
        if id(own[name]) in adapted:
            raise InputError("weights adapted or trained in full", f"{name}, which is both", "save the adapter again")
    return tuple(name for name in own if name in also)


def _lengths(method: Method, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """How many numbers each vector has, in the order of the file."""
    if isinstance(method, Nola):
        return method.lengths(shapes)
    if isinstance(method, Lora):
        return [method.rank * side for out, inn in shapes for side in (inn, out)]
    return []


def _check_rank(method: Method, named: Sequence[Named]) -> None:
    """Beyond the largest side a rank adds nothing, but a file of bytes could ask for gigabytes by it."""
    rank, most = getattr(method, "rank", 0), max((max(shape) for _, shape in named), default=0)
    if named and rank > most:
        raise InputError(f"a rank of at most {most}, the largest side of the weights", f"{rank}", "take a smaller rank")


def _base(model: nn.Module, recipe: Recipe) -> str | None:
    """Fingerprint of what the adapter leaves alone; ``None`` where that is unknown, as for quantised weights."""
    state = find_state(model)
    inside = set() if state is None else {id(number) for number in numbers_of(state)}
    kept = [
        (re.sub(r"(^|\.)parametrizations\.(.*)\.original$", r"\1\2", name), parameter.detach())
        for name, parameter in model.named_parameters()
        if name not in recipe.also and id(parameter) not in inside
    ]
    return fingerprint(kept) if kept else None
