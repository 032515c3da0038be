"""What every member of the family keeps, each checked to fail on a member that breaks it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from scrimp.select import (
    Policy,
    Record,
    Selection,
    Strategy,
    badge,
    coefficient_determinants,
    coverage,
    herding,
    history,
    importance_sample,
    k_centre,
    margin,
    nearest_to_centres,
    prune,
    typicality,
    uniform,
    uniform_sample,
)

Member = Callable[[torch.Tensor, int, torch.Generator], Selection]
Promise = Callable[[Member], None]

COUNT, BUDGET = 40, 24


def from_policy(policy: Policy) -> Member:
    def member(scores: torch.Tensor, budget: int, generator: torch.Generator) -> Selection:
        return policy(Record(scores, torch.arange(len(scores)) % 6), budget, generator=generator)

    return member


MEMBERS: dict[str, Member] = {
    "uniform_sample": lambda scores, budget, generator: uniform_sample(len(scores), budget, generator=generator),
    "importance_sample": lambda scores, budget, generator: importance_sample(scores, budget, generator=generator),
    "uniform": from_policy(uniform),
    "history": from_policy(history(gate=1.0)),
    "history shut": from_policy(history(gate=float("inf"))),
    "prune": from_policy(prune()),
}


def from_strategy(strategy: Strategy) -> Member:
    def member(scores: torch.Tensor, budget: int, generator: torch.Generator) -> Selection:
        features = torch.stack([scores, scores.flip(0)], 1)
        probabilities = torch.stack([scores, scores * scores, 1 - scores]).T.softmax(1)
        return strategy(features, probabilities, torch.arange(0), budget, generator=generator)

    return member


# Chosen to teach most, so biased on purpose: every promise but the mean's.
FOR_LABELS: list[Strategy] = [
    badge,
    coefficient_determinants,
    coverage,
    herding,
    k_centre,
    margin,
    nearest_to_centres,
    typicality,
]


def scores() -> torch.Tensor:
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(9)) ** 2 + 0.01


def budget_is_kept(member: Member) -> None:
    chosen = member(scores(), BUDGET, torch.Generator().manual_seed(0))
    assert 0 < len(chosen) <= BUDGET
    assert chosen.weights.shape == chosen.indices.shape
    assert 0 <= int(chosen.indices.min()) <= int(chosen.indices.max()) < COUNT


def same_generator_same_result(member: Member) -> None:
    first, second = (member(scores(), BUDGET, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)


def arguments_untouched(member: Member) -> None:
    mine = scores()
    member(mine, BUDGET, torch.Generator().manual_seed(0))
    assert torch.equal(mine, scores())


def global_generator_untouched(member: Member) -> None:
    before = torch.get_rng_state()
    member(scores(), BUDGET, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def mean_is_unbiased(member: Member) -> None:
    """The sum of weight * value over the draws, divided by the budget (prune falls short of it), is the mean."""
    values = torch.linspace(0, 1, COUNT) ** 3 + scores()
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(3000):
        chosen = member(scores(), BUDGET, generator)
        found.append(float((chosen.weights * values[chosen.indices]).sum() / BUDGET))
    estimate, spread = torch.tensor(found).mean(), torch.tensor(found).std() / 3000**0.5
    assert abs(float(estimate - values.mean())) < 4 * float(spread) + 1e-6


PROMISES: list[Promise] = [
    budget_is_kept,
    same_generator_same_result,
    arguments_untouched,
    global_generator_untouched,
    mean_is_unbiased,
]


@pytest.mark.parametrize("promise", PROMISES, ids=lambda item: item.__name__)
@pytest.mark.parametrize("name", MEMBERS)
def test_promise(name, promise):
    promise(MEMBERS[name])


@pytest.mark.parametrize("promise", [item for item in PROMISES if item is not mean_is_unbiased])
@pytest.mark.parametrize("strategy", FOR_LABELS)
def test_promise_of_choices_for_labels(strategy, promise):
    promise(from_strategy(strategy))


def over_budget(values, budget, generator):
    return uniform_sample(len(values), budget + 1, generator=generator)


def forgetful(values, budget, generator):
    return uniform_sample(len(values), budget, generator=torch.Generator().manual_seed(torch.Generator().seed()))


def meddling(values, budget, generator):
    values.mul_(2)
    return uniform_sample(len(values), budget, generator=generator)


def leaking(values, budget, generator):
    return Selection(torch.randint(0, len(values), (budget,)), torch.ones(budget))


def unweighted(values, budget, generator):
    return Selection(importance_sample(values, budget, generator=generator).indices, torch.ones(budget))


@pytest.mark.touches_global_rng
@pytest.mark.parametrize(
    ("promise", "broken"),
    list(zip(PROMISES, [over_budget, forgetful, meddling, leaking, unweighted], strict=True)),
    ids=lambda item: item.__name__,
)
def test_promise_fails_on_a_broken_member(promise, broken):
    with pytest.raises(AssertionError):
        promise(broken)
