"""What every choice of images to label keeps, and how choices are combined."""

from __future__ import annotations

import pytest
import torch

from scrimp.primitives.errors import InputError
from scrimp.select import (
    Selection,
    badge,
    balanced,
    coefficient_determinants,
    coefficient_gradients,
    cold_start,
    coverage,
    herding,
    k_centre,
    margin,
    multi_round,
    nearest_to_centres,
    predictive_entropy,
    random_labels,
    typicality,
)
from scrimp.select.active import even_shares

STRATEGIES = [
    badge,
    balanced(typicality),
    coefficient_determinants,
    coefficient_gradients,
    coverage,
    herding,
    k_centre,
    margin,
    multi_round,
    nearest_to_centres,
    predictive_entropy,
    random_labels,
    typicality,
]
NEED_NO_MODEL = [item for item in STRATEGIES if item not in (badge, STRATEGIES[1], margin, predictive_entropy)]
NONE = torch.arange(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pool(count=30, dim=3, classes=4, dtype=torch.float64):
    generator = seeded(count)
    features = torch.randn(count, dim, generator=generator, dtype=dtype)
    return features, torch.randn(count, classes, generator=generator, dtype=dtype).mul(2).softmax(1)


def keeps_the_contract(strategy, features, probabilities, labelled, budget):
    before = features.clone(), None if probabilities is None else probabilities.clone(), labelled.clone()
    found = strategy(features, probabilities, labelled, budget, generator=seeded())
    left = set(range(len(features))) - set(labelled.tolist())
    assert found.indices.dtype == torch.int64
    assert len(found) == len(set(found.indices.tolist())) == min(budget, len(left))
    assert set(found.indices.tolist()) <= left
    assert torch.equal(found.weights, torch.ones(len(found)))
    assert torch.equal(before[0], features)
    assert torch.equal(before[2], labelled)
    assert probabilities is None or torch.equal(before[1], probabilities)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_distinct_unlabelled_and_as_many_as_asked_for(strategy):
    features, probabilities = pool()
    some = torch.tensor([7, 2, 2, 29])
    for labelled, budget in [(NONE, 0), (NONE, 1), (some, 9), (some, 40), (torch.arange(30), 3)]:
        keeps_the_contract(strategy, features, probabilities, labelled, budget)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_degenerate_pools(strategy):
    for features, classes in [
        (torch.ones(12, 3), 2),  # all alike
        (torch.zeros(5, 2), 1),  # one class, no gradient
        (torch.ones(1, 4, dtype=torch.float16), 3),
        (torch.ones(0, 4), 3),
        (torch.tensor([[0.0, 1.0], [5.0, 5.0]]).repeat(4, 1), 2),  # copies
    ]:
        probabilities = torch.full((len(features), classes), 1 / classes)
        keeps_the_contract(strategy, features, probabilities, NONE, 4)
        keeps_the_contract(strategy, features, probabilities, torch.arange(len(features))[:1], 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_pool_is_refused(strategy):
    features, probabilities = pool()
    bad = features.clone()
    bad[3, 1] = torch.nan
    for values, labelled, budget in [
        (bad, NONE, 2),
        (features[0], NONE, 2),
        (features.long(), NONE, 2),
        (features, torch.tensor([30]), 2),
        (features, torch.tensor([-1]), 2),
        (features, torch.zeros(30, dtype=torch.bool), 2),
        (features, NONE, -1),
    ]:
        with pytest.raises(InputError):
            strategy(values, probabilities, labelled, budget, generator=seeded())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_a_model(strategy):
    features, probabilities = pool()
    if strategy in NEED_NO_MODEL:
        keeps_the_contract(strategy, features, None, NONE, 5)
        return
    with pytest.raises(InputError, match="cold_start"):
        strategy(features, None, NONE, 5, generator=seeded())
    for wrong in (
        probabilities * 2,
        probabilities - 0.5,
        probabilities[:4],
        probabilities.log(),
        probabilities * 0 / 0,
    ):
        with pytest.raises(InputError):
            strategy(features, wrong, NONE, 5, generator=seeded())


def test_random_labels_are_uniform():
    features, counts, generator = torch.zeros(6, 1), torch.zeros(6), seeded()
    for _ in range(900):
        counts[random_labels(features, None, torch.tensor([4]), 2, generator=generator).indices] += 1
    assert counts[4] == 0
    assert (counts[[0, 1, 2, 3, 5]] - 360).abs().max() < 4 * (900 * 0.4 * 0.6) ** 0.5


def test_cold_start_changes_over_when_there_is_a_model_and_labels_enough():
    def said(index):
        return lambda *arguments, generator: Selection(torch.tensor([index]), torch.ones(1))

    strategy = cold_start(said(1), said(2), until=3)
    features, probabilities = pool()
    cases = [(None, [0, 1, 2, 3], 1), (probabilities, [0, 1, 1], 1), (probabilities, [0, 1, 2], 2)]
    for model, labelled, expected in cases:
        got = strategy(features, model, torch.tensor(labelled), 1, generator=seeded())
        assert got.indices.tolist() == [expected]


def test_balanced_raises_the_smallest_classes_first():
    generator = seeded()
    have, room = torch.randint(0, 9, (7,), generator=generator), torch.randint(0, 9, (7,), generator=generator)
    totals, expected = have.clone(), [0] * 7
    for _ in range(15):
        index = min((i for i in range(7) if expected[i] < room[i]), key=lambda i: int(totals[i]))
        totals[index] += 1
        expected[index] += 1
    assert even_shares(have.tolist(), room.tolist(), 15) == expected
    assert even_shares([3], [2], 5) == [2]
    with pytest.raises(InputError):
        even_shares([1], [], 1)


def test_balanced_chooses_within_predicted_classes():
    classes = torch.tensor([0] * 20 + [1] * 3 + [2] * 2)
    sure = torch.linspace(0.5, 0.9, 25)[:, None]
    one_hot = torch.nn.functional.one_hot(classes, 3)
    probabilities = sure * one_hot + (1 - sure) / 2 * (1 - one_hot)
    found = balanced(margin)(torch.zeros(25, 1), probabilities, torch.tensor([0, 1, 20]), 6, generator=seeded())
    # Totals 2, 1, 0 become 3, 3, 2 with the last class used up; least margin first within each.
    assert found.indices.tolist() == [2, 3, 21, 22, 23, 24]
