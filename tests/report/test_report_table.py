"""The table in the terminal and in markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from scrimp.meter.cost import Reading
from scrimp.receipts import Receipt
from scrimp.report import markdown_table, render_table, summarise, verdict
from scrimp.report.table import grid
from scrimp.report.words import headline, sentence

Study = Callable[..., list[Receipt]]


def printed(receipts: list[Receipt], width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render_table(receipts))
    return stream.getvalue()


def with_energy(receipts: list[Receipt], how: str = "NVML counter") -> list[Receipt]:
    return [replace(run, cost=replace(run.cost, joules=Reading(2350.0, how))) for run in receipts]


@pytest.mark.parametrize("width", [100, 120, 140])
def test_every_figure_is_whole_on_its_own_line(make_study: Study, width: int) -> None:
    text = printed(make_study(), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    line = next(line for line in text.splitlines() if line.startswith("history"))
    assert re.fullmatch(
        r"history +88\.5 ± 0\.3 % +0\.262 ± 0\.004 +901 G +59\.3 s +31\.2 s +610 MB +384,000 +12,000 +1\.23 MB *", line
    )
    below = text.splitlines()[text.splitlines().index(line) + 1]
    assert below.split() == ["n=3", "tie", "better", "-0.078"]


def test_energy_without_a_meter_is_said_once(make_study: Study) -> None:
    assert printed(make_study()).count("not measured: no meter") == 1
    assert "energy" not in grid(make_study()).headings


def test_energy_with_a_meter_has_a_column(make_study: Study) -> None:
    laid = grid(with_energy(make_study()))
    assert {row[laid.headings.index("energy")].text for row in laid.rows} == {"2.35 kJ"}
    assert "no meter" not in " ".join(laid.caption)


def test_energy_of_two_meters_is_a_dash_with_a_note(make_study: Study) -> None:
    receipts = make_study()
    laid = grid(with_energy(receipts[:5]) + with_energy(receipts[5:], "RAPL"))
    assert {row[laid.headings.index("energy")].text for row in laid.rows} == {"-"}
    assert laid.caveats == ["Energy readings are not mixed (NVML counter; RAPL)."]


def test_modelled_energy_stands_in_a_column_of_its_own(make_study: Study) -> None:
    modelled = [replace(run, cost=replace(run.cost, energy_modelled=Reading(9.0, "5 W"))) for run in make_study()]
    laid = grid(modelled)
    assert laid.headings[-1] == "energy, modelled"
    assert "Energy not measured: no meter." in laid.caption


def test_a_gpus_clock_is_called_so(make_study: Study) -> None:
    receipts = [replace(r, cost=replace(r.cost, cpu_seconds=Reading(1.0, "CUDA events"))) for r in make_study()]
    assert "GPU time" in grid(receipts).headings


def test_one_seed_gets_no_verdict(make_study: Study) -> None:
    text = printed(make_study(seeds=1))
    assert text.count("no verdict") == 6 + 1
    assert "one seed: no verdict" in text
    assert "tie" not in text.replace("tie: the 95 %", "")


def test_a_partial_mean_says_over_how_many(make_study: Study) -> None:
    receipts = make_study()
    receipts[0] = replace(receipts[0], cost=replace(receipts[0].cost, flops=Reading()))
    receipts[1] = replace(receipts[1], cost=replace(receipts[1].cost, flops=Reading(9e11, "counted", ("aten::cdist",))))
    laid = grid(receipts)
    column = laid.headings.index("FLOPs")
    assert laid.rows[0][column].text == "900 G (n=2)"
    assert [row[column].note for row in laid.rows] == ["", "partial", "", ""]


def test_studies_stand_under_their_names(make_study: Study) -> None:
    text = printed(make_study(name="one") + make_study(name="two", ways=("uniform", "history")))
    lines = [line.strip() for line in text.splitlines()]
    assert lines.index("one") < lines.index("two")
    assert sum(line.startswith("uniform") for line in lines) == 2


def test_names_are_text_and_not_markup(make_study: Study) -> None:
    receipts = make_study(ways=("uniform", "[red]a|b[/red]"))
    assert "[red]a|b[/red]" in printed(receipts, 140)
    row = next(line for line in markdown_table(receipts).splitlines() if "red\\]" in line)
    assert row.startswith(r"| \[red\]a\|b\[/red\] (n=3) | ")


def test_markdown_has_as_many_cells_in_every_row(make_study: Study) -> None:
    text = markdown_table(make_study())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11}
    assert len(rows) == 2 + 4
    assert "| 88.5 ± 0.3 % (tie) | 0.262 ± 0.004 (better -0.078) | 901 G |" in text
    assert text.endswith("Energy not measured: no meter.\n")


def test_verdicts_in_words(make_study: Study) -> None:
    receipts = make_study()
    rows = {row.way: row for row in summarise(receipts)}
    accuracy = {item.way: item for item in verdict(receipts, "test_accuracy")}
    assert headline(accuracy.values(), "uniform") == (
        "Test accuracy: presample is worse than uniform; history and prune tie with uniform."
    )
    assert sentence(accuracy["history"], rows["history"], rows["uniform"]) == (
        "history reached a test accuracy of 88.5 % against 88.4 % for uniform at the same 900 GFLOP: "
        "a tie (difference +0.14 points, 95 % interval -0.06 to +0.33, 3 seeds)."
    )
    assert "worse by 0.71 points" in sentence(accuracy["presample"], rows["presample"], rows["uniform"])


def test_verdicts_at_other_budgets_say_both(make_study: Study) -> None:
    receipts = [
        replace(run, cost=replace(run.cost, flops=Reading(6e11, "counted"))) if run.way == "history" else run
        for run in make_study()
    ]
    rows = {row.way: row for row in summarise(receipts)}
    (found,) = [item for item in verdict(receipts, "train_loss") if item.way == "history"]
    assert "for uniform, with 600 GFLOP against 900 GFLOP: better by 0.078" in sentence(
        found, rows["history"], rows["uniform"]
    )


def test_no_verdict_in_words(make_study: Study) -> None:
    receipts = make_study(seeds=1, ways=("uniform", "history"))
    rows = {row.way: row for row in summarise(receipts)}
    (found,) = verdict(receipts, "test_accuracy")
    assert sentence(found, rows["history"], rows["uniform"]).endswith("at the same 900 GFLOP: one seed, no verdict.")
    assert headline([found], "uniform") == "Test accuracy: history: one seed, no verdict."
