"""Gating against a loop over heads and tokens in float64, gradients included; losses, noise, budgets, every family."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_vits import HOSTS, build, pictures
from torch import Tensor

from scrimp.adaptive import Controller, controller_of, gating_, image_costs, restore_, usage_loss
from scrimp.adaptive.gates import Gates
from scrimp.meter.flops import count_flops
from scrimp.primitives.errors import InputError


def _scatter(control: Controller, size: float = 0.5, shift: float = 0.0) -> None:
    """Gates that differ by image, block, head and token."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in control.parameters():
            noise = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise + (shift if parameter.ndim == 1 else 0))


def _gate(logit: Tensor, threshold: float) -> Tensor:
    soft = (logit / 5).sigmoid()
    return (soft > threshold).to(soft) + soft - soft.detach()


def _reference(model: Any, gates: Any, images: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """One image, head and layer after another; off tokens are left out of the keys. Every product is written out."""
    outs, seen = [], [[], [], []]
    for image in range(len(images)):
        x = model.norm_pre(model._pos_embed(model.patch_embed(images[image : image + 1])))[0]
        for index, block in enumerate(model.blocks):
            part, own = block.attn, None
            if index:
                own = x[0] if model.cls_token is not None else x.mean(0)
                logits = gates.image[index - 1].weight @ own + gates.image[index - 1].bias
                layers, heads = _gate(logits[:2], 0.5), _gate(logits[2:], 0.5)
                tokens = _gate((x @ gates.token[index - 1].weight.T + gates.token[index - 1].bias)[:, 0], 0.6)
                tokens = torch.cat([torch.ones(model.num_prefix_tokens).to(tokens), tokens[model.num_prefix_tokens :]])
                seen[0] += list(tokens[model.num_prefix_tokens :])
                seen[1] += list(heads)
                seen[2] += list(layers)
            else:
                layers, heads, tokens = x.new_ones(2), x.new_ones(part.num_heads), x.new_ones(len(x))
            on = [i for i in range(len(x)) if tokens[i] > 0.5]
            q, k, v = part.qkv(block.norm1(x)).view(len(x), 3, part.num_heads, part.head_dim).permute(1, 2, 0, 3)
            parts = []
            for head in range(part.num_heads):
                weights = (q[head] @ k[head][on].T * part.scale).softmax(-1) if on else q.new_zeros(len(x), 0)
                parts.append(heads[head] * (weights @ v[head][on]))
            x = x + (tokens * layers[0])[:, None] * block.ls1(part.proj(torch.cat(parts, -1)))
            x = x + (tokens * layers[1])[:, None] * block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        outs.append(model.forward_head(x[None])[0])
    return torch.stack(outs), seen


@pytest.mark.parametrize("host", ["deit3", "gap"])
def test_gating_is_the_papers(host: str) -> None:
    model: Any = build(host).double()
    images = pictures(3).double()
    control = gating_(model, form="masked")
    _scatter(control, 1.0)
    got, usage = model(images), usage_loss(control, (0.3, 0.4, 0.9))
    parameters = [*control.parameters(), *model.blocks.parameters()]
    grads = torch.autograd.grad((got.square().sum() + usage), parameters)
    gates = control.method.gates
    restore_(model)
    wanted, seen = _reference(model, gates, images)
    by_hand = sum((torch.stack(kind).mean() - target) ** 2 for kind, target in zip(seen, (0.3, 0.4, 0.9), strict=True))
    assert torch.allclose(got, wanted, atol=1e-10)
    assert torch.allclose(usage, by_hand, atol=1e-12)
    for kind in seen:
        assert 0 < sum(float(gate.detach()) for gate in kind) < len(kind)  # some of each kind are open, some are not
    for got_grad, grad in zip(grads, torch.autograd.grad(wanted.square().sum() + by_hand, parameters), strict=True):
        assert torch.allclose(got_grad, grad, atol=1e-9)
    assert all(grad.abs().max() > 1e-6 for grad in grads[: len(list(gates.parameters()))])


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_forms_agree(host: str) -> None:
    model, images = build(host, depth=2), pictures()
    keys, plain = list(model.state_dict()), model(images)
    control = gating_(model, example=images)
    assert list(model.state_dict()) == keys
    assert torch.allclose(model(images), plain, atol=1e-5)  # new gates are open
    dense = control.costs
    for size, shift in ((1.0, 0.0), (0.0, -9.0)):  # some gates are closed, then all are
        _scatter(control, size, shift)
        control.form = "masked"
        masked, costs, tokens, kept = model(images), control.costs, control.tokens, control.kept
        ragged: list[Tensor] = []
        control.form = "ragged"
        counted = count_flops(lambda ragged=ragged: ragged.append(model(images)))
        assert torch.allclose(ragged[0], masked, atol=1e-5)
        assert torch.equal(control.costs, costs)
        assert torch.equal(control.tokens, tokens)
        assert torch.equal(control.kept, kept)
        assert int(costs.sum()) < int(dense.sum())
        assert counted.missed == ()
        assert counted.value == int(costs.sum()) - sum(block.shared for block in control.host.blocks)
    assert control.depth.tolist() == [1, 1]


@torch.no_grad()
def test_the_noise_is_logistic() -> None:
    gates = Gates(4, [2], [6], 2.0, (0.5, 0.6))
    for parameter in gates.parameters():
        parameter.fill_(0.5 if parameter.ndim == 1 else 0)
    given = {"prefix": 1, "by_class": True, "cap": None}
    seen = [gates.decide(0, torch.ones(500, 5, 4), draw=gates.draw(3), **given) for _ in range(2)]
    for name, threshold in (("layers", 0.5), ("heads", 0.5), ("tokens", 0.6)):
        first, second = (getattr(decision, name).double() for decision in seen)
        wanted = 1 / (1 + math.exp(-(0.5 - 2 * math.log(threshold / (1 - threshold)))))
        patches = first[:, 1:] if name == "tokens" else first
        assert float(patches.mean()) == pytest.approx(wanted, abs=4 * (0.25 / patches.numel()) ** 0.5)
        assert not torch.equal(first, second)
    still = gates.decide(0, torch.ones(2, 5, 4), draw=None, **given)
    assert bool(still.heads.all())
    assert not bool(still.tokens[:, 1:].any())  # 0.5 is below the threshold of tokens


def test_training_draws_its_own() -> None:
    model, images = build("vit", depth=2).train(), pictures(4)
    before, runs = torch.get_rng_state(), []
    control = gating_(model, seed=3)
    _scatter(control, 0.0, 1.0)
    for steps in (None, None, 0):
        if steps is not None:  # a state_dict goes on where it was
            state = {**control.method.gates.state_dict(), "steps": torch.tensor(steps)}
            control.method.gates.load_state_dict(state)
        model(images)
        runs.append(control.run.memory["decisions"][0].tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])
    usage_loss(control, (0.0, 0.0, 0.0)).backward()
    assert all(bool((p.grad > 0).all()) for p in control.parameters() if p.ndim == 1)  # fewer, fewer, fewer


