"""The target network: a copy of its own that follows by the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scrimp.primitives.errors import InputError
from scrimp.represent import follow_, target_of


@pytest.fixture
def online() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 4, 5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def moved(model: nn.Module) -> None:
    """Other weights and other statistics."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(3)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_follows_by_the_formula_and_keeps_its_statistics(online, momentum: float, dtype: torch.dtype) -> None:
    online = online.to(dtype)
    target = target_of(online)
    moved(online)
    learning = {name: value.clone() for name, value in online.state_dict().items()}
    before = {name: value.clone() for name, value in target.state_dict().items()}
    follow_(target, online, momentum=momentum)
    follow_(target, online, momentum=momentum)
    parameters = {name for name, _ in online.named_parameters()}
    assert 0 < len(parameters) < len(before)
    for name, value in target.state_dict().items():
        expected = before[name]
        for _ in range(2 * (name in parameters)):
            expected = momentum * expected + (1 - momentum) * learning[name]
        torch.testing.assert_close(value, expected)
        if momentum in (0, 1) or name not in parameters:
            assert torch.equal(value, expected)
    assert all(torch.equal(value, learning[name]) for name, value in online.state_dict().items())


def test_the_default_momentum_is_the_papers(online) -> None:
    target = target_of(online)
    moved(online)
    before = target[0].weight.clone()
    follow_(target, online)
    torch.testing.assert_close(target[0].weight, before + 0.01 * 3)


def test_the_copy_learns_nothing_and_shares_nothing(online) -> None:
    target = target_of(online)
    assert all(value.requires_grad for value in online.parameters())
    assert not any(value.requires_grad for value in target.parameters())
    assert target.training == online.training
    for mine, theirs in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert not target(torch.ones(2, 2, 4, 4)).requires_grad
    assert not torch.equal(target[1].running_mean, online[1].running_mean)  # statistics of its own


def test_gradients_of_the_online_network_are_left_alone(online) -> None:
    target = target_of(online)
    online(torch.ones(2, 2, 4, 4)).sum().backward()
    before = online[3].bias.grad.clone()
    follow_(target, online)
    assert torch.equal(online[3].bias.grad, before)
    assert all(value.grad is None and not value.requires_grad for value in target.parameters())


def test_networks_without_parameters_and_frozen_ones() -> None:
    follow_(nn.ReLU(), nn.ReLU())
    with torch.random.fork_rng(devices=[]):
        frozen = nn.Linear(2, 2).requires_grad_(False)
    target = target_of(frozen)
    moved(frozen)
    follow_(target, frozen, momentum=0)
    assert torch.equal(target.weight, frozen.weight)


def test_what_does_not_fit_is_refused(online) -> None:
    with torch.random.fork_rng(devices=[]):
        other, longer = nn.Linear(2, 3), nn.Sequential(*target_of(online), nn.Linear(5, 5))
    for target in (other, longer, nn.ReLU()):
        with pytest.raises(InputError, match="a target of the online network's shape"):
            follow_(target, online)
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"a momentum in \[0, 1\]; got"):
            follow_(target_of(online), online, momentum=momentum)
