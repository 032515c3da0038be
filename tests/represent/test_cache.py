"""The cache of embeddings, in RAM and in a file, against a dictionary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from represent_reference import draws, of_unit_length

from scrimp.primitives.errors import InputError
from scrimp.represent import EmbeddingCache

OFF = {torch.float16: 5e-4, torch.float32: 2e-7}


@pytest.mark.parametrize("dtype", OFF, ids=str)
@settings(max_examples=30)
@given(
    images=st.integers(1, 12),
    dim=st.integers(1, 9),
    batches=st.lists(st.integers(0, 12), max_size=5),
    seed=st.integers(0, 10**6),
)
def test_the_last_that_was_written_is_read(dtype, images: int, dim: int, batches: list[int], seed: int) -> None:
    cache, kept = EmbeddingCache(images, dim, dtype=dtype), {}
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(batches):
        indices = torch.randperm(images, generator=generator)[:batch]
        vectors = draws(len(indices), dim, seed=seed + number)
        cache.write_(indices, vectors)
        kept.update({row: of_unit_length(v) for row, v in zip(indices.tolist(), vectors, strict=True)})
    asked = torch.randint(0, images, (20,), generator=generator)
    expected = torch.stack([kept.get(row, torch.zeros(dim, dtype=torch.float64)) for row in asked.tolist()])
    found = cache.read(asked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=OFF[dtype], rtol=0)


@pytest.mark.parametrize("dtype", OFF, ids=str)
def test_ram_and_file_agree_and_the_file_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    ram, file = EmbeddingCache(11, 5, dtype=dtype), EmbeddingCache(11, 5, path=path, dtype=dtype)
    assert not bool(file.read(torch.arange(11)).any())
    for rows in ([3, 0, 10], [10, 4]):
        for cache in (ram, file):
            cache.write_(torch.tensor(rows), draws(len(rows), 5, seed=len(rows)))
    everything = torch.arange(11)
    assert torch.equal(ram.read(everything), file.read(everything))
    assert path.stat().st_size == 11 * 5 * dtype.itemsize
    del file
    again = EmbeddingCache(11, 5, path=path, dtype=dtype)
    assert torch.equal(ram.read(everything), again.read(everything))
    again.write_(torch.tensor([1]), torch.ones(1, 5))
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(11, 5)
    torch.testing.assert_close(stored[1].float(), torch.full((5,), 0.2**0.5), atol=5e-4, rtol=0)


def test_a_file_of_another_length_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    EmbeddingCache(4, 3, path=path).write_(torch.arange(4), torch.ones(4, 3))
    before = path.read_bytes()
    for images, dtype in ((5, torch.float16), (4, torch.float32)):
        with pytest.raises(InputError, match=rf"a cache file of {images * 3 * dtype.itemsize} bytes; got .* of 24"):
            EmbeddingCache(images, 3, path=path, dtype=dtype)
    assert path.read_bytes() == before


def test_a_state_moves_between_ram_and_file(tmp_path: Path) -> None:
    ram, file = EmbeddingCache(6, 4), EmbeddingCache(6, 4, path=tmp_path / "cache.bin")
    ram.write_(torch.tensor([5, 2]), draws(2, 4))
    file.load_state_dict({name: value.clone() for name, value in ram.state_dict().items()})
    assert torch.equal(ram.read(torch.arange(6)), file.read(torch.arange(6)))
    with pytest.raises(InputError, match=r"a cache of \[6, 4\]; got \[6, 5\]"):
        ram.load_state_dict(EmbeddingCache(6, 5).state_dict())


def test_zeros_stay_zeros_and_nothing_is_aliased() -> None:
    cache, vectors = EmbeddingCache(3, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    cache.write_(torch.tensor([0, 2]), vectors)
    found = cache.read(torch.arange(3))
    torch.testing.assert_close(found, torch.tensor([[0, 0], [0, 0], [0.6, 0.8]]), atol=5e-4, rtol=0)
    assert not found.requires_grad
    found.fill_(7)
    assert not bool((cache.read(torch.arange(3)) == 7).any())


def test_read_goes_where_it_is_asked_to() -> None:
    assert EmbeddingCache(3, 2).read(torch.arange(2), device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("indices", "vectors", "said"),
    [
        (torch.arange(3), torch.ones(3, 1), r"floating embeddings \[3, 2\]; got float32 \[3, 1\]"),
        (torch.arange(3), torch.ones(1, 2), r"floating embeddings \[3, 2\]; got float32 \[1, 2\]"),
        (torch.arange(3), torch.ones(3, 2, dtype=torch.int64), "got int64"),
        (torch.ones(3, dtype=torch.bool), torch.ones(3, 2), r"indices as int64 \[3\]; got bool \[3\]"),
    ],
)
def test_what_would_be_spread_over_many_rows_is_refused(indices, vectors, said: str) -> None:
    cache = EmbeddingCache(4, 2)
    with pytest.raises(InputError, match=said):
        cache.write_(indices, vectors)
    assert not bool(cache.read(torch.arange(4)).any())


@pytest.mark.parametrize(
    ("images", "dim", "dtype"),
    [(0, 2, torch.float16), (2, 0, torch.float16), (2, 2, torch.bfloat16), (2, 2, torch.float64)],
)
def test_sizes_and_types_out_of_range(images: int, dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="images and dim from 1, float16 or float32; got"):
        EmbeddingCache(images, dim, dtype=dtype, path=tmp_path / "none.bin")
    assert list(tmp_path.iterdir()) == []
