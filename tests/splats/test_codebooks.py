"""k-means against a loop, its kernel against its twin, and what is promised of weights, empty centres and odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp import native
from scrimp.primitives.errors import InputError
from scrimp.splats import codebooks
from scrimp.splats.codebooks import kmeans, nearest, nearest_torch, refine, refine_torch


def rows_of(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def brute(values: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    apart = (values.double()[:, None] - centres.double()).square().sum(2)
    return apart.argmin(1), apart.amin(1)


@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (97, 3, 33), (300, 45, 70), (5, 24, 64), (0, 4, 2)])
@pytest.mark.parametrize("find", [nearest, nearest_torch])
def test_nearest_is_the_brute_force(n: int, d: int, k: int, find: object) -> None:
    values, centres = rows_of(n, d), rows_of(k, d, 1)
    labels, distances = find(values, centres)
    wanted, apart = brute(values, centres)
    assert torch.equal(labels, wanted)
    torch.testing.assert_close(distances.double(), apart, rtol=1e-5, atol=1e-6)


def test_of_equal_centres_the_first() -> None:
    centres = torch.zeros(70, 3)
    assert nearest(torch.ones(9, 3), centres)[0].tolist() == [0] * 9


def test_every_instruction_set_finds_the_same() -> None:
    module = native.load()
    if module is None:
        pytest.skip("no native library")
    used, values, centres = native.capabilities()["simd"], rows_of(200, 17), rows_of(90, 17, 1)
    try:
        found = []
        for name in ("generic", used):
            module.set_simd(name)
            found.append(nearest(values, centres))
    finally:
        module.set_simd(used)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_refine_looks_at_the_candidates_alone() -> None:
    values, centres = rows_of(150, 6), rows_of(40, 6, 1)
    labels = torch.arange(150) % 40
    candidates = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:7] for i in range(40)])
    near = centres[candidates[labels]].double()
    wanted = candidates[labels].gather(1, (near - values.double()[:, None]).square().sum(2).argmin(1, keepdim=True))
    for find in (refine, refine_torch):
        found, distances = find(values, centres, labels, candidates.int())
        assert torch.equal(found, wanted[:, 0])
        torch.testing.assert_close(distances, (values - centres[found]).square().sum(1))


def test_exact_k_means_is_lloyds(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = rows_of(200, 4) + 50, rows_of(200, 1, 2).abs()[:, 0] + 0.1
    centres, labels = kmeans(values, 12, weights=weights, seed=3, iterations=5, exact=True)
    monkeypatch.setattr(codebooks, "nearest", brute)
    middle = values.mean(0)
    wanted = codebooks._start(values - middle, weights, 12, codebooks.generator_for(3)).double() + middle
    for _ in range(5):
        mine, _ = brute(values, wanted)
        wanted = torch.stack(
            [(values.double() * weights[:, None])[mine == c].sum(0) / weights[mine == c].sum() for c in range(12)]
        )
    torch.testing.assert_close(centres.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, brute(values, centres)[0])


def test_the_short_cut_costs_little_and_the_seed_fixes_it() -> None:
    values = rows_of(3000, 8)
    cost = {}
    for exact in (True, False):
        centres, labels = kmeans(values, 256, seed=1, iterations=6, exact=exact)
        cost[exact] = float((values - centres[labels]).square().sum())
        assert torch.equal(labels, nearest(values, centres)[0])
    assert cost[False] < 1.03 * cost[True]
    again = kmeans(values, 256, seed=1, iterations=6)
    assert torch.equal(again[0], centres)
    assert not torch.equal(kmeans(values, 256, seed=2, iterations=6)[0], centres)


def test_weights_draw_the_centre() -> None:
    values = torch.tensor([[0.0], [1.0]])
    assert float(kmeans(values, 1, weights=torch.tensor([1.0, 3.0]), seed=0)[0]) == pytest.approx(0.75)


def test_an_empty_centre_moves_to_the_worst_served() -> None:
    rows = torch.tensor([[0.0], [0.1], [9.0]])
    centres = torch.tensor([[0.05], [500.0]])
    codebooks._fill_(centres, torch.tensor([3.0, 0.0]), rows, torch.tensor([0.1, 0.1, 80.0]))
    assert centres.flatten().tolist() == pytest.approx([0.05, 9.0])
    alike = torch.ones(50, 2)
    centres, labels = kmeans(alike, 4, seed=0)
    assert torch.equal(centres[labels], alike)


@pytest.mark.parametrize(("n", "k"), [(0, 3), (1, 1), (3, 3), (3, 7)])
def test_as_many_centres_as_rows_lose_nothing(n: int, k: int) -> None:
    values = rows_of(n, 2)
    centres, labels = kmeans(values, k, seed=0)
    assert centres.shape == (k, 2)
    torch.testing.assert_close(centres[labels], values)


def test_a_batch_moves_the_centres_and_every_row_is_assigned() -> None:
    values = rows_of(1000, 3)
    centres, labels = kmeans(values, 20, seed=0, batch=100)
    assert torch.equal(labels, brute(values, centres)[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"values": torch.tensor([[float("nan")]])},
        {"values": torch.zeros(3)},
        {"k": 0},
        {"weights": torch.ones(1)},
        {"weights": -torch.ones(2)},
        {"batch": 0},
    ],
)
def test_wrong_input_is_refused(bad: dict[str, object]) -> None:
    options = {"values": torch.zeros(2, 2), "k": 1, "seed": 0} | bad
    with pytest.raises(InputError):
        kmeans(options.pop("values"), options.pop("k"), **options)
