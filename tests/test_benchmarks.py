"""The benchmarks' page says what the receipts say, and every command in it starts."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, save_receipt
from scrimp.select import Selection

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
HELPERS = {
    "common.py",
    "peers.py",
    "attention_tables.py",
    "represent_tables.py",
    "adapt_tables.py",
    "adapt_tasks.py",
    "adapt_ways.py",
    "adaptive_accuracy_tables.py",
    "adaptive_lines.py",
    "adaptive_models.py",
    "adaptive_runtimes.py",
    "adaptive_tables.py",
    "attack_lines.py",
    "attack_models.py",
    "attack_tables.py",
    "denoise_judge.py",
    "denoise_lines.py",
    "denoise_measure.py",
    "denoise_models.py",
    "denoise_picture.py",
    "denoise_sampling.py",
    "denoise_tables.py",
    "label_accuracy_data.py",
    "label_accuracy_tables.py",
    "label_lines.py",
    "splat_lines.py",
    "splat_peers.py",
    "splat_tables.py",
    "splat_training_tables.py",
    "zoom_tables.py",
    "zoom_tasks.py",
    "zoom_items.py",
    "zoom_mnist.py",
    "zoom_modules.py",
    "zoom_signs.py",
    "zoom_sparse.py",
    "acceptance.py",
    "distillation_teachers.py",
}
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HELPERS)


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("readme")


@pytest.fixture
def receipts(readme: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the published receipts."""
    monkeypatch.setattr(readme, "RECEIPTS", tmp_path)
    monkeypatch.setattr(readme.sampling, "RECEIPTS", tmp_path / readme.sampling.NAME)
    for benchmark in (readme.representations, readme.distillation, readme.few_labels):
        monkeypatch.setattr(benchmark, "RECEIPTS", tmp_path / benchmark.NAME)
    return tmp_path


def run_of(readme: ModuleType, policy: str, *, share: float = 1.0, seed: int = 0, **quality: float) -> None:
    receipt = Receipt("benchmark", "importance-sampling/tail", policy, seed=seed, quality=quality)
    save_receipt(receipt, readme.sampling.path_of("tail", policy, share, seed))


def every_line(readme: ModuleType) -> list[object]:
    own, attentive, learning = readme.LINES, readme.ATTENTION_LINES, readme.REPRESENT_LINES
    later = [*readme.ADAPT_LINES, *readme.ZOOM_LINES, *readme.SPLAT_LINES, *readme.ADAPTIVE_LINES]
    return [*own, *attentive, *learning, *later, *readme.ATTACK_LINES, *readme.LABEL_LINES, *readme.DENOISE_LINES]


def setting_row(readme: ModuleType, policy: str) -> list[str]:
    about = readme.sampling.SETTINGS["tail"].about
    (row,) = [row for row in readme.setting_rows() if row.startswith(f"| {about} | {policy} |")]
    return [cell.strip() for cell in row.split("|")[3:-1]]


def test_the_page_is_what_the_receipts_say(readme: ModuleType) -> None:
    page = readme.README.read_text(encoding="utf-8")
    assert readme.filled(page) == page, "run: python benchmarks/readme.py"


def test_the_method_cards_are_what_the_receipts_say(readme: ModuleType) -> None:
    for path, content in readme.cards().items():
        card = path.read_text(encoding="utf-8")
        assert readme.filled(card, content) == card, f"{path.name}: run python benchmarks/readme.py"


def test_the_page_names_every_benchmark_and_its_receipt(readme: ModuleType) -> None:
    page = readme.README.read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"python benchmarks/{name}" not in page] == []
    assert [line.number for line in readme.LINES] == ["1", "3", "3", "4", "4"]
    assert [line.number for line in readme.ATTENTION_LINES] == ["1", "2", "3", "4"]
    assert [line.number for line in readme.REPRESENT_LINES] == ["1", "2", "3", "4", "6"]
    assert [line.number for line in readme.ADAPT_LINES] == ["1", "1", "1", "2", "4"]
    assert [line.number for line in readme.ZOOM_LINES] == ["1", "2", "3", "4"]
    assert [line.number for line in readme.SPLAT_LINES] == ["1", "1", "2", "3", "3", "3", "4", "4", "4", "4"]
    assert [line.number for line in readme.ADAPTIVE_LINES] == ["1", "3"]
    for line in every_line(readme):
        path = FOLDER / line.script.split()[0]
        if not path.is_file():
            assert readme.line_row(line).split(" | ")[2:5:2] == ["-", readme.UNKNOWN]
            continue
        script = path.read_text(encoding="utf-8")
        folder, _, file = line.receipt.removesuffix("/*/*.json").removesuffix("/*/step-time/*.json").rpartition("/")
        assert file in script or file == "*.json"
        assert not folder or f'"{folder}"' in script


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_what_was_not_measured_says_so(readme: ModuleType, receipts: Path) -> None:
    rows = [row for row in readme.tables().splitlines() if row.startswith("| ") and "`receipts/" in row]
    assert len(rows) == len(every_line(readme)) + 1
    assert all(readme.UNKNOWN in row for row in rows)
    assert all(cell == readme.UNKNOWN for cell in setting_row(readme, "history")[:2])
    cards = {path.name: text for path, text in readme.cards().items()}
    assert cards["self-supervised.md"].count(readme.represent.UNMEASURED) == 3
    assert cards["distillation.md"] == cards["adapters.md"] == readme.represent.UNMEASURED


