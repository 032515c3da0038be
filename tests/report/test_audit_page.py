"""The page of an audit: its numbers, its silence towards the network, and how it looks in a browser."""

from __future__ import annotations

import copy
import io
import json
import math
import random
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_report_browser import drain, until

from scrimp.jobs.audit_page import PAGE, audit_sections, audit_table, write_audit_page
from scrimp.jobs.audit_page_chart import costs_figure, drawn
from scrimp.jobs.audit_pictures import KEPT
from scrimp.receipts import Receipt

FULL, CEILING, IMAGES = 2_490_000, 2_310_000, 64
EVIL = "</script><script>window.broken = 1</script>"


def flops(costs: list[int]) -> dict[str, float]:
    ranked = sorted(costs)
    found = {name: ranked[math.ceil(share * len(costs)) - 1] for name, share in (("p50", 0.5), ("p95", 0.95))}
    return {"mean": sum(costs) / len(costs), **found, "p99": ranked[-1], "worst": ranked[-1]}


def trial(name: str, threat: str, mean: float, spread: float = 6e4, *, count: int = IMAGES, **more: Any) -> Any:
    """A trial of images that cost about ``mean``."""
    noise = random.Random(name)
    costs = [round(min(CEILING, noise.gauss(mean, spread))) for _ in range(count)]
    reached = sum(costs) / count - sum(CLEAN) / IMAGES
    of = [reached / (most - sum(CLEAN) / IMAGES) for most in (FULL, CEILING)]
    found = {"name": name, "threat": threat, "kind": "attack", "goal": "ignore", "area": None, "place": None}
    found |= {"epsilon": None, "defence": None, "costs": costs, "flops": flops(costs), "accuracy": 0.61}
    found |= {"agreement": 0.72, "success": of[0], "success_ceiling": of[1], "spent": 4800, "queries": None}
    return {**found, "file": None, **more}


_NOISE = random.Random(0)
CLEAN = [round(_NOISE.gauss(1.31e6, 1.1e5)) for _ in range(IMAGES)]


def sample() -> dict[str, Any]:
    """An audit's report as the job makes it, of made-up numbers that hang together."""
    patch = {"area": 0.08, "place": [0, 0]}
    trials = [
        trial("natural tail", "T0", 1.52e6, 2e4, count=4, goal=None, spent=0),
        trial("flat colours", "T0", 1.12e6, 3e4, count=16, goal=None, agreement=None, accuracy=None, spent=0),
        trial("random patch", "T1", 1.312e6, 1e5, kind="control", goal=None, spent=0, **patch),
        trial("accuracy-only patch", "T1", 1.27e6, 1e5, kind="control", goal="accuracy", accuracy=0.08, **patch),
        trial("patch 2 %", "T1", 1.66e6, 1e5, area=0.02, place=[0, 0]),
        trial("patch 8 %", "T1", 2.05e6, 9e4, file="attacks/patch-8.png", **patch),
        trial("patch 8 %, preserve", "T1", 1.93e6, 9e4, goal="preserve", accuracy=0.84, agreement=0.95, **patch),
        trial("universal 16/255", "T2", 1.48e6, 1e5, epsilon=16 / 255),
        trial("per image 16/255", "T3", 2.2e6, 5e4, count=24, epsilon=16 / 255),
        trial("queried patch 8 %", "black box", 1.41e6, 1e5, queries=3000, **patch),
        trial("patch 8 % under hard budget", "T1", 1.5e6, 1e4, kind="defended", defence="hard budget", **patch),
    ]
    worst = max(trials, key=lambda item: item["flops"]["worst"])
    speed = [row(form, batch, inputs) for batch in (1, 16) for form, inputs in LANES]
    speed += [{**row(form, 16, "1 of 16 patch 8 %"), "factor": factor(0.1)} for form in ("ragged", "padded")]
    return {
        "model": "small-vit",
        "method": "ats-64",
        "data": "photos",
        "seed": 3,
        "images": IMAGES,
        "learnt_from": 64,
        "budget": 60_000,
        "spent": 48_211,
        "full": FULL,
        "ceiling": CEILING,
        "clean": {"costs": CLEAN, "flops": flops(CLEAN), "accuracy": 0.87},
        "trials": trials,
        "poisoning": [
            {"batch": 16, "by": "patch 8 %", "own": 1.31e6, "clean": 1.5e6, "poisoned": 2.1e6, "factor": 1.4}
            | {"padding": 1.145}
        ],
        "transfer": [{"to": "other-vit", "by": "patch 8 %", "success": 0.11}],
        "detector": {"false_alarms": 0.05, "clean_alarms": 0.06, "caught": {"patch 8 %": 0.94, "random patch": 0.05}},
        "defences": [
            defence("hard budget", 1_520_000, kept=True),
            defence("median filter", None),
        ],
        "speed": speed,
        "energy": {"clean_joules": None, "attacked_joules": None, "how": "not measured: no meter"},
        "break_even": {
            "static": "tome-7",
            "static_flops": 1.6e6,
            "static_accuracy": 0.87,
            "clean_flops": 1.31e6,
            "attacked_flops": 2.05e6,
            "share": 0.392,
        },
        "verdict": {
            "kind": "bounded",
            "worst": int(worst["flops"]["worst"]),
            "worst_by": worst["name"],
            "recommended_budget": 1_520_000,
            "text": "No image can cost more than 92.8 % of dense; an attacker gets most of the way there.",
        },
    }


