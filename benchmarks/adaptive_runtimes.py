"""Other runtimes for adaptive_speed.py: each makes a call of an exported model on fixed images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[], Any]


def to_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """By torch.export; a file that is there already is this model's."""
    if path.is_file():
        return
    with torch.no_grad():
        options = {"verbose": False, "external_data": False, "optimize": True}
        torch.onnx.export(model, (images,), str(path), dynamo=True, **options)


def onnxruntime(model: nn.Module, images: Tensor, path: Path, threads: int) -> Call:
    import onnxruntime as runtime

    to_onnx(model, images, path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(model: nn.Module, images: Tensor, path: Path, threads: int, *, precision: str) -> Call:
    import openvino as runtime

    to_onnx(model, images, path)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = runtime.Core().compile_model(str(path), "CPU", options)
    given = images.numpy()
    return lambda: compiled(given)[0]


RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[nn.Module, Tensor, Path, int], Call]]] = {
    "ONNX Runtime fp32": (("onnx", "onnxscript", "onnxruntime"), onnxruntime),
    "OpenVINO fp32": (("onnx", "onnxscript", "openvino"), partial(openvino, precision="f32")),
    "OpenVINO bf16": (("onnx", "onnxscript", "openvino"), partial(openvino, precision="bf16")),
}
