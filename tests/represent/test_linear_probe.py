"""The linear probe: an optimum by its own conditions, by plain descent and by scikit-learn; few labels; mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scrimp.primitives.errors import InputError
from scrimp.represent.linear import LinearProbe, few_label_rows, fit_linear_probe, linear_accuracy


@pytest.fixture(autouse=True)
def one_thread():
    """Problems this small lose more by handing work over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(count: int = 300, *, seed: int = 0, dim: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Features with correlated dimensions of very different spreads, float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(77)
    centres = torch.randn(classes, dim, generator=shared, dtype=torch.float64)
    mixing = torch.randn(dim, dim, generator=shared, dtype=torch.float64) * torch.logspace(-2, 1, dim)
    labels = torch.randint(0, classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return (centres[labels] + 1.5 * noise) @ mixing + 0.5, labels


def standardised(rows: Tensor, like: Tensor) -> Tensor:
    """As written in the docstring, by hand."""
    rows, like = (part / part.square().sum(1, keepdim=True).sqrt() for part in (rows, like))
    mean = like.sum(0) / len(like)
    return (rows - mean) / ((like - mean).square().sum(0) / len(like)).sqrt()


def gradient(probe: LinearProbe, rows: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Of the objective, row by row: by the weight and by the bias."""
    by_weight, by_bias = l2 * probe.weight, torch.zeros_like(probe.bias)
    for row, label in zip(rows, labels.tolist(), strict=True):
        error = (probe.weight @ row + probe.bias).exp()
        error = error / error.sum()
        error[label] -= 1
        by_weight, by_bias = by_weight + error[:, None] * row, by_bias + error
    return by_weight, by_bias


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("count", [9, 300])
def test_the_gradient_vanishes_at_the_probe(count, l2):
    features, labels = problem(count)
    probe = fit_linear_probe(features, labels, classes=4, l2=l2)
    rows = standardised(features, features)
    by_weight, by_bias = gradient(probe, rows, labels, l2)
    assert by_weight.abs().max() < 1e-5 * count
    assert by_bias.abs().max() < 1e-5 * count
    shifted = LinearProbe(probe.mean, probe.std, 1.1 * probe.weight, probe.bias)
    assert gradient(shifted, rows, labels, l2)[0].abs().max() > 1e-3 * count * min(l2, 1)
    assert torch.allclose(probe.logits(features), rows @ probe.weight.T + probe.bias)


def test_plain_descent_ends_at_the_same_place():
    features, labels = problem(80, dim=5, classes=3)
    probe = fit_linear_probe(features, labels, classes=3, l2=2.0)
    rows = standardised(features, features)
    weight, bias = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(1200):
        shares = (rows @ weight.T + bias).softmax(1)
        shares[torch.arange(80), labels] -= 1
        weight, bias = weight - 0.02 * (shares.T @ rows + 2.0 * weight), bias - 0.02 * shares.sum(0)
    assert torch.allclose(probe.weight, weight, atol=1e-4)
    assert torch.allclose(probe.bias, bias, atol=1e-4)


@pytest.mark.parametrize("l2", [0.1, 1.0])
def test_scikit_learn_agrees(l2):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    (features, labels), (test, answers) = problem(400), problem(1000, seed=1)
    rows = standardised(features, features).numpy()
    judge = linear.LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(rows, labels.numpy())
    probe = fit_linear_probe(features, labels, classes=4, l2=l2)
    assert torch.allclose(probe.weight, torch.from_numpy(judge.coef_), atol=1e-3)
    wanted = judge.score(standardised(test, features).numpy(), answers.numpy())
    assert linear_accuracy(features, labels, test, answers, l2=l2) == pytest.approx(wanted, abs=1e-3)


def test_float32_and_half_give_what_float64_does():
    (features, labels), (test, answers) = problem(400), problem(500, seed=1)
    exact = fit_linear_probe(features, labels, classes=4)
    single = fit_linear_probe(features.float(), labels, classes=4)
    assert single.weight.dtype == torch.float32
    assert torch.allclose(single.weight.double(), exact.weight, atol=2e-3)
    half = features.bfloat16()
    assert linear_accuracy(half, labels, test.bfloat16(), answers) == linear_accuracy(
        half.float(), labels, test.bfloat16().float(), answers
    )


def test_accuracy_counts_and_is_the_same_each_time():
    (features, labels), (test, answers) = problem(), problem(200, seed=1)
    before = features.clone()
    probe = fit_linear_probe(features, labels, classes=4)
    wanted = sum(int(row.argmax() == label) for row, label in zip(probe.logits(test), answers, strict=True)) / 200
    assert linear_accuracy(features, labels, test, answers) == wanted
    assert wanted > 0.5
    again = fit_linear_probe(features, labels, classes=4)
    assert torch.equal(probe.weight, again.weight)
    assert torch.equal(features, before)
    assert not probe.weight.requires_grad


def test_mean_and_deviation_of_the_unlabelled():
    features, labels = problem()
    few = torch.arange(12)
    probe = fit_linear_probe(features[few], labels[few], classes=4, unlabelled=features)
    by_weight, _ = gradient(probe, standardised(features[few], features), labels[few], 1.0)
    assert by_weight.abs().max() < 1e-4
    assert not torch.allclose(probe.mean, fit_linear_probe(features[few], labels[few], classes=4).mean)


def test_dimensions_that_never_vary_and_classes_without_rows():
    features, labels = problem()
    padded = torch.cat([features, torch.zeros(300, 2, dtype=torch.float64)], 1).float()
    probe = fit_linear_probe(padded, labels, classes=6)
    assert torch.equal(probe.std[-2:], torch.ones(2))
    assert torch.isfinite(probe.weight).all()
    assert torch.equal(probe.logits(padded)[:, 4:], torch.full((300, 2), -1e4))
    assert torch.allclose(
        probe.weight[:4, :12].double(), fit_linear_probe(features, labels, classes=6).weight[:4], atol=1e-2
    )
    same = torch.full((5, 3), 0.1)
    alone = fit_linear_probe(same, torch.tensor([0, 0, 0, 1, 1]), classes=2)
    assert torch.allclose(alone.logits(same).softmax(1)[:, 0], torch.full((5,), 0.6), atol=1e-4)


def test_one_class_and_one_row():
    probe = fit_linear_probe(torch.ones(1, 2), torch.tensor([0]), classes=1)
    assert probe.logits(torch.ones(3, 2)).shape == (3, 1)
    assert linear_accuracy(torch.ones(1, 2), torch.tensor([1]), torch.ones(1, 2), torch.tensor([1])) == 1


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_few_labels_are_the_same_share_of_every_class(fraction):
    labels = torch.tensor([0] * 200 + [2] * 50 + [5] * 3)[
        torch.randperm(253, generator=torch.Generator().manual_seed(0))
    ]
    rows = few_label_rows(labels, fraction=fraction, generator=torch.Generator().manual_seed(1))
    counts = [int((labels[rows] == label).sum()) for label in (0, 2, 5)]
    assert counts == [max(1, round(size * fraction)) for size in (200, 50, 3)]
    assert torch.equal(rows, rows.unique())
    again = few_label_rows(labels, fraction=fraction, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rows, again)


def test_few_labels_are_drawn_evenly():
    labels, times = torch.zeros(10, dtype=torch.int64), torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        times[few_label_rows(labels, fraction=0.3, generator=generator)] += 1
    assert times.sum() == 3000
    assert times.min() > 230
    assert times.max() < 370


def test_mistakes_are_told():
    features, labels = problem(20)
    with pytest.raises(InputError, match="l2 above 0"):
        fit_linear_probe(features, labels, classes=4, l2=0)
    with pytest.raises(InputError, match="class numbers below 3"):
        fit_linear_probe(features, labels, classes=3)
    with pytest.raises(InputError, match="n and dim at least 1"):
        fit_linear_probe(features[:0], labels[:0], classes=4)
    with pytest.raises(InputError, match="finite"):
        fit_linear_probe(features / 0, labels, classes=4)
    with pytest.raises(InputError, match=r"features \[n, 12\]"):
        fit_linear_probe(features, labels, classes=4).logits(features[:, :3])
    with pytest.raises(InputError, match="one width"):
        fit_linear_probe(features, labels, classes=4, unlabelled=features[:, :3])
    for fraction in (0.0, 1.5):
        with pytest.raises(InputError, match="fraction"):
            few_label_rows(labels, fraction=fraction, generator=torch.Generator())
