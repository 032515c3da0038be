"""`scrimp audit`: the same report after a stop, from the shell, of other people's models; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_victim import Bright
from safetensors.torch import save_file
from torch import nn

from conftest import CLASSES, draw
from scrimp.adaptive import token_sampling_
from scrimp.attack import Normalised, attack_success, victim_of
from scrimp.cli import main
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.audit import AUDIT, _budget, audit
from scrimp.jobs.audit_config import AuditConfig
from scrimp.jobs.audit_extras import share_from
from scrimp.jobs.audit_page import PAGE
from scrimp.jobs.audit_store import Store, slug
from scrimp.jobs.folder import RECEIPT, WEIGHTS, read_yaml
from scrimp.jobs.interrupt import Interrupted
from scrimp.receipts import load_receipt
from scrimp.report.collect import find_receipts

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
OWN = Path(__file__).with_name("audit_victim.py")


def tiny_vit() -> nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(NAME, img_size=16, in_chans=1, num_classes=3, **TINY)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model.eval()


def shapes_of(train: int, test: int) -> ImageData:
    parts = TensorImages(*draw(train, 0)), TensorImages(*draw(test, 1))
    return ImageData(train=parts[0], test=parts[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))


def config(out: Path, **settings: Any) -> AuditConfig:
    usual = {"model": "vit", "data": "unused", "json": True, "device": "cpu", "method": "ats", "calls": 0}
    return AuditConfig(**{**usual, "images": 5, "budget": 100, **settings}, out=out)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named model at a size that a test can run."""
    import timm

    create = timm.create_model

    def small(name: str, **options: Any) -> nn.Module:
        with torch.random.fork_rng():
            return create(name, **{**(TINY if name == NAME else {}), **options})

    monkeypatch.setattr(timm, "create_model", small)


def test_a_stopped_audit_goes_on_to_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an audit in one go; attacks read back from disk make every image cost what it did."""
    given: dict[str, Any] = {"victim": Bright(), "data": shapes_of(40, 17)}
    whole = audit(config(tmp_path / "whole", images=40, method=None), **given)
    remember, made = Store.remember, []

    def stopping(self: Store, name: str, make: Callable[[], Any]) -> Any:
        if len(made) == 15:
            raise Interrupted
        made.append(name)
        return remember(self, name, make)

    monkeypatch.setattr(Store, "remember", stopping)
    with pytest.raises(Interrupted):
        audit(config(tmp_path / "part", images=40, method=None), **given)
    assert not (tmp_path / "part" / AUDIT).exists()
    kept = [tmp_path / "part" / "trials" / slug(name) / "trial.json" for name in made]
    times = [file.stat().st_mtime_ns for file in kept]
    monkeypatch.setattr(Store, "remember", remember)
    monkeypatch.setattr("scrimp.jobs.audit.write_audit_page", lambda *_: None)
    audit(config(tmp_path / "part", images=40, method=None, resume=True), **given)
    assert [file.stat().st_mtime_ns for file in kept] == times
    assert (tmp_path / "part" / AUDIT).read_bytes() == (tmp_path / "whole" / AUDIT).read_bytes()
    content = json.loads((tmp_path / "whole" / AUDIT).read_text())
    assert content == whole.content
    assert content["defences"][0]["kept"] is True
    assert content["detector"]["clean_alarms"] < 0.5
    receipts = {item.way: item for item in find_receipts([tmp_path / "whole"])}
    assert [way for way, item in receipts.items() if item.baseline] == ["clean"]
    for trial in content["trials"]:
        receipt = receipts[trial["name"]]
        assert receipt.cost.flops.value == trial["flops"]["mean"]
        assert receipt.quality == {"test_accuracy": trial["accuracy"], "attack_success": trial["success"]}
        assert trial["file"] is None or (tmp_path / "whole" / trial["file"]).is_file()
    assert "Verdict" in (tmp_path / "whole" / PAGE).read_text()


@pytest.mark.usefixtures("small_timm")
def test_from_the_shell(tmp_path: Path, shape_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that say what they were fine-tuned with, audited on another copy too, with times."""
    run = tmp_path / "ats-12"
    run.mkdir()
    about = {"thin": json.dumps({"method": "ats", "samples": 12, "blocks": [1, 2]}), "model": NAME, "format": "pt"}
    facts = {"kind": "encoder", "channels": "1", "size": "16", "dim": "16", "mean": "0.2", "std": "0.2"}
    save_file(tiny_vit().state_dict(), run / WEIGHTS, {**about, **facts, "classes": "\n".join(CLASSES)})
    given = ["audit", str(run), str(shape_folder), "--device", "cpu", "--images", "3", "--budget", "100"]
    given += ["--transfer-to", str(run), "--calls", "1", "--batches", "1", "2", "--out", str(tmp_path / "out")]
    assert main(given) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / AUDIT).read_text())
    assert content["verdict"]["text"].split(".")[0] in " ".join(said.split())
    assert content["method"] == "ats-12"
    assert content["spent"] <= 100
    assert {row["execution"] for row in content["speed"]} == {"ragged", "masked", "padded", "dense"}
    own = {row["name"]: row["success"] for row in content["trials"]}
    assert content["transfer"]
    assert all(row["to"] == "ats-12" and row["success"] == own[row["by"]] for row in content["transfer"])
    assert load_receipt(tmp_path / "out" / "trials" / "clean" / RECEIPT).baseline