@pytest.mark.parametrize("host", ["vit", "pwee"])
@torch.no_grad()
def test_budgets_hold(host: str) -> None:
    model = build(host)
    control = gating_(model)
    full = int(image_costs(model, pictures(1)))
    restore_(model)
    control = gating_(model, max_flops=int(0.7 * full))
    spot = torch.zeros(1, 3, 32, 32)
    spot[:, :, :8, :8] = 1e4
    bad = [torch.full_like(spot, value) for value in (torch.nan, torch.inf, 1.0)]
    for control.form in ("ragged", "masked"):
        costs = image_costs(model, torch.cat([pictures(2), spot, *bad]))
        assert int(costs.max()) <= 0.7 * full
        assert int(costs[:2].min()) > 0.6 * full
    restore_(model)
    control = gating_(model, max_tokens=6)
    outs = []
    for control.form in ("ragged", "masked"):
        outs.append(model(pictures(2)))
        assert control.tokens.tolist() == [[control.host.tokens, 6, 6]] * 2
    assert torch.allclose(*outs, atol=1e-5)
    restore_(model)
    for wrong in ({"max_flops": full // 4}, {"max_tokens": 1}):
        with pytest.raises(InputError, match="at least"):
            gating_(model, **wrong)


@torch.no_grad()
def test_copies_and_refusals() -> None:
    model, images = build("vit"), pictures(2)
    control = gating_(model)
    with pytest.raises(InputError, match="before a forward"):
        usage_loss(control)
    _scatter(control, 1.0)
    twin = copy.deepcopy(model)
    gates = controller_of(twin).method.gates
    assert torch.equal(twin(images), model(images))
    assert torch.equal(gates.token[0].weight, control.method.gates.token[0].weight)
    assert gates.token[0].weight is not control.method.gates.token[0].weight
    with pytest.raises(InputError, match="targets"):
        usage_loss(control, (0.5, 0.5, 1.5))
    assert model(images[:0]).shape == (0, 5)
    restore_(model)
    for wrong in ({"full": 3}, {"full": -1}, {"tau": 0.0}, {"thresholds": (0.5, 1.0)}):
        with pytest.raises(InputError, match=r"full|tau"):
            gating_(model, **wrong)
