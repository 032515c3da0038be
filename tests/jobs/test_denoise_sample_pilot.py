"""The search of `scrimp denoise sample`, on a pretended model whose errors and costs are known."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from scrimp.jobs import denoise_sample_pilot as module
from scrimp.jobs.denoise_sample_config import DenoiseSampleConfig
from scrimp.jobs.denoise_sample_pilot import LADDER, Pilot, choose
from scrimp.jobs.denoise_sample_table import pilot_table, sentence
from scrimp.jobs.denoise_sample_ways import CallCost, Drawn, Way, fitting_solvers
from scrimp.meter import Reading
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


class Pretended:
    """A model whose errors and costs are known: the error falls by the order of the solver, caching adds to it."""

    name, kind, prediction, reusable = "pretended", "denoiser", "v", True
    network, scale = torch.nn.Identity(), None
    orders: ClassVar = {"dpm++": 2, "ddim": 1}

    def __init__(self, *, cache_error: float = 0.0, failing: tuple[str, ...] = ()) -> None:
        self.made: list[Way] = []
        self.cache_error, self.failing = cache_error, failing

    def sample(self, way: Way, numbers: range, each=lambda: None) -> Drawn:
        self.made.append(way)
        if way.solver in self.failing and way.steps < 100:
            raise InputError("finite outputs", "NaN", "take more steps")
        exact = torch.randn(len(numbers), 1, 8, 8, generator=generator_for(0)).clamp(-1, 1)
        other = torch.randn(len(numbers), 1, 8, 8, generator=generator_for(1))
        error = 0.0 if way.steps >= 100 else (2 / way.steps) ** self.orders[way.solver]
        error += self.cache_error * (way.cache != "none")
        reused = 0 if way.cache == "none" else way.nfe // 2
        return Drawn(exact + error * other, way.nfe - reused, reused)

    def call_cost(self, way: Way) -> CallCost:
        return CallCost(Reading(100.0, "pretended"), Reading(20.0, "pretended"))

    def solvers(self) -> tuple[str, ...]:
        return tuple(self.orders)

    def notes(self) -> dict[str, Any]:
        return {}


def searched(subject: Pretended, **settings) -> tuple[Pilot, Any]:
    asked = DenoiseSampleConfig(model="x", count=8, **{"pilot": 4, **settings})
    pilot = Pilot(subject, asked, {})
    return pilot, choose(pilot, asked)


def test_the_cheapest_way_within_the_baselines_error_is_taken():
    """DDIM at 50 steps: 1/25 off; order 2 is there at 10 steps; reuse without harm makes those cheaper."""
    pilot, taken = searched(Pretended(cache_error=10.0))
    assert (taken.way.solver, taken.way.steps, taken.way.cache) == ("dpm++", 10, "none")
    bound = pilot.baseline().error
    assert taken.error <= bound
    cheaper = [trial for trial in pilot.trials if trial.price < taken.price]
    assert cheaper
    assert all(trial.error > bound for trial in cheaper)
    pilot, taken = searched(Pretended())
    assert taken.way.cache != "none"
    assert taken.error <= pilot.baseline().error
    assert taken.price < 10 * 100


def test_every_way_is_tried_once_and_dear_ones_never():
    subject = Pretended(cache_error=10.0)
    pilot, taken = searched(subject)
    assert len(set(subject.made)) == len(subject.made) == len(pilot.trials) + 1
    assert max(way.steps for way in subject.made if way.cache == "none" and way.steps < 50) == taken.way.steps


def test_a_tolerance_takes_the_place_of_the_baselines_error():
    _, loose = searched(Pretended(cache_error=10.0), tolerance=0.4)
    assert loose.way.steps == 4
    with pytest.raises(InputError, match=r"paired error of at most 1e-09; got .* at best, by"):
        searched(Pretended(cache_error=10.0), tolerance=1e-9)


def test_what_is_given_is_not_searched():
    _, taken = searched(Pretended(), solver="ddim", cache="none", tolerance=0.2)
    assert (taken.way.solver, taken.way.steps, taken.way.cache) == ("ddim", 16, "none")
    _, taken = searched(Pretended(), steps=20, cache="none")
    assert (taken.way.steps, taken.way.solver) == (20, "dpm++")
    _, taken = searched(Pretended(), cache="every:2")
    assert taken.way.cache == "every:2"


def test_a_solver_that_fails_is_passed_over_and_named():
    pilot, taken = searched(Pretended(failing=("dpm++",)), cache="none")
    assert (taken.way.solver, taken.way.steps) == ("ddim", 50)
    assert {trial.note != "" for trial in pilot.trials if trial.way.solver == "dpm++"} == {True}


class Slow(Pretended):
    """A clock of its own: a second a whole call, a fifth for one that reuses."""

    now = 0.0

    def sample(self, way: Way, numbers: range, each=lambda: None) -> Drawn:
        drawn = super().sample(way, numbers)
        Slow.now += drawn.full + 0.2 * drawn.reused
        return drawn


def test_a_time_budget_takes_the_best_that_fits(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", lambda: Slow.now)
    for seconds, steps in ((25, 12), (50, 25)):  # eight images in batches of four: two seconds a step
        pilot, taken = searched(Slow(cache_error=10.0), seconds=seconds, cache="none")
        assert (taken.way.solver, taken.way.steps) == ("dpm++", steps)
        assert pilot.seconds(taken) <= seconds
    with pytest.raises(InputError, match=r"--seconds of at least 2 for 8 images here; got 1\.5; raise it"):
        searched(Slow(), seconds=1.5, cache="none")
    pilot, taken = searched(Slow(), seconds=25)
    assert taken.way.cache != "none"
    assert taken.way.steps > 12


def test_the_table_names_all_that_was_tried_and_what_was_taken(capsys):
    from rich.console import Console

    pilot, taken = searched(Pretended(cache_error=10.0, failing=("ddim",)), tolerance=0.2)
    base = pilot.try_out(Way("dpm++", 50))
    Console(width=100).print(pilot_table(pilot.trials, base, taken, images=4, bound=0.2))
    said = capsys.readouterr().out
    assert said.count("<- taken") == said.count("(baseline)") == 1
    assert all(trial.way.name in said for trial in pilot.trials)
    assert "no images" in said
    assert sentence(taken, base).endswith("worse")
    assert f"{50 / taken.way.steps:.3g}x fewer FLOPs" in sentence(taken, base)


def test_solvers_are_tried_from_high_order_to_low():
    assert fitting_solvers("v")[0] == "dpm++"
    assert fitting_solvers("v")[-1] == "ddim"
    assert fitting_solvers("flow")[-1] == "euler"
    assert "ddpm" not in fitting_solvers("epsilon")
    assert list(LADDER) == sorted(set(LADDER))
