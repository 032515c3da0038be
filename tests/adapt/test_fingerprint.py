"""The fingerprint: the same for copies, another for other weights, none where weights cannot be read."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy
import pytest
import torch
from torch import Tensor, nn

from scrimp.adapt.fingerprint import fingerprint


def weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def reference(tensors: list[tuple[str, Tensor]]) -> str:
    """From the description, in NumPy: bfloat16 is float32's upper half, rounded to even."""
    content = b"scrimp-weights-1"
    for name, tensor in sorted(tensors):
        flat = tensor.detach().double().numpy().reshape(-1)
        taken = min(64, flat.size)
        places = [place * (flat.size - 1) // max(taken - 1, 1) for place in range(taken)]
        pattern = flat[places].astype(numpy.float32).view(numpy.uint32).astype(numpy.uint64)
        upper = ((pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16).astype("<u2")
        header = json.dumps([name, list(tensor.shape)]).encode()
        content += len(header).to_bytes(8, "little") + header + upper.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def test_it_is_what_the_description_says(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"single": (), "none": (0, 3), "one": (1,), "63": (63,), "64": (8, 8), "65": (5, 13), "many": (7, 11, 13)}
    tensors = [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()] + weights(model)
    found = fingerprint(tensors)
    assert found == reference(tensors)
    assert fingerprint(reversed(tensors)) == found


def test_copies_agree(model: nn.Module) -> None:
    own = fingerprint(weights(model))
    assert fingerprint(weights(copy.deepcopy(model).bfloat16())) == own
    assert fingerprint(weights(copy.deepcopy(model).double())) == own
    assert fingerprint(weights(copy.deepcopy(model).to(memory_format=torch.channels_last))) == own
    assert fingerprint([(name, tensor.detach()) for name, tensor in weights(model)]) == own


def test_a_step_of_training_is_seen(model: nn.Module) -> None:
    further = copy.deepcopy(model)
    optimizer = torch.optim.Adam(further[3].parameters(), lr=1e-3)
    pixels = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    further(pixels).square().sum().backward()
    optimizer.step()
    assert fingerprint(weights(further)) != fingerprint(weights(model))


def test_names_shapes_and_their_order_count() -> None:
    tensor = torch.arange(6.0)
    found = [
        fingerprint([("a", tensor)]),
        fingerprint([("b", tensor)]),
        fingerprint([("a", tensor.view(2, 3))]),
        fingerprint([("a", tensor.view(3, 2))]),
        fingerprint([("a", tensor.flip(0))]),
        fingerprint([("a", tensor), ("b", tensor + 1)]),
        fingerprint([("a", tensor + 1), ("b", tensor)]),
    ]
    assert len(set(found)) == len(found)
    assert all(digits is not None and len(digits) == 16 and int(digits, 16) >= 0 for digits in found)


def test_every_layout_is_read_in_the_same_order() -> None:
    tensor = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    transposed = tensor.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert fingerprint([("a", transposed)]) == fingerprint([("a", tensor)])
    assert fingerprint([("a", tensor[:1].expand(9, 20))]) == fingerprint([("a", tensor[:1].repeat(9, 1))])


def test_values_that_are_no_numbers_agree_too() -> None:
    patterns = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert patterns.isnan().all()
    assert fingerprint([("a", patterns)]) == fingerprint([("a", torch.full((3,), torch.nan))])
    assert fingerprint([("a", torch.full((3,), torch.inf))]) != fingerprint([("a", patterns)])


class Packed(Tensor):
    """Stands for the tensor kinds of quantisation libraries, which claim a floating dtype."""


@pytest.mark.parametrize(
    "unreadable",
    [
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(4, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(4, device="meta"),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4).as_subclass(Packed),
    ],
    ids=["int8", "uint8", "bool", "float8", "meta", "sparse", "subclass"],
)
def test_what_cannot_be_read_is_unknown(unreadable: Tensor) -> None:
    assert fingerprint([("a", torch.ones(3)), ("b", unreadable)]) is None


def test_only_the_entries_looked_at_are_read() -> None:
    # Expanded to 10^12 entries: whatever touched all of them would run out of memory.
    assert fingerprint([("a", torch.ones(1).expand(10**6, 10**6))]) is not None
