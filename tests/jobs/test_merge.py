"""`scrimp merge` on images: one ordinary model, checked; and all that may not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_adapt import CLASSES, config, shapes_of, untrained

from scrimp.adapt import load_adapter_
from scrimp.cli import main
from scrimp.jobs import merge as job
from scrimp.jobs.adapt import adapt
from scrimp.jobs.adapt_models import image_subject
from scrimp.jobs.adapt_run import ADAPTER
from scrimp.jobs.encoders import load_encoder
from scrimp.jobs.folder import WEIGHTS
from scrimp.jobs.merge import merge
from scrimp.jobs.merge_config import MergeConfig
from scrimp.jobs.models import create_model, load_weights_
from scrimp.primitives.errors import InputError

METHODS = ("nola", "bias", "full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A base, another one of the same shape, and run folders of several methods."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fixture of a module comes before those of a test
    root = tmp_path_factory.mktemp("merge")
    untrained(root / "base", "small-resnet18-4")
    untrained(root / "other", "small-resnet18-4", seed=4)
    untrained(root / "convnet", "convnet-4")
    for method in METHODS:
        run = config(root / method, model=str(root / "base"), method=method, epochs=0.5, lr=0.05, baseline="none")
        adapt(run, data=shapes_of(96, 24))
    torch.set_num_threads(threads)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_the_adapted_one(runs, tmp_path, method):
    out = tmp_path / "merged.safetensors"
    done = merge(MergeConfig(model=str(runs / "base"), adapter=runs / method / ADAPTER, out=out, device="cpu"))
    assert done.path == out
    assert done.weights == (20 if method == "nola" else 0)
    assert done.difference <= 1e-5 < done.largest
    with torch.random.fork_rng([]):
        torch.manual_seed(9)
        merged = create_model("small-resnet18-4", classes=3, channels=1, size=16).eval()
    assert load_weights_(merged, out) == []
    adapted = image_subject(load_encoder(runs / "base"), CLASSES).build(3)
    shown = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        bare = adapted.eval()(shown)
        load_adapter_(adapted, runs / method / ADAPTER)
        torch.testing.assert_close(merged(shown), adapted.eval()(shown), atol=1e-5, rtol=1e-4)
        assert float((merged(shown) - bare).abs().max()) > 1e-2
    with safe_open(out, "pt") as file:
        assert (file.metadata()["model"], file.metadata()["classes"].split("\n")) == ("small-resnet18-4", list(CLASSES))


def test_by_default_it_is_written_beside_the_adapter(runs, capsys):
    assert main(["merge", str(runs / "base"), str(runs / "nola"), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == str(runs / "nola" / "merged.safetensors")
    assert (runs / "nola" / "merged.safetensors").is_file()
    assert main(["merge", str(runs / "base"), str(runs / "nola"), "--device", "cpu"]) == 2
    assert "--out" in capsys.readouterr().err
    out = str(runs / "again.safetensors")
    assert main(["merge", str(runs / "base"), str(runs / "nola"), "--out", out, "--device", "cpu"]) == 0
    assert "largest difference" in capsys.readouterr().err
    assert (runs / "again.safetensors").read_bytes() == (runs / "nola" / "merged.safetensors").read_bytes()


def test_outputs_that_differ_are_refused(runs, tmp_path, monkeypatch):
    merge_ = job.merge_

    def spoilt(model):
        merge_(model)
        with torch.no_grad():
            model.fc.bias += 0.1

    monkeypatch.setattr(job, "merge_", spoilt)
    with pytest.raises(InputError, match="differ by"):
        merge(MergeConfig(model=str(runs / "base"), adapter=runs / "nola", out=tmp_path / "m.safetensors"))
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "adapter", "words"),
    [
        ("other", "nola", "fingerprint"),
        ("convnet", "nola", "small-resnet18-4"),
        ("base", "absent", "absent"),
        ("absent", "nola", "absent"),
        ("base", "base", ADAPTER),
        ("base", "alone/adapter.safetensors", "config.yaml"),
        ("base", "short", "whole"),
        ("base", "stranger", "scrimp adapt"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(runs, tmp_path, capsys, model, adapter, words):
    whole = (runs / "nola" / ADAPTER).read_bytes()
    for name, content in (("alone", whole), ("short", whole[:-7]), ("stranger", whole)):
        (tmp_path / name).mkdir()
        (tmp_path / name / ADAPTER).write_bytes(content)
    (tmp_path / "short" / "config.yaml").write_bytes((runs / "nola" / "config.yaml").read_bytes())
    (tmp_path / "stranger" / "config.yaml").write_text("job: train\nresolved: {budget_flops: 1.0}\n")
    place = runs / adapter if (runs / adapter).exists() else tmp_path / adapter
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(runs / model), str(place), "--out", str(out), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scrimp: expected ")
    assert words in line
    assert not out.exists()
    assert WEIGHTS not in {item.name for item in tmp_path.rglob("*")}
