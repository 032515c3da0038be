"""`scrimp.attack.audit`: the verdict, budgets kept, what a defence is given credit for, the same again by the seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_victims import Toy, pictures, pixels, victim, vit
from torch import Tensor

from scrimp.adaptive import token_halting_
from scrimp.attack import AuditReport, Patch, Trial, Victim, attack_success, audit, judge, victim_of
from scrimp.attack.alarms import watch_of
from scrimp.attack.battery import standard
from scrimp.attack.defended import recommended
from scrimp.attack.trials import bench_of, stream
from scrimp.primitives.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more by handing work over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dumped(report: AuditReport) -> str:
    return json.dumps(report.to_dict(), allow_nan=False)


def halting(max_flops: int | None = None) -> Victim:
    model = vit()
    token_halting_(model, gate_scale=4, gate_center=-2, max_flops=max_flops)
    return victim_of(model)


class Capped(Toy):
    """No image costs more than the bound, and a tenth on top where it is broken."""

    def __init__(self, bound: int, broken: bool = False) -> None:
        super().__init__()
        self.bound = bound + broken * bound // 10
        self.ceiling = bound

    def cost(self, images: Tensor) -> Tensor:
        return super().cost(images).clamp_max(self.bound)


@pytest.mark.parametrize(
    ("attacked", "ceiling", "kind", "worst"),
    [
        ([5, 5], 5, "static", 5),
        ([5, 5], None, "static", 5),
        ([5, 8], 9, "bounded", 8),
        ([5, 9], 9, "bounded", 9),
        ([5, 10], 9, "unbounded within dense", 10),
        ([5, 8], 10, "unbounded within dense", 8),
        ([5, 8], None, "unbounded within dense", 8),
    ],
)
def test_the_verdict_follows_from_the_numbers(attacked: list[int], ceiling: int | None, kind: str, worst: int) -> None:
    clean = torch.tensor([5, 5])
    found = judge({"clean": clean, "patch": torch.tensor(attacked)}, full=10, ceiling=ceiling, recommended=7)
    assert (found.kind, found.worst) == (kind, worst)
    assert found.worst_by == ("clean" if kind == "static" else "patch")
    assert found.recommended == (None if kind == "static" else 7)
    assert ("broken" in found.text) == (worst == 10)
    if kind == "static":  # a model that could do otherwise is not praised for not having been seen to
        assert ("nothing in the model" in found.text) == (ceiling is None)
    with pytest.raises(InputError, match="1 image or more"):
        judge({"clean": clean, "patch": clean[:0]}, full=10, ceiling=None)


def test_a_budget_is_recommended_that_the_model_can_keep() -> None:
    costs = torch.arange(1, 101)
    assert recommended(costs, 200, None) == (99, None)
    assert recommended(costs, 99, None) == (None, None)  # nothing to gain

    def from_120(bound: int) -> Victim:
        if bound < 120:
            raise InputError("more", "less", "")
        return Capped(bound)

    bound, model = recommended(costs, 200, from_120)
    assert bound == 99 + 101 * 2 // 8
    assert isinstance(model, Capped)
    assert recommended(costs, 110, from_120) == (None, None)
    assert recommended(costs, 99, Capped) == (None, None)  # a budget of the dense cost caps nothing


def test_an_audit_gives_the_same_however_often_it_is_stopped() -> None:
    """Finished trials are not made again, and nothing hangs on which were made just now."""
    kept: dict[str, Trial] = {}
    made: list[str] = []
    told: list[tuple[str, float]] = []

    def remember(name: str, make: Callable[[], Trial]) -> Trial:
        if name not in kept:
            made.append(name)
            if len(made) in (13, 30):
                raise KeyboardInterrupt
            kept[name] = make()
        return kept[name]

    options: dict[str, Any] = {"learn": pixels(40, seed=4), "budget": 300, "seed": 3, "capped": Capped}
    options |= {"others": {"other": Toy(1)}, "labels": torch.arange(17) % 3}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            audit(Toy(), pixels(17), remember=remember, **options)
    resumed = audit(Toy(), pixels(17), remember=remember, **options)
    assert len(made) == len(set(made)) + 2  # those that were stopped
    again = audit(Toy(), pixels(17), report=lambda *said: told.append(said), **options)
    assert dumped(again) == dumped(resumed)
    assert [name for name, _ in told] == list(kept)
    assert all(0 < done <= 1 for _, done in told)
    other = audit(Toy(), pixels(17), **{**options, "seed": 4})
    assert dumped(other) != dumped(again)
    assert again.detector is not None


@pytest.fixture(scope="module")
def halted() -> AuditReport:
    return audit(halting(), pictures(5, 3), learn=pictures(2, 9), budget=270, capped=halting, defend={})


def test_an_audit_of_halting_finds_that_dense_is_the_only_bound(halted: AuditReport) -> None:
    """Costs counted once more by hand from the attacks that were kept."""
    report, content, bare = halted, halted.to_dict(), halting()
    assert content["verdict"]["kind"] == "unbounded within dense"
    assert content["verdict"]["worst"] == bare.full == content["full"]
    assert content["spent"] <= 270
    assert content["surrogate"] in content["pilot"]
    images = pictures(5, 3)
    clean = bare.cost(images)
    assert content["clean"]["costs"] == clean.tolist()
    for trial in report.trials:
        if isinstance(trial.attack, Patch) and trial.attack.place is not None and trial.case.kind == "attack":
            told = next(row for row in content["trials"] if row["name"] == trial.case.name)
            costs = bare.cost(trial.attack.on(images))
            assert told["costs"] == costs.tolist()
            assert told["success"] == pytest.approx(attack_success(costs, clean, bare.full))
    assert max(row["success"] for row in content["trials"] if row["threat"] == "T1") > 0.9
    assert {row["threat"] for row in content["trials"]} == {"T0", "T1", "T2", "T3", "black box"}
    assert content["poisoning"] == []  # 5 images make no batch of 16
    assert content["detector"] is None  # 2 images are too few for its rate


def test_the_hard_budget_holds_for_every_image(halted: AuditReport) -> None:
    cap = halted.to_dict()["defences"][0]
    assert (cap["name"], cap["kept"]) == ("hard budget", True)
    assert cap["bound"] < halted.full
    assert cap["adaptive_success"] >= cap["success"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_broken_cap_is_caught(broken: bool) -> None:
    """And a victim of no known kind is audited without labels, statistics or parts."""
    found = audit(Toy(), pixels(20), budget=300, capped=lambda bound: Capped(bound, broken), defend={}).to_dict()
    cap = next(item for item in found["defences"] if item["name"] == "hard budget")
    assert cap["kept"] is not broken
    assert found["verdict"]["recommended_budget"] == cap["bound"]
    assert (found["images"], found["learnt_from"], found["surrogate"]) == (10, 10, "own")
    assert found["clean"]["accuracy"] is None
    assert all(row["accuracy"] is None for row in found["trials"])


def test_what_is_left_out_changes_nothing_else() -> None:
    images, options = pixels(8), {"learn": pixels(7, seed=4), "budget": 400}
    whole = audit(Toy(), images, **options).to_dict()["trials"]  # type: ignore[arg-type]
    part = audit(Toy(), images, sizes=(0.08,), epsilons=(16 / 255,), defend={}, **options).to_dict()["trials"]  # type: ignore[arg-type]
    known = {row["name"]: row for row in whole}
    same = [row["name"] for row in part if known.get(row["name"]) == row]
    assert {"noise", "patch 8 %", "patch 8 %, anywhere", "per image 16/255", "queried patch 8 %"} <= set(same)


def test_a_static_model_has_nothing_to_attack() -> None:
    found = audit(
        victim("merging"), pictures(16, 3), learn=pictures(2, 9), budget=2400, capped=Capped, defend={}
    ).to_dict()
    assert found["verdict"]["kind"] == "static"
    assert found["verdict"]["recommended_budget"] is None
    assert found["budget"] == 120
    assert {row["success"] for row in found["trials"]} == {0.0}
    assert [(row["batch"], row["factor"]) for row in found["poisoning"]] == [(16, 1.0)]


def test_who_knows_the_detector_stays_below_its_threshold() -> None:
    """On a toy that the detector judges by its cost: what passes is no dearer than what raises no alarm."""
    bench = bench_of(Toy(), pixels(12), None, pixels(60, seed=5), seed=0)
    trials = []
    for entry in standard(torch.Size((3, 8, 8)), (0.2,), (8 / 255, 64 / 255)):
        if entry.case.threat in ("T1", "T3") and entry.case.goal == "ignore":
            trials.append(entry.make(bench, entry.case, 300, stream(0, entry.case.name)))
    watch = watch_of(bench)
    assert watch is not None
    caught = {trial.case.name: watch.caught(trial) for trial in trials}
    assert any(bool(alarms.all()) for alarms in caught.values())
    found = watch.aware(trials, caught)
    moved = found.costs != bench.clean.costs
    assert bool(moved.any())
    assert not bool(watch.detector.alarms(found.costs[moved, None].double()).any())
    for trial in trials:  # whatever is quiet was open to him
        quiet = torch.where(caught[trial.case.name], 0, trial.costs)
        assert bool((found.costs[: len(quiet)] >= quiet).all())
    blind = watch.unaware(trials[0], caught[trials[0].case.name])
    alarmed = caught[trials[0].case.name]
    assert torch.equal(blind.costs[alarmed], bench.clean.costs[alarmed])
    assert watch_of(bench_of(Toy(), pixels(12), None, pixels(10), seed=0)) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"budget": 99}, "budget of at least 100"),
        ({"sizes": ()}, "different sizes"),
        ({"epsilons": (0.001,)}, "epsilon from 1/255"),
        ({"learn": torch.rand(2, 3, 4, 4)}, r"learn \[m"),
        ({"labels": torch.zeros(3)}, "labels as int64"),
        ({"images": torch.rand(1, 3, 8, 8)}, "2 images or more"),
        ({"victim": [Toy(), Toy()]}, "one victim"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], match: str) -> None:
    options = {"victim": Toy(), "images": pixels(4), **change}
    with pytest.raises(InputError, match=match):
        audit(options.pop("victim"), options.pop("images"), **options)
