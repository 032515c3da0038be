"""One process and two (gloo): replicas and shards train the same adapters, and change between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Results of whole, replicated and sharded training."""
    folder = tmp_path_factory.mktemp("parallel")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(HERE / "adapt_parallel_worker.py"), str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", ["lora", "nola"])
@pytest.mark.parametrize("how", ["replicas", "shards"])
def test_two_processes_train_the_same_adapters(folder, method, how):
    one, two = (load_file(folder / f"{method}-{kind}.safetensors") for kind in ("whole", how))
    assert one.keys() == two.keys()
    for key in one:
        assert float((one[key] - two[key]).abs().max()) < 1e-5, key


@pytest.mark.parametrize("method", ["lora", "nola"])
def test_what_was_compared_did_train(folder, method):
    one = load_file(folder / f"{method}-whole.safetensors")
    outputs = [one[key] for key in ("a output", "b output", "off")]
    for place, first in enumerate(outputs):
        for second in outputs[:place]:
            assert float((first - second).abs().max()) > 1e-2
    assert float((one["b again"] - one["b output"]).abs().max()) == 0
