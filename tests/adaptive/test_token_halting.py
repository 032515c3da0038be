"""Token halting against a loop over tokens in float64; its losses, its budgets, and the two forms on every family."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_vits import HOSTS, build, pictures
from torch import Tensor

from scrimp.adaptive import depth_prior_loss, image_costs, ponder_loss, restore_, token_halting_, token_sampling_
from scrimp.meter.flops import count_flops
from scrimp.primitives.errors import InputError


def _halt(model: Any, image: Tensor, read: set[int], silent: set[int]) -> tuple[Tensor, Tensor, list[list[float]], Any]:
    """One image, its rows really taken away: the mean of states, N + r, and the scores of every token by block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    count, last = len(x), len(model.blocks) - 1
    total, mean = [0.0] * count, torch.zeros_like(x)
    rho, scores = torch.zeros(count, dtype=x.dtype), [[0.0] * (last + 1) for _ in range(count)]
    prefix, rows, running, ran = model.num_prefix_tokens, list(range(count)), set(range(count)), []
    for index, block in enumerate(model.blocks):
        if not rows:
            break
        x = x.clone()
        x[rows] = block(x[rows][None])[0]
        ran.append(set(rows))
        going = set()
        for k in running:
            h = 0.0 if k in silent else 1 / (1 + math.exp(-(2 * float(x[k, 0]) - 1.5)))
            scores[k][index] = h
            if index < last and total[k] + h < 0.99:
                going.add(k)
        if not going & read:
            going = set()
        for k in running:
            share = scores[k][index] if k in going else 1 - total[k]
            mean[k] += share * x[k]
            if k not in going:
                rho[k] = index + 1 + share
            total[k] += scores[k][index]
        running = going
        rows = sorted(going | set(range(prefix))) if going else []
    return mean, rho, scores, ran


@pytest.mark.parametrize("host", ["deit3", "distilled", "registers", "avgmax"])
@torch.no_grad()
def test_halting_is_the_papers(host: str) -> None:
    model: Any = build(host).double()
    images = pictures(3).double()
    control = token_halting_(model, gate_scale=2, gate_center=1.5, form="masked")
    got, kept = model(images), control.kept
    losses = ponder_loss(control), depth_prior_loss(control, depth=1.5, spread=0.7)
    restore_(model)
    prefix = model.num_prefix_tokens
    unread = {"registers": set(range(1, 5)), "avgmax": {0}}.get(host, set())
    patches = {"avgmax": set(range(1, 17))}.get(host, set(range(prefix)) - unread)
    rhos, mass = [], [0.0] * 3
    for image in range(3):
        mean, rho, scores, ran = _halt(model, images[image], patches, unread)
        assert torch.allclose(got[image], model.forward_head(model.norm(mean)[None])[0], atol=1e-10)
        for index in range(3):
            rows = ran[index] if index < len(ran) else set()
            assert set(kept[image, index].nonzero().flatten().tolist()) == rows
            mass[index] += sum(row[index] for k, row in enumerate(scores) if k not in unread)
        rhos += [float(rho[k]) for k in range(len(rho)) if k not in unread]
    assert min(rhos) < 2.5 < max(rhos)
    assert float(losses[0]) == pytest.approx(sum(rhos) / len(rhos), rel=1e-12)
    bell = [math.exp(-(((index + 1 - 1.5) / 0.7) ** 2) / 2) for index in range(3)]
    share = [part / sum(mass) for part in mass]
    prior = sum(p * math.log(p * sum(bell) / b) for p, b in zip(share, bell, strict=True))
    assert float(losses[1]) == pytest.approx(prior, rel=1e-10)


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_forms_agree(host: str) -> None:
    model, images = build(host, depth=2), pictures()
    plain = model(images)
    control = token_halting_(model, gate_center=1e9, example=images)
    assert torch.allclose(model(images), plain, atol=1e-5)
    dense = control.costs
    for center, some in ((1.0, True), (-1e9, False)):  # some tokens halt at the first block, then all do
        control.method.gate_scale, control.method.gate_center, control.form = 2.0, center, "masked"
        masked, costs, tokens, ragged = model(images), control.costs, control.tokens, []
        control.form = "ragged"
        counted = count_flops(lambda ragged=ragged: ragged.append(model(images)))
        assert torch.allclose(ragged[0], masked, atol=1e-5)
        assert torch.equal(control.costs, costs)
        assert torch.equal(control.tokens, tokens)
        assert bool((tokens[:, 1] > 0).all()) is some
        assert int(costs.sum()) < int(dense.sum())
        assert counted.missed == ()
        assert counted.value == int(costs.sum()) - sum(block.shared for block in control.host.blocks)


