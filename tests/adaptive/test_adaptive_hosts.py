"""Attached to any family and taking nothing away, a method changes nothing; taking away, its two forms agree."""

from __future__ import annotations

import pytest
import torch
from tiny_vits import HOSTS, build, pictures
from torch import Tensor, nn

from scrimp.adaptive import Controller, controller_of, keep_tokens_, restore_, token_merging_, token_sampling_
from scrimp.adaptive.stream import Stream
from scrimp.meter.flops import count_flops
from scrimp.primitives.errors import InputError


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_family(host: str) -> None:
    model, images = build(host, depth=2), pictures()
    keys, plain = list(model.state_dict()), model(images)

    control = token_sampling_(model, 7, least=99, blocks=range(2), example=images)
    assert torch.allclose(model(images), plain, atol=1e-5)  # packed, as all tokens are among the least
    control.form = "masked"
    assert torch.allclose(model(images), plain, atol=1e-5)
    assert list(model.state_dict()) == keys
    control.method.least = 2
    masked, costs, tokens = model(images), control.costs, control.tokens
    control.form = "ragged"
    assert torch.allclose(model(images), masked, atol=1e-5)
    assert not torch.allclose(masked, plain, atol=1e-3)
    _assert_counted(model, control, images)
    assert torch.equal(control.costs, costs)
    assert torch.equal(control.tokens, tokens)
    assert int(tokens[:, -1].max()) < control.host.tokens - 4
    restore_(model)

    control = token_merging_(model, 0, example=images)
    assert torch.allclose(model(images), plain, atol=1e-5)
    control.method.r = [2]
    _assert_counted(model, control, images)
    assert control.tokens[:, -1].tolist() == [control.host.tokens - 4] * 2
    restore_(model)

    assert torch.equal(model(images), plain)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def _assert_counted(model: nn.Module, control: Controller, images: Tensor) -> None:
    """The ledger says what torch counts; but a bias by place, in each image's bill, is computed once for all."""
    counted = count_flops(lambda: model(images))
    shared = sum(block.shared for block in control.host.blocks)
    assert counted.missed == ()
    assert counted.value == int(control.costs.sum()) - (len(images) - 1) * shared


@pytest.mark.parametrize("host", ["vit", "pwee", "relpos", "siglip"])
@torch.no_grad()
def test_keeping(host: str) -> None:
    model, images = build(host), pictures()
    plain = model(images)
    control = keep_tokens_(model, 1.0, blocks=(0, 1), example=images)
    assert torch.allclose(model(images), plain, atol=1e-5)
    control.method.ratio = 0.5
    for control.method.fuse in (True, False):
        _assert_counted(model, control, images)
        left = 6 if control.method.fuse else 4
        assert control.tokens[:, -1].tolist() == [control.host.prefix + left] * 2


@pytest.mark.parametrize(("host", "door"), [("rope", "rope"), ("beit", "bias")])
def test_the_probe_sees_places_left_behind(host: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check when attaching can fail: it does, for a stream that forgets where its tokens were."""
    if door == "rope":
        monkeypatch.setattr(Stream, "rope", lambda self, table: table)
    else:
        monkeypatch.setattr("scrimp.adaptive.calls._moved", lambda bias, stream, image: bias)
    model = build(host)
    with pytest.raises(InputError, match=r"place only by embeddings and biases"):
        token_merging_(model, 2)
    with pytest.raises(InputError, match="attach one first"):
        controller_of(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
