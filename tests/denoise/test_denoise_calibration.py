"""Estimates of the error of reused features bound it for as many fresh samples as they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scrimp.denoise import calibration
from scrimp.denoise.calibration import Calibration, calibrate, coverage
from scrimp.denoise.reuse import Reuse, reuse
from scrimp.denoise.reuse_rules import below, every
from scrimp.primitives.errors import InputError

ROWS, STEPS, LEVEL = 24, 12, 0.95


class Block(nn.Module):
    """A residual block that takes note of the time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim + 1, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        given = torch.cat([hidden_states, time.view(-1, 1, 1).expand(*hidden_states.shape[:2], 1)], -1)
        moved: Tensor = self.down(torch.tanh(self.up(given)))
        return hidden_states + moved


class Tiny(nn.Module):
    """As little as has transformer blocks: images [batch, 4, 8] are their own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(8) for _ in range(4))
        self.out = nn.Linear(8, 8)

    def forward(self, images: Tensor, timestep: Tensor) -> tuple[Tensor]:
        hidden = images
        for block in self.transformer_blocks:
            hidden = block(hidden, timestep / 1000)
        return (self.out(hidden),)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tiny().requires_grad_(False)


def sampling(model: nn.Module, seed: int, *, steps: int = STEPS) -> Callable[[int], Tensor]:
    """Euler steps of a flow, on samples that differ in size, so that some are harder."""

    def run(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        images = torch.randn(ROWS, 4, 8, generator=generator) * torch.rand(ROWS, 1, 1, generator=generator).add(0.5)
        for step in range(steps):
            images = images - model(images, torch.full((ROWS,), 1000 * (1 - step / steps)))[0] / steps
        return images

    return run


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (every(3), 0),
        (below(0.1), 0),
        (below(0.3), 0),
        (below(0.1, most=2), 0),
        (every(3), 1),
        (below(0.1), 1),
        (below(0.3), 1),
    ],
)
def test_the_estimate_bounds_the_error_of_95_percent_of_fresh_samples(model: Tiny, rule: object, order: int) -> None:
    found = calibrate(model, sampling(model, 1), rule=rule, batches=12, level=LEVEL, order=order)
    seen = coverage(model, sampling(model, 2), rule=replace(rule, scale=found), batches=20, order=order)
    assert seen.samples == 20 * ROWS
    # Three standard deviations of a share that errs by both the samples of the scale and the fresh ones.
    slack = 3 * math.sqrt(LEVEL * (1 - LEVEL) * (1 / found.samples + 1 / seen.samples))
    assert seen.share >= LEVEL - slack
    assert 0.2 < seen.reused < 0.95
    assert "forward" not in model.__dict__
    tight = replace(rule, scale=replace(found, scale=found.scale / 4))
    broken = coverage(model, sampling(model, 2), rule=tight, batches=20, order=order)
    assert broken.share < LEVEL - slack


def test_the_bound_is_not_idle(model: Tiny) -> None:
    found = calibrate(model, sampling(model, 1), rule=below(0.1), batches=8)
    with reuse(model, below(0.1, scale=found)) as handle:
        handle.shadow = True
        sampling(model, 3)(0)
    estimates, errors = (torch.cat([step[place] for step in handle.measured]) for place in (1, 2))
    assert bool((estimates <= 0.1).all())
    assert 0.1 < float((errors / estimates).median()) < 1


def test_shadow_gives_the_outputs_of_reuse(model: Tiny) -> None:
    run, made = sampling(model, 4), []
    for shadow in (False, True):
        with reuse(model, every(2)) as handle:
            handle.shadow = shadow
            made.append(run(0))
            assert len(handle.measured) == shadow * STEPS // 2
            assert [step.refreshed for step in handle.steps] == [True, False] * (STEPS // 2)
    assert torch.equal(*made)


def test_a_profile_is_interpolated_and_level_past_its_ends() -> None:
    found = Calibration(2.0, 0.95, 19, (100.0, 300.0), (1.0, 3.0))
    assert [found(at) for at in (0.0, 100.0, 200.0, 300.0, 900.0, None)] == [2.0, 2.0, 4.0, 6.0, 6.0, 2.0]


def test_nothing_reused_is_unknown_not_covered(model: Tiny) -> None:
    seen = coverage(model, sampling(model, 2), rule=below(0.0), batches=1)
    assert (seen.share, seen.worst, seen.reused) == (None, None, 0.0)


def test_what_cannot_be_calibrated_is_told(model: Tiny) -> None:
    def twice(rows: int, value: float) -> Callable[[int], None]:
        def run(_: int) -> None:
            for step in (1, 2):
                model(torch.full((rows, 4, 8), value * step), torch.full((rows,), 9.0 - step))

        return run

    with pytest.raises(InputError, match=r"19 or more samples for a level of 0.95; got 8"):
        calibrate(model, twice(8, 1.0), rule=every(2), batches=2)
    with pytest.raises(InputError, match="NaN"):
        calibrate(model, twice(20, float("nan")), rule=every(2), batches=2)
    with pytest.raises(InputError, match="2 or more batches"):
        calibrate(model, sampling(model, 1), rule=every(2), batches=1)
    with pytest.raises(InputError, match="a rule that reuses"):
        calibrate(model, sampling(model, 1), rule=every(1))
    with pytest.raises(InputError, match="no call of it"):
        calibrate(model, lambda _: None, rule=every(2))
    with pytest.raises(InputError, match="features and outputs change"):
        calibrate(model, sampling(model, 1, steps=1), rule=every(2))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("needs", "first"),
    [
        (lambda scale: 6.0 if scale < 3 else 2.0, 1.0),  # asks for more than there is need of
        (lambda scale: 1.5 if scale < 4 else None, 9.0),  # begins where nothing is reused
        (lambda scale: 3 * scale if scale < 2 else None, 1.0),  # holds only where nothing is reused
        (lambda scale: 2.0 - scale / 10, 5.0),
    ],
)
def test_the_scale_holds_under_the_rule_that_it_makes(
    model: Tiny, monkeypatch: pytest.MonkeyPatch, needs: Callable[[float], float | None], first: float
) -> None:
    def drawn(attached: Reuse, run: object, numbers: range) -> list[calibration._Batch]:
        scale = getattr(attached.rule, "scale", None)
        needed = first if scale is None else needs(scale.scale * scale.profile[0])
        steps = [] if needed is None else [(500.0, torch.ones(40), torch.full((40,), needed))]
        return [calibration._Batch(steps, 40, 4) for _ in numbers]

    monkeypatch.setattr(calibration, "_trajectories", drawn)
    found = calibrate(model, sampling(model, 1), rule=below(0.1), batches=2)
    wanted = needs(found.scale * found.profile[0])
    assert wanted is None or wanted <= found.scale * found.profile[0] * (1 + 1e-6)
