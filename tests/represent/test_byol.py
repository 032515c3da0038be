"""Agreement of two embeddings against a loop, and at the ends of what its types hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from represent_reference import TOLERANCE, agree, draws, of_unit_length

from scrimp.primitives.errors import InputError
from scrimp.represent import byol_loss
from scrimp.represent.byol import unit

TYPES = list(TOLERANCE)


def reference(online: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    pairs = zip(online.double(), target.detach().double(), strict=True)
    return torch.stack([(of_unit_length(v) - of_unit_length(u)).square().sum() for v, u in pairs])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=30)
@given(rows=st.integers(1, 9), dim=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_against_a_loop(dtype: torch.dtype, rows: int, dim: int, seed: int) -> None:
    online = draws(rows, dim, seed=seed, dtype=dtype).requires_grad_()
    target = draws(rows, dim, seed=seed + 1, dtype=dtype)
    agree(byol_loss(online, target, reduction="none"), reference(online, target), [online], kind=dtype)


def test_mean_and_extremes() -> None:
    online = draws(5, 3)
    assert float(byol_loss(online, online * 7)) == pytest.approx(0)
    assert float(byol_loss(online, -online)) == pytest.approx(4)
    target = draws(5, 3, seed=4)
    each = byol_loss(online, target, reduction="none")
    assert each.shape == (5,)
    assert float(byol_loss(online, target)) == pytest.approx(float(each.sum()) / 5)


def test_no_gradient_goes_to_the_target() -> None:
    online, target = draws(4, 3).requires_grad_(), draws(4, 3, seed=1).requires_grad_()
    byol_loss(online, target).backward()
    assert online.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_huge_tiny_and_zero_vectors(dtype: torch.dtype) -> None:
    info, target = torch.finfo(dtype), torch.ones(5, 2, dtype=dtype)
    rows = [[info.max, info.max], [info.tiny, info.tiny], [0, 0], [info.tiny / 4, 0], [info.max, 0]]
    online = torch.tensor(rows, dtype=torch.float64).to(dtype).requires_grad_()
    losses = byol_loss(online, target, reduction="none")
    aslant = 2 - 2 * 0.5**0.5
    expected = torch.tensor([0, 0, 2, 2, aslant], dtype=losses.dtype)
    torch.testing.assert_close(losses, expected, atol=TOLERANCE[dtype], rtol=0)
    losses.mean().backward()
    assert bool(torch.isfinite(online.grad).all())
    assert bool((online.grad[2:4] == 0).all())
    assert bool((byol_loss(target, online, reduction="none").isfinite()).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_the_gradient_of_vectors_whose_squares_float32_cannot_hold(scale: float) -> None:
    online = (draws(3, 4, dtype=torch.float32) * scale).requires_grad_()
    target = draws(3, 4, seed=1, dtype=torch.float32)
    (found,) = torch.autograd.grad(byol_loss(online, target), online)
    wide = online.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(reference(wide, target).mean(), wide)
    torch.testing.assert_close(found.double() * scale, right * scale, atol=4e-6, rtol=0)


def test_unit_keeps_what_is_no_number_visible() -> None:
    rows = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [3.0, 4.0]])
    found = unit(rows)
    assert found.isnan().any(1).tolist() == [True, True, False]
    assert found[2].tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("online", "target", "said"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"one shape \[batch, dim\]; got \[3, 4\] and \[3, 5\]"),
        (torch.ones(3, 4), torch.ones(4), r"one shape .* \[4\]"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "flatten them"),
        (torch.ones(0, 4), torch.ones(0, 4), r"got \[0, 4\]"),
        (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 4), "floating numbers; got torch.int64"),
        (torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64), "floating numbers; got torch.int64"),
    ],
)
def test_wrong_shapes_and_types(online: torch.Tensor, target: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        byol_loss(online, target)


def test_another_reduction_is_refused() -> None:
    with pytest.raises(InputError, match='"mean" or "none"; got "sum"'):
        byol_loss(torch.ones(2, 2), torch.ones(2, 2), reduction="sum")