def test_gradients_are_the_slopes() -> None:
    model: Any = build("deit3").double()
    images = pictures(2).double()
    control = token_halting_(model, gate_scale=2, gate_center=1.5)
    model.train()
    generator = torch.Generator().manual_seed(0)
    parameters = [parameter for name, parameter in model.named_parameters() if "blocks" in name]
    ways = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in parameters]

    def losses() -> list[Tensor]:
        return [model(images).square().sum(), ponder_loss(control), depth_prior_loss(control)]

    def moved(step: float) -> list[float]:
        with torch.no_grad():
            for part, way in zip(parameters, ways, strict=True):
                part += step * way
            values = [float(loss) for loss in losses()]
            for part, way in zip(parameters, ways, strict=True):
                part -= step * way
        return values

    up, down = moved(1e-6), moved(-1e-6)
    for index, loss in enumerate(losses()):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        slope = sum(float((g * w).sum()) for g, w in zip(grads, ways, strict=True) if g is not None)
        assert slope == pytest.approx((up[index] - down[index]) / 2e-6, rel=1e-4)
        assert abs(slope) > 1e-4


def _hard() -> Tensor:
    spot, mixed = torch.zeros(1, 3, 32, 32), pictures(1)
    spot[:, :, :8, :8] = 1e4
    mixed[:, 0, 0, 0] = torch.nan
    same = [torch.full_like(spot, value) for value in (1.0, torch.nan, torch.inf)]
    return torch.cat([pictures(2, seed=3), spot, mixed, *same])


@pytest.mark.parametrize("host", ["vit", "gap"])
@torch.no_grad()
def test_budgets_hold(host: str) -> None:
    model = build(host)
    full = int(image_costs(model, pictures(1))) if token_halting_(model) else 0  # an untrained score: none halts
    restore_(model)
    control = token_halting_(model, max_flops=int(0.7 * full))
    for control.form in ("ragged", "masked"):
        costs = image_costs(model, _hard())
        assert int(costs.max()) <= 0.7 * full
        assert int(costs[:2].min()) > 0.6 * full
    restore_(model)
    control = token_halting_(model, max_tokens=6)
    outs = []
    for control.form in ("ragged", "masked"):
        outs.append(model(pictures(2)))
        assert control.tokens.tolist() == [[control.host.tokens, 6, 6]] * 2
    assert torch.allclose(*outs, atol=1e-5)
    restore_(model)
    for wrong in ({"max_flops": full // 4}, {"max_tokens": control.host.prefix}):
        with pytest.raises(InputError, match="at least"):
            token_halting_(model, **wrong)


@torch.no_grad()
def test_scores_that_are_no_numbers_halt() -> None:
    model = build("gap")
    control = token_halting_(model)
    model(torch.full((2, 3, 32, 32), torch.nan))
    assert control.depth.tolist() == [1, 1]
    assert float(ponder_loss(control)) == 2  # one block, and all of the remainder


def test_the_published_centers_and_refusals() -> None:
    model = build("vit", depth=1, embed_dim=200)
    assert token_halting_(model).method.gate_center == 75
    small = build("vit", depth=1)
    control = token_halting_(small)
    assert control.method.gate_center == 30
    with pytest.raises(InputError, match="before a forward"):
        ponder_loss(control)
    twin = copy.deepcopy(small)
    assert torch.equal(twin(pictures(1)), small(pictures(1)))
    with pytest.raises(InputError, match="spread"):
        depth_prior_loss(control, spread=0)
    restore_(small)
    other = token_sampling_(small, blocks=(0,))
    small(pictures(1))
    with pytest.raises(InputError, match="Sampling"):
        depth_prior_loss(other)
    restore_(small)
    for wrong in ({"eps": 0.0}, {"eps": 1.0}, {"gate_scale": math.nan}, {"gate_center": math.inf}):
        with pytest.raises(InputError, match="eps"):
            token_halting_(small, **wrong)
