"""Attention of images of unlike lengths in one call on nested tensors, as on GPUs, against image after image."""

from __future__ import annotations

import pytest
import torch
from tiny_vits import build, pictures

from scrimp.adaptive import calls, token_sampling_
from scrimp.adaptive.calls import Call, attend
from scrimp.adaptive.stream import Plan, Stream

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
HEADS, DIM = 3, 8


def packed(lengths: tuple[int, ...], rows: torch.Tensor) -> Stream:
    return Stream("packed", 3, 7, 1, max(lengths), lengths=lengths, positions=rows)


@pytest.mark.parametrize("lengths", [(5, 3, 7), (5, 0, 7), (6, 6, 6)])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("leaving", [False, True])
def test_one_call_gives_what_a_loop_gives(lengths: tuple[int, ...], dense: bool, leaving: bool) -> None:
    if dense:
        lengths = (6, 6, 6)
    total, made = sum(lengths), torch.Generator().manual_seed(0)
    shape = (3, HEADS, 6, DIM) if dense else (1, HEADS, total, DIM)
    call = Call(*(torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(3)))
    stream = Stream("dense", 3, 6, 1, 6) if dense else packed(lengths, torch.arange(total))
    rows, plan = torch.arange(total), None
    if leaving:
        kept = torch.rand(total, generator=made) > 0.4
        rows = kept.nonzero().squeeze(1)
        plan = Plan(packed(tuple(int(part.sum()) for part in kept.split(lengths)), rows), rows)
    elif dense:
        plan = Plan(packed(lengths, rows), rows)
    one, by_image = (
        run(call, stream, plan).transpose(1, 2).flatten(0, 1)[rows] for run in (calls._nested, calls._by_image)
    )
    assert torch.allclose(one, by_image, rtol=0, atol=1e-14)
    assert torch.allclose(attend(call, stream, plan).transpose(1, 2).flatten(0, 1)[rows], one, rtol=0, atol=1e-14)


@torch.no_grad()
def test_a_whole_model_by_one_call_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = build("vit"), pictures(3)
    controller = token_sampling_(model, 6, blocks=(0, 2), least=3)
    wanted, tokens, seen = model(images), controller.tokens, []
    monkeypatch.setattr(calls, "_by_image", lambda *given: seen.append(1) or calls._nested(*given))
    assert torch.allclose(model(images), wanted, atol=1e-5)
    assert seen
    assert torch.equal(controller.tokens, tokens)
    assert int(tokens.max()) < 17
