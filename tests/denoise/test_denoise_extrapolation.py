"""Deep features extrapolated from two refreshes: exact on a line, a fresh start with every trajectory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scrimp.denoise.reuse import reuse
from scrimp.denoise.reuse_rules import Below, Every, below, every, relative_error
from scrimp.primitives.errors import InputError

UNEVEN = (900.0, 850.0, 700.0, 620.0, 500.0, 420.0, 300.0, 210.0)


class Timed(nn.Module):
    """A residual block that adds a function of the time."""

    def __init__(self, added: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.added = added

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        return hidden_states + self.added(time / 1000).view(-1, 1, 1) * torch.linspace(0.5, 1, 8)


class Small(nn.Module):
    """As little as has transformer blocks: images [batch, 4, 8] are their own tokens."""

    def __init__(self, added: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Timed(added) for _ in range(3))

    def forward(self, images: Tensor, timestep: Tensor) -> tuple[Tensor]:
        for block in self.transformer_blocks:
            images = block(images, timestep)
        return (images,)


def outputs(model: nn.Module, timesteps: tuple[float, ...] = UNEVEN, *, begin: float = 1.0) -> list[Tensor]:
    """Of images that move evenly with the time."""
    images = torch.arange(64.0).view(2, 4, 8).sin()
    return [model(images * (begin + at / 1000), torch.full((2,), at))[0] for at in timesteps]


def errors(model: nn.Module, order: int) -> list[float]:
    plain = outputs(model)
    with reuse(model, every(2), order=order):
        made = outputs(model)
    return [float(relative_error(one, other).max()) for one, other in zip(made, plain, strict=True)]


def test_features_on_a_line_are_met_from_the_second_refresh_on() -> None:
    line = Small(lambda time: 3 * time - 1)
    stale, extrapolated = errors(line, 0), errors(line, 1)
    assert extrapolated[:2] == stale[:2]  # one refresh makes no line
    assert stale[1] > 1e-2
    assert max(extrapolated[2:]) < 1e-6
    assert max(stale[2:]) > 1e-2


def test_a_line_is_followed_half_as_far_as_it_is_long() -> None:
    line = Small(lambda time: 3 * time - 1)
    with reuse(line, every(1), order=1) as handle:
        outputs(line, (900.0, 700.0))
        handle.rule = every(9)
        far = outputs(line, (500.0,))[0]
    # Two deep blocks, at 600 rather than 500.
    ahead = far - outputs(line, (500.0,))[0]
    torch.testing.assert_close(ahead, (2 * 3 * 0.1 * torch.linspace(0.5, 1, 8)).expand_as(ahead))


def test_features_on_a_curve_come_nearer() -> None:
    curve = Small(torch.exp)
    stale, extrapolated = errors(curve, 0), errors(curve, 1)
    reused = range(3, len(UNEVEN), 2)
    assert all(0 < extrapolated[step] < stale[step] for step in reused)


def test_the_estimate_is_how_far_the_shallow_features_are_from_their_line() -> None:
    line = Small(lambda time: 3 * time - 1)
    for order in (0, 1):
        with reuse(line, every(2, scale=lambda _: 2.0), order=order) as handle:
            outputs(line)
        estimates = [float(step.estimate.max()) for step in handle.steps[3::2]]
        assert max(estimates) < 1e-5 if order else min(estimates) > 1e-2


def test_a_new_trajectory_forgets_the_line() -> None:
    curve = Small(torch.exp)
    with reuse(curve, every(2), order=1) as handle:
        alone = outputs(curve, begin=2.0)
        handle.reset()
        outputs(curve)
        after = outputs(curve, begin=2.0)
        assert all(map(torch.equal, alone, after))
        handle.reset()
        outputs(curve, (900.0,))
        short = outputs(curve, (900.0, 850.0), begin=2.0)  # the same first timestep, other images
        assert all(map(torch.equal, short, alone))


def test_two_refreshes_at_one_timestep_make_no_line() -> None:
    """Within a step, Heun's method asks twice at one timestep."""
    curve = Small(torch.exp)
    twice = (900.0, 800.0, 800.0, 700.0, 700.0, 600.0, 600.0)
    with reuse(curve, every(1), order=1) as handle:
        outputs(curve, twice)
        handle.rule = every(9)
        found = outputs(curve, (550.0,))[0]
    assert torch.isfinite(found).all()
    assert float(relative_error(found, outputs(curve, (550.0,))[0]).max()) < 0.02


@pytest.mark.parametrize("rule", [every(1), below(0.0)])
def test_refreshing_every_step_stays_the_plain_model(rule: Every | Below) -> None:
    curve = Small(torch.exp)
    plain = outputs(curve)
    with reuse(curve, rule, order=1):
        assert all(map(torch.equal, plain, outputs(curve)))


def test_a_unet_extrapolates_what_enters_the_way_back() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ).eval().requires_grad_(False)  # fmt: skip
    images = torch.linspace(-1, 1, 64).sin().view(1, 1, 8, 8)

    def run() -> list[Tensor]:
        # The embedding of the time turns fast: little steps.
        return [unet(images * (1 + at / 1000), torch.tensor(at)).sample for at in (700.0, 699.9, 699.8, 699.7)]

    plain, wrong = run(), []
    for order in (0, 1):
        with reuse(unet, every(2), order=order):
            made = run()
        assert torch.equal(made[2], plain[2])
        wrong.append(float(relative_error(made[3], plain[3])))
    assert 0 < wrong[1] < 0.5 * wrong[0]


def test_alike_features_at_the_first_timestep_are_the_same_images() -> None:
    """Kernels differ in the last bits, as under a counter of FLOPs."""
    curve = Small(lambda time: time)
    with reuse(curve, every(9)) as handle:
        for begin in (1.0, 1.00001, 1.1):
            outputs(curve, (900.0,), begin=begin)
    assert [step.refreshed for step in handle.steps] == [True, False, True]


def test_other_orders_are_told() -> None:
    with pytest.raises(InputError, match="order 0 or 1; got 2"):
        reuse(Small(lambda time: time), every(2), order=2)
