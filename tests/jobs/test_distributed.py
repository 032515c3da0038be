"""One process and two (gloo): the same draws, the same network up to rounding, replicas and shards alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scrimp.jobs.folder import RECEIPT, REPORT, WEIGHTS
from scrimp.receipts import load_receipt
from scrimp.report import find_receipts

HERE = Path(__file__).parent
POLICIES = ("uniform", "history", "prune", "presample")


def torchrun(processes: int, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*launcher, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the same jobs run by one process and by two."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for processes, folder in enumerate(folders, 1):
        torchrun(processes, str(HERE / "worker.py"), str(folder), cwd=folder)
    return folders


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_draw_the_same(runs, policy, parallel):
    one, two = (json.loads((runs[0] / f"{policy}-ddp.json").read_text()),
                json.loads((runs[1] / f"{policy}-{parallel}.json").read_text()))  # fmt: skip
    assert len(one) >= 2
    assert one == two


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_network(runs, policy, parallel):
    one = load_file(runs[0] / f"{policy}-ddp" / WEIGHTS)
    two = load_file(runs[1] / f"{policy}-{parallel}" / WEIGHTS)
    assert one.keys() == two.keys()
    for key in one:
        assert float((one[key] - two[key]).abs().max()) < 1e-3, key


def test_presampling_differs_from_uniform(runs):
    """The parity above would hold of a presampler that never chose."""
    one, other = (load_file(runs[1] / f"{policy}-ddp" / WEIGHTS) for policy in ("uniform", "presample"))
    assert any(float((one[key] - other[key]).abs().max()) > 1e-2 for key in one)


def test_a_study_runs_on_two_processes(runs):
    assert (runs[1] / "study" / REPORT).is_file()
    found = find_receipts([runs[1] / "study"])
    assert {item.way for item in found} == {"uniform", "history"}
    assert all(item.notes["processes"] == 2 for item in found)


@pytest.mark.parametrize("strategy", ["mcmc", "classic"])
def test_two_processes_fit_the_same_scene(runs, strategy):
    one = load_file(runs[0] / f"splats-{strategy}-0.safetensors")
    two, other = (load_file(runs[1] / f"splats-{strategy}-{rank}.safetensors") for rank in (0, 1))
    assert one.keys() == two.keys() == other.keys()
    assert one["model.leaves.means"].shape[0] != 60
    for key in one:
        assert torch.equal(two[key], other[key]), key
        if one[key].numel():
            assert float((one[key] - two[key]).abs().max()) < (1e-5 if "leaves" in key else 1e-4), key


def test_splats_are_fitted_on_two_processes(runs):
    receipts = find_receipts([runs[1] / "splats"])
    assert {receipt.way for receipt in receipts} >= {".sgs, trained for it", ".sgs, rounded afterwards"}
    assert all(receipt.notes["processes"] == receipt.notes["views"] == 2 for receipt in receipts)
    assert all(receipt.cost.samples.value == 20 for receipt in receipts)
    (own,) = [receipt for receipt in receipts if receipt.way.endswith("trained for it")]
    assert (runs[1] / "splats" / "scene.sgs").stat().st_size == own.cost.stored_bytes.value


def test_a_transformer_is_thinned_on_two_processes(runs):
    """The same answers and costs of the same images; what is learnt is learnt by both."""
    one, two = (find_receipts([run / "thin-ats"]) for run in runs)
    assert [receipt.way for receipt in one] == [receipt.way for receipt in two]
    for first, second in zip(one, two, strict=True):
        assert (first.notes["processes"], second.notes["processes"]) == (1, 2)
        assert second.notes["flops_an_image"] == first.notes["flops_an_image"]
        assert second.quality == pytest.approx(first.quality, abs=1e-6)
    trained = runs[1] / "thin-adavit" / "adavit-0.5"
    assert load_receipt(trained / "training" / RECEIPT).cost.samples.value == 24
    gates = load_file(trained / "gates.safetensors")
    assert any(bool(value.any()) for name, value in gates.items() if name.endswith("weight"))


def test_two_processes_are_hardened_against_the_same_patches(runs):
    """The first patch is of the same model on any number of processes, the second of one that has learnt a little."""
    one, two = (run / "thin-avit" / "avit-0.0005" for run in runs)
    alone, together = (load_file(folder / "patches.safetensors") for folder in (one, two))
    assert alone.keys() == together.keys() == {"patch-1", "patch-2"}
    assert torch.equal(alone["patch-1"], together["patch-1"])
    note, other = (load_receipt(folder / RECEIPT).notes["defence"] for folder in (one, two))
    assert [item["at"] for item in other["made"]] == [item["at"] for item in note["made"]] == [0, 0.5]
    assert other["flops"] == 2 * note["flops"]  # each process makes them
    known, found = (load_file(folder / WEIGHTS) for folder in (one, two))
    assert all(float((known[name] - found[name]).abs().max()) < 1e-3 for name in known)


def test_torchrun_from_the_shell(shape_folder, tmp_path):
    command = ["-m", "scrimp", "train", str(shape_folder), "--epochs", "2", "--device", "cpu", "--model", "convnet-8"]
    done = torchrun(2, *command, "--out", str(tmp_path / "run"), "--json", cwd=tmp_path)
    (receipt,) = json.loads(done.stdout)
    assert receipt["notes"]["processes"] == 2
    assert (tmp_path / "run" / WEIGHTS).is_file()
