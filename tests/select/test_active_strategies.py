"""Choices of images to label against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from scrimp.primitives.errors import InputError
from scrimp.select import (
    badge,
    coefficient_determinants,
    coefficient_gradients,
    coverage,
    expected_residuals,
    head_gradients,
    k_centre,
    margin,
    multi_round,
    nearest_to_centres,
    predicted_residuals,
    predictive_entropy,
    typicality,
)
from scrimp.select.active_density import greedy_cover, mean_distance, pure_radius

NONE = torch.arange(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def blobs(sizes):
    """Groups far apart, and the rows of each."""
    labels = torch.cat([torch.full((size,), index) for index, size in enumerate(sizes)])
    order = torch.randperm(len(labels), generator=seeded(5))
    labels = labels[order]
    values = normal(len(labels), 3, seed=6) + 60 * torch.eye(3, dtype=torch.float64).repeat(2, 1)[labels]
    values[labels > 2] *= -1
    return values, [(labels == index).nonzero().flatten() for index in range(len(sizes))]


def middles(values, groups):
    return [int(rows[(values[rows] - values[rows].mean(0)).square().sum(1).argmin()]) for rows in groups]


def distances(values):
    return (values[:, None] - values[None]).square().sum(2)


def test_nearest_to_centres_takes_the_middle_of_each_new_group_the_largest_first():
    values, groups = blobs([9, 4, 7, 5])
    expected = middles(values, [groups[i] for i in (0, 2, 3, 1)])
    assert nearest_to_centres(values, None, NONE, 4, generator=seeded()).indices.tolist() == expected
    known = torch.tensor([int(groups[2][0])])
    found = nearest_to_centres(values, None, known, 3, generator=seeded()).indices.tolist()
    assert found == [expected[0], *expected[2:]]


def test_multi_round_clusters_what_is_left():
    values, groups = blobs([9, 4, 7, 5])
    known = torch.cat([groups[0], groups[1][:1]])
    expected = middles(values, [groups[2], groups[3], groups[1][1:]])
    assert multi_round(values, None, known, 3, generator=seeded()).indices.tolist() == expected


@pytest.mark.parametrize("count", [11, 700])
def test_k_centre_goes_to_the_farthest(count):
    values, known = normal(count, 2), [3, 8]
    apart, expected = distances(values), [3, 8]
    while len(expected) < 10:
        expected.append(int(apart[:, expected].amin(1).argmax()))
    found = k_centre(values, None, torch.tensor(known), 8, generator=seeded()).indices.tolist()
    assert found == expected[2:]
    alone = k_centre(values, None, NONE, 4, generator=seeded()).indices.tolist()
    for place in range(1, 4):
        assert alone[place] == int(apart[:, alone[:place]].amin(1).argmax())


def test_k_centre_of_equals_takes_the_first():
    values = torch.tensor([[0.0], [2.0], [-2.0], [2.0], [0.0]])
    found = k_centre(values, None, torch.tensor([4]), 3, generator=seeded())
    assert found.indices.tolist() == [1, 2, 0]


@pytest.mark.parametrize(("count", "neighbours"), [(1, 20), (2, 20), (3, 1), (23, 5), (23, 20)])
def test_mean_distance_is_that_of_a_loop(count, neighbours):
    values = normal(count, 4) + 100
    values[-1] = values[0]
    k = min(neighbours, max(1, count // 2))
    for row, got in enumerate(mean_distance(values, neighbours)):
        others = sorted(float((values[row] - values[other]).norm()) for other in range(count) if other != row)
        assert float(got) == pytest.approx(sum(others[:k]) / k if others else 0.0, abs=1e-9)


def test_typicality_takes_the_densest_of_each_group():
    values, groups = blobs([9, 8, 7, 6])
    densest = [int(rows[mean_distance(values[rows], 20).argmin()]) for rows in groups]
    assert typicality(values, None, NONE, 4, generator=seeded()).indices.tolist() == densest
    known = torch.tensor([int(groups[1][3])])
    found = typicality(values, None, known, 3, generator=seeded()).indices.tolist()
    assert found == [densest[0], *densest[2:]]
    # Fewer clusters than labels: each is served in turn, and a small one last.
    values, groups = blobs([9, 7, 4])
    order = [rows[mean_distance(values[rows], 20).argsort()].tolist() for rows in groups]
    found = typicality(values, None, NONE, 16, clusters=3, generator=seeded()).indices.tolist()
    served = [item for pair in itertools.zip_longest(order[0][:9], order[1]) for item in pair if item is not None]
    assert found == served
    assert len(typicality(values, None, NONE, 15, sample=3, generator=seeded())) == 15
    with pytest.raises(InputError):
        typicality(values, None, NONE, 1, neighbours=0, generator=seeded())


@pytest.mark.parametrize("purity", [1.0, 0.8, 0.55])
def test_the_radius_is_the_widest_that_is_pure_enough(purity):
    values, labels = normal(21, 2), torch.arange(21) % 3
    values[:, 0] += 2 * labels
    apart = distances(values)

    def pure(squared):
        return sum(bool((labels[apart[i] <= squared] == labels[i]).all()) for i in range(21)) / 21

    found = pure_radius(apart, labels, purity)
    wider = apart[apart > found].min()
    assert pure(found) >= purity > pure(wider)
    assert pure_radius(apart, labels * 0, purity) == torch.inf


def test_coverage_is_greedy():
    holds = distances(normal(24, 2)) < 0.5
    covered, allowed = torch.arange(24) < 3, torch.arange(24) % 5 != 0
    expected, done = [], covered.clone()
    while True:
        gains = [int((holds[i] & ~done).sum()) if allowed[i] and i not in expected else 0 for i in range(24)]
        if max(gains) == 0:
            break
        expected.append(gains.index(max(gains)))
        done |= holds[expected[-1]]
    assert len(expected) > 5
    assert greedy_cover(holds, covered, allowed, 99).tolist() == expected
    assert greedy_cover(holds, covered, allowed, 4).tolist() == expected[:4]


def test_coverage_serves_each_group_once_then_passes_over_what_labels_cover():
    values, groups = blobs([9, 8, 7, 6])
    # With groups this far apart the widest pure balls hold a whole group.
    found = coverage(values, None, NONE, 4, classes=4, purity=1.0, generator=seeded()).indices.tolist()
    assert [next(i for i, rows in enumerate(groups) if row in rows) for row in found] == [0, 1, 2, 3]
    known = torch.tensor([int(groups[0][0])])
    found = coverage(values, None, known, 3, classes=4, purity=1.0, generator=seeded()).indices.tolist()
    assert [next(i for i, rows in enumerate(groups) if row in rows) for row in found] == [1, 2, 3]
    assert len(coverage(values, None, NONE, 20, sample=8, generator=seeded())) == 20
    with pytest.raises(InputError):
        coverage(values, None, NONE, 4, purity=0.0, generator=seeded())


def test_margin_and_entropy_rank_by_their_formulas():
    probabilities = normal(20, 5).mul(2).softmax(1)
    known = torch.tensor([1, 4])
    rows = [i for i in range(20) if i not in (1, 4)]
    best = [sorted(row.tolist())[::-1] for row in probabilities]
    by_margin = sorted(rows, key=lambda i: best[i][0] - best[i][1])
    by_entropy = sorted(rows, key=lambda i: float((probabilities[i] * probabilities[i].log()).sum()))
    features = torch.zeros(20, 2)
    assert margin(features, probabilities, known, 7, generator=seeded()).indices.tolist() == by_margin[:7]
    found = predictive_entropy(features, probabilities, known, 7, generator=seeded())
    assert found.indices.tolist() == by_entropy[:7]
    sure = torch.eye(5)[torch.arange(20) % 5]  # 0 log 0 is 0, and all tie: the generator decides
    ties = {tuple(margin(features, sure, known, 3, generator=seeded(i)).indices.tolist()) for i in range(4)}
    assert len(ties) > 1
    assert len(predictive_entropy(features, sure, known, 3, generator=seeded())) == 3


def test_diverse_doubt_takes_one_of_each_group_among_the_doubtful():
    values, groups = blobs([6, 6, 6])
    sure = torch.full((18,), 0.95)
    doubtful = torch.cat([rows[:2] for rows in groups])
    sure[doubtful] = torch.tensor([0.5, 0.51, 0.6, 0.61, 0.6, 0.61])
    probabilities = torch.stack([sure, 1 - sure], 1)
    plain = margin(values, probabilities, NONE, 3, generator=seeded()).indices.tolist()
    assert plain[:2] == groups[0][:2].tolist()
    spread = margin(values, probabilities, NONE, 3, diverse=2, generator=seeded()).indices.tolist()
    assert set(spread) <= set(doubtful.tolist())
    assert sorted(next(i for i, rows in enumerate(groups) if row in rows) for row in spread) == [0, 1, 2]
    with pytest.raises(InputError):
        margin(values, probabilities, NONE, 3, diverse=0, generator=seeded())


def test_residuals_are_the_gradients_of_their_losses():
    logits = normal(6, 4).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(predicted_residuals(logits.detach().softmax(1)), expected)
    (expected,) = torch.autograd.grad(torch.distributions.Categorical(logits=logits).entropy().sum(), logits)
    assert torch.allclose(expected_residuals(logits.detach().softmax(1)), expected)
    assert bool((expected_residuals(torch.eye(3)) == 0).all())


def test_head_gradients_are_those_of_autograd():
    features, frozen = normal(7, 5), normal(4, 5, seed=1)
    outer_bases, inner_bases, start = normal(3, 4, 2, seed=2), normal(6, 2, 5, seed=3), normal(2, 5, seed=4)
    betas, alphas = normal(3, seed=5).requires_grad_(), normal(6, seed=6).requires_grad_()
    outer = torch.einsum("j,jcr->cr", betas, outer_bases)
    inner = start + torch.einsum("i,ird->rd", alphas, inner_bases)
    logits = features @ (frozen + outer @ inner).T
    residuals = predicted_residuals(logits.detach().softmax(1))
    factors = {"outer": outer.detach(), "inner": inner.detach()}
    found = head_gradients(features, residuals, **factors, outer_bases=outer_bases, inner_bases=inner_bases)
    for row in range(7):
        loss = torch.nn.functional.cross_entropy(logits[row], logits[row].argmax())
        expected = torch.cat(torch.autograd.grad(loss, [alphas, betas], retain_graph=True))
        assert torch.allclose(found[row], expected)
    with pytest.raises(InputError):
        head_gradients(features, residuals, **factors, outer_bases=inner_bases, inner_bases=outer_bases)


def probability(gradients, path):
    """Of drawing this path by k-means++ after its first."""
    apart, result = distances(gradients), 1.0
    for place in range(1, len(path)):
        share = apart[:, list(path[:place])].amin(1)
        result *= float(share[path[place]] / share.sum())
    return result


def test_gradients_are_drawn_as_kmeans_plus_plus_draws_them():
    features, probabilities = normal(5, 2, seed=3), normal(5, 3, seed=4).softmax(1)
    residuals = probabilities - torch.eye(3)[probabilities.argmax(1)]
    gradients = torch.einsum("nc,nd->ncd", residuals, features).flatten(1)
    first = int(gradients.norm(dim=1).argmax())
    generator, draws, found = seeded(), 400, {}
    for _ in range(draws):
        path = tuple(badge(features, probabilities, NONE, 3, generator=generator).indices.tolist())
        found[path] = found.get(path, 0) + 1
    for pair in itertools.permutations([i for i in range(5) if i != first], 2):
        p = probability(gradients, (first, *pair))
        assert abs(found.pop((first, *pair), 0) - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5 + 1
    assert found == {}
    for seed in range(5):
        whole = coefficient_gradients(gradients, None, torch.tensor([first]), 4, generator=seeded(seed))
        assert torch.equal(
            whole.indices, badge(features, probabilities, torch.tensor([first]), 4, generator=seeded(seed)).indices
        )


def test_badge_draws_no_copy_while_there_are_others():
    features = normal(6, 3).repeat_interleave(4, 0).float()
    probabilities = normal(6, 4, seed=1).softmax(1).repeat_interleave(4, 0).float()
    for seed in range(5):
        found = badge(features, probabilities, NONE, 6, generator=seeded(seed)).indices
        assert sorted((found // 4).tolist()) == list(range(6))


@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_determinants_grow_the_most(ridge):
    values, known = normal(16, 3), [2, 5]
    base = ridge * values.square().mean() * torch.eye(3, dtype=torch.float64)
    expected = list(known)
    while len(expected) < 9:
        gains = [
            float(torch.logdet(base + values[[*expected, i]].T @ values[[*expected, i]])) if i not in expected else -1e9
            for i in range(16)
        ]
        expected.append(gains.index(max(gains)))
    found = coefficient_determinants(values, None, torch.tensor(known), 7, ridge=ridge, generator=seeded())
    assert found.indices.tolist() == expected[2:]
    with pytest.raises(InputError):
        coefficient_determinants(values, None, NONE, 1, ridge=0.0, generator=seeded())
