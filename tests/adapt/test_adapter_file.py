"""Adapter files: as small as promised, exact, and no harm from damaged or hostile ones."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import zlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from scrimp.adapt import (
    adapters,
    attach_,
    bias,
    detach_,
    full,
    independent,
    linear,
    load_adapter_,
    lora,
    nola,
    save_adapter,
    use_,
)
from scrimp.adapt.file import adapter_bytes, file_bytes
from scrimp.adapt.methods import Method
from scrimp.adapt.targets import find_targets
from scrimp.primitives.errors import InputError
from scrimp.primitives.weights import pack_weights


class Net(nn.Module):
    """A convolution, attention, a linear layer under batch statistics, a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Linear(width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.norm(self.stem(images)).flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.mlp(mixed).mean(1))


def bare(seed: int = 0, **settings: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**settings).eval()


IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(method: Method, where: Any = None, also: str | None = r"^head\.") -> nn.Module:
    model = bare()
    attach_(model, method, where=where, also=also)
    return moved(model)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IMAGES)
    return result


class Stack(nn.Module):
    """The weights of a transformer by their names and shapes, on no device."""

    def __init__(self, layers: int, shapes: dict[str, tuple[int, int]], prefix: str = "blocks") -> None:
        super().__init__()
        with torch.device("meta"):
            rows = nn.ModuleList()
            for _ in range(layers):
                row = nn.Module()
                for name, (out, inn) in shapes.items():
                    owner, _, last = name.rpartition(".")
                    if owner and not hasattr(row, owner):
                        row.add_module(owner, nn.Module())
                    row.get_submodule(owner).add_module(last, nn.Linear(inn, out, bias=False))
                rows.append(row)
        outer, _, inner = prefix.rpartition(".")
        if outer:
            self.add_module(outer, nn.Module())
        self.get_submodule(outer).add_module(inner, rows)


def vit_small() -> Stack:
    return Stack(12, {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)})