FORMS = ("ragged", "masked", "padded")
LANES = [("dense", "clean"), *((form, name) for name in ("clean", "patch 8 %") for form in FORMS)]


def row(execution: str, batch: int, inputs: str) -> dict[str, Any]:
    median = (
        batch * 1e-3 * (1 if execution == "dense" else 1.2 if execution == "masked" else 0.7 + 0.2 * len(inputs) / 9)
    )
    seconds = {"p50": median, "p95": 1.2 * median, "p99": 1.31 * median}
    found = {"execution": execution, "batch": batch, "inputs": inputs, "seconds": seconds, "clock": "process CPU"}
    return {**found, "ratio": median / batch * 1e3, "calls": 40, "factor": None}


def factor(width: float) -> dict[str, float]:
    return {"median": 1.21, "low": 1.21 - width, "high": 1.21 + width}


def defence(name: str, bound: int | None, *, kept: bool | None = None) -> dict[str, Any]:
    found = {"name": name, "clean_accuracy": 0.86, "clean_flops": 1.29e6, "attacked_accuracy": 0.58}
    return {
        **found,
        "attacked_flops": 1.5e6,
        "success": 0.17,
        "adaptive_success": 0.18,
        "bound": bound,
        "kept": kept,
    }


def receipts(report: dict[str, Any]) -> list[Receipt]:
    found = [("clean", report["clean"]["accuracy"]), *((item["name"], item["accuracy"]) for item in report["trials"])]
    return [
        Receipt(kind="run", name="audit", way=name, seed=3, baseline=name == "clean", quality={"test_accuracy": right})
        for name, right in found
    ]


def run_folder(path: Path) -> Path:
    """With the files that the page shows."""
    (path / "attacks").mkdir()
    for name, size in (("patch-8.png", (9, 9)), (KEPT.name, (480, 280))):
        Image.effect_noise(size, 90).convert("RGB").save(path / "attacks" / name)
    return path


def of(report: dict[str, Any], folder: Path, title: str) -> str:
    found = {part.title: part.content for part in audit_sections(report, folder)}
    return unescape(str(found[title]))


def test_the_verdict_says_worst_case_and_what_to_type(tmp_path: Path) -> None:
    report = sample()
    text = of(report, tmp_path, "Verdict")
    worst = report["verdict"]["worst"]
    assert "Bounded: no image costs more than 2.31 MFLOP" in text
    assert f"{worst / report['clean']['flops']['mean']:.3g}x" in text
    assert f"{100 * worst / FULL:.1f} %" in text
    assert "scrimp thin MODEL DATA --method ats --samples 64 --max-flops 1520000" in text
    report["verdict"] |= {"kind": "static", "recommended_budget": None}
    text = of(report, tmp_path, "Verdict")
    assert "Static cost" in text
    assert "--max-flops" not in text


