"""Synthetic receipts shaped like a study's, and a headless browser that refuses to be skipped where one is required."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scrimp.meter.cost import Cost, Reading
from scrimp.receipts import Receipt

VERSIONS = {"python": "3.12.3", "scrimp": "0.1.0", "torch": "2.14.1", "torchvision": "0.29.1", "numpy": None}
MACHINE = {
    "system": "Linux",
    "architecture": "x86_64",
    "processor": "A processor",
    "cores": 2,
    "gpu": None,
    "threads": 2,
}
# Way: final accuracy, final training loss, FLOPs, relative speed.
WAYS = {
    "uniform": (0.879, 0.334, 9.0e11, 1.0),
    "presample": (0.871, 0.341, 9.0e11, 1.31),
    "history": (0.8805, 0.262, 9.01e11, 1.04),
    "prune": (0.8795, 0.291, 8.98e11, 0.98),
}


@pytest.fixture(scope="session")
def make_study() -> Callable[..., list[Receipt]]:
    return study


def study(
    *, ways: tuple[str, ...] = tuple(WAYS), seeds: int = 3, points: int = 24, name: str = "fmnist"
) -> list[Receipt]:
    """Receipts of ``ways`` x ``seeds``, the first way the baseline, paired: a seed's luck is the same for all ways."""
    return [_receipt(way, seed, points, name, baseline=way == ways[0]) for seed in range(seeds) for way in ways]


def _receipt(way: str, seed: int, points: int, name: str, *, baseline: bool) -> Receipt:
    profile = WAYS.get(way, WAYS["history"])
    noise = random.Random(f"{way}/{seed}")
    luck = random.Random(seed).gauss(0, 0.004)
    accuracy, loss, flops, slow = profile
    final = (accuracy + luck + noise.gauss(0, 0.0012), loss * (1 + noise.gauss(0, 0.02)))
    seconds = 30.0 * slow * (1 + noise.gauss(0, 0.03))
    curve = [_point(step / points, final, (flops, seconds), noise) for step in range(1, points + 1)]
    if way != "uniform":
        curve = [
            {**point, "tau": 1 + 5 * (1 - accuracy) / slow * (1 - math.exp(-3 * (point["flops"] or 0) / flops))}
            for point in curve
        ]
    cost = Cost(
        seconds=Reading(seconds, "monotonic clock around training, evaluation left out"),
        cpu_seconds=Reading(1.9 * seconds, "process CPU time, all threads"),
        flops=Reading(flops, "counted once per shape by FlopCounterMode, times steps"),
        peak_bytes=Reading(6.1e8 + 1e6 * noise.random(), "peak resident set of a fresh process"),
        samples=Reading(384_000, "counted"),
        labels=Reading(12_000, "distinct indices seen"),
        stored_bytes=Reading(1_234_567, "size of weights.safetensors"),
    )
    return Receipt(
        kind="run",
        name=name,
        way=way,
        seed=seed,
        baseline=baseline,
        quality={"test_accuracy": final[0], "train_loss": final[1]},
        cost=cost,
        curve=curve,
        config={"model": "convnet", "batch": 64, "budget": {"flops": 9.0e11}, "sampling": way, "seed": seed},
        notes={"data": "fashion-mnist (built-in sample)", "images": 12_000},
        versions=dict(VERSIONS),
        machine=dict(MACHINE),
        created=f"2026-01-02T03:{seed:02}:05+00:00",
    )


def _point(
    share: float, final: tuple[float, float], cost: tuple[float, float], noise: random.Random
) -> dict[str, float | None]:
    accuracy, loss = final
    return {
        "flops": share * cost[0],
        "seconds": share * cost[1],
        "cpu_seconds": 1.9 * share * cost[1],
        "samples": round(share * 384_000),
        "train_loss": loss + 1.9 * math.exp(-7 * share) + 0.03 * (1 - share) * noise.gauss(0, 1),
        "test_accuracy": accuracy - 0.5 * math.exp(-6 * share) + 0.006 * (1 - share) * noise.gauss(0, 1),
        "learning_rate": 0.05 * (1 - share),
    }


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium by selenium; skips without one, fails instead where SCRIMP_REQUIRE_BROWSER=1."""
    missing = _missing_browser()
    if missing and os.environ.get("SCRIMP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"SCRIMP_REQUIRE_BROWSER=1, but there is no {missing}")
    if missing:
        pytest.skip(f"no {missing}: the report was not opened in a browser")
    driver = _start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def _missing_browser() -> str | None:
    try:
        import selenium  # noqa: F401
    except ModuleNotFoundError:
        return "selenium"
    return next((program for program in ("chromium", "chromedriver") if not shutil.which(program)), None)


def _start(profile: Path) -> Any:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "window-size=1200,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument("about:blank")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))