def smol() -> Stack:
    shapes = {f"self_attn.{key}_proj": (576 if key in "qo" else 192, 576) for key in "qkvo"}
    shapes |= {"mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}
    return Stack(30, shapes, "model.layers")


@pytest.mark.parametrize(
    ("build", "bases", "bits"),
    [*((vit_small, 41, bits) for bits in (32, 16, 8, 4, 3, 2)), (smol, 10, 32), (smol, 20, 4), (smol, 40, 2)],
)
def test_at_most_a_tenth_and_a_kilobyte_more_than_the_numbers(build: Any, bases: int, bits: int) -> None:
    model, method = build(), nola(4, bases, seed=123)
    attach_(model, method, where=r".")
    for module in model.modules():
        if hasattr(module, "factors"):
            module.to_empty(device="cpu").factors.load_state_dict(
                {"alpha": torch.zeros(bases), "beta": torch.ones(bases)}
            )
    content = adapter_bytes(model, bits=bits)
    named = [(target.name, target.shape) for target in find_targets(build(), r".")]
    # The one entry that weights on no device cannot have.
    assert len(content) + len('"base":"0123456789abcdef",') == pytest.approx(file_bytes(method, named, bits), abs=8)
    assert file_bytes(method, named, bits) <= 1.1 * 2 * bases * len(named) * bits / 8 + 1024


def test_length_is_foretold(tmp_path: Path) -> None:
    model = adapted(nola(2, 13, 3, bits=3), where=r"stem|mlp", also=None)
    named = [(target.name, target.shape) for target in find_targets(bare(), r"stem|mlp")]
    for bits in (32, 16, 8, 4, 3, 2):
        assert len(adapter_bytes(model, bits=bits)) == file_bytes(nola(2, 13, 3, bits=3), named, bits)


CASES: dict[str, tuple[Method, int | None]] = {
    "nola": (nola(2, 16, 7), None),
    "nola at its default": (nola(), None),
    "of the paper": (nola(2, 6, 7, combine=independent), None),
    "shared": (nola(2, 16, 7, shared=True, alpha=0.3), None),
    "trained at 8 bits": (nola(2, 16, 7, bits=8), None),
    "trained at 4 bits": (nola(2, 16, 7, bits=4), None),
    "trained at 3 bits, shared": (nola(2, 16, 7, bits=3, shared=True), None),
    "trained at 2 bits": (nola(2, 16, 2**64 - 1, bits=2), None),
    "trained at 2 bits, kept at 32": (nola(2, 16, bits=2), 32),
    "lora": (lora(2, alpha=3.0, seed=4), None),
    "bias": (bias(), None),
    "linear": (linear(), None),
    "full": (full(), None),
}


@pytest.mark.parametrize("case", CASES)
def test_reload_differs_by_nothing(case: str, tmp_path: Path) -> None:
    method, bits = CASES[case]
    model = adapted(method)
    path = save_adapter(model, tmp_path / "deep" / "adapter.safetensors", bits=bits)
    again = bare()
    names = load_adapter_(again, path, name="other")
    assert adapters(again) == ("other",)
    assert (outputs(model) - outputs(bare())).abs().max() > 1e-4
    assert torch.equal(outputs(model), outputs(again))
    assert bool(names) == (case not in ("bias", "linear", "full"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert adapter_bytes(again, bits=bits) == adapter_bytes(model, bits=bits) == path.read_bytes()


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_fewer_bits_after_training_are_the_same_ever_after(bits: int, tmp_path: Path) -> None:
    model = adapted(nola(2, 32))
    path = save_adapter(model, tmp_path / "one", bits=bits)
    one, two = bare(), bare()
    load_adapter_(one, path)
    assert save_adapter(one, tmp_path / "two", bits=bits).read_bytes() == path.read_bytes()
    load_adapter_(two, save_adapter(one, tmp_path / "three", bits=32))
    assert torch.equal(outputs(one), outputs(two))
    error = (outputs(one) - outputs(model)).abs().max().item()
    assert 0 < error < {16: 1e-2, 8: 0.1, 4: 1, 3: 2, 2: 3}[bits]


def test_a_fresh_process_finds_the_same_outputs(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 5))

    model, inputs = build(), torch.linspace(-1, 1, 72).view(3, 24)
    attach_(model, nola(3, 20, 9, bits=4), where=r".")
    save_adapter(moved(model), tmp_path / "adapter")
    torch.save((build(), inputs, model(inputs).detach()), tmp_path / "case.pt")
    code = (
        "import sys, torch; from scrimp.adapt import load_adapter_; torch.set_num_threads(2)\n"
        "model, inputs, want = torch.load(sys.argv[1] + '/case.pt', weights_only=False)\n"
        "load_adapter_(model, sys.argv[1] + '/adapter')\n"
        "assert torch.equal(model(inputs), want)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ)


def test_several_adapters_of_files_take_turns(tmp_path: Path) -> None:
    first, second = adapted(nola(2, 16, 1)), adapted(lora(2))
    model = bare()
    for name, source in (("first", first), ("second", second)):
        load_adapter_(model, save_adapter(source, tmp_path / name), name=name)
    assert torch.equal(outputs(model), outputs(second))
    use_(model, "first")
    assert torch.equal(outputs(model), outputs(first))
    detach_(model)
    assert torch.equal(outputs(model), outputs(bare()))


def test_base_of_another_precision_is_the_same_base(tmp_path: Path) -> None:
    path = save_adapter(adapted(nola(2, 16)), tmp_path / "adapter")
    load_adapter_(bare().bfloat16(), path)


def test_base_of_other_weights(tmp_path: Path) -> None:
    path = save_adapter(adapted(nola(2, 16)), tmp_path / "adapter")
    model = bare(1)
    with pytest.raises(InputError, match=r"fingerprint [0-9a-f]{16}; got [0-9a-f]{16}: the same shapes, other weights"):
        load_adapter_(model, path)
    load_adapter_(model, path, check_base=False)


def test_other_heads_make_no_other_base(tmp_path: Path) -> None:
    path = save_adapter(adapted(nola(2, 16)), tmp_path / "adapter")
    model = bare()
    nn.init.zeros_(model.head.weight)
    load_adapter_(model, path)


@pytest.mark.touches_global_rng
def test_quantised_base_is_unknown_and_accepted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)
    attach_(model, nola(1, 4), where=r"^0$")
    content = adapter_bytes(model)
    assert b'"base"' not in content
    detach_(model)
    (tmp_path / "adapter").write_bytes(content)
    load_adapter_(model, tmp_path / "adapter")


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (type(module).__name__, len(module._forward_hooks)) for name, module in model.named_modules()},
        set(vars(model)),
    )


