"""Mean shift against a loop over memory and neighbours; with one neighbour it is BYOL."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from represent_reference import TOLERANCE, agree, draws, filled, mean_shift

from scrimp.primitives.errors import InputError
from scrimp.represent import Memory, byol_loss, mean_shift_loss


@given(
    rows=st.integers(1, 7),
    dim=st.integers(1, 9),
    size=st.integers(1, 40),
    views=st.integers(1, 3),
    push=st.booleans(),
    data=st.data(),
)
def test_against_a_loop(rows: int, dim: int, size: int, views: int, push: bool, data: st.DataObject) -> None:
    memory = filled(size, dim, pushed=data.draw(st.integers(1, 2 * size)))
    online = [draws(rows, dim, seed=10 + view).requires_grad_() for view in range(views)]
    target = draws(rows, dim, seed=20)
    if push:
        memory.push_(target)
    k = data.draw(st.integers(1, memory.known))
    ours = mean_shift_loss(online if views > 1 else online[0], target, memory, k=k, reduction="none")
    agree(ours, mean_shift(online, target, memory, k=k), online, kind=torch.float64)
    torch.testing.assert_close(mean_shift_loss(online, target, memory, k=k), ours.mean())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kept", TOLERANCE, ids=str)
def test_half_precision_in_the_inputs_and_in_the_memory(dtype: torch.dtype, kept: torch.dtype) -> None:
    exact, memory = filled(500, 32), filled(500, 32, dtype=kept)
    online = draws(16, 32, seed=2, dtype=dtype).requires_grad_()
    target = draws(16, 32, seed=3, dtype=dtype)
    for each in (exact, memory):
        each.push_(target)
    ours = mean_shift_loss(online, target, memory, k=5, reduction="none")
    agree(ours, mean_shift([online], target, exact, k=5), [online], kind=max(dtype, kept, key=TOLERANCE.get))


@given(rows=st.integers(1, 24), dim=st.integers(2, 33), size=st.integers(24, 60), seed=st.integers(0, 10**6))
def test_one_neighbour_is_byol(rows: int, dim: int, size: int, seed: int) -> None:
    memory = Memory(size, dim)
    memory.push_(draws(size + 5, dim, seed=seed + 2, dtype=torch.float32))
    online = draws(rows, dim, seed=seed, dtype=torch.float32).requires_grad_()
    target = draws(rows, dim, seed=seed + 1, dtype=torch.float32)
    memory.push_(target)
    ours, theirs = mean_shift_loss(online, target, memory, k=1), byol_loss(online, target)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    (found,), (right,) = torch.autograd.grad(ours, online), torch.autograd.grad(theirs, online)
    assert float(((found - right).abs() * online.detach().norm(dim=1, keepdim=True).clamp_max(1)).max()) <= 1e-6


def test_autocast_changes_nothing() -> None:
    memory = filled(2000, 16, dtype=torch.float32)
    online, target = draws(32, 16, dtype=torch.float32), draws(32, 16, seed=3, dtype=torch.float32)
    plain = mean_shift_loss(online, target, memory, k=10, reduction="none")
    rows = memory.search(target, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memory.search(target, 10), rows)
        torch.testing.assert_close(mean_shift_loss(online, target, memory, k=10, reduction="none"), plain)


def test_the_order_of_the_memory_does_not_matter() -> None:
    memory, shuffled = filled(60, 5), Memory(60, 5, dtype=torch.float64)
    shuffled.push_(memory.vectors[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    online, target = draws(8, 5, seed=4), draws(8, 5, seed=5)
    losses = [mean_shift_loss(online, target, each, k=7, reduction="none") for each in (memory, shuffled)]
    torch.testing.assert_close(*losses)


def test_no_gradient_goes_to_target_or_memory() -> None:
    memory, target = filled(9, 4), draws(3, 4, seed=7).requires_grad_()
    online = draws(3, 4).requires_grad_()
    memory.push_(target)
    mean_shift_loss(online, target, memory, k=2).backward()
    assert target.grad is None
    assert online.grad is not None


def test_more_of_the_batch_than_the_memory_holds() -> None:
    """The last of the batch are kept; what was pushed first is not there to be found."""
    memory, target = Memory(4, 3, dtype=torch.float64), draws(10, 3, seed=1)
    memory.push_(target)
    losses = mean_shift_loss(target, target, memory, k=1, reduction="none")
    torch.testing.assert_close(losses[6:], torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert bool((losses[:6] > 1e-6).all())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_huge_tiny_and_zero_vectors(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    extreme = torch.tensor([[info.max, info.max], [info.tiny, 0], [0, 0], [0, 1]], dtype=torch.float64).to(dtype)
    memory = Memory(8, 2, dtype=dtype)
    memory.push_(extreme)
    online = extreme.clone().requires_grad_()
    losses = mean_shift_loss(online, extreme, memory, k=3, reduction="none")
    losses.mean().backward()
    assert bool(losses.isfinite().all())
    assert bool(online.grad.isfinite().all())
    assert float(losses[2].detach()) == 2


def test_clear_errors() -> None:
    memory, online = filled(4, 3), draws(2, 3)
    with pytest.raises(InputError, match="k from 1 to the 4 embeddings in the memory; got 5; lower k"):
        mean_shift_loss(online, online, memory)
    with pytest.raises(InputError, match=r"one shape \[batch, dim\]; got \[2, 3\] and \[2, 4\]"):
        mean_shift_loss(online, draws(2, 4), memory, k=1)
    with pytest.raises(InputError, match="one online view or more; got none"):
        mean_shift_loss([], online, memory, k=1)
    with pytest.raises(InputError, match=r"got \[1, 3\] and \[2, 3\]"):
        mean_shift_loss([online, online[:1]], online, memory, k=1)
    with pytest.raises(InputError, match=r"same width|as wide"):
        mean_shift_loss(draws(2, 5), draws(2, 5), memory, k=1)
    with pytest.raises(InputError, match='got "sum"'):
        mean_shift_loss(online, online, memory, k=1, reduction="sum")
