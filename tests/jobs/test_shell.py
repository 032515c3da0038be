"""The command line as a person meets it: exit codes, one line for a mistake, kill -9, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scrimp.cli import main, parse
from scrimp.jobs.config import StudyConfig, TrainConfig
from scrimp.jobs.folder import CHECKPOINT, CONFIG, REPORT, WEIGHTS
from scrimp.primitives.errors import InputError

SMALL = ["--model", "convnet-8", "--batch-size", "16", "--evaluations", "1", "--device", "cpu"]


def scrimp(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scrimp", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_bits(shape_folder, tmp_path, how):
    command = ["train", str(shape_folder), *SMALL, "--epochs", "150", "--sampling", "history", "--augment", "crop"]
    often = ["--checkpoint-seconds", "0.01", "--out", "killed"]
    victim = scrimp(*command, *often, cwd=tmp_path)
    wait_for(tmp_path / "killed" / CHECKPOINT, victim)
    time.sleep(0.3)
    victim.send_signal(how)
    _, errors = victim.communicate(timeout=180)
    assert victim.returncode == (-9 if how == signal.SIGKILL else 130), errors
    assert "--resume" in errors or how == signal.SIGKILL
    whole = scrimp(*command, "--out", "whole", cwd=tmp_path)
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    resumed = scrimp(*command, *often, "--resume", "--json", cwd=tmp_path)
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert json.loads(output)[0]["notes"]["resumed"] == 1
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no/such/folder"], "no/such/folder"),
        (["train", "--device", "cuda"], "--device cpu"),
        (["train", "--out", "runs/absent", "--resume"], "--resume"),
        (["train", "--lr", "-1"], "--lr"),
        (["study", "--ways", "magic"], "magic"),
        (["study", "--ways", "uniform", "uniform"], "different ways"),
        (["study", "--seeds", "0"], "seed"),
        (["report", "no/such/run"], "no/such/run"),
        (["compare", "magic"], "magic"),
        (["train", "--config", "absent.yaml"], "absent.yaml"),
        (["--config"], "file after --config"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("scrimp: expected ")
    assert words in output.err
    assert list(tmp_path.rglob("*.json")) == []


def test_an_unknown_flag_is_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--no-such-flag"])
    assert stop.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err


def test_help_and_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["study", "--help"])
    assert stop.value.code == 0
    assert "--minutes" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_help_loads_no_torch():
    code = "import sys\nfrom scrimp.cli import parse\ntry:\n parse(['train', '--help'])\nexcept SystemExit: pass\n"
    subprocess.run([sys.executable, "-c", f"{code}assert 'torch' not in sys.modules"], check=True, capture_output=True)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"lr": 0.3, "epochs": 7, "trackers": ["tensorboard"], "out": "here"}))
    found = parse(["train", "cifar10", "--config", str(file), "--lr", "0.1"])
    assert isinstance(found, TrainConfig)
    assert (found.lr, found.epochs, found.data, found.batch_size) == (0.1, 7, "cifar10", 64)
    assert (found.trackers, found.out) == (("tensorboard",), Path("here"))
    file.write_text("learning_rate: 1")
    with pytest.raises(InputError, match="learning_rate"):
        parse(["train", f"--config={file}"])


def test_study_from_the_shell_and_its_report(shape_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["study", str(shape_folder), *SMALL, "--flops", "6e8", "--seeds", "2", "--ways", "uniform", "history"]
    assert main(command) == 0
    folder = tmp_path / "runs" / f"study-{shape_folder.name}"
    printed = capsys.readouterr()
    assert "uniform" in printed.out
    assert "history" in printed.out
    assert str(REPORT) in printed.err
    assert len(list(folder.rglob(WEIGHTS))) == 4
    again = parse(["study", "--config", str(folder / CONFIG)])
    assert isinstance(again, StudyConfig)
    assert (again.flops, again.ways) == (6e8, ("uniform", "history"))
    (folder / REPORT).unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / REPORT).is_file()
    assert main(["report", str(folder), "--out", str(tmp_path / "merged")]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "merged.html")]) == 0
    assert (tmp_path / "merged" / REPORT).read_bytes() == (tmp_path / "merged.html").read_bytes()
    assert main([*command, "--resume", "--json"]) == 0
    printed = capsys.readouterr().out
    assert len(json.loads(printed[printed.index("\n[\n") :])) == 4


def test_a_corrupt_image_is_named_or_skipped(shape_folder, tmp_path, monkeypatch, capsys):
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(shape_folder, folder)
    broken = next((folder / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:60])
    command = ["train", str(folder), *SMALL, "--epochs", "1", "--json", "--out"]
    assert main([*command, str(tmp_path / "refused")]) == 2
    assert broken.name in capsys.readouterr().err
    assert main([*command, str(tmp_path / "skipped"), "--on-corrupt", "skip"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert receipt["notes"]["skipped images"] == 1


def test_empty_and_disagreeing_classes_are_named(shape_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(shape_folder, folder)
    (folder / "train" / "blank").mkdir()
    assert main(["train", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "blank" in capsys.readouterr().err
    (folder / "train" / "blank").rmdir()
    (folder / "test" / "ring").rename(folder / "test" / "rings")
    assert main(["train", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "ring" in capsys.readouterr().err