def refused(model: nn.Module, path: Path, said: str) -> None:
    """Loading says so, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(InputError, match=said):
        load_adapter_(model, path, name="new")
    after = snapshot(model)
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def sealed(metadata: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """A file with a valid checksum, whatever else is in it."""
    content = pack_weights(tensors, metadata | {"crc": "0" * 8})
    return content.replace(b'"crc":"00000000"', b'"crc":"%08x"' % zlib.crc32(content), 1)


def parts(content: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"], safetensors.torch.load(content)


@pytest.fixture(scope="module")
def whole() -> bytes:
    return adapter_bytes(adapted(nola(2, 8, 3, bits=4), where=r"stem|mlp"))


WEIGHTS = "stem:8x27,mlp:8x8"
HOSTILE: dict[str, tuple[dict[str, str | None], str]] = {
    "a later format": ({"format": "scrimp-adapter-2"}, "format scrimp-adapter-1"),
    "another library's": ({"format": "pt"}, "format scrimp-adapter-1"),
    "no method": ({"method": None}, "no method"),
    "no weights": ({"weights": None}, "no weights"),
    "an unknown method": ({"method": "prompt length=3"}, "a method out of: nola, lora"),
    "a later generator": (
        {"method": "nola rank=2 bases=8 kind=orthogonal generator=philox-2"}, "generator philox-1; got philox-2"
    ),
    "an unknown kind of bases": ({"method": "nola rank=2 bases=8 kind=x generator=philox-1"}, "settings"),
    "an unknown setting": ({"method": "nola rank=2 bases=8 kind=orthogonal generator=philox-1 x=1"}, "settings"),
    "a setting twice": ({"method": "lora rank=2 rank=3"}, "once each"),
    "no settings": ({"method": "nola"}, "settings"),
    "code": ({"method": "nola __import__('os')"}, "key=value"),
    "a negative rank": ({"method": "lora rank=-2"}, "rank of at least 1"),
    "a giant rank": (
        {"method": "nola rank=1000000000000 bases=8 kind=orthogonal generator=philox-1"}, "rank of at most 27"
    ),
    "a giant rank of lora": ({"method": "lora rank=1000000000000"}, "rank of at most 27"),
    "a number beyond all": ({"method": "lora rank=" + "9" * 40}, "rank of at most 27"),
    "a giant number of bases": (
        {"method": f"nola rank=2 bases={10**30} shared=1 kind=orthogonal generator=philox-1"}, "for these vectors"
    ),
    "an infinite scale": ({"method": "lora rank=2 alpha=inf"}, "."),
    "bits of another kind": ({"bits": "5"}, "bits out of: 32, .*; got 5"),
    "bits that are no number": ({"bits": "four"}, "bits out of: 32, .*; got four"),
    "other bits": ({"bits": "8"}, "for these vectors"),
    "all names there are": ({"weights": "blocks.{0-999999999}.(attn.qkv:576x192)"}, "."),
    "nested names": ({"weights": "b{0-9}{0-9}(a:1x1)"}, "."),
    "no text of names": ({"weights": ")))(("}, "."),
    "another shape": ({"weights": "stem:8x27,mlp:8x9"}, r"mlp of shape \[8, 9\]; got \[8, 8\]"),
    "a shape of one number": ({"weights": "stem:8x27,mlp:64"}, r"mlp of shape \[64\]; got \[8, 8\]"),
    "a module that is absent": ({"weights": "stem:8x27,mlp2:8x8"}, "adapted module 'mlp2'"),
    "a weight twice": ({"weights": "mlp:8x8,mlp:8x8"}, "each weight once"),
    "no names": ({"weights": ""}, "numbers for the adapted weights"),
    "fewer names": ({"weights": "stem:8x27"}, "for these vectors"),
    "numbers for a method without": ({"method": "linear"}, "numbers for the adapted weights"),
    "settings for a method without": ({"method": "linear rank=2"}, "a method's settings"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_metadata(case: str, whole: bytes, tmp_path: Path) -> None:
    changes, said = HOSTILE[case]
    metadata, tensors = parts(whole)
    assert metadata["weights"] == WEIGHTS
    changed = {key: value for key, value in (metadata | changes).items() if value is not None}
    (tmp_path / "adapter").write_bytes(sealed(changed, tensors))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(bare(), tmp_path / "adapter", said)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kilobytes


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no numbers": ({".numbers": None}, "numbers for the adapted weights"),
    "fewer numbers": ({".numbers": torch.zeros(3, dtype=torch.uint8)}, "for these vectors"),
    "numbers of another type": ({".numbers": torch.zeros(28)}, "for these vectors"),
    "a tensor too many": ({"head.scale": torch.zeros(3)}, r"parameter head.scale of shape \[3\]; got none"),
    "a head of another shape": (
        {"head.weight": torch.zeros(5, 8)},
        r"head.weight of shape \[5, 8\]; got shape \[4, 8\]",
    ),
    "an adapted weight itself": ({"mlp.weight": torch.zeros(8, 8)}, "mlp.weight, which is both"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors(case: str, whole: bytes, tmp_path: Path) -> None:
    changes, said = TENSORS[case]
    metadata, tensors = parts(whole)
    changed = {key: value for key, value in (tensors | changes).items() if value is not None}
    (tmp_path / "adapter").write_bytes(sealed(metadata, changed))
    refused(bare(), tmp_path / "adapter", said)


def test_refusal_on_an_adapted_model_keeps_its_adapter(whole: bytes, tmp_path: Path) -> None:
    metadata, tensors = parts(whole)
    (tmp_path / "adapter").write_bytes(sealed(metadata | {"weights": "stem:8x27,mlp:8x9"}, tensors))
    model = adapted(lora(2), where=r"attention|mlp")
    before = outputs(model)
    refused(model, tmp_path / "adapter", "mlp of shape")
    assert adapters(model) == ("default",)
    assert torch.equal(outputs(model), before)


def test_truncated(whole: bytes, tmp_path: Path) -> None:
    model, path = bare(), tmp_path / "adapter"
    for length in range(0, len(whole), 16):
        path.write_bytes(whole[:length])
        refused(model, path, "safetensors|format")
    path.write_bytes(whole + b"\0")
    refused(model, path, "safetensors")


@settings(max_examples=60)
@given(place=some.integers(0, 1 << 20), mask=some.integers(1, 255))
def test_flipped_bytes(place: int, mask: int, tmp_path_factory: pytest.TempPathFactory, whole: bytes) -> None:
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= mask
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    refused(bare(), path, ".")


@settings(max_examples=50)
@given(
    some.dictionaries(some.sampled_from(["format", "method", "weights", "bits", "base", "x"]), some.text()), some.data()
)
def test_any_metadata_at_all(changes: dict[str, str], data: Any) -> None:
    """Under a valid checksum: whatever is said, it loads or is refused."""
    content = adapter_bytes(adapted(nola(1, 4), where=r"mlp", also=None))
    metadata, tensors = parts(content)
    kept = {key: value for key, value in metadata.items() if data.draw(some.booleans())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        path.write_bytes(sealed(kept | changes, tensors))
        try:
            load_adapter_(bare(), path)
        except InputError:
            return
        assert metadata.items() <= (kept | changes | {"crc": metadata["crc"], "base": metadata["base"]}).items()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    with pytest.raises(InputError, match="a model with an adapter"):
        save_adapter(bare(), path)
    model = adapted(nola(2, 8), where="mlp")
    with pytest.raises(InputError, match="bits"):
        save_adapter(model, path, bits=5)
    with torch.no_grad():
        next(parameter for parameter in model.mlp.parameters() if parameter.requires_grad).fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="finite"):
        save_adapter(model, path)
    use_(model, None)
    with pytest.raises(InputError, match="live adapter to save"):
        save_adapter(model, path)
    with pytest.raises(InputError, match="rank of at most 8"):
        save_adapter(adapted(nola(9, 8), where="mlp"), path)
    assert not path.exists()


def test_absent_files_and_names_in_use(whole: bytes, tmp_path: Path) -> None:
    refused(bare(), tmp_path / "nothing", "which is absent")
    refused(bare(), tmp_path, "which is absent")
    (tmp_path / "adapter").write_bytes(whole)
    model = bare()
    load_adapter_(model, tmp_path / "adapter", name="new")
    refused(model, tmp_path / "adapter", "'new', which is there")


def test_arguments_and_global_generator_untouched(tmp_path: Path) -> None:
    model = adapted(nola(2, 8))
    before, drawn = snapshot(model), torch.random.get_rng_state()
    path = save_adapter(model, tmp_path / "adapter")
    load_adapter_(bare(), path)
    after = snapshot(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert deepcopy(path) == path
