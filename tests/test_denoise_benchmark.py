"""What the benchmark of diffusion publishes: figures out of its receipts, and when it publishes none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt, save_receipt

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("denoise_tables")


@pytest.fixture
def lines(tables: ModuleType) -> ModuleType:
    return importlib.import_module("denoise_lines")


def trained(way: str, seed: int, fd: float, flops: float, *, task: str = "dit") -> Receipt:
    quality = {"fd": fd, "fd_error": 0.1, "fd_solver": fd - 1, "precision": 0.8, "recall": 0.7}
    return Receipt("benchmark", f"denoise/{task}", way, seed=seed, quality=quality, cost=Cost(flops=Reading(flops)))


def setting(name: str, flops: float, away: float, fd: float | None, **more: Any) -> dict[str, Any]:
    solver, _, cache = name.partition(", ")
    return {"name": name, "solver": solver, "cache": cache or "none", "flops": flops, "paired_error": away, "fd": fd,
            "fd_error": 0.1, **more}  # fmt: skip


def sampled(seed: int = 0, *, passed: bool = True) -> Receipt:
    """50 steps cost 50; 20 of dpm++ are as good, with reuse at half their cost; 5 have a low FD from other images."""
    settings = [
        setting("ddim 50", 50.0, 0.10, 3.0),
        setting("ddim 100", 100.0, 0.05, 3.15 if passed else 3.3),
        setting("ddim 25", 25.0, 0.2, 3.3),
        setting("ddim 10", 10.0, 0.4, 5.0),
        setting("dpm++ 20", 20.0, 0.08, 3.05, cpu_ratio=0.4, wall_ratio=0.5),
        setting("dpm++ 20, every 2", 10.0, 0.09, 3.1, cpu_ratio=0.25, wall_ratio=0.2),
        setting("dpm++ 10", 9.0, 0.09, 3.2),
        setting("dpm++ 5", 5.0, 0.5, 2.0),
        setting("dpm++ 8", 8.0, 0.09, None),
    ]
    notes = {"baseline": "ddim 50", "settings": settings}
    return Receipt("benchmark", "denoise/dit", "sampling", seed=seed, notes=notes)


def student(seed: int = 0) -> Receipt:
    rows = [
        {
            "steps": steps,
            "flops": float(steps),
            "fd": fd,
            "solver": f"dpm++ {steps}",
            "solver_fd": 9.0,
            "needed": needed,
        }
        for steps, fd, needed in ((1, 5.0, 4), (2, 3.05, 5), (4, 2.9, None))
    ]
    return Receipt("benchmark", "denoise/dit", "student", seed=seed, notes={"rows": rows})


def styled(style: str, fd: float, size: float | None) -> Receipt:
    return Receipt(
        "benchmark", "denoise/dit", f"personal {style}", seed=0, quality={"fd": fd, "fd_error": 0.1},
        cost=Cost(stored_bytes=Reading(size)),
    )  # fmt: skip


def test_the_recipes_are_compared_seed_by_seed_and_a_tie_is_named(lines: ModuleType) -> None:
    runs = [trained("plain", seed, 3.0 + seed, 10.0) for seed in (0, 1, 2)]
    runs += [trained("thrifty", seed, 3.0 + seed + change, 6.0) for seed, change in ((0, 0.1), (1, -0.1), (2, 0.03))]
    runs += [trained("thrifty without weighting", seed, 6.0 + seed, 6.0) for seed in (0, 1)]
    told = lines.training(runs)
    assert "small DiT, Fashion-MNIST, 3 seeds: FD 4.00 ± 1.00 plain, 4.01 ± " in told
    assert "thrifty at 0.60x the FLOPs (tie); without weighting +3.00 ± 0.14" in told
    assert not told.endswith("(tie)")
    alone = lines.training([runs[0], trained("thrifty", 0, 2.5, 6.0)])
    assert alone.endswith("FD 3.00 plain, 2.50 thrifty at 0.60x the FLOPs")
    assert lines.training([runs[0], trained("thrifty", 0, 2.9, 6.0)]).endswith("(tie)")


def test_only_settings_as_good_in_both_measures_count(tables: ModuleType, lines: ModuleType) -> None:
    receipt = sampled()
    assert tables.cheapest(receipt)["name"] == "dpm++ 20, every 2"
    assert tables.cheapest(receipt, reuse=False)["name"] == "dpm++ 20"
    assert tables.cheapest(receipt, paired=False)["name"] == "dpm++ 5"
    assert [one["name"] for one in tables.front(receipt.notes["settings"], reuse=False, most=50.0)] == [
        "dpm++ 5",
        "dpm++ 8",
        "dpm++ 20",
    ]
    told = lines.sampling([receipt])
    assert (
        "1 seed, as good by both measures: 5.00x fewer FLOPs, 4.00x less CPU time, 5.00x less wall time than ddim 50 "
        "(dpm++ 20, every 2)" in told
    )
    assert told.endswith("by FD alone: 10.00x fewer FLOPs, - less CPU time, - less wall time than ddim 50 (dpm++ 5)")
    assert "through reuse 2.00x; " in lines.beyond_solvers([receipt])
    assert "through reuse 1.00x (by FD alone)" in lines.beyond_solvers([receipt])
    assert lines.beyond_solvers([receipt]).endswith("at equal paired error up to 0.80x (dpm++ 20, every 2)")
    assert lines.beyond_solvers([receipt, student()]).endswith(
        "through distillation 4.00x at the FD of 1 (5.0), 2.50x at the FD of 2 (3.0), - at 4; as good as 50 steps on "
        "1 of 1 seed"
    )


def test_what_solvers_cost_at_an_error_is_interpolated_between_their_settings(tables: ModuleType) -> None:
    settings = [
        setting("ddim 50", 50.0, 0.01, 3.0),
        setting("dpm++ 5", 5.0, 0.4, 3.0),
        setting("dpm++ 20", 20.0, 0.1, 3.0),
        setting("dpm++ 20, every 2", 8.0, 0.2, 3.0),
        setting("dpm++ 4, every 2", 2.0, 0.5, 3.0),
    ]
    receipt = Receipt("benchmark", "denoise/dit", "sampling", notes={"baseline": "ddim 50", "settings": settings})
    assert tables.gains_at_equal_error(receipt) == {"dpm++ 20, every 2": pytest.approx(10 / 8)}


def test_nothing_is_published_where_more_steps_are_worse(tables: ModuleType, lines: ModuleType, tmp_path: Path) -> None:
    assert tables.sound(sampled())
    receipt = sampled(passed=False)
    assert lines.sampling([receipt]) == "small DiT, Fashion-MNIST: 1 of 1 seed not published: more steps are worse"
    assert lines.beyond_solvers([receipt]) == tables.UNMEASURED
    save_receipt(receipt, tmp_path / "denoise" / "dit" / "sampling-s0.json")
    card = tables.card(tmp_path)
    assert "small DiT, Fashion-MNIST, sampling: not published: more steps are worse." in card
    assert "dpm++" not in card


def test_the_card_has_every_table(tables: ModuleType, lines: ModuleType, tmp_path: Path) -> None:
    judged = {"test_accuracy": 0.9, "fd_floor": 0.2, "fd_noise": 190.0, "fd_blurred": 50.0}
    covered = Receipt(
        "benchmark", "denoise/dit", "coverage", seed=0, quality={"coverage": 0.96}, notes={"images": 1000}
    )
    found = [Receipt("benchmark", "denoise/judge", "judge", seed=0, quality=judged), sampled(), student(), covered]
    found += [trained("plain", 0, 3.0, 10.0), trained("thrifty", 0, 3.0, 6.0)]
    found += [styled("none", 30.0, None), styled("nola", 4.1, 7600.0), styled("lora", 4.0, 40_000.0)]
    for number, receipt in enumerate(found):
        save_receipt(receipt, tmp_path / "denoise" / "any" / f"{number}.json")
    assert "![" not in tables.card(tmp_path, tmp_path / "denoise.png")
    (tmp_path / "denoise.png").touch()
    card = tables.card(tmp_path, tmp_path / "denoise.png")
    assert "(images/denoise.png)" in card
    assert "| 90.0 % | 0.20 | 190.00 | 50.00 |" in card
    assert "| small DiT, Fashion-MNIST | thrifty | 0.60x | 3.00 ± 0.10 (tie) | 2.00 | 0.80 | 0.70 | 1 |" in card
    assert "| dpm++ 20, every 2 | cheapest of all, seed 0 | 5.00x | 4.00x | 5.00x | 0.090 | 3.10 | 1 |" in card
    assert "| dpm++ 5 | cheapest solver by FD alone, seed 0 | 10.00x | - | - | 0.500 | 2.00 | 1 |" in card
    assert "| small DiT, Fashion-MNIST | 2 | 3.05 | 9.00 | dpm++ 2 | 5 | 1 |" in card
    assert "| small DiT, Fashion-MNIST | NOLA | 7,600 | 4.10 ± 0.10 | 1 |" in card
    assert "dpm++ 8" not in card
    assert lines.coverage(found).endswith("1 seed: 96.0 % of 1,000 fresh samples")
    assert lines.personal(found).endswith("NOLA 4.10 in 7,600 bytes, LoRA r4 4.00 in 40,000 bytes (tie)")


def test_nothing_measured_is_said(tables: ModuleType, lines: ModuleType, tmp_path: Path) -> None:
    assert tables.card(tmp_path) == tables.UNMEASURED
    assert {line.figure([]) for line in lines.DENOISE_LINES} == {tables.UNMEASURED}


def test_a_setting_is_named_and_the_front_holds_what_nothing_beats(tables: ModuleType) -> None:
    sampling, drawing = (importlib.import_module(f"denoise_{name}") for name in ("sampling", "picture"))
    assert sampling.Setting("dpm++", 20, "every 2", 3).name == "dpm++ 20, every 2, depth 3"
    assert sampling.Setting("ddim", 50).name == "ddim 50"
    settings = sampled().notes["settings"]
    assert [one["name"] for one in drawing.front(settings)] == ["dpm++ 5", "dpm++ 8", "dpm++ 20", "ddim 100"]
    assert len(drawing.scatter(sampled()).data) == 5
    assert not drawing.scatter(sampled(passed=False)).data


def test_a_distance_comes_with_its_error(tables: ModuleType) -> None:
    """Means one apart in each of three dimensions; more images are known better."""
    sampling = importlib.import_module("denoise_sampling")
    real, drawn = (torch.randn(800, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    distance, error = sampling.fd_and_error(drawn + 1, real)
    assert abs(distance - 3) < 5 * error
    assert error < sampling.fd_and_error(drawn[:100] + 1, real)[1]
