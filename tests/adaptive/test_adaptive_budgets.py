"""Hard budgets an image: no input costs more, and what cannot be kept is refused beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vits import build, pictures
from torch import Tensor, nn

from scrimp.adaptive import Controller, image_costs, keep_tokens_, restore_, token_merging_, token_sampling_
from scrimp.primitives.errors import InputError


def _sampling(model: nn.Module, **budget: Any) -> Controller:
    return token_sampling_(model, blocks=range(3), **budget)


def _merging(model: nn.Module, **budget: Any) -> Controller:
    return token_merging_(model, 1, **budget)


def _keeping(model: nn.Module, **budget: Any) -> Controller:
    return keep_tokens_(model, 0.9, blocks=(0, 1), **budget)


METHODS = [_sampling, _merging, _keeping]


def _inputs() -> dict[str, Tensor]:
    spot = torch.zeros(2, 3, 32, 32)
    spot[:, :, :8, :8] = 1e4
    return {
        "random": pictures(2, seed=3),
        "constant": torch.ones(2, 3, 32, 32),
        "nan": torch.full((2, 3, 32, 32), torch.nan),
        "infinite": torch.full((2, 3, 32, 32), torch.inf),
        "spot": spot,
    }


def _costliest(model: nn.Module, control: Controller) -> Tensor:
    """An image that costs much, found by hill climbing."""
    generator, best, most = torch.Generator().manual_seed(0), pictures(8), 0
    for _ in range(2):
        tries = best + torch.randn(8, 3, 32, 32, generator=generator)
        costs = image_costs(model, tries)
        if int(costs.max()) > most:
            most, best = int(costs.max()), tries[costs.argmax()].expand(8, -1, -1, -1)
    return best


@pytest.mark.parametrize(("attach", "host"), [*((attach, "vit") for attach in METHODS), (_sampling, "pwee")])
@torch.no_grad()
def test_max_flops_holds(attach: Any, host: str) -> None:
    model = build(host)
    control = attach(model)
    full = int(image_costs(model, pictures(4)).max())
    restore_(model)
    budget = int(0.8 * full)
    control = attach(model, max_flops=budget)
    inputs = {**_inputs(), "adversarial": _costliest(model, control)}
    for name, images in inputs.items():
        for control.form in ("ragged", "masked"):
            costs = image_costs(model, images)
            assert int(costs.max()) <= budget, name
    assert int(image_costs(model, inputs["random"]).max()) > 0.5 * budget  # used, not given away


@pytest.mark.parametrize("attach", METHODS)
@torch.no_grad()
def test_max_tokens_holds(attach: Any) -> None:
    model = build("vit")
    control = attach(model, max_tokens=6)
    for images in _inputs().values():
        model(images)
        assert int(control.tokens[:, -1].max()) <= 6


@pytest.mark.parametrize("attach", METHODS)
@pytest.mark.parametrize("budget", [{"max_flops": 1000}, {"max_tokens": 1}])
def test_impossible_budgets_are_refused(attach: Any, budget: dict[str, int]) -> None:
    model = build("vit")
    with pytest.raises(InputError, match="at least"):
        attach(model, **budget)
    restored = any(part._forward_hooks for part in model.modules())
    assert not restored


@torch.no_grad()
def test_other_sizes_have_their_own_cap() -> None:
    model = build("vit", dynamic_img_size=True)
    control = _sampling(model)
    small = int(image_costs(model, pictures(2)).max())
    restore_(model)
    control = _sampling(model, max_flops=small)
    larger = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert int(image_costs(model, larger).max()) <= small
    assert control.tokens.shape == (2, 3)
