"""The static schedules as ONNX: exported as they are, run by another runtime, equals among the scores included."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tiny_vits import build, pictures
from torch import Tensor

from scrimp.adaptive import keep_tokens_, token_merging_
from scrimp.adaptive.stream import falling

SCORES = torch.tensor([[0.5, 2.0, 0.5, -1.0, 2.0, 0.5, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
ORDER = [[1, 4, 0, 2, 5, 3, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_equals_keep_their_order() -> None:
    assert falling(SCORES).tolist() == ORDER
    assert falling(SCORES[:, :1]).tolist() == [[0], [0]]
    assert falling(SCORES[:, :0]).shape == (2, 0)


class _Falling(torch.nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return falling(scores)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("what", ["order", "merging", "keeping"])
@torch.no_grad()
def test_onnx_runtime_agrees(what: str) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="torch.onnx needs it to export")
    runtime: Any = pytest.importorskip("onnxruntime", reason="it runs what is exported")
    model, given = (_Falling(), SCORES) if what == "order" else (build("dinov3", depth=2), pictures(2))
    if what == "merging":
        token_merging_(model, 3)
    elif what == "keeping":
        keep_tokens_(model, 0.5, blocks=(0, 1))
    wanted, file = model(given), io.BytesIO()
    program = torch.onnx.export(model, (given,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    assert torch.allclose(torch.from_numpy(got), wanted, atol=1e-5)
    assert wanted.tolist() == ORDER or what != "order"
