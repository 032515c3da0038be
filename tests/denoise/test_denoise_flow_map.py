"""Losses of few-step students: against loops and finite differences, and zero for the student that is exact."""

from __future__ import annotations

import pytest
import torch

from scrimp.denoise.flow_map import (
    as_velocity,
    consistency_loss,
    flow_map_loss,
    on_line,
    pseudo_huber,
    straight_loss,
    u_shaped,
    walk,
)
from scrimp.denoise.process import Process, new_scheduler, process_of
from scrimp.denoise.solvers import integrate, solver_for
from scrimp.primitives.errors import InputError

SHAPE = (5, 2, 3)
FACTOR = 0.3  # of the exact pairs: clean = FACTOR * noise


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(count: int = SHAPE[0]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.rand(count, generator=generator, dtype=torch.float64) * 0.9 + 0.1


def field(weight: torch.Tensor):
    """A velocity with a parameter, that depends on all it is given."""
    return lambda x, sigma: torch.tanh(x * weight[0]) + weight[1] * sigma.view(-1, 1, 1) * x


def exact(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The velocity of pairs with clean = FACTOR * noise, whose lines never cross."""
    level = sigma.view(-1, *[1] * (x.ndim - 1))
    return (1 - FACTOR) * x / ((1 - level) * FACTOR + level)


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(1, *SHAPE), drawn(2, *SHAPE)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)


_STEPS = ([1, 0, 0, 0], [1, 0.5, 0, 0], [1, 0.5, 0, 0], [1, 2 / 3, 1 / 3, 0], [1, 2 / 3, 1 / 3, 0])
GRIDS = torch.tensor(_STEPS).double()
JUMPS = torch.tensor([0, 0, 1, 1, 2])


def test_the_line_ends_in_its_pair(pairs):
    clean, noise = pairs
    assert torch.equal(on_line(clean, noise, torch.zeros(5)), clean)
    assert torch.equal(on_line(clean, noise, torch.ones(5)), noise)


def test_straight_loss_is_that_of_a_loop(pairs, weight):
    (clean, noise), sigma = pairs, levels()
    velocity = field(weight.detach())
    found = straight_loss(velocity, clean, noise, sigma)
    for row in range(len(clean)):
        x = (1 - sigma[row]) * clean[row] + sigma[row] * noise[row]
        wrong = velocity(x[None], sigma[row : row + 1])[0] - (noise[row] - clean[row])
        assert float(found[row]) == pytest.approx(float((wrong**2).mean()), rel=1e-12)


def euler(velocity, x, here, there):
    return x - (here - there) * velocity(x[None], here[None])[0]


@pytest.mark.parametrize("taught", [False, True])
def test_consistency_loss_is_that_of_a_loop(pairs, weight, taught):
    (clean, noise), sigma = pairs, levels()
    lower = torch.cat([torch.zeros(1, dtype=torch.float64), sigma[1:] * 0.6])
    velocity, target = field(weight.detach()), field(weight.detach() + 0.2)
    teacher = field(weight.detach() - 0.5) if taught else None
    found = consistency_loss(velocity, target, clean, noise, sigma=sigma, lower=lower, teacher=teacher)
    for row in range(len(clean)):
        x = (1 - sigma[row]) * clean[row] + sigma[row] * noise[row]
        point = (1 - lower[row]) * clean[row] + lower[row] * noise[row]
        if teacher is not None:
            point = euler(teacher, x, sigma[row], lower[row])
        zero = torch.zeros((), dtype=torch.float64)
        wanted = euler(target, point, lower[row], zero) if lower[row] > 0 else point
        square = float(((euler(velocity, x, sigma[row], zero) - wanted) ** 2).mean())
        assert float(found[row]) == pytest.approx((square + 0.00054**2) ** 0.5 - 0.00054, rel=1e-10)


def test_the_walk_is_that_of_a_loop(pairs, weight):
    noise, velocity = pairs[1], field(weight.detach())
    kept = noise.clone()
    found = walk(velocity, noise, GRIDS, JUMPS)
    assert torch.equal(noise, kept)
    for row, jumps in enumerate(JUMPS.tolist()):
        x = noise[row]
        for jump in range(jumps):
            x = euler(velocity, x, GRIDS[row, jump], GRIDS[row, jump + 1])
        assert torch.allclose(found[row], x, rtol=1e-12)


def test_the_walk_asks_only_for_those_that_move(pairs):
    asked = []

    def counting(x, sigma):
        asked.append(len(x))
        return torch.zeros_like(x)

    walk(counting, pairs[1], GRIDS, JUMPS)
    assert asked == [3, 1]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_walk_to_the_end_is_the_euler_sampler(weight, steps):
    noise = drawn(3, 3, 1, 4, 4).float()
    scheduler = solver_for("euler", new_scheduler("flow"))
    velocity = lambda x, sigma: torch.sin(x) + sigma.view(-1, 1, 1, 1) * x  # noqa: E731
    made = integrate(lambda x, t: velocity(x, (t / 1000).expand(len(x))), scheduler, noise, steps=steps)
    grid = torch.linspace(1, 0, steps + 1).expand(3, -1)
    walked = walk(velocity, noise, grid, torch.full((3,), steps))
    assert torch.allclose(made, walked, atol=1e-5)


def test_flow_map_loss_is_that_of_a_loop(pairs, weight):
    (clean, noise), velocity, target = pairs, field(weight.detach()), field(weight.detach() + 0.3)
    found = flow_map_loss(velocity, target, clean, noise, sigmas=GRIDS, jumps=JUMPS)
    for row, jumps in enumerate(JUMPS.tolist()):
        x = noise[row]
        for jump in range(jumps):
            x = euler(target, x, GRIDS[row, jump], GRIDS[row, jump + 1])
        made = euler(velocity, x, GRIDS[row, jumps], torch.zeros((), dtype=torch.float64))
        assert float(found[row]) == pytest.approx(float(((made - clean[row]) ** 2).mean()), rel=1e-12)


def losses_of(name: str, velocity, target, clean, noise) -> torch.Tensor:
    sigma = levels()
    if name == "straight":
        return straight_loss(velocity, clean, noise, sigma)
    if name == "consistency":
        return consistency_loss(velocity, target, clean, noise, sigma=sigma, lower=sigma / 2)
    return flow_map_loss(velocity, target, clean, noise, sigmas=GRIDS, jumps=JUMPS)


@pytest.mark.parametrize("name", ["straight", "consistency", "flow-map"])
def test_gradients_are_finite_differences_and_leave_the_target_out(pairs, weight, name):
    still = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    loss = lambda: losses_of(name, field(weight), field(still), *pairs).mean()  # noqa: E731
    loss().backward()
    assert still.grad is None
    for place in range(2):
        values = []
        for change in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += change
                values.append(float(loss()))
                weight[place] -= change
        assert float(weight.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("name", ["straight", "consistency", "flow-map"])
def test_the_exact_student_has_no_loss_and_another_has(name):
    noise = drawn(4, *SHAPE)
    clean = FACTOR * noise
    assert float(losses_of(name, exact, exact, clean, noise).max()) < 1e-12
    wrong = lambda x, sigma: 1.1 * exact(x, sigma)  # noqa: E731
    assert float(losses_of(name, wrong, wrong, clean, noise).min()) > 1e-4


def test_u_shaped_levels_follow_their_density():
    steepness, count = 4.0, 4000
    found = u_shaped(count, steepness=steepness, generator=torch.Generator().manual_seed(0)).double()
    assert found.dtype == torch.float64
    assert bool(((found > 0) & (found <= 1)).all())
    whole = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = torch.exp(steepness * whole) + torch.exp(steepness * (1 - whole))
    cumulative = density.cumsum(0) / density.sum()
    for edge in (0.1, 0.3, 0.5, 0.8, 0.95):
        assert float((found < edge).double().mean()) == pytest.approx(float(cumulative[int(edge * 1e5)]), abs=2e-3)


def test_even_draws_hit_every_stratum_once():
    found = u_shaped(50, steepness=0.0, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([found[found <= 0.5], found[found > 0.5]])
    assert len(halves) == 50
    counts = torch.histc(found, bins=25, min=0, max=1)
    assert int(counts.min()) == int(counts.max()) == 2
    assert not torch.equal(found, found.sort().values)
    again = u_shaped(50, steepness=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def teacher_of_one_image(process: Process, clean: float):
    """The exact network of data that is one image: [batch, ...] and timesteps to its prediction."""

    def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        index = (process.given[None].double() - timestep.double()[:, None]).abs().argmin(1)
        signal, sigma = (item.double()[index].view(-1, 1, 1) for item in (process.signal, process.sigma))
        noise = (x - signal * clean) / sigma
        image = torch.full_like(x, clean)
        known = {"epsilon": noise, "v": signal * noise - sigma * image, "sample": image, "flow": noise - image}
        return known[process.prediction]

    return predict


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_any_denoiser_is_a_velocity(prediction):
    process = process_of(new_scheduler(prediction))
    velocity = as_velocity(process, teacher_of_one_image(process, 0.25))
    x, sigma = drawn(5, 4, 2, 2), torch.tensor([0.02, 0.3, 0.6, 0.9], dtype=torch.float64)
    # The only line through x that ends in the image. The nearest level is off by up to half a level.
    assert torch.allclose(velocity(x, sigma), (x - 0.25) / sigma.view(-1, 1, 1), rtol=0.05, atol=0.02)


def test_noise_estimates_give_a_velocity_even_of_pure_noise():
    process = process_of(new_scheduler("epsilon"))
    velocity = as_velocity(process, teacher_of_one_image(process, 0.25))
    x = drawn(6, 2, 2, 2)
    assert torch.allclose(velocity(x, torch.ones(2)), x - 0.25, atol=0.05)


def test_unusable_arguments_say_so(pairs, weight):
    (clean, noise), velocity = pairs, field(weight.detach())
    with pytest.raises(InputError, match="levels in"):
        straight_loss(velocity, clean, noise, torch.zeros(5))
    with pytest.raises(InputError, match="one shape"):
        straight_loss(velocity, clean, noise[:4], levels())
    with pytest.raises(InputError, match="lower levels"):
        consistency_loss(velocity, velocity, clean, noise, sigma=levels(), lower=levels())
    with pytest.raises(InputError, match="jumps"):
        walk(velocity, noise, GRIDS, JUMPS + 2)
    with pytest.raises(InputError, match="steepness"):
        u_shaped(3, steepness=-1.0, generator=torch.Generator())


def test_the_huber_distance_is_between_square_and_length():
    difference = torch.tensor([[0.0, 0.0], [1e-5, 1e-5], [3.0, 3.0]], dtype=torch.float64)
    zero, small, large = pseudo_huber(difference).tolist()
    assert zero == 0
    assert small == pytest.approx(1e-10 / (2 * 0.00054), rel=1e-3)
    assert large == pytest.approx(3.0, rel=1e-3)