def test_a_share_is_interpolated_and_accuracy_paired_by_seed(readme: ModuleType, receipts: Path) -> None:
    for seed, ahead in ((0, 0.004), (1, 0.002)):
        run_of(readme, "uniform", seed=seed, train_loss=0.2, test_accuracy=0.8 + seed / 10)
        run_of(readme, "history", seed=seed, train_loss=0.1, test_accuracy=0.8 + seed / 10 + ahead)
        run_of(readme, "history", share=0.7, seed=seed, train_loss=0.4, test_accuracy=0.5)
    run_of(readme, "history", seed=2, train_loss=0.1, test_accuracy=0.9)  # no uniform run to pair it with
    shares = [pair.share for pair in readme.sampling.paired_with_uniform("tail", "history")]
    assert shares == pytest.approx([0.85, 0.85])
    assert setting_row(readme, "history") == ["0.85 ± 0.00x", "+0.30 ± 0.14", "2"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.6, 0.8], "0.70 ± 0.14x"),
        ([0.5, 0.6], "at most 0.55 ± 0.07x"),
        ([0.9, math.inf], "not within 1.00x by 1 of 2 seeds; 0.90x (1 seed)"),
        ([math.inf], "not within 1.00x by 1 of 1 seeds"),
    ],
)
def test_a_share_that_is_no_plain_mean_says_so(readme: ModuleType, values: list[float], shown: str) -> None:
    assert readme.shares(values) == shown


def test_the_verdict_counts_losses_as_well(readme: ModuleType, receipts: Path) -> None:
    run_of(readme, "uniform", train_loss=0.2, test_accuracy=0.8)
    run_of(readme, "prune", train_loss=0.3, test_accuracy=0.795)
    assert readme.verdict("prune") == (
        "prune: at most 0.7x on 0 of 1 settings measured, not reached by some seed on 1, accuracy -0.50 points at worst"
    )


def learned(way: str, share: float, seed: int, passes: float, found: float | None) -> Receipt:
    notes, config = {"passes": passes}, {"way": way, "share": share}
    name = way if share == 1 else f"{way} at {share:g}x"
    quality = {"knn20_accuracy": found}
    return Receipt("benchmark", "representations/small", name, seed=seed, quality=quality, config=config, notes=notes)


def test_features_are_held_against_the_best_peer_and_simsiam(readme: ModuleType) -> None:
    """By hand: +3 and +5 points to SimCLR, whose mean is best; SimSiam's 8 passes lie a third from 6 to 12."""
    runs = [learned("lightly-simclr", 1.0, seed, 8, value) for seed, value in ((0, 0.50), (1, 0.54))]
    runs += [learned("lightly-simsiam", 1.0, seed, 8, 0.30) for seed in (0, 1)]
    runs += [learned("lightly-simsiam", 0.5, seed, 4, 0.90) for seed in (0, 1)]  # no run of ours is as short
    runs += [learned("constrained", 1.0, seed, 12, value) for seed, value in ((0, 0.53), (1, 0.59))]
    runs += [learned("constrained", 0.5, seed, 6, 0.47) for seed in (0, 1)]
    assert readme.represent.representations(runs) == (
        "small: 20-NN at equal FLOPs +4.0 ± 1.4 points to lightly-simclr, the best of lightly's; at equal epochs "
        "+20.0 ± 1.4 points to SimSiam"
    )
    assert readme.represent.representations(runs[:6]) == "small: not both sides yet"


@pytest.mark.parametrize(("passes", "found"), [(6, 0.2), (9, 0.3), (12, 0.4), (5, None), (13, None)])
def test_epochs_between_two_runs_are_interpolated(readme: ModuleType, passes: float, found: float | None) -> None:
    runs = [learned("constrained", 1.0, 0, 12, 0.4), learned("constrained", 0.5, 0, 6, 0.2)]
    assert readme.represent.at_epochs(runs, passes) == (None if found is None else pytest.approx(found))
    assert readme.represent.at_epochs(runs[:1], 12) == 0.4
    assert readme.represent.at_epochs([], 12) is None


def taught(way: str, seed: int, flops: float | None, **quality: float) -> Receipt:
    cost = Cost(flops=Reading(flops))
    return Receipt("benchmark", "distillation/small", way, seed=seed, quality=quality, cost=cost)


