"""Attaching and its ways back: what is refused, copies, failures, training, export."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import timm
import torch
from tiny_vits import build, pictures
from torch import Tensor, nn

from scrimp.adaptive import attach_, controller_of, image_costs, keep_tokens_, restore_, token_merging_, token_sampling_
from scrimp.adaptive.method import Method, Run
from scrimp.meter.flops import count_flops
from scrimp.primitives.errors import InputError


@pytest.fixture(scope="module")
def strangers() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=8)
        conv = timm.create_model("efficientnet_lite0", num_classes=2)
        xcit = timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=1)
    return {"swin": swin, "conv": conv, "xcit": xcit, "linear": nn.Linear(2, 2)}


@pytest.mark.parametrize(
    ("name", "saw"), [("swin", "Swin"), ("conv", "Efficient"), ("xcit", "XCA|Xcit"), ("linear", "Lin")]
)
def test_other_models_are_refused_by_name(strangers: dict[str, nn.Module], name: str, saw: str) -> None:
    with pytest.raises(InputError, match=saw):
        token_merging_(strangers[name], 2, example=torch.zeros(2, 3, 32, 32))
    assert not any(part._forward_hooks for part in strangers[name].modules())


def test_refusals() -> None:
    model, images = build("vit"), pictures(2)
    with pytest.raises(InputError, match="attach one first"):
        restore_(model)
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match="checkpointing"):
        token_merging_(model, 1)
    model.set_grad_checkpointing(False)
    control = token_sampling_(model)
    with pytest.raises(InputError, match="restore_ it"):
        token_merging_(model, 1)
    with pytest.raises(InputError, match="forward_intermediates"):
        model.forward_intermediates(images)
    with pytest.raises(InputError, match="mask"):
        model(images, attn_mask=torch.zeros(17, 17))
    with pytest.raises(InputError, match="order"):
        model.blocks[1](torch.zeros(1, 17, 32))
    control.form = "ragged"
    model.train()
    with pytest.raises(InputError, match="masked form to train"):
        model(images)
    model.set_grad_checkpointing()
    with pytest.raises(InputError, match="checkpointing"):
        model(images)


class _Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model, images = build("vit"), pictures(2)
    token_merging_(model, 2)
    plain, mlp = model(images), model.blocks[1].mlp
    model.blocks[1].mlp = _Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        model(images)
    assert torch.overrides._len_torch_function_stack() == 0
    model.blocks[1].mlp = mlp
    assert torch.equal(model(images), plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_are_attached_too(copied: Any) -> None:
    model, images = build("vit"), pictures(2)
    plain = model(images)
    control = token_sampling_(model, 5, blocks=(1,))
    less = model(images)
    twin = copied(model)
    assert torch.equal(twin(images), less)
    assert controller_of(twin) is not control
    assert controller_of(twin).host.model is twin
    restore_(twin)
    assert torch.equal(twin(images), plain)
    assert torch.equal(model(images), less)


@torch.no_grad()
def test_threads_keep_to_themselves() -> None:
    model, seen = build("vit"), {}
    control = token_sampling_(model, 5, blocks=(1,))
    alone = {count: model(pictures(count)) for count in (1, 4)}

    def work(count: int) -> None:
        with torch.no_grad():
            same = all(torch.equal(model(pictures(count)), alone[count]) for _ in range(5))
        seen[count] = same and len(control.costs) == count

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1: True, 4: True}


def test_training_is_masked_and_the_gradients_are_the_ragged_ones() -> None:
    model, images = build("rope"), pictures(3)
    control, grads = token_sampling_(model, 6, blocks=(0, 1), least=2), []
    for control.form in ("masked", "ragged"):
        given = images.clone().requires_grad_()
        model(given).square().sum().backward()
        assert given.grad is not None
        grads.append(given.grad)
    assert torch.allclose(*grads, atol=1e-5)
    assert grads[0].abs().max() > 1e-3
    control.form = "auto"
    model.train()(images).sum().backward()
    assert int(control.tokens[:, -1].max()) < 9


@pytest.mark.parametrize(
    ("attach", "host"),
    [(lambda m: token_merging_(m, 3), "dinov3"), (lambda m: keep_tokens_(m, 0.5, blocks=(0, 1), fuse=False), "vit")],
)
@torch.no_grad()
def test_static_schedules_export(attach: Any, host: str) -> None:
    model, images = build(host, depth=2), pictures(2)
    attach(model)
    wanted = model(images)
    before = controller_of(model).costs
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (pictures(3, seed=5),), dynamic_shapes=batch, strict=False).module()
    assert torch.allclose(exported(images), wanted, atol=1e-5)
    assert torch.equal(before, controller_of(model).costs)


def test_the_ragged_form_is_not_exported() -> None:
    model = build("vit")
    token_sampling_(model)
    with pytest.raises(InputError, match="masked"):
        torch.export.export(model, (pictures(2),), strict=False)


@torch.no_grad()
def test_read_outs() -> None:
    model, images = build("registers"), pictures(2)
    control = attach_(model, Method())
    assert (control.costs, control.tokens, control.depth, control.kept) == (None,) * 4
    assert torch.equal(image_costs(model, images), control.costs)
    assert control.depth.tolist() == [3, 3]
    assert control.kept.shape == (2, 3, 21)
    assert bool(control.kept.all())
    assert list(control.parameters()) == []
    restore_(model)
    control = token_sampling_(model)
    assert model(images[:0]).shape == (0, 5)
    assert control.costs.shape == (0,)


class _Detour(Method):
    """Every other patch token goes around the second block: what `enter` and `leave` are for."""

    def enter(self, run: Run, x: Tensor) -> Tensor:
        if run.block != 1:
            return x
        mask = (torch.arange(run.stream.width) % 2 == 1).expand(run.stream.images, -1)
        plan = run.stream.keep(mask)
        run.memory["before"] = (x, run.stream, plan)
        run.stream = plan.stream
        return plan.take(x)

    def leave(self, run: Run, x: Tensor) -> Tensor:
        if run.block != 1:
            return x
        whole, stream, plan = run.memory["before"]
        run.stream = stream
        if plan.rows is None:
            return torch.where(plan.stream.alive[..., None], x, whole)
        return whole.flatten(0, 1).index_copy(0, plan.rows, x[0]).view_as(whole)


@pytest.mark.parametrize("host", ["vit", "rope_mixed", "beit", "pwee"])
@torch.no_grad()
def test_a_method_of_ones_own(host: str) -> None:
    model, images = build(host), pictures(2)
    plain = model(images)
    control = attach_(model, _Detour(), form="masked")
    masked, costs = model(images), control.costs
    control.form = "ragged"
    assert torch.allclose(model(images), masked, atol=1e-5)
    assert torch.equal(control.costs, costs)
    assert not torch.allclose(masked, plain, atol=1e-3)
    whole, prefix = control.host.tokens, control.host.prefix
    assert control.tokens.tolist() == [[whole, prefix + (whole - prefix) // 2, whole]] * 2
    shared = sum(block.shared for block in control.host.blocks)
    assert count_flops(lambda: model(images)).value == int(costs.sum()) - shared


def test_a_budget_takes_a_method_that_knows_its_highest_cost() -> None:
    with pytest.raises(InputError, match=r"override Method\.schedule"):
        attach_(build("vit"), Method(), max_tokens=9)
