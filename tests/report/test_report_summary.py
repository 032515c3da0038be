"""Means, spreads and verdicts: checked by hand, by simulation, and where receipts do not fit together."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from scrimp.meter.cost import Cost, Reading
from scrimp.receipts import Receipt
from scrimp.report import summarise, verdict
from scrimp.report.caveats import caveats, energy_unmeasured
from scrimp.report.summary import Verdict, quality_names, studies
from scrimp.report.words import headline

Study = Callable[..., list[Receipt]]


def receipt(way: str, seed: int | None, quality: dict[str, float | None], **fields: object) -> Receipt:
    common = {"kind": "run", "name": "s", "baseline": way == "base", "versions": {}, "machine": {}, "created": "2026"}
    return Receipt(way=way, seed=seed, quality=quality, **{**common, **fields})  # type: ignore[arg-type]


def pairs(base: list[float], other: list[float], name: str = "test_accuracy") -> list[Receipt]:
    return [receipt("base", seed, {name: value}) for seed, value in enumerate(base)] + [
        receipt("other", seed, {name: value}) for seed, value in enumerate(other)
    ]


def test_a_row_holds_mean_deviation_and_count(make_study: Study) -> None:
    receipts = make_study()
    rows = {row.way: row for row in summarise(receipts)}
    assert list(rows) == ["uniform", "presample", "history", "prune"]
    values = [run.quality["test_accuracy"] for run in receipts if run.way == "history"]
    spread = rows["history"].quality["test_accuracy"]
    assert (spread.mean, spread.deviation, spread.count) == (
        pytest.approx(statistics.mean(values)),
        pytest.approx(statistics.stdev(values)),
        3,
    )
    assert rows["uniform"].baseline
    assert not rows["history"].baseline
    assert rows["history"].cost["joules"].mean is None
    assert rows["history"].cost["labels"].mean == 12_000


def test_one_run_has_no_deviation_and_the_unknown_is_left_out() -> None:
    (row,) = summarise([receipt("base", 0, {"test_accuracy": 0.5, "train_loss": None})])
    assert (row.quality["test_accuracy"].mean, row.quality["test_accuracy"].deviation) == (0.5, None)
    assert (row.quality["train_loss"].mean, row.quality["train_loss"].count) == (None, 0)
    (row,) = summarise(
        [receipt("base", seed, {"x": value}) for seed, value in enumerate([1.0, None, 3.0, float("nan")])]
    )
    assert (row.quality["x"].mean, row.quality["x"].count, row.runs) == (2.0, 2, 4)


def test_the_interval_is_students_over_paired_differences() -> None:
    (found,) = verdict(pairs([0.80, 0.82, 0.84], [0.81, 0.84, 0.87]), "test_accuracy")
    # Differences 0.01, 0.02, 0.03: mean 0.02, s = 0.01, t = 4.3027, half width 4.3027 * 0.01 / sqrt(3) = 0.024842.
    assert (found.difference, found.low, found.high) == (
        pytest.approx(0.02),
        pytest.approx(-0.004842, abs=1e-6),
        pytest.approx(0.044842, abs=1e-6),
    )
    assert (found.outcome, found.pairs, found.decided) == ("tie", 3, True)


@pytest.mark.parametrize(
    ("quality", "shift", "outcome"),
    [
        ("test_accuracy", 0.05, "better"),
        ("test_accuracy", -0.05, "worse"),
        ("train_loss", 0.05, "worse"),
        ("train_loss", -0.05, "better"),
        ("test_accuracy", 0.0, "tie"),
        ("sparsity", 0.05, "higher"),
        ("sparsity", -0.05, "lower"),
    ],
)
def test_the_direction_of_better_belongs_to_the_quality(quality: str, shift: float, outcome: str) -> None:
    base = [0.80, 0.82, 0.84]
    other = [value + shift + wiggle for value, wiggle in zip(base, (0.001, -0.001, 0.0005), strict=True)]
    (found,) = verdict(pairs(base, other, quality), quality)
    assert found.outcome == outcome


def test_pairs_follow_the_seed_and_not_the_order() -> None:
    receipts = pairs([0.1, 0.5, 0.9], [0.11, 0.511, 0.912])
    random.Random(1).shuffle(receipts)
    (found,) = verdict(receipts, "test_accuracy")
    assert found.outcome == "better"
    assert found.difference == pytest.approx(0.011)


def test_ways_that_differ_in_nothing_tie_nineteen_times_in_twenty() -> None:
    noise = random.Random(0)
    ties = 0
    for _ in range(2000):
        base = [noise.gauss(0.8, 0.01) for _ in range(3)]
        ties += (
            verdict(pairs(base, [value + noise.gauss(0, 0.002) for value in base]), "test_accuracy")[0].outcome == "tie"
        )
    assert ties / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


@pytest.mark.parametrize(
    ("receipts", "outcome"),
    [
        (pairs([0.8], [0.9]), "one seed: no verdict"),
        (pairs([0.8, 0.8], [0.9]), "one seed: no verdict"),
        (
            [receipt("base", None, {"test_accuracy": 0.8}), receipt("other", None, {"test_accuracy": 0.9})],
            "one seed: no verdict",
        ),
        (
            [receipt("base", 0, {"test_accuracy": 0.8}), *(receipt("o", s, {"test_accuracy": 0.9}) for s in (1, 2))],
            "no shared seed: no verdict",
        ),
        ([receipt("a", 0, {"test_accuracy": 0.8})], "no baseline: no verdict"),
        (
            [receipt("base", 0, {"test_accuracy": 0.8}), receipt("o", 0, {"test_accuracy": None})],
            "not measured: no verdict",
        ),
    ],
)
def test_too_little_to_compare_is_said(receipts: list[Receipt], outcome: str) -> None:
    (found,) = verdict(receipts, "test_accuracy")
    assert (found.outcome, found.low, found.decided) == (outcome, None, False)


def test_studies_do_not_mix(make_study: Study) -> None:
    receipts = make_study(name="a") + make_study(name="b", ways=("prune", "uniform"))
    assert [(row.name, row.way) for row in summarise(receipts)][-2:] == [("b", "prune"), ("b", "uniform")]
    found = {(item.name, item.way): item.outcome for item in verdict(receipts, "train_loss")}
    assert found["a", "prune"] == "better"
    assert found["b", "uniform"] == "worse"


def test_leading_qualities_come_first() -> None:
    assert quality_names([receipt("a", 0, {"z": 1.0, "train_loss": 1.0, "test_accuracy": 1.0})]) == [
        "test_accuracy",
        "train_loss",
        "z",
    ]


def test_the_newest_of_two_runs_with_one_seed_counts_and_this_is_said() -> None:
    old = receipt("base", 0, {"x": 1.0}, created="2026-01-01T00:00:00+00:00")
    new = receipt("base", 0, {"x": 2.0}, created="2026-01-02T00:00:00+00:00")
    for order in ([old, new], [new, old], [new, old, new]):
        (row,) = summarise(order)
        assert (row.runs, row.quality["x"].mean) == (1, 2.0)
        assert caveats(order) == ["1 older receipt of the same way and seed left out."]
    assert caveats([new, new]) == []
    assert len(studies([replace(new, seed=None), replace(old, seed=None)])["s"]["base"]) == 2


def metered(way: str, seed: int, how: str) -> Receipt:
    return receipt(way, seed, {"test_accuracy": 0.8}, cost=Cost(joules=Reading(100.0 + seed, how)))


def test_energies_of_one_meter_are_averaged_and_of_two_are_refused() -> None:
    one = [metered("base", seed, "NVML counter") for seed in (0, 1)]
    assert summarise(one)[0].cost["joules"].mean == 100.5
    assert energy_unmeasured(one) is None
    mixed = [*one, metered("other", 0, "RAPL package")]
    assert [row.cost["joules"].mean for row in summarise(mixed)] == [None, None]
    assert "Energy readings are not mixed (NVML counter; RAPL package)." in caveats(mixed)


def test_a_whole_study_of_one_machine_has_no_caveat(make_study: Study) -> None:
    assert caveats(make_study()) == []
    assert energy_unmeasured(make_study()) == "not measured: no meter"


def test_other_machines_versions_and_ways_of_measuring_are_said(make_study: Study) -> None:
    receipts = make_study()
    receipts[0] = replace(
        receipts[0],
        machine={**receipts[0].machine, "processor": "Another"},
        versions={**receipts[0].versions, "numpy": "2.4"},
        cost=replace(receipts[0].cost, peak_bytes=Reading(1e9, "maximum allocated")),
    )
    found = " ".join(caveats(receipts))
    assert "2 machines (differing in processor): their times are not comparable" in found
    assert "Versions differ between receipts: numpy 2.4 / absent." in found
    assert "Peak memory measured in 2 ways" in found


def test_partial_counts_uneven_seeds_and_two_baselines_are_said(make_study: Study) -> None:
    receipts = make_study(ways=("uniform", "history"))[:-1]
    receipts[1] = replace(
        receipts[1], baseline=True, cost=replace(receipts[1].cost, flops=Reading(1e9, "counted", ("aten::cdist",)))
    )
    found = " ".join(caveats(receipts))
    assert "FLOPs counted in part, without aten::cdist." in found
    assert "Not every way has the same seeds (runs: uniform 3, history 2)" in found
    assert "Several baselines; compared with uniform." in found


def test_short_names_are_written_in_capitals() -> None:
    psnr, ssim = (Verdict("s", "new", name, "tie") for name in ("worst_psnr", "ssim"))
    assert headline([psnr], "old") == "Worst PSNR: new ties with old."
    assert headline([ssim], "old") == "SSIM: new ties with old."
