"""Exact search in pieces against all pairs at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scrimp.meter.memory import peak_bytes
from scrimp.primitives.errors import InputError
from scrimp.primitives.nearest import CHUNK, nearest

# Half-precision products are rounded to their own type before they are compared.
OFF = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draws(rows: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return (vectors / vectors.norm(dim=1, keepdim=True)).to(dtype)


def check(queries: torch.Tensor, keys: torch.Tensor, k: int, *, allowed: torch.Tensor | None = None, **options) -> None:
    """The largest similarities in order, each at an index that has it, no index twice; the rest marked."""
    similar, found = nearest(queries, keys, k, allowed=allowed, **options)
    exact = queries.double() @ keys.double().T
    if allowed is not None:
        exact = exact.masked_fill(~allowed, -torch.inf)
    best, off = exact.topk(k, dim=1).values, OFF[queries.dtype]
    assert similar.shape == found.shape == (len(queries), k)
    assert similar.dtype == torch.promote_types(queries.dtype, torch.float32)
    assert found.dtype == torch.int64
    torch.testing.assert_close(similar.double(), best, atol=off, rtol=0)
    assert bool((similar[:, 1:] <= similar[:, :-1]).all())
    there = best > -torch.inf
    torch.testing.assert_close(exact.gather(1, found)[there], best[there], atol=2 * off, rtol=0)
    assert bool((found[~there] == 0).all())
    for row, real in zip(found, there, strict=True):
        assert len(set(row[real].tolist())) == int(real.sum())


@given(
    n=st.integers(0, 5),
    m=st.integers(1, 700),
    dim=st.integers(1, 9),
    chunk=st.sampled_from([1, 3, 64, 65, 255, 256, 300, CHUNK]),
    share=st.sampled_from([None, 0.0, 0.01, 0.5, 0.99]),
    data=st.data(),
)
def test_odd_sizes_against_all_pairs(n: int, m: int, dim: int, chunk: int, share: float | None, data) -> None:
    k = min(m, data.draw(st.sampled_from([1, 2, 3, 64, m])))
    allowed = None if share is None else torch.rand(m, generator=torch.Generator().manual_seed(2)) < share
    check(draws(n, dim), draws(m, dim, seed=1), k, allowed=allowed, chunk=chunk)


@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_types(dtype: torch.dtype, masked: bool) -> None:
    allowed = torch.arange(1500) % 3 > 0 if masked else None
    check(draws(7, 24, dtype=dtype), draws(1500, 24, seed=1, dtype=dtype), 5, allowed=allowed, chunk=600)


@pytest.mark.parametrize("at", [0, 63, 64, 255, 256, 447, 448, 499, 500, 511, 512, 999, 1000, 1022])
def test_no_border_hides_the_best(at: int) -> None:
    """Pieces of 500 keys are 7 blocks of 64 and a rest of 52; the last piece is a rest of 23."""
    keys = draws(1023, 8, seed=1) * 0.5
    keys[at] = torch.ones(8)
    queries = torch.ones(2, 8)
    assert nearest(queries, keys, 1, chunk=500)[1].tolist() == [[at], [at]]
    check(queries, keys, 1, chunk=500)
    assert nearest(queries, keys, 1, allowed=torch.arange(1023) != at, chunk=500)[1][0, 0] != at


@pytest.mark.parametrize("together", [range(3), range(62, 66), range(498, 503), [0, 64, 128, 192], [5, 69, 600, 1020]])
def test_the_best_may_share_a_block_or_lie_apart(together) -> None:
    keys, aim = draws(1023, 8, seed=1) * 0.1, draws(1, 8, seed=2)[0]
    rows = list(together)
    for rank, row in enumerate(rows):
        keys[row] = aim * (1 - 0.1 * rank)
    assert nearest(aim[None], keys, len(rows), chunk=500)[1].tolist() == [rows]


@pytest.mark.parametrize(("m", "chunk"), [(5, 5), (6, 3), (6, 4), (130, 64), (1000, 300)])
def test_all_keys_in_order(m: int, chunk: int) -> None:
    check(draws(3, 4), draws(m, 4, seed=1), m, chunk=chunk)


@pytest.mark.parametrize("known", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("chunk", [3, 100, CHUNK])
def test_fewer_allowed_than_asked_for(known: int, chunk: int) -> None:
    allowed = torch.zeros(1000, dtype=torch.bool)
    allowed[torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:known]] = True
    keys = -draws(1000, 4, seed=1).abs()  # every similarity is negative: a zero would win
    similar, _ = nearest(draws(3, 4).abs(), keys, 5, allowed=allowed, chunk=chunk)
    assert int((similar > -torch.inf).sum()) == 3 * min(known, 5)
    check(draws(3, 4).abs(), keys, 5, allowed=allowed, chunk=chunk)


@given(m=st.integers(1, 600), dim=st.integers(1, 3), k=st.integers(1, 12), chunk=st.sampled_from([7, 64, 300, CHUNK]))
def test_ties(m: int, dim: int, k: int, chunk: int) -> None:
    numbers = torch.randint(-1, 2, (m + 2, dim), generator=torch.Generator().manual_seed(m))
    vectors = numbers.float()
    check(vectors[:2], vectors[2:], min(k, m), chunk=chunk)


def test_equal_keys_are_all_found_once() -> None:
    _, found = nearest(torch.ones(1, 2), torch.ones(900, 2), 900, chunk=256)
    assert sorted(found[0].tolist()) == list(range(900))
    _, found = nearest(torch.ones(1, 2), torch.ones(900, 2), 3)
    assert len(set(found[0].tolist())) == 3


def test_arguments_are_left_alone_and_need_not_be_contiguous() -> None:
    queries, keys = draws(4, 6), draws(500, 6, seed=1)
    allowed = torch.arange(500) % 2 == 0
    before = queries.clone(), keys.clone(), allowed.clone()
    found = nearest(queries, keys, 3, allowed=allowed)
    assert all(torch.equal(*pair) for pair in zip((queries, keys, allowed), before, strict=True))
    again = nearest(queries.T.contiguous().T, keys.T.contiguous().T, 3, allowed=allowed)
    torch.testing.assert_close(again[0], found[0])
    assert torch.equal(again[1], found[1])


def test_autocast_changes_nothing() -> None:
    queries, keys = draws(16, 16), draws(3000, 16, seed=1)
    plain = nearest(queries, keys, 10)
    with torch.autocast("cpu", torch.bfloat16):
        check(queries, keys, 10)
        found = nearest(queries, keys, 10)
    assert all(torch.equal(*pair) for pair in zip(plain, found, strict=True))


@pytest.mark.parametrize("allowed", [None, torch.arange(40_000) % 5 > 0], ids=["all", "some"])
def test_no_table_of_all_pairs_is_held(allowed: torch.Tensor | None) -> None:
    queries, keys = draws(32, 4), draws(40_000, 4, seed=1)
    peak = peak_bytes(lambda: nearest(queries, keys, 5, allowed=allowed, chunk=1024)).value
    assert 32 * 1024 * 4 <= peak <= 2.5 * 32 * 1024 * 4
    assert peak < 0.1 * 32 * 40_000 * 4


@pytest.mark.parametrize(
    ("queries", "keys", "k", "allowed", "said"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 1, None, r"queries \[n, dim\] and keys \[m, dim\]; got \[2, 3\] and"),
        (torch.ones(3), torch.ones(4, 3), 1, None, r"got \[3\] and \[4, 3\]"),
        (torch.ones(2, 3), torch.ones(4, 3, 1), 1, None, r"and \[4, 3, 1\]"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, None, "1 to 4 neighbours, .*; got 0"),
        (torch.ones(2, 3), torch.ones(4, 3), 5, None, "got 5; lower k"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, None, "1 to 0 neighbours"),
        (torch.ones(2, 3), torch.ones(4, 3), 1, torch.ones(3, dtype=torch.bool), r"bool \[4\]; got bool \[3\]"),
        (torch.ones(2, 3), torch.ones(4, 3), 1, torch.ones(4), r"bool \[4\]; got float32 \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused(queries, keys, k: int, allowed, said: str) -> None:
    with pytest.raises(InputError, match=said):
        nearest(queries, keys, k, allowed=allowed)
