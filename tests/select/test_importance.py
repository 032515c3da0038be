"""Importance sampling against exact gradients, and every promise on a broken member as well."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from scrimp.primitives.errors import InputError
from scrimp.select import (
    gradient_norm_bound,
    importance_sample,
    output_gradient_norm,
    speedup_threshold,
    uniform_sample,
    variance_reduction,
)

DRAWS = 2000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_network(steps: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    """A small classifier after some steps on a separable problem with a hard minority, float64."""
    generator = seeded(1)
    inputs = torch.randn(96, 6, generator=generator, dtype=torch.float64)
    targets = (inputs[:, 0] > 1).long() + (inputs[:, 1] > 1.2).long()
    with torch.random.fork_rng([]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model, inputs, targets


def sample_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The reference: each sample's whole gradient by its own backward pass, [count, parameters]."""
    rows = []
    for one, target in zip(inputs, targets, strict=True):
        loss = functional.cross_entropy(model(one[None]), target[None])
        rows.append(torch.cat([item.flatten() for item in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def drawn_mean(gradients: Tensor, scores: Tensor, *, draws: int = DRAWS, weigh: bool = True) -> Tensor:
    """Mean over ``draws`` draws of a batch of 256 of the weighted mean gradient."""
    generator, shares = seeded(3), torch.zeros(len(gradients), dtype=gradients.dtype)
    for _ in range(draws):
        chosen = importance_sample(scores, 256, generator=generator)
        shares.index_add_(0, chosen.indices, chosen.weights if weigh else torch.ones_like(chosen.weights))
    return shares @ gradients / (256 * draws)


def relative_error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [count, parameters], their norms and the bounds [count]."""
    model, inputs, targets = trained_network()
    gradients = sample_gradients(model, inputs, targets)
    return gradients, gradients.norm(dim=1), gradient_norm_bound(model(inputs), targets)


@pytest.mark.parametrize("steps", [0, 60])
def test_the_weighted_gradient_is_unbiased(steps):
    """Within 1 %, or, near the optimum where the gradient vanishes beside its noise, within that noise."""
    model, inputs, targets = trained_network(steps)
    gradients = sample_gradients(model, inputs, targets)
    bound = gradient_norm_bound(model(inputs), targets)
    noise = float(gradients.norm(dim=1).mean() / gradients.mean(0).norm()) / (256 * DRAWS) ** 0.5
    assert noise < 0.005 or steps > 0
    assert relative_error(drawn_mean(gradients, bound), gradients.mean(0)) < max(0.01, 3 * noise)


def test_the_unweighted_gradient_is_not(problem):
    gradients, _, bound = problem
    assert relative_error(drawn_mean(gradients, bound, weigh=False), gradients.mean(0)) > 0.5


def test_the_bound_follows_exact_norms(problem):
    _, norms, bound = problem
    assert spearman(norms, bound) > 0.9


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([item.argsort().argsort().double() for item in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("kind", ["classes", "probabilities", "sequence", "ignored"])
def test_the_closed_form_is_the_gradient_at_the_outputs(kind):
    logits = torch.randn(5, 4, dtype=torch.float64, generator=seeded())
    targets: Tensor = torch.tensor([0, 1, 2, 3, 0])
    if kind == "probabilities":
        targets = torch.softmax(torch.randn(5, 4, dtype=torch.float64, generator=seeded(1)), 1)
    if kind in ("sequence", "ignored"):
        logits = torch.randn(5, 4, 3, dtype=torch.float64, generator=seeded())
        targets = torch.randint(0, 4, (5, 3), generator=seeded())
    if kind == "ignored":
        targets[1, 2] = -100

    def loss(outputs: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs, targets, reduction="none")
        return losses.flatten(1).sum(1) if losses.ndim > 1 else losses

    torch.testing.assert_close(gradient_norm_bound(logits, targets), output_gradient_norm(loss, logits))


def test_the_general_form_on_another_loss():
    outputs, targets = torch.randn(7, 3, generator=seeded()), torch.randn(7, 3, generator=seeded(1))
    found = output_gradient_norm(lambda z: (z - targets).square().sum(1), outputs)
    torch.testing.assert_close(found, 2 * (outputs - targets).norm(dim=1))


def test_the_bound_in_half_precision_and_without_gradient():
    logits = torch.randn(6, 10, generator=seeded()).requires_grad_()
    targets = torch.arange(6)
    exact = gradient_norm_bound(logits, targets)
    assert not exact.requires_grad
    torch.testing.assert_close(gradient_norm_bound(logits.bfloat16(), targets), exact, atol=2e-2, rtol=2e-2)


def reference_tau(scores: Tensor) -> float:
    """Section 3.3 of the paper, term by term."""
    g = [float(item) / float(scores.sum()) for item in scores]
    distance = sum((item - 1 / len(g)) ** 2 for item in g)
    return 1 / math.sqrt(1 - distance / sum(item**2 for item in g))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_tau_is_the_papers(values):
    scores = torch.tensor(values, dtype=torch.float64)
    assert variance_reduction(scores) == pytest.approx(reference_tau(scores), rel=1e-6)


def test_tau_predicts_the_variance_ratio(problem):
    """The second moment of the gradient under g against uniform is 1 / tau^2, when scores are exact norms."""
    gradients, norms, _ = problem
    uniform_moment = gradients.square().sum(1).mean()
    g = norms / norms.sum()
    drawn_moment = (g * (gradients / (len(g) * g[:, None])).square().sum(1)).sum()
    assert float(uniform_moment / drawn_moment) == pytest.approx(variance_reduction(norms) ** 2, rel=1e-6)


def test_tau_of_even_and_of_single_scores():
    assert variance_reduction(torch.full((8,), 3.0)) == pytest.approx(1.0)
    assert variance_reduction(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(2.0)
    assert variance_reduction(torch.zeros(4)) == pytest.approx(1.0)


def test_the_papers_threshold():
    assert speedup_threshold(3 * 128, 128) == pytest.approx(2.0)
    assert speedup_threshold(640, 128, forward=1, backward=1) == pytest.approx((640 + 256) / 256)


def test_frequencies_follow_scores():
    scores = torch.ones(1000)
    scores[:250] = 4
    drawn = importance_sample(scores, 20000, generator=seeded()).indices
    assert float((drawn < 250).double().mean()) == pytest.approx(1000 / 1750, abs=0.02)


def test_zero_scores_are_never_drawn_unless_all_are_zero():
    scores = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    drawn = importance_sample(scores, 500, generator=seeded()).indices
    assert set(drawn.tolist()) == {1, 3}
    even = importance_sample(torch.zeros(5), 500, generator=seeded())
    assert set(even.indices.tolist()) == set(range(5))
    assert bool((even.weights == 1).all())


def test_uniform_passes_hold_everything_once():
    chosen = uniform_sample(10, 25, generator=seeded())
    assert sorted(chosen.indices[:10].tolist()) == sorted(chosen.indices[10:20].tolist()) == list(range(10))
    assert bool((chosen.weights == 1).all())


@pytest.mark.parametrize(
    "scores", [torch.tensor([]), torch.tensor([[1.0]]), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -1.0]),
               torch.tensor([1.0, float("inf")])]
)  # fmt: skip
def test_unusable_scores_are_refused(scores):
    with pytest.raises(InputError, match="expected"):
        importance_sample(scores, 3, generator=seeded())
    with pytest.raises(InputError, match="expected"):
        variance_reduction(scores)


def test_unusable_budgets_and_shapes_are_refused():
    with pytest.raises(InputError, match="budget"):
        importance_sample(torch.ones(3), 0, generator=seeded())
    with pytest.raises(InputError, match="budget"):
        uniform_sample(3, 0, generator=seeded())
    with pytest.raises(InputError, match="logits"):
        gradient_norm_bound(torch.ones(3, 4), torch.ones(2).long())
    with pytest.raises(InputError, match="losses"):
        output_gradient_norm(lambda z: z.sum(), torch.ones(3, 2))
    with pytest.raises(InputError, match="sizes"):
        speedup_threshold(0, 1)
