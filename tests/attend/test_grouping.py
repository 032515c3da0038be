"""Grouping queries: reproducible, masked, capped, the same compiled as in torch, and better than chance."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scrimp import native
from scrimp.attend import grouping_ops
from scrimp.attend.grouping import group_queries
from scrimp.primitives.errors import InputError

LEVELS = ("generic", "avx2", "avx512", "neon")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def kernels() -> Iterator[ModuleType]:
    """The compiled module, its instruction set and torch's threads put back afterwards."""
    module = native.load()
    if module is None or not hasattr(module, "cluster_codes"):
        pytest.skip("the native library is not built here")
    chosen, threads = module.capabilities()["simd"], torch.get_num_threads()
    yield module
    module.set_simd(chosen)
    torch.set_num_threads(threads)


def settings_of(kernels: ModuleType) -> Iterator[str]:
    """Every instruction set of this processor, with one and two threads."""
    for level in LEVELS:
        try:
            kernels.set_simd(level)
        except ValueError:
            continue
        for threads in (1, 2):
            torch.set_num_threads(threads)
            yield f"{level}, {threads} threads"


def random_codes(rows: int, tokens: int, bits: int, seed: int = 0) -> Tensor:
    """Codes in loose bunches, so that Lloyd's algorithm has something to move."""
    generator = torch.Generator().manual_seed(seed)
    bunches = torch.randint(2, (rows, 9, bits), generator=generator)
    own = bunches.gather(1, torch.randint(9, (rows, tokens, 1), generator=generator).expand(-1, -1, bits))
    flipped = own ^ (torch.rand(rows, tokens, bits, generator=generator) < 0.2).long()
    return (flipped << torch.arange(bits)).sum(-1)


@pytest.mark.parametrize("bits", [1, 31, 63, 64])
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_native_and_twin_group_codes_alike(kernels: ModuleType, bits: int, iterations: int) -> None:
    codes = random_codes(3, 4500, bits)
    lengths = torch.tensor([4500, 4097, 3])
    first = codes[:, torch.arange(0, 4500, 400)]
    wanted = grouping_ops.cluster_codes_twin(codes, lengths, first, iterations)
    for where in settings_of(kernels):
        found = grouping_ops.cluster_codes_native(kernels, codes, lengths, first, iterations)
        assert torch.equal(found.long(), wanted), where


def test_native_and_twin_hash_and_refine_alike(kernels: ModuleType) -> None:
    # Small whole numbers: every sum is exact, so the order of summation cannot matter.
    rows = torch.randint(-3, 4, (2, 300, 16), generator=torch.Generator().manual_seed(1)).float()
    planes = torch.randint(-3, 4, (63, 16), generator=torch.Generator().manual_seed(2)).float()
    offsets, lengths = torch.full((2, 63), 0.5), torch.tensor([300, 170])
    codes = grouping_ops.hash_twin(rows, planes, offsets)
    for where in settings_of(kernels):
        found = grouping_ops.hash_native(kernels, rows, lengths, planes, offsets)
        assert torch.equal(found[0], codes[0]), where
        assert torch.equal(found[1, :170], codes[1, :170]), where
    start = grouping_ops.cluster_codes_twin(codes, lengths, codes[:, :10], 3)
    wanted = grouping_ops.refine_twin(rows, lengths, start, 10, 1)
    for where in settings_of(kernels):
        found = grouping_ops.refine_native(kernels, rows, lengths, start.int(), 10, 1)
        assert (found == wanted).float().mean() > 0.99, where  # means are rounded: a tie may fall either way
        assert torch.equal(found < 0, wanted < 0), where


def test_hash_has_the_signs_of_the_definition() -> None:
    rows, planes, offsets = normal(1, 5, 7), normal(3, 7, seed=1), normal(1, 3, seed=2)
    codes = grouping_ops.hash_twin(rows, planes, offsets)
    for i in range(5):
        for bit in range(3):
            assert bool(codes[0, i] >> bit & 1) == bool(rows[0, i] @ planes[bit] > offsets[0, bit])


def lloyd_by_hand(codes: list[int], centroids: list[int], iterations: int) -> list[int]:
    centroids = list(centroids)
    for step in range(iterations + 1):
        nearest = [min(range(len(centroids)), key=lambda j: (bin(code ^ centroids[j]).count("1"), j)) for code in codes]
        if step == iterations:
            break
        for j in range(len(centroids)):
            own = [code for code, place in zip(codes, nearest, strict=True) if place == j]
            if own:
                bits = range(63)
                centroids[j] = sum((2 * sum(code >> bit & 1 for code in own) > len(own)) << bit for bit in bits)
    return nearest


def test_codes_are_grouped_as_by_hand() -> None:
    codes = random_codes(1, 60, 63, seed=4)
    first = codes[:, :7]
    found = grouping_ops.cluster_codes_twin(codes, torch.tensor([60]), first, 3)
    assert found[0].tolist() == lloyd_by_hand(codes[0].tolist(), first[0].tolist(), 3)


