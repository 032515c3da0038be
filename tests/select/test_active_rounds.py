"""When to stop labelling, and strategies of scikit-activeml by way of a stand-in."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from scrimp.primitives.errors import InputError, MissingExtraError
from scrimp.select import Gain, bridge, changes_left, enough, gain_left

LABELS = [10, 20, 50, 100, 200]
NONE = torch.arange(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_gain_of_a_power_law_is_found():
    accuracies = [1 - (0.1 + 0.9 * m**-0.5) for m in LABELS]
    expected = 0.9 * (200**-0.5 - 5000**-0.5)
    found = gain_left(LABELS, accuracies, 5000)
    assert [found.expected, found.low, found.high] == pytest.approx([expected] * 3)
    noisy = gain_left(LABELS, [a + e for a, e in zip(accuracies, [0.02, -0.02, 0.01, 0.0, -0.01], strict=True)], 5000)
    assert noisy.low < noisy.expected < noisy.high
    assert gain_left(LABELS, accuracies, 200).high == 0


def test_the_fit_keeps_floor_and_scale_from_zero_up():
    worse = gain_left(LABELS, [0.9, 0.8, 0.7, 0.6, 0.5], 1000)
    assert worse == Gain(0.0, 0.0, 0.0)
    to_nothing = gain_left(LABELS, [1 - 5 * m**-1.5 for m in LABELS], 1000)
    assert to_nothing.expected == pytest.approx(5 * (200**-1.5 - 1000**-1.5))
    steep = gain_left([10, 20, 30, 40], [0.0, 0.5, 0.9, 1.0], 10**9)
    assert steep.expected <= steep.high <= 1


def test_changes_left_extrapolates_the_share_that_still_changes():
    # Each image keeps its first class up to some number of labels, spread so that shares fall as m^-1 does.
    settled = 1 / torch.linspace(1e-4, 1 / 5, 20000, dtype=torch.float64)
    predictions = [(settled <= m).long() for m in LABELS]
    found = changes_left(LABELS, predictions, 5000)
    assert found.expected == pytest.approx(5 * (1 / 200 - 1 / 5000), rel=2e-2)
    assert found.low <= found.expected <= found.high
    still = changes_left(LABELS, [predictions[0]] * 5, 5000)
    assert still == Gain(0.0, 0.0, 0.0)


def test_unknown_gain_never_stops():
    assert gain_left([10, 20, 20, 30], [0.5] * 4, 100) is None
    assert changes_left([], [], 100) is None
    assert not enough(None, 1.0)
    assert enough(Gain(0.0, 0.0, 0.009), 0.01)
    assert not enough(Gain(0.0, 0.0, 0.01), 0.01)


def test_what_is_no_history_is_refused():
    ones = torch.ones(3)
    for call in [
        lambda: gain_left([1, 2], [0.5], 9),
        lambda: gain_left([0, 2], [0.5, 0.5], 9),
        lambda: gain_left([1, 12], [0.5, 0.5], 9),
        lambda: gain_left([1, 2], [50.0, 60.0], 9),
        lambda: changes_left([1, 2], [ones, ones[:2]], 9),
        lambda: changes_left([1, 2], [ones[:0], ones[:0]], 9),
    ]:
        with pytest.raises(InputError):
            call()


class QueryBase:
    def __init__(self, random_state=None, wrong=False):
        self.random_state, self.wrong = random_state, wrong

    def get_params(self, deep=True):
        return {"random_state": self.random_state, "wrong": self.wrong}


class Classifier:
    def __init__(self, classes=None):
        self.classes = classes


class LeastSure(QueryBase):
    def query(self, X, y, clf, fit_clf=True, candidates=None, batch_size=1):
        assert isinstance(clf, Classifier)
        assert not fit_clf
        self.seen = torch.from_numpy(y)
        sure = clf.predict_proba(X[candidates]).max(1)
        order = sure.argsort()[:batch_size]
        return candidates[order] * (0 if self.wrong else 1)


class ByState(QueryBase):
    def query(self, X, y, candidates=None, batch_size=1):
        return candidates[torch.randperm(len(candidates), generator=seeded(self.random_state))[:batch_size].numpy()]


class Perturbing(QueryBase):
    def query(self, X, y, clf, batch_size=1):
        return clf.predict(X + 1)


@pytest.fixture
def stand_in(monkeypatch):
    base = types.ModuleType("skactiveml.base")
    base.SingleAnnotatorPoolQueryStrategy, base.SkactivemlClassifier = QueryBase, Classifier
    monkeypatch.setitem(sys.modules, "skactiveml", types.ModuleType("skactiveml"))
    monkeypatch.setitem(sys.modules, "skactiveml.base", base)


@pytest.mark.usefixtures("stand_in")
def test_the_bridge_asks_with_the_models_predictions():
    features = torch.randn(9, 2, generator=seeded())
    probabilities = torch.rand(9, 3, generator=seeded(1)).mul(3).softmax(1)
    known = torch.tensor([8, 0])
    sure = probabilities.max(1).values
    expected = sorted(range(1, 8), key=lambda i: float(sure[i]))
    found = bridge(LeastSure())(features, probabilities, known, 4, generator=seeded())
    assert found.indices.tolist() == expected[:4]
    assert len(bridge(LeastSure())(features, probabilities, known, 20, generator=seeded())) == 7
    assert len(bridge(LeastSure())(features, probabilities, torch.arange(9), 2, generator=seeded())) == 0
    for broken in (LeastSure(wrong=True), Perturbing()):
        with pytest.raises(InputError):
            bridge(broken)(features, probabilities, known, 2, generator=seeded())
    with pytest.raises(InputError, match="cold_start"):
        bridge(LeastSure())(features, None, known, 2, generator=seeded())
    with pytest.raises(InputError, match="query strategy"):
        bridge(sorted)


@pytest.mark.usefixtures("stand_in")
def test_the_bridge_takes_its_randomness_from_the_generator():
    strategy, features = ByState(random_state=3), torch.zeros(30, 1)
    first, again, other = (bridge(strategy)(features, None, NONE, 5, generator=seeded(i)).indices for i in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert strategy.random_state == 3


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("labels", [None, torch.arange(6)])
def test_the_bridge_hands_over_labels_of_labelled_images_only(labels):
    seen = []

    class Looking(LeastSure):
        def query(self, X, y, clf, fit_clf=True, candidates=None, batch_size=1):
            seen.append(torch.from_numpy(y).clone())
            return candidates[:batch_size]

    probabilities = torch.eye(3)[[0, 1, 2, 2, 1, 0]]
    bridge(Looking(), labels=labels)(torch.zeros(6, 1), probabilities, torch.tensor([3, 4]), 1, generator=seeded())
    expected = torch.tensor([2.0, 1.0] if labels is None else [3.0, 4.0], dtype=torch.float64)
    assert torch.equal(seen[0][3:5], expected)
    assert bool(seen[0][[0, 1, 2, 5]].isnan().all())


def test_without_the_package_the_bridge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skactiveml.base", None)
    monkeypatch.setitem(sys.modules, "skactiveml", None)
    with pytest.raises(MissingExtraError, match="label"):
        bridge(object())
