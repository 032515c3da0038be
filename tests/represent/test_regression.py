"""Regression onto teachers against the formula in a loop; logit distillation against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from represent_reference import TOLERANCE, agree, draws, of_unit_length
from torch import nn

from scrimp.primitives.errors import InputError
from scrimp.represent import logit_distillation_loss, regression_loss


def reference(students, teachers) -> torch.Tensor:
    losses = []
    for image in range(len(students[0])):
        terms = [
            (of_unit_length(ours[image].double()) - of_unit_length(theirs[image].double())).square().sum()
            for ours, theirs in zip(students, teachers, strict=True)
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=30)
@given(rows=st.integers(1, 6), dims=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_teachers_of_different_widths_against_a_loop(dtype: torch.dtype, rows: int, dims: list[int]) -> None:
    students = [draws(rows, dim, seed=index, dtype=dtype).requires_grad_() for index, dim in enumerate(dims)]
    teachers = [draws(rows, dim, seed=50 + index, dtype=dtype) for index, dim in enumerate(dims)]
    ours = regression_loss(students, teachers, reduction="none")
    agree(ours, reference(students, teachers), students, kind=dtype)
    torch.testing.assert_close(regression_loss(students, teachers), ours.mean())
    if len(dims) == 1:
        assert torch.equal(regression_loss(students[0], teachers[0], reduction="none"), ours)


def test_no_gradient_goes_to_the_teachers() -> None:
    student, teachers = draws(3, 4).requires_grad_(), [draws(3, 4, seed=n).requires_grad_() for n in (1, 2)]
    regression_loss([student, student], teachers).backward()
    assert student.grad is not None
    assert [teacher.grad for teacher in teachers] == [None, None]


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"got \[2, 3\] and \[2, 4\]; .*head"),
        ([torch.ones(2, 3)], [torch.ones(2, 3)] * 2, "one prediction for each teacher; got 1 for 2 teachers"),
        (torch.ones(2, 3), [torch.ones(2, 3)] * 2, "got 1 for 2 teachers"),
        ([], [], "got 0 for 0 teachers"),
    ],
)
def test_what_does_not_fit_is_refused(student, teacher, said: str) -> None:
    with pytest.raises(InputError, match=said):
        regression_loss(student, teacher)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=30)
@given(rows=st.integers(1, 6), classes=st.integers(1, 11), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_logit_distillation_against_torch(dtype: torch.dtype, rows: int, classes: int, temperature: float) -> None:
    student = draws(rows, classes, dtype=dtype).requires_grad_()
    teacher = draws(rows, classes, seed=1, dtype=dtype)
    ours = logit_distillation_loss(student, teacher, temperature=temperature, reduction="none")
    inputs = (student.double() / temperature).log_softmax(1)
    aims = (teacher.double() / temperature).softmax(1)
    theirs = nn.KLDivLoss(reduction="none")(inputs, aims).sum(1) * temperature**2
    agree(ours, theirs, [student], kind=dtype)
    whole = nn.KLDivLoss(reduction="batchmean")(inputs, aims) * temperature**2
    found = logit_distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(found.double(), whole, atol=TOLERANCE[dtype], rtol=0)


def test_logits_far_apart_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4], [3e4, -3e4]], requires_grad=True)
    losses = logit_distillation_loss(student, teacher, temperature=1.0, reduction="none")
    torch.testing.assert_close(losses, torch.tensor([2e4, math.log(2)]), atol=1e-3, rtol=0)
    losses.sum().backward()
    assert bool(student.grad.isfinite().all())
    assert teacher.grad is None


def test_wrong_logits_and_temperatures() -> None:
    with pytest.raises(InputError, match=r"student and teacher logits .* got \[2, 3\] and \[2, 4\]"):
        logit_distillation_loss(torch.ones(2, 3), torch.ones(2, 4))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="a temperature above 0; got"):
            logit_distillation_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)
    with pytest.raises(InputError, match='got "batchmean"'):
        logit_distillation_loss(torch.ones(2, 3), torch.ones(2, 3), reduction="batchmean")