def test_distillation_is_compared_seed_by_seed(readme: ModuleType) -> None:
    few = {"linear_1pct_accuracy": 0.4}
    runs = [taught("head-4", seed, 2e9, knn1_accuracy=0.5 + seed / 10, **few) for seed in (0, 1, 2)]
    runs += [taught("head-1", seed, 2e9, knn1_accuracy=0.48 + seed / 10) for seed in (0, 1)]
    runs += [taught("live", 0, 4e9, knn1_accuracy=0.502)]
    runs += [taught("scratch-1pct", 1, None, test_accuracy=0.35, linear_1pct_accuracy=0.1)]
    assert readme.represent.distillation(runs) == (
        "small: 1-NN of a 4-layer head over a linear one +2.0 ± 0.0 points, linear classifier of 1 % of the labels "
        "over training on them +5.0 points (1 seed), 1-NN of kept over live features -0.2 points (1 seed), "
        "kept features 0.50x the live FLOPs"
    )
    assert readme.represent.distillation(runs[:1]) == "small: no pair of runs yet"


def test_few_labels_are_compared_at_the_same_labels(readme: ModuleType) -> None:
    def run(share: str, way: str, accuracy: float) -> Receipt:
        return Receipt("benchmark", f"few-labels/{share}", way, seed=0, quality={"test_accuracy": accuracy})

    runs = [run("0.01", "pseudo-labels", 0.5), run("0.01", "scratch", 0.4), run("0.1", "scratch", 0.6)]
    assert readme.represent.few_labels(runs) == (
        "1 % of the labels: +10.0 points (1 seed); 10 % of the labels: no pair of runs yet"
    )


def test_the_ways_that_are_compared_exist(readme: ModuleType) -> None:
    named = {way for _, *sides in readme.represent.LESSONS for way, _ in sides}
    assert named <= set(readme.distillation.WAYS)
    assert {readme.represent.SEMI, readme.represent.ALONE} <= set(readme.few_labels.WAYS)
    assert {readme.represent.OURS, readme.represent.EPOCHS_BESIDE} <= set(readme.representations.WAYS)


def counted(**quality: float | None) -> Receipt:
    notes: dict[str, Any] = {
        "FLOPs an image": {"byol": 8e9, "mean-shift": 4e9},
        "saved bytes an image": {"byol": 3e6, "mean-shift": 2e6},
        "memory": 131_072,
        "batch": 256,
        "threads": 2,
    }
    return Receipt("benchmark", "represent-cost", "counted", quality=quality, notes=notes)


def test_the_cost_of_a_step_is_told_beside_byol(readme: ModuleType, tmp_path: Path) -> None:
    shares = {"mean_shift_flops_to_byol": 0.5, "mean_shift_saved_to_byol": 0.6667, "search_flops_to_step": 0.0084}
    receipt = counted(**shares, constrained_flops_to_mean_shift=1.011, search_time_to_step=None)
    told = readme.represent.cost(receipt)
    assert "mean shift 0.50x BYOL's FLOPs (4.00 against 8.00 GFLOP an image), 0.67x its saved activations" in told
    assert "constrained 1.01x" in told
    assert "131,072 embeddings - of the step's CPU time (0.8 % of its FLOPs)" in told
    path = save_receipt(receipt, tmp_path / "cost.json")
    assert "| mean shift | 4.00 | 0.50x | 2.00 | 0.67x |" in readme.represent.cost_table(path)


def test_a_page_without_its_markers_is_refused(readme: ModuleType) -> None:
    with pytest.raises(InputError, match="put the markers back"):
        readme.filled("no figures here")


def test_a_biased_draw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    unbiased = importlib.import_module("unbiased")
    gradients = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    even, odd = Selection(torch.tensor([0, 1]), torch.ones(2)), Selection(torch.tensor([0, 0]), torch.ones(2))
    assert unbiased.error_of_mean(gradients, [even, even], count=2) == 0
    assert unbiased.error_of_mean(gradients, [odd, odd], count=2) == pytest.approx(1)
    assert unbiased.spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1)


def test_a_study_whose_table_lacks_a_way_counts_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    study_time = importlib.import_module("study_time")
    run = tmp_path / "runs" / "study"
    cost = Cost(flops=Reading(2e9))
    for way in ("uniform", "history"):
        save_receipt(
            Receipt("run", "study", way, cost=cost, notes={"data": "x"}), run / way / "seed-0" / "receipt.json"
        )
    (run / "report.html").write_text("report")
    receipt = study_time.receipt_of(tmp_path, "uniform history", cores=2, wall=240.0, cpu=1.0)
    assert receipt.cost.flops.value == 4e9
    assert receipt.notes["within the limit"] is False
    with pytest.raises(SystemExit, match="history"):
        study_time.receipt_of(tmp_path, "uniform", cores=2, wall=1.0, cpu=1.0)