def test_tables_hold_the_reports_numbers(tmp_path: Path) -> None:
    report = sample()
    threats, every = of(report, tmp_path, "Threat models"), of(report, tmp_path, "All trials")
    patch = report["trials"][5]
    assert threats.count("<tr>") == 1 + 8
    assert f"{100 * patch['success']:.1f} %" in threats  # the hardest of T1, and neither a control nor a defended one
    assert "other-vit" in threats
    assert every.count("<tr>") == 2 + 1 + len(report["trials"])
    assert "Trials behind a defence: 1" in every
    assert "24 images" in every
    assert "<small>3,000</small>" in every
    assert "never exceeded" in of(report, tmp_path, "Defences")
    assert "1.21x" in of(report, tmp_path, "One bad image in a batch")
    assert "From 39.2 % attacked images on, the static model tome-7" in of(report, tmp_path, "Against a static model")
    limits = of(report, tmp_path, "What was not tested")
    assert "per image 16/255 (24)" in limits
    assert "Not tried" not in limits


def test_a_broken_bound_and_a_lack_are_said(tmp_path: Path) -> None:
    report = sample()
    report["defences"][0]["kept"] = False
    report |= {"transfer": [], "detector": None, "break_even": None, "ceiling": None, "speed": [], "poisoning": []}
    report["trials"] = [item for item in report["trials"] if item["threat"] != "T2"]
    report["verdict"]["kind"] = "unbounded within dense"
    assert "BROKEN" in of(report, tmp_path, "Defences")
    assert "Not tried: T2, T4, T5." in of(report, tmp_path, "What was not tested")
    titles = [part.title for part in audit_sections(report, tmp_path)]
    assert "Latency" not in titles
    assert "One bad image in a batch" not in titles
    assert "The patch, and what is kept with and without it" not in titles
    assert [name for name in drawn(report) if "universal" in name] == []


def test_the_chart_is_a_cumulative_distribution() -> None:
    report = sample()
    figure = costs_figure(report)
    lines = {trace.name: trace for trace in figure.data}
    clean = lines["clean"]
    middle = sorted(CLEAN)[IMAGES // 2 - 1]
    assert clean.y[list(clean.x).index(middle, 1)] == 0.5
    assert (clean.y[0], clean.y[-1]) == (0, 1)
    assert {"dense, 2.49 MFLOP", "ceiling, 2.31 MFLOP", "recommended budget, 1.52 MFLOP"} <= set(lines)
    assert set(lines["dense, 2.49 MFLOP"].x) == {FULL}
    assert "accuracy-only patch" not in lines
    assert figure.layout.xaxis.range[1] > FULL


def test_the_terminal_gets_a_dozen_lines() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(audit_table(sample()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 12
    assert lines[2].split()[0] == "clean"
    assert lines[-1].startswith("No image can cost more")


def test_the_page_opens_in_a_browser(browser: Any, tmp_path: Path) -> None:
    report = copy.deepcopy(sample())
    report["trials"][7]["name"], report["model"] = EVIL, str(tmp_path / "secret" / "vit")
    path = write_audit_page(report, run_folder(tmp_path), receipts(report))
    assert path == tmp_path / PAGE
    assert str(tmp_path) not in path.read_text()
    browser.get("about:blank")
    browser.set_window_size(900, 900)
    drain(browser)
    browser.get(path.as_uri())
    until(lambda: len(browser.find_elements("css selector", "#figure-1 .trace")) >= 8)
    assert drain(browser) == ([], [path.as_uri()])
    assert browser.execute_script("return window.broken === undefined") is True
    assert browser.find_elements("css selector", "section h2")[0].text == "Verdict"
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth") is True
    shown = browser.execute_script("return [...document.images].map(e => [e.naturalWidth, e.naturalHeight])")
    assert shown == [[153, 153], [480, 280]]
    legend = [entry.text for entry in browser.find_elements("css selector", "#figure-1 .legendtext")]
    assert EVIL in legend
    assert "dense, 2.49 MFLOP" in legend


def test_reports_come_from_json(tmp_path: Path) -> None:
    report = json.loads(json.dumps(sample()))
    assert [part.first for part in audit_sections(report, tmp_path)] == [True] * 10


@pytest.mark.parametrize(("share", "said"), [(None, "never the cheaper one"), (0.0, "already on clean images")])
def test_break_even(tmp_path: Path, share: float | None, said: str) -> None:
    report = sample()
    report["break_even"]["share"] = share
    assert said in of(report, tmp_path, "Against a static model")
