"""Ways, stages and the budget they share."""

from __future__ import annotations

import dataclasses

import pytest

from scrimp.jobs.config import StudyConfig
from scrimp.jobs.fit import Spent
from scrimp.jobs.folder import RECEIPT, REPORT, WEIGHTS
from scrimp.jobs.study import study
from scrimp.jobs.ways import WAYS, Context, Stage, Way, find_ways, run_way
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, save_receipt
from scrimp.report import find_receipts


def config(out, **settings) -> StudyConfig:
    usual = {"model": "convnet-8", "batch_size": 16, "evaluations": 2, "device": "cpu", "json": True, "flops": 1e9}
    return StudyConfig(**{**usual, **settings}, out=out)


def test_every_way_gets_the_same_budget_and_pairs_share_a_start(shapes, tmp_path):
    folder, receipts = study(config(tmp_path / "study", seeds=2), data=shapes)
    assert [(item.way, item.seed) for item in receipts] == [(way.name, seed) for way in WAYS for seed in (0, 1)]
    budget = receipts[0].config["budget_flops"]
    assert budget == 1e9
    assert all(0.95 * budget < item.cost.flops.value <= budget for item in receipts)
    assert [item.baseline for item in receipts] == [item.way == "uniform" for item in receipts]
    assert "history" in (folder / REPORT).read_text()


def test_a_finished_study_is_read_back_not_run_again(shapes, tmp_path, monkeypatch):
    _, first = study(config(tmp_path / "study", seeds=1, ways=("uniform", "prune")), data=shapes)
    monkeypatch.setattr("scrimp.jobs.fit.Fitting.run", lambda *_: pytest.fail("trained again"))
    _, second = study(config(tmp_path / "study", seeds=1, ways=("uniform", "prune"), resume=True), data=shapes)
    assert [item.created for item in first] == [item.created for item in second]


def test_minutes_bound_the_whole_study(shapes, tmp_path, monkeypatch):
    """At 0.5 s a step, two runs in two minutes get the FLOPs of about 90 steps each; 20 % is kept in reserve."""
    monkeypatch.setattr("scrimp.jobs.budget.time_step", lambda *_, **__: (0.5, 0.01))
    settings = {"flops": None, "minutes": 2.0, "seeds": 1, "ways": ("uniform", "prune")}
    _, receipts = study(config(tmp_path / "study", **settings), data=shapes)
    steps = receipts[0].cost.samples.value / 16
    assert 50 <= steps <= 96
    assert receipts[0].config["budget_flops"] == receipts[1].config["budget_flops"]


def test_too_few_minutes_say_so(shapes, tmp_path):
    with pytest.raises(InputError, match="--minutes"):
        study(config(tmp_path / "study", flops=None, minutes=0.001), data=shapes)


def test_stages_share_the_budget_in_order(tmp_path):
    seen = []

    def stage(name: str, share: float) -> Stage:
        def run(context: Context) -> Receipt:
            seen.append((name, context.budget, context.folder.name, context.before and context.before.way))
            return Receipt(kind="run", name="study", way=name)

        return Stage(name, share, run)

    context = Context(setup=None, study="study", way="both", baseline=False, seed=0, budget=100.0,
                      folder=tmp_path, report=lambda spent: None)  # fmt: skip
    last = run_way(Way("both", "", (stage("pretrain", 0.75), stage("probe", 0.25))), context)
    assert seen == [("pretrain", 75.0, "pretrain", None), ("probe", 25.0, "probe", "pretrain")]
    assert last.way == "probe"
    with pytest.raises(InputError, match="sum to 1"):
        run_way(Way("half", "", (stage("only", 0.5),)), context)
    with pytest.raises(InputError, match="at least one stage"):
        run_way(Way("none", "", ()), context)


def test_what_a_stage_takes_anyway_comes_off_the_budget_first(tmp_path):
    seen, told = {}, []

    def stage(name: str, share: float, fixed: float) -> Stage:
        def run(context: Context) -> Receipt:
            seen[name] = context.budget, context.encoder
            context.report(Spent(flops=1.0))
            return Receipt(kind="run", name="study", way=name, cost=Cost(flops=Reading(context.budget - 1)))

        return Stage(name, share, run, fixed=lambda context: fixed)

    def finish(context: Context, receipts: dict[str, Receipt]) -> Receipt:
        return Receipt(kind="run", name="study", way="+".join(receipts))

    spent = []
    context = Context(setup=None, study="study", way="all", baseline=False, seed=0, budget=100.0, folder=tmp_path,
                      report=lambda point: spent.append(point.flops), told=told.append)  # fmt: skip
    way = Way("all", "", (stage("a", 0.5, 0), stage("b", 0.5, 10), stage("c", 0.0, 30)), finish)
    assert run_way(way, context).way == "a+b+c"
    folder = tmp_path / "stages"
    assert seen == {"a": (30, None), "b": (40, folder / "a" / WEIGHTS), "c": (30, folder / "b" / WEIGHTS)}
    assert told == ["a", "b", "c"]
    assert spent == [1, 30, 69]  # what came before is counted in
    with pytest.raises(InputError, match="budget above 40"):
        run_way(way, dataclasses.replace(context, budget=40.0))


def test_only_the_labelled_images_are_trained_on_at_the_same_budget(shapes, tmp_path):
    ways = tuple(way.name for way in WAYS)
    _, receipts = study(config(tmp_path / "study", seeds=1, labelled=0.05, flops=3e8, ways=ways), data=shapes)
    assert {receipt.cost.labels.value for receipt in receipts} == {18}  # 6.4 of each class, rounded
    assert {receipt.notes["training images"] for receipt in receipts} == {18}
    assert all(0.9 * 3e8 < receipt.cost.flops.value <= 3e8 for receipt in receipts)
    assert receipts[0].cost.samples.value > 10 * 18


def test_a_report_leaves_the_stages_of_runs_out(tmp_path):
    for place in ("uniform/seed-0", "pretrain+probe/seed-0", "pretrain+probe/seed-0/stages/probe"):
        save_receipt(Receipt(kind="run", name="study", way=place), tmp_path / place / RECEIPT)
    assert {item.way for item in find_receipts([tmp_path])} == {"uniform/seed-0", "pretrain+probe/seed-0"}
    stages = tmp_path / "pretrain+probe" / "seed-0" / "stages"
    assert [item.way for item in find_receipts([stages])] == ["pretrain+probe/seed-0/stages/probe"]


def test_ways_are_found_by_name():
    assert [way.name for way in find_ways(("prune", "uniform"))] == ["prune", "uniform"]
    with pytest.raises(InputError, match="history"):
        find_ways(("historical",))


def test_python_data_sets_and_settings_are_checked(shapes, tmp_path):
    with pytest.raises(InputError, match="batch size"):
        study(config(tmp_path / "study", batch_size=5000), data=shapes)
    with pytest.raises(InputError, match="seed"):
        study(dataclasses.replace(config(tmp_path / "study"), seeds=0), data=shapes)
