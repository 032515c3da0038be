"""`scrimp compare`: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import scrimp.compare
from scrimp.cli import main
from scrimp.compare import Comparison, Sides
from scrimp.compare.comparison import at_most
from scrimp.jobs import compare as job
from scrimp.receipts import load_receipt

LEFT, RIGHT = torch.ones(64, 64), torch.ones(64, 64)


class Bench:
    """Two quick comparisons in place of the real ones: "right" and, where told so, "wrong"."""

    def __init__(self) -> None:
        self.error = 0.0
        self.calls: list[tuple[str, int, str]] = []
        self.threads: list[int] = []

    def check(self, name: str):
        def run(*, seed: int = 0):
            self.calls.append((f"check {name}", seed, "cpu"))
            return [at_most("error", self.error if name == "wrong" else 0.0, 0.1)]

        return run

    def sides(self, name: str):
        def build(*, seed: int = 0, device: str = "cpu") -> Sides:
            self.calls.append((f"sides {name}", seed, device))
            return Sides(
                lambda: self.threads.append(torch.get_num_threads()) or LEFT @ RIGHT,
                lambda: LEFT @ RIGHT @ RIGHT,
                quality={"accuracy": (0.9, 0.8)},
                repeats=3,
            )

        return build

    def row(self, name: str) -> Comparison:
        return Comparison(name, "quick product", "slow product", "two products", self.check(name), self.sides(name))


@pytest.fixture
def bench(monkeypatch, tmp_path) -> Bench:
    made = Bench()
    monkeypatch.setattr(scrimp.compare, "COMPARISONS", (made.row("right"), made.row("wrong")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return made


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_unknown_name_ends_with_code_2_and_the_names(bench, capsys):
    assert main(["compare", "nothing"]) == 2
    assert capsys.readouterr().err == (
        "scrimp: expected a comparison out of: right, wrong, all; got nothing; see scrimp compare --list\n"
    )


def test_the_list_names_every_real_row(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["compare", "--list"]) == 0
    shown = capsys.readouterr().out
    for row in scrimp.compare.COMPARISONS:
        assert all(part in shown for part in (row.name, row.method, row.reference, row.baseline))


def test_the_list_as_json(bench, capsys):
    assert main(["compare", "--list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["right", "wrong"]
    assert bench.calls == []


def test_a_check_writes_nothing(bench, capsys, tmp_path):
    assert main(["compare", "all", "--check", "--seed", "5"]) == 0
    assert written(tmp_path) == []
    assert bench.calls == [("check right", 5, "cpu"), ("check wrong", 5, "cpu")]
    shown = capsys.readouterr()
    assert "right: quick product against slow product\n  ✓ error: 0 (at most 0.1)\n" in shown.out
    assert shown.err == ""


def test_a_failed_check_ends_with_code_1(bench, capsys, tmp_path):
    bench.error = 0.5
    assert main(["compare", "all", "--check"]) == 1
    shown = capsys.readouterr()
    assert "✗ error: 0.5 (at most 0.1)" in shown.out
    assert shown.err == "scrimp: wrong: not as the reference has it\n"
    assert written(tmp_path) == []
    assert main(["compare", "right", "--check"]) == 0


def test_a_check_as_json(bench, capsys):
    bench.error = float("nan")
    assert main(["compare", "--check", "--json"]) == 1
    right, wrong = json.loads(capsys.readouterr().out)
    assert right["passed"]
    assert not wrong["passed"]
    assert wrong["findings"] == [{"what": "error", "figure": None, "at most": 0.1, "passed": False}]


def test_both_receipts_are_written_and_load(bench, capsys, tmp_path):
    assert main(["compare", "right", "--seed", "2", "--device", "cpu"]) == 0
    folder = tmp_path / "runs" / "compare-right"
    assert written(folder) == ["config.yaml", "receipts/baseline.json", "receipts/method.json"]
    method, baseline = (load_receipt(folder / "receipts" / name) for name in ("method.json", "baseline.json"))
    assert [item.kind for item in (method, baseline)] == ["compare", "compare"]
    assert (method.name, method.way, method.baseline, method.seed) == ("right", "quick product", False, 2)
    assert (baseline.name, baseline.way, baseline.baseline, baseline.seed) == ("right", "two products", True, 2)
    assert (method.cost.flops.value, baseline.cost.flops.value) == (2 * 64**3, 4 * 64**3)
    assert (method.quality, baseline.quality) == ({"accuracy": 0.9}, {"accuracy": 0.8})
    assert "median of 3" in method.cost.cpu_seconds.how
    assert method.notes["ratios"]["seconds"]["count"] == 3
    assert method.notes["findings"] == [{"what": "error", "figure": 0.0, "at most": 0.1, "passed": True}]
    table = " ".join(capsys.readouterr().out.split())
    assert "FLOPs 524 kFLOP 1.05 MFLOP 0.500" in table
    assert "accuracy 90.0 % 80.0 % 1.125" in table
    assert "medians of 3 alternating pairs" in table


def test_threads_are_set_for_the_measuring_alone(bench):
    before = torch.get_num_threads()
    assert main(["compare", "right"]) == 0
    assert set(bench.threads) == {1}
    assert torch.get_num_threads() == before
    receipt = load_receipt("runs/compare-right/receipts/method.json")
    assert receipt.machine["threads"] == 1


def test_a_method_that_fails_is_not_measured(bench, capsys, tmp_path):
    bench.error = 0.5
    assert main(["compare", "all", "--out", "here"]) == 1
    assert written(tmp_path / "here") == [
        "config.yaml",
        "right/receipts/baseline.json",
        "right/receipts/method.json",
    ]
    assert main(["compare", "wrong", "--out", "there"]) == 1
    assert not (tmp_path / "there").exists()


def test_receipts_as_json_and_nothing_else(bench, capsys):
    assert main(["compare", "--json"]) == 0
    receipts = json.loads(capsys.readouterr().out)
    assert [(item["name"], item["baseline"]) for item in receipts] == [
        ("right", False),
        ("right", True),
        ("wrong", False),
        ("wrong", True),
    ]


def test_an_interrupted_run_goes_on_with_what_is_missing(bench, tmp_path):
    assert main(["compare", "all", "--out", "here"]) == 0
    (tmp_path / "here/wrong/receipts/baseline.json").unlink()
    kept = (tmp_path / "here/right/receipts/method.json").read_bytes()
    bench.calls.clear()
    assert main(["compare", "all", "--out", "here", "--resume"]) == 0
    assert [call for call, _, _ in bench.calls if "sides" in call] == ["sides wrong"]
    assert (tmp_path / "here/right/receipts/method.json").read_bytes() == kept
    assert (tmp_path / "here/wrong/receipts/baseline.json").is_file()


def test_a_folder_in_use_and_a_device_that_is_not_there_are_refused(bench, capsys):
    assert main(["compare", "right", "--out", "here"]) == 0
    assert main(["compare", "right", "--out", "here"]) == 2
    assert "--resume" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["compare", "right", "--device", "cuda"]) == 2
        assert "--device cpu" in capsys.readouterr().err


def test_the_receipts_make_a_report(bench, capsys):
    assert main(["compare", "all", "--out", "here"]) == 0
    assert main(["report", "here"]) == 0
    assert "quick product" in Path("here/report.html").read_text()


def test_marks_where_the_terminal_has_no_such_sign():
    assert [job._mark(passed, "utf-8") for passed in (True, False)] == ["✓", "✗"]
    assert [job._mark(passed, "ascii") for passed in (True, False)] == ["ok", "FAILED"]


def test_a_baseline_too_quick_for_the_clock_has_no_ratio():
    assert job._spread({"median": None, "low": None, "high": None, "count": 0}) == "-"
    assert job._ratio(1.0, 0.0) == job._ratio(None, 1.0) == "-"
