"""Sizes by numbers and by bytes: as close as can be from below, and exact in bytes of the file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scrimp.adapt import attach_, lora, lora_of, lora_of_bytes, nola_of, nola_of_bytes
from scrimp.adapt.file import adapter_bytes
from scrimp.adapt.methods import Method
from scrimp.adapt.nola import nola
from scrimp.primitives.errors import InputError


def stack(*sizes: tuple[int, int]) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*[nn.Linear(inn, out, bias=False) for out, inn in sizes])


def counted(method: Method, model: nn.Sequential) -> int:
    shapes = [(layer.out_features, layer.in_features) for layer in model]  # type: ignore[union-attr]
    return sum(number.numel() for part in method.factors(shapes) for number in part.parameters())  # type: ignore[arg-type]


MODELS = {
    "alike": stack(*[(96, 96)] * 6),
    "of a ViT": stack(*[(576, 192), (192, 192), (768, 192), (192, 768)] * 12),
    "odd": stack((3, 500), (1, 7), (64, 1), (200, 31), (5, 5)),
    "one weight": stack((10, 17)),
}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_no_nola_comes_closer_from_below(name: str, rank: int) -> None:
    model = MODELS[name]
    most = counted(nola(rank, 10**9), model)
    for numbers in sorted({2, 3, 17, most // 7, most // 3, most // 2, most - 1} & set(range(2, most))):
        method = nola_of(model, numbers, where=r".", rank=rank)
        got = counted(method, model)
        larger = nola(rank, method.bases + 1, shared=method.shared)
        assert 2 <= got <= numbers < counted(larger, model)
        assert method.shared == (numbers < 8 * 2 * len(model))


def test_settings_are_passed_on() -> None:
    method = nola_of(MODELS["alike"], 400, where=r"[02]", rank=2, seed=9, bits=4)
    assert (method.rank, method.bases, method.seed, method.bits, method.shared) == (2, 100, 9, 4, False)


@pytest.mark.parametrize("numbers", [1, 0, -4, 6 * 4 * 2 * 96, 10**9])
def test_numbers_out_of_range(numbers: int) -> None:
    with pytest.raises(InputError, match=r"at least 2 numbers|fewer than the 4608 numbers of LoRA at rank 4"):
        nola_of(MODELS["alike"], numbers, where=r".")


@pytest.mark.parametrize(("numbers", "rank"), [(1152, 1), (1153, 1), (2303, 1), (2304, 2), (5000, 4), (96 * 1152, 96)])
def test_the_largest_rank_within_the_numbers(numbers: int, rank: int) -> None:
    assert lora_of(MODELS["alike"], numbers, where=r".", seed=3).rank == rank


def test_numbers_no_lora_has() -> None:
    with pytest.raises(InputError, match="at least 1152 numbers for LoRA at rank 1"):
        lora_of(MODELS["alike"], 1151, where=r".")
    with pytest.raises(InputError, match="at most 110592 numbers, rank 96"):
        lora_of(MODELS["alike"], 97 * 1152, where=r".")


def written(method: Method, model: nn.Sequential, bits: int) -> int:
    """Bytes of the real file of this method on weights that are there."""
    real = nn.Sequential(*[nn.Linear(layer.in_features, layer.out_features, bias=False) for layer in model])  # type: ignore[arg-type]
    attach_(real, method, where=r".")
    return len(adapter_bytes(real, bits=bits))


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 3, 2])
def test_files_fill_the_bytes_asked_for(bits: int) -> None:
    model = stack(*[(96, 64), (64, 64), (128, 64), (64, 128)] * 6)
    most = 64 * 6 * 672 * bits // 8  # of all of LoRA's entries
    for size in (500, 2_000, 11_111, 100_000):
        if size > most:
            continue
        method = nola_of_bytes(model, size, bits=bits, where=r".", rank=64, seed=2**40)
        got = written(method, model, bits)
        assert got <= size
        assert got >= (0.8 if size >= 2_000 else 0.7) * size
        assert method.bits == (bits if bits <= 8 else None)


def test_bytes_out_of_range() -> None:
    model = MODELS["alike"]
    with pytest.raises(InputError, match=r"at least \d+ bytes for this model's names and 2 numbers; got 100"):
        nola_of_bytes(model, 100, where=r".")
    with pytest.raises(InputError, match=r"at most \d+ bytes: LoRA at rank 4 is no larger; got 1000000"):
        nola_of_bytes(model, 1_000_000, where=r".")


@pytest.mark.touches_global_rng
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_lora_takes_the_largest_rank_that_fits(bits: int) -> None:
    model: Any = stack((96, 64), (64, 64), (128, 64))
    method = lora_of_bytes(model, 20_000, bits=bits, where=r".")
    assert written(method, model, bits) <= 20_000 < written(lora(method.rank + 1), model, bits)
    with pytest.raises(InputError, match=r"at least \d+ bytes for LoRA at rank 1; got 200"):
        lora_of_bytes(model, 200, bits=bits, where=r".")
    with pytest.raises(InputError, match=r"at most the \d+ bytes of rank 128"):
        lora_of_bytes(model, 10**9, bits=bits, where=r".")