def test_other_peoples_models(
    tmp_path: Path, shape_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(OWN, "their_model.py")
    given = ["audit", "any", str(shape_folder), "--victim", "their_model:Bright", "--unlabelled", "--json"]
    given += ["--images", "6", "--budget", "300", "--device", "cpu", "--out", "out"]
    with torch.random.fork_rng():
        assert main(given) == 0
    content = json.loads((tmp_path / "out" / AUDIT).read_text())
    receipts = json.loads(capsys.readouterr().out)
    assert receipts[0]["way"] == "clean"
    assert receipts[0]["quality"]["test_accuracy"] is None
    white = next(row for row in content["trials"] if row["name"] == "flat colours")
    assert white["flops"]["worst"] == content["verdict"]["worst"] == 900
    clean = torch.tensor(content["clean"]["costs"])
    for row in content["trials"]:
        if row["images"] == 6 and row["defence"] is None:
            assert row["success"] == pytest.approx(attack_success(torch.tensor(row["costs"]), clean, 1000))
    patch = next(row for row in content["trials"] if row["name"] == "patch 8 %")
    assert patch["success"] > 0.03  # at most the patch's share of the area, of dark images
    assert (content["speed"], content["break_even"]) == ([], None)


@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([NAME, "--weights", "vit.safetensors"], "a model with an adaptive method"),
        ([NAME, "--weights", "vit.safetensors", "--method", "avit"], "weights that learnt avit"),
        ([NAME, "--weights", "vit.safetensors", "--method", "ats", "--r", "2"], "settings of ats"),
        ([NAME, "--weights", "vit.safetensors", "--method", "ats", "--max-flops", "10"], "max_flops of at least"),
        ([NAME, "--weights", "vit.safetensors", "--method", "ats", "--unlabelled"], "name their classes"),
        ([NAME, "--weights", "vit.safetensors", "--method", "ats", "--transfer-to", "none"], "without any"),
        ([NAME, "--budget", "3"], "--budget at least 100"),
        ([NAME, "--budget", "300", "--minutes", "1"], "pass one of them"),
        (["any", "--victim", "their_model:broken"], "without model"),
        (["any", "--victim", "their_model:nothing"], "package.module:factory"),
        (["any", "--victim", "their_model:Bright", "--method", "ats"], "leave it out"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_is_written(
    settings: list[str],
    said: str,
    tmp_path: Path,
    shape_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(OWN, "their_model.py")
    save_file(tiny_vit().state_dict(), "vit.safetensors")
    command = ["audit", settings[0], str(shape_folder), "--size", "16", "--device", "cpu", "--json", *settings[1:]]
    with torch.random.fork_rng():
        assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_two_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["audit", "any", "builtin", "--method", "ats", "--out", str(tmp_path / "out")]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_minutes_become_a_budget_that_is_recorded(tmp_path: Path) -> None:
    model, images = tiny_vit(), draw(4, 0)[0] / 255
    token_sampling_(model, blocks=(1, 2))
    victim = victim_of(model, mean=(0.2,), std=(0.2,))
    assert isinstance(victim.ready, Normalised)
    few, more = (_budget(config(tmp_path, budget=None, minutes=time), victim, images) for time in (1e-6, 5))
    assert few == 100
    assert more > 1000
    assert _budget(config(tmp_path, budget=None), victim, images) == 40_000


def test_from_what_share_on_a_static_model_is_cheaper() -> None:
    assert share_from(5, 6, 9) == 0
    assert share_from(7, 6, 8) == 0.5
    assert share_from(9, 6, 8) is None
    assert share_from(7, 6, 5) is None
    share = share_from(7, 6, 10)
    assert share is not None
    assert (1 - share) * 6 + share * 10 == 7


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("config: {seed: 1}\nresolved: {budget: 100}\n")
    assert read_yaml(tmp_path / "config.yaml")["resolved"] == {"budget": 100}
    assert main(["audit", "any", "builtin", "--victim", "no:thing", "--resume", "--out", str(tmp_path)]) == 2
