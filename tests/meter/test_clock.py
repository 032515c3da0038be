"""The clock: counts calls and does its sums; no test looks at how long anything takes on this machine."""

from __future__ import annotations

import itertools

import pytest

from scrimp.meter import clock, paired
from scrimp.meter.clock import Spread, timed
from scrimp.primitives.errors import InputError


@pytest.fixture
def clocks(monkeypatch):
    """Clocks that stand still but for what calls add to them: ``spend(wall, cpu)``."""
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(clock.time, "process_time", lambda: now["cpu"])

    def spend(wall, cpu):
        now["wall"] += wall
        now["cpu"] += cpu

    return spend


def test_median_and_quartiles_leave_the_warm_up_out(clocks):
    laps = iter([100.0, 1.0, 2.0, 3.0, 4.0, 50.0])
    timing = timed(lambda: (lambda lap: clocks(lap, 2 * lap))(next(laps)), warmup=1, repeats=5)
    assert timing.seconds == Spread(3.0, 2.0, 4.0, 5)
    assert timing.cpu_seconds == Spread(6.0, 4.0, 8.0, 5)
    seconds, cpu = timing.readings()
    assert (seconds.value, cpu.value) == (3.0, 6.0)
    assert "median of 5" in seconds.how
    assert "2 to 4" in seconds.how


def test_one_call_has_no_quartiles(clocks):
    seconds, _ = timed(lambda: clocks(1.5, 1.0), warmup=0, repeats=1).readings()
    assert seconds.value == 1.5
    assert "quartile" not in seconds.how


def test_pairs_alternate_and_divide_pair_by_pair(clocks):
    order = []
    machine = itertools.chain([9, 9], [1, 1], [10, 10], [2, 2])  # how slow the machine is at each call

    def call(name, cost):
        order.append(name)
        clocks(cost * next(machine), cost)

    result = paired(lambda: call("a", 1.0), lambda: call("b", 4.0), 3)
    assert "".join(order) == "abababab"
    assert result.ratio == Spread(0.25, 0.25, 0.25, 3)
    assert result.cpu_ratio.median == 0.25
    assert result.a.seconds.median == 2.0
    assert result.b.seconds.high == 24.0


def test_a_baseline_too_quick_to_register_gives_no_ratio(clocks):
    result = paired(lambda: clocks(1.0, 1.0), lambda: clocks(1.0, 0.0), 3)
    assert result.ratio.median == 1.0
    assert result.cpu_ratio == Spread(None, None, None, 0)


@pytest.mark.parametrize("counts", [{"warmup": -1}, {"repeats": 0}])
def test_counts_that_measure_nothing_are_refused(counts):
    with pytest.raises(InputError, match="repeats"):
        timed(lambda: None, **counts)
    with pytest.raises(InputError):
        paired(lambda: None, lambda: None, **counts)


def test_the_gpu_is_waited_for_on_both_sides_of_a_call(monkeypatch):
    events = []
    monkeypatch.setattr(clock, "synchronise", lambda: events.append("wait"))
    timed(lambda: events.append("call"), warmup=0, repeats=2)
    assert events == ["wait", "call", "wait"] * 2


def test_cpu_time_is_this_process_s():
    timing = timed(lambda: sum(range(20_000)), repeats=3)
    assert timing.seconds.median > 0
    assert timing.cpu_seconds.median > 0
