"""The figures as data: traces, axes, means, colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from scrimp.receipts import Receipt
from scrimp.report.curves import mean_line, seed_line
from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, looks
from scrimp.report.plots import figures, final_points, quality_against_cost, tau_trace, training_curves

Study = Callable[..., list[Receipt]]


def test_the_mean_is_read_where_all_seeds_have_points() -> None:
    mean = mean_line([[(0.0, 0.0), (2.0, 2.0), (4.0, 4.0)], [(1.0, 3.0), (3.0, 5.0)], []])
    assert mean.x == [1.0, 2.0, 3.0]
    assert mean.y == [2.0, 3.0, 4.0]
    assert mean.deviation == pytest.approx([2**0.5] * 3)


def test_seeds_that_share_no_stretch_have_no_mean() -> None:
    assert mean_line([[(0.0, 1.0), (1.0, 1.0)], [(2.0, 1.0), (3.0, 1.0)]]).x == []
    assert mean_line([]).y == []


def test_unknown_points_are_left_out_and_long_curves_thinned(make_study: Study) -> None:
    run = make_study(seeds=1)[0]
    gaps = replace(run, curve=[{"flops": 2.0, "tau": 1.0}, {"flops": None, "tau": 2.0}, {"tau": 3.0}, {"flops": 1.0}])
    assert seed_line(gaps, "flops", "tau") == [(2.0, 1.0)]
    long = replace(run, curve=[{"flops": float(step), "tau": 1.0} for step in range(5000)])
    line = seed_line(long, "flops", "tau")
    assert (len(line), line[0][0], line[-1][0]) == (300, 0.0, 4999.0)


def test_curves_have_a_line_a_seed_and_a_mean_a_way(make_study: Study) -> None:
    figure = quality_against_cost(make_study())
    assert len(figure.data) == 4 * (3 + 1)
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert named == ["uniform", "presample", "history", "prune"]
    assert figure.layout.xaxis.title.text == "compute (FLOP)"
    assert figure.layout.yaxis.title.text == "test accuracy"


def test_one_seed_has_no_faint_line(make_study: Study) -> None:
    assert len(training_curves(make_study(seeds=1)).data) == 4


def test_buttons_bring_every_trace_its_own_points(make_study: Study) -> None:
    receipts = make_study()
    figure = quality_against_cost(receipts)
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["FLOPs", "CPU time", "wall time"]
    change, layout = figure.layout.updatemenus[0].buttons[1].args
    assert layout["xaxis.title.text"] == "CPU time (s)"
    assert len(change["x"]) == len(figure.data)
    # The last seed of the first way, its last point.
    last = [run for run in receipts if run.way == "uniform"][-1].curve[-1]
    assert (change["x"][2][-1], change["y"][2][-1]) == (last["cpu_seconds"], last["test_accuracy"])


def test_an_axis_no_curve_knows_has_no_button(make_study: Study) -> None:
    receipts = [
        replace(run, curve=[{**point, "cpu_seconds": None, "seconds": None} for point in run.curve])
        for run in make_study()
    ]
    assert not quality_against_cost(receipts).layout.updatemenus


def test_loss_is_on_a_log_axis_with_its_unit(make_study: Study) -> None:
    study = make_study()
    axis = training_curves(study).layout.yaxis
    assert axis.type == "log"
    assert "nats" in axis.title.text
    distances = [replace(run, notes={**run.notes, "unit of train_loss": "distance"}) for run in study]
    assert training_curves(distances).layout.yaxis.title.text == "train loss (distance, log)"


def test_only_ways_with_tau_are_in_its_figure(make_study: Study) -> None:
    names = {trace.name for trace in tau_trace(make_study()).data}
    assert names == {"presample", "history", "prune"}


def test_ways_of_one_cost_stand_side_by_side_and_others_where_they_are(make_study: Study) -> None:
    receipts = make_study()
    figure = final_points(receipts)
    marks = [trace for trace in figure.data if trace.showlegend is not False]
    places = [trace.x[0] for trace in marks]
    assert places == sorted(places)
    assert min(b - a for a, b in pairwise(places)) > 1e10
    assert "900 GFLOP" in marks[0].text[0]  # the label tells the true cost
    change, _ = figure.layout.updatemenus[0].buttons[2].args
    seconds = [run.cost.seconds.value for run in receipts if run.way == "uniform"]
    assert change["x"][1] == [pytest.approx(sum(seconds) / 3)]
    assert marks[0].error_y.array[0] > 0


def test_receipts_without_curves_or_costs_have_fewer_figures(make_study: Study) -> None:
    titles = [section.title for section in figures(make_study())]
    assert titles == [
        "Test accuracy against cost",
        "Training curves",
        "Where each way ended",
        "Variance reduction along the run",
    ]
    bare = [replace(run, curve=[]) for run in make_study()]
    assert [section.title for section in figures(bare)] == ["Where each way ended"]
    assert figures([replace(run, quality={}) for run in bare]) == []


def test_a_way_keeps_its_colour_and_the_baseline_is_grey(make_study: Study) -> None:
    every = make_study() + make_study(name="two", ways=("uniform", "prune"))
    drawn = looks(every)
    part = [run for run in every if run.name == "two"]
    for figure in (quality_against_cost(part, drawn=drawn), training_curves(part, drawn=drawn)):
        assert {trace.name: trace.line.color for trace in figure.data} == {
            "uniform": BASELINE_COLOUR,
            "prune": COLOURS[2],
        }
    assert {trace.name: trace.marker.color for trace in final_points(part, drawn=drawn).data} == {
        "uniform": BASELINE_COLOUR,
        "prune": COLOURS[2],
    }


def _luminance(colour: str) -> float:
    shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#15181c"])
@pytest.mark.parametrize("colour", [BASELINE_COLOUR, *COLOURS])
def test_every_colour_stands_out_on_both_pages(page: str, colour: str) -> None:
    light, dark = sorted((_luminance(page), _luminance(colour)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3.0  # WCAG 2.1, graphical objects


def test_names_are_text_in_figures_too(make_study: Study) -> None:
    receipts = make_study(ways=("uniform", '<a href="https://example.org">x</a>'))
    names = {trace.name for trace in quality_against_cost(receipts).data}
    assert names == {"uniform", '&lt;a href="https://example.org"&gt;x&lt;/a&gt;'}
