"""What the steps without labels cost beside their baselines, by their layers' dimensions; and that they learn."""

from __future__ import annotations

import pytest
import torch

from scrimp.compare import Sides, find_comparisons
from scrimp.compare.represent_step import Distillation, Pretraining
from scrimp.meter import count_flops
from scrimp.meter.memory import saved_bytes


@pytest.fixture(scope="module")
def built() -> dict[str, Sides]:
    names = ("mean-shift", "constrained-mean-shift", "regression")
    return {name: find_comparisons(name)[0].sides(seed=3) for name in names}


@pytest.mark.parametrize("name", ["mean-shift", "constrained-mean-shift"])
def test_one_view_for_each_network_is_half_of_byols_work(name: str, built) -> None:
    sides = built[name]
    ours, theirs = count_flops(sides.method), count_flops(sides.baseline)
    assert ours.missed == theirs.missed == ()
    assert 0.5 < ours.value / theirs.value < 0.52
    saved = [saved_bytes(side).value for side in (sides.method, sides.baseline)]
    assert 0 < saved[0] < 0.52 * saved[1]


def test_the_constraint_adds_a_search_and_no_forward_pass(built) -> None:
    constrained, plain = (count_flops(built[name].method).value for name in ("constrained-mean-shift", "mean-shift"))
    batch, memory, dim = 64, 4096, 32
    assert constrained - plain == 2 * batch * memory * dim


def test_mean_shift_costs_what_its_layers_say(built) -> None:
    """Convolutions and heads by their dimensions: the target once, the online network three times but for images."""
    first, rest = 2 * 32**2 * 27 * 32, 2 * (16**2 * 288 * 64 + 8**2 * 576 * 128)
    projector, predictor = 2 * (128 * 256 + 256 * 32), 2 * (32 * 256 + 256 * 32)
    target, online = first + rest + projector, 2 * first + 3 * (rest + projector + predictor)
    assert count_flops(built["mean-shift"].method).value == 64 * (target + online + 2 * 4096 * 32)


def test_a_step_of_learning_reaches_every_weight_and_leaves_the_teacher_alone() -> None:
    step = Pretraining(seed=1)
    for way in (step.mean_shift, step.constrained, step.byol):
        before = [value.clone() for value in step.target.parameters()]
        way()
        learning = [*step.online.parameters(), *step.predict.parameters()]
        assert all(bool(value.grad.any()) for value in learning)
        assert all(value.grad is None for value in step.target.parameters())
        assert all(torch.allclose(*pair) for pair in zip(before, step.target.parameters(), strict=True))
    distil = Distillation(seed=1)
    distil.regression()
    assert all(bool(value.grad.any()) for part in (distil.student, distil.head) for value in part.parameters())
    assert all(value.grad is None for value in [*distil.teacher.parameters(), *distil.classify.parameters()])
    distil.logits()
    assert all(bool(value.grad.any()) for part in (distil.student, distil.classify) for value in part.parameters())
    assert all(value.grad is None for value in [*distil.teacher.parameters(), *distil.head.parameters()])


def test_features_cost_about_what_logits_cost(built) -> None:
    sides = built["regression"]
    ours, theirs = count_flops(sides.method).value, count_flops(sides.baseline).value
    heads = 3 * 2 * (128 * 256 + 256 * 128 + 128 * 256 + 256 * 256) - 3 * 2 * 128 * 100 - 2 * 256 * 100
    assert ours - theirs == 64 * heads
    assert ours < 1.02 * theirs
