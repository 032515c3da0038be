"""Finding receipts, and what importing the report costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, save_receipt
from scrimp.report import find_receipts, summarise

Study = Callable[..., list[Receipt]]


@pytest.fixture
def runs(tmp_path: Path, make_study: Study) -> Path:
    """``runs/one`` with receipts/*.json, ``runs/two`` with one receipt.json."""
    for receipt in make_study(ways=("uniform", "history"), seeds=2):
        save_receipt(receipt, tmp_path / "one" / "receipts" / f"{receipt.way}-{receipt.seed}.json")
    save_receipt(make_study(name="two", seeds=1)[0], tmp_path / "two" / "receipt.json")
    return tmp_path


def test_a_file_a_run_folder_and_a_folder_of_runs(runs: Path) -> None:
    (lone,) = find_receipts([runs / "two" / "receipt.json"])
    assert (lone.name, lone.way) == ("two", "uniform")
    found = find_receipts([runs / "one"])
    assert [(run.way, run.seed) for run in found] == [("history", 0), ("history", 1), ("uniform", 0), ("uniform", 1)]
    assert len(find_receipts([runs])) == 5
    assert [row.way for row in summarise(found)] == ["uniform", "history"]


def test_a_receipt_reached_twice_counts_once(runs: Path) -> None:
    assert len(find_receipts([runs, runs / "one", str(runs / "two" / "receipt.json")])) == 5


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_path_without_receipts_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        find_receipts([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_no_path_is_an_error() -> None:
    with pytest.raises(InputError, match="no path"):
        find_receipts([])


def test_a_damaged_receipt_is_named(runs: Path) -> None:
    damaged = runs / "one" / "receipts" / "uniform-1.json"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(InputError, match=r"uniform-1\.json"):
        find_receipts([runs])


def test_importing_the_report_loads_neither_torch_nor_plotly() -> None:
    code = "import sys, scrimp.report; print([name for name in ('torch', 'plotly', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
