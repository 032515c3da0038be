"""Adaptive transformers as victims: their losses against the methods' own and by hand, and attacks that cost them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_victims import pictures, victim, vit

from scrimp.adaptive import cost_bounds, image_costs, ponder_loss, token_halting_, usage_loss
from scrimp.attack import (
    attack_success,
    attention,
    perturb,
    ponder,
    ponder_and_prior,
    random_patch,
    running,
    samples,
    scores,
    significance,
    universal_patch,
    usage,
    victim_of,
)
from scrimp.primitives.errors import InputError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So little work is done sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_losses_are_the_methods_own_image_by_image() -> None:
    images = pictures(3)
    halting, gating = victim("halting", surrogate=ponder), victim("gating")
    with torch.no_grad():
        each = halting.policy_loss(images)
        assert float(each.mean()) == pytest.approx(-float(ponder_loss(halting.controller)), rel=1e-6)
        assert each[1:2].tolist() == pytest.approx(halting.policy_loss(images[1:2]).tolist(), rel=1e-5)
        assert len(set(each.tolist())) == 3
        used = gating.policy_loss(images)
        for index in range(3):
            gating.cost(images[index : index + 1])
            assert float(used[index]) == pytest.approx(-float(usage_loss(gating.controller, (0, 0, 0))), rel=1e-5)


@torch.no_grad()
def test_attention_is_that_of_the_model() -> None:
    target = victim("sampling", surrogate=attention, depth=2)
    target.model.double()
    images, model = pictures(2).double(), target.model
    got = target.policy_loss(images)
    again = victim("sampling", surrogate=significance, depth=2)
    again.model.double()
    mass = again.policy_loss(images)
    plain: Any = vit(depth=2).double()
    plain.load_state_dict(model.state_dict())
    first = plain.blocks[0](plain._pos_embed(plain.patch_embed(images)))  # the second block alone samples
    part = plain.blocks[1].attn
    for image in range(2):
        rows = part.qkv(plain.blocks[1].norm1(first))[image].view(17, 3, 2, 16)
        wanted, heads = 0.0, torch.zeros(17, dtype=torch.float64)
        for head in range(2):
            weights = torch.softmax(rows[:, 1, head] @ rows[0, 0, head] / 4, 0)
            wanted += sum((float(weight) - 1 / 17) ** 2 for weight in weights[1:])
            heads += weights
        score = (heads * rows[:, 2].flatten(1).norm(dim=1))[1:]
        share = score / score.sum()
        assert float(got[image].detach()) == pytest.approx(wanted, rel=1e-10)
        assert float(mass[image].detach()) == pytest.approx(float((share * (share * 16).log()).sum()), rel=1e-8)
    assert "look" not in vars(target.controller.method)
    assert target.controller.form == "auto"


@pytest.mark.parametrize(
    ("kind", "surrogate"),
    [
        ("halting", ponder),
        ("halting", ponder_and_prior),
        ("halting", scores),
        ("halting", running),
        ("sampling", attention),
        ("sampling", samples),
    ],
)
def test_gradients_of_pixels_are_the_slopes(kind: str, surrogate: Any) -> None:
    target = victim(kind, surrogate=surrogate, depth=3)
    target.model.double()
    images = pictures(2).double().requires_grad_()
    (slope,) = torch.autograd.grad(target.policy_loss(images).sum(), images)
    way = torch.randn(images.shape, generator=_gen(), dtype=images.dtype)
    with torch.no_grad():
        up, down = (float(target.policy_loss(images + step * way).sum()) for step in (1e-5, -1e-5))
    assert float((slope * way).sum()) == pytest.approx((up - down) / 2e-5, rel=1e-3)
    assert abs(up - down) > 1e-8


def test_a_patch_raises_what_halting_costs_and_chance_does_not() -> None:
    target, seen, fresh = victim("halting"), pictures(12), pictures(12, seed=7)
    clean = target.cost(fresh)
    assert float(clean.double().mean()) < 0.6 * target.full
    weights = {name: part.clone() for name, part in target.model.state_dict().items()}
    patch = universal_patch(target, seen, size=10, steps=30, generator=_gen())
    same = universal_patch(target.model, seen, size=10, steps=30, generator=_gen())  # the model is made a victim
    assert torch.equal(patch.pixels, same.pixels)
    assert attack_success(target.cost(patch.on(fresh)), clean, target.full) > 0.5
    chance = random_patch(seen, size=10, generator=_gen())
    assert abs(attack_success(target.cost(chance.on(fresh)), clean, target.full)) < 0.15
    assert all(torch.equal(part, weights[name]) for name, part in target.model.state_dict().items())
    assert all(part.requires_grad and part.grad is None for part in target.model.parameters())


def test_a_budget_holds_under_attack() -> None:
    model, images = vit(depth=3), pictures(6)
    token_halting_(model, gate_scale=4, gate_center=-2)
    dense, most = cost_bounds(model)
    assert most == dense
    free, bound = victim_of(model), int(0.7 * dense)
    attacked = perturb(free, images, epsilon=16 / 255, steps=10, generator=_gen()).on(images)
    assert int(free.cost(attacked).max()) > bound
    capped: Any = vit(depth=3)
    token_halting_(capped, gate_scale=4, gate_center=-2, max_flops=bound)
    target = victim_of(capped)
    assert target.full == dense
    assert target.ceiling is not None
    assert target.ceiling <= bound
    again = perturb(target, images, epsilon=16 / 255, steps=10, generator=_gen()).on(images)
    for shown in (attacked, again):
        assert int(target.cost(shown).max()) <= target.ceiling


@pytest.mark.parametrize("kind", ["sampling", "gating", "static"])
def test_other_methods(kind: str) -> None:
    target, images = victim(kind), pictures(6)
    costs = target.cost(images)
    assert target.ceiling is not None
    assert int(costs.max()) <= target.ceiling
    assert torch.equal(target.parts(images).sum(1), costs)
    assert torch.equal(costs, image_costs(target.model, images))
    assert target.statistics(images).shape == (6, 4)
    attacked = perturb(target, images, epsilon=16 / 255, steps=8, generator=_gen()).on(images)
    success = attack_success(target.cost(attacked), costs, target.ceiling)
    if kind == "static":
        assert success == 0
        assert attack_success(target.cost(attacked), costs, target.full) == 0
        assert target.ceiling == int(costs[0]) < target.full
    else:
        assert success > 0.1


def test_normalisation_and_refusals() -> None:
    target, images = victim("halting"), pictures(2)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    there = victim_of(target.model, mean=mean, std=std)
    by_hand = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(there.cost(images), target.cost(by_hand))
    assert torch.allclose(there.policy_loss(images), target.policy_loss(by_hand))
    with pytest.raises(InputError, match="a method attached"):
        victim_of(vit())
    with pytest.raises(InputError, match="token_halting_"):
        victim("gating", surrogate=ponder).policy_loss(images)
    with pytest.raises(InputError, match="both mean and std"):
        victim_of(target.model, mean=mean)
    assert usage(_seen(images)).shape == (2,)


def _seen(images: torch.Tensor) -> Any:
    kept: list[Any] = []
    victim("gating", surrogate=lambda seen: kept.append(seen) or usage(seen)).policy_loss(images)
    return kept[0]