def test_an_empty_cluster_keeps_its_code_and_is_harmless() -> None:
    codes = torch.zeros(1, 50, dtype=torch.int64)  # all queries alike: the first cluster takes them all
    lengths = torch.tensor([50])
    for found in group_both(codes, lengths, codes[:, :5]):
        assert found.unique().tolist() == [0]
    groups = group_queries(torch.ones(1, 2, 50, 8), clusters=5)
    assert groups.counts.sum(-1).tolist() == [[50, 50]]
    assert (groups.counts > 0).sum(-1).tolist() == [[1, 1]]


def group_both(codes: Tensor, lengths: Tensor, first: Tensor) -> list[Tensor]:
    made = [grouping_ops.cluster_codes_twin(codes, lengths, first, 10)]
    module = native.load()
    if module is not None and hasattr(module, "cluster_codes"):
        made.append(grouping_ops.cluster_codes_native(module, codes, lengths, first, 10).long())
    return made


def test_the_same_generator_gives_the_same_groups() -> None:
    query = normal(2, 3, 200, 16)
    fixed = group_queries(query, clusters=9)
    assert torch.equal(fixed.assignment, group_queries(query, clusters=9).assignment)
    drawn = [group_queries(query, clusters=9, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(drawn[0].assignment, drawn[1].assignment)
    assert not torch.equal(drawn[0].assignment, drawn[2].assignment)
    generator = torch.Generator().manual_seed(5)
    group_queries(query, clusters=9, generator=generator)
    assert not torch.equal(group_queries(query, clusters=9, generator=generator).assignment, drawn[0].assignment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_is_in_no_cluster_and_changes_nothing(dtype: torch.dtype) -> None:
    query, lengths = normal(3, 2, 120, 16, dtype=dtype), torch.tensor([120, 77, 0])
    other = query.clone()
    for sample, length in enumerate(lengths.tolist()):
        other[sample, :, length:] = float("nan")
    groups, again = (group_queries(each, clusters=8, query_lengths=lengths) for each in (query, other))
    assert torch.equal(groups.assignment, again.assignment)
    assert groups.counts.sum(-1).tolist() == [[120, 120], [77, 77], [0, 0]]
    for sample, length in enumerate(lengths.tolist()):
        assert (groups.assignment[sample, :, length:] == -1).all()
        assert (groups.assignment[sample, :, :length] >= 0).all()


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 60), st.data())
def test_counts_are_the_assignments(batch: int, tokens: int, dim: int, clusters: int, data: st.DataObject) -> None:
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, tokens), min_size=batch, max_size=batch)))
    groups = group_queries(normal(batch, 2, tokens, dim), clusters=clusters, query_lengths=lengths)
    assert groups.clusters == min(clusters, tokens)
    for sample in range(batch):
        for head in range(2):
            own = groups.assignment[sample, head, : lengths[sample]]
            assert torch.equal(torch.bincount(own, minlength=groups.clusters), groups.counts[sample, head])
            if lengths[sample] <= clusters:
                assert own.tolist() == list(range(len(own)))  # one query a cluster


def spread(query: Tensor, assignment: Tensor, clusters: int) -> float:
    """Mean squared distance of the queries of one head to the means of their clusters."""
    means = torch.stack([query[assignment == j].mean(0) for j in range(clusters) if (assignment == j).any()])
    return float(torch.cdist(query, means).amin(1).square().mean())


def test_refinement_draws_clusters_together_and_beats_chance() -> None:
    centres = 3 * normal(12, 16, seed=3)
    query = centres[torch.arange(600) % 12] + normal(600, 16, seed=4)
    chance = spread(query, torch.arange(600) // 50, 12)
    plain, refined = (group_queries(query[None, None], clusters=12, refine=steps).assignment[0, 0] for steps in (0, 3))
    assert spread(query, refined, 12) < spread(query, plain, 12) < 0.5 * chance


def test_follows_a_shift_of_all_queries() -> None:
    query = normal(1, 2, 200, 16, dtype=torch.float64)
    assert torch.equal(group_queries(query, clusters=9).assignment, group_queries(query + 8, clusters=9).assignment)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"clusters": 0}, "clusters >= 1"), ({"bits": 65}, "bits from 1 to 64"), ({"iterations": -1}, "iterations"),
     ({"query_lengths": torch.tensor([1.0])}, "query_lengths")],
)  # fmt: skip
def test_refuses_numbers_that_do_not_fit(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        group_queries(normal(1, 1, 4, 4), **change)  # type: ignore[arg-type]


def test_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="batch, heads, tokens, dim"):
        group_queries(normal(4, 4))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # inside opcheck
def test_operator_is_sound_and_counted() -> None:
    query, lengths = normal(2, 2, 30, 5), torch.tensor([30, 12])
    torch.library.opcheck(torch.ops.scrimp.group_queries.default, (query, lengths, 4, 63, 3, 2, 0))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        group_queries(query, clusters=4, bits=10)
    assert counter.get_total_flops() == 2 * 4 * 30 * 5 * (10 + 2 * 4)
