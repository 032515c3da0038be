"""Every solver against data whose best denoiser, and whose path from noise to image, are known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from scrimp.denoise.solvers import SOLVERS, baseline, calls, integrate, prediction_of, prepare_, solver_for
from scrimp.primitives.errors import InputError

diffusers = pytest.importorskip("diffusers")

MEAN, SPREAD = 0.3, 0.2
PAIRS = [
    (name, kind)
    for name, solver in SOLVERS.items()
    for kind in ("epsilon", "v_prediction", "sample", "flow")
    if (solver.flow if kind == "flow" else solver.betas)
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scheduler_of(kind: str, **settings: Any) -> Any:
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind, **settings)


def best_denoiser(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Of pixels drawn from one Gaussian. The probability flow takes noise z to MEAN + SPREAD z."""
    kept = None if kind == "flow" else scheduler_of(kind).alphas_cumprod.double()

    def denoise(images: Tensor, timestep: Tensor) -> Tensor:
        if kept is None:
            sigma = float(timestep) / 1000
            signal = 1 - sigma
        else:
            signal = float(kept[int(timestep)]) ** 0.5
            sigma = (1 - signal**2) ** 0.5
        x = images.double()
        clean = MEAN + SPREAD**2 * signal / (signal**2 * SPREAD**2 + sigma**2) * (x - signal * MEAN)
        noise = (x - signal * clean) / sigma
        answers = {
            "flow": noise - clean,
            "epsilon": noise,
            "sample": clean,
            "v_prediction": signal * noise - sigma * clean,
        }
        return answers[kind].float()

    return denoise


def noise_of(seed: int = 0) -> Tensor:
    return torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_more_steps_come_closer_to_the_exact_path(name: str, kind: str) -> None:
    noise, denoise, told = noise_of(), best_denoiser(kind), []
    before = noise.clone()

    def counted(images: Tensor, timestep: Tensor) -> Tensor:
        told.append(float(timestep))
        return denoise(images, timestep)

    errors = []
    for steps in (5, 50):
        told.clear()
        solver = solver_for(name, scheduler_of(kind))
        images = integrate(counted, solver, noise, steps=steps, generator=torch.Generator().manual_seed(1))
        assert len(told) == calls(name, steps)
        assert told[0] > 990
        if SOLVERS[name].random:
            errors.append(abs(float(images.std()) - SPREAD))
        else:
            errors.append(float((images - MEAN - SPREAD * noise).square().mean().sqrt()))
    assert errors[1] < min(errors[0] / 3, 0.03)
    assert torch.equal(noise, before)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_higher_order_beats_the_baseline_at_25_steps(kind: str) -> None:
    noise, errors = noise_of(), {}
    for name in (baseline("flow" if kind == "flow" else "epsilon")[0], "dpm++", "unipc"):
        images = integrate(best_denoiser(kind), solver_for(name, scheduler_of(kind)), noise, steps=25)
        errors[name] = float((images - MEAN - SPREAD * noise).square().mean())
    first, *others = errors.values()
    assert max(others) < first / 3


def test_every_allowed_number_of_steps_makes_as_many_calls() -> None:
    for name, kind in PAIRS:
        if kind in ("epsilon", "flow"):
            solver = solver_for(name, scheduler_of(kind))
            for steps in (1, 2, 3, 7, 30, 61):
                timesteps = prepare_(solver, steps)
                assert len(timesteps) == calls(name, steps)
                assert bool((timesteps.diff() <= 0).all())


def test_a_clipping_model_is_clipped_by_every_solver() -> None:
    noise = noise_of()
    for name, kind in PAIRS:
        if kind == "epsilon":
            solver = solver_for(name, scheduler_of(kind, clip_sample=True))
            images = integrate(lambda x, _: -3 * x.sign(), solver, noise, steps=5, generator=torch.Generator())
            assert float(images.abs().max()) < 1.1, name
            wild = solver_for(name, scheduler_of(kind, clip_sample=False))
            images = integrate(lambda x, _: -3 * x.sign(), wild, noise, steps=5, generator=torch.Generator())
            assert float(images.abs().max()) > 1.5, name


def test_a_learned_variance_is_dropped_where_unused() -> None:
    noise, denoise = noise_of(), best_denoiser("epsilon")
    for name in ("ddim", "dpm++"):
        solver = solver_for(name, scheduler_of("epsilon"))
        plain = integrate(denoise, solver, noise, steps=4)
        both = integrate(lambda x, t: torch.cat([denoise(x, t), torch.ones_like(x)], 1), solver, noise, steps=4)
        assert torch.equal(plain, both)


def test_a_shift_moves_the_steps_to_more_noise() -> None:
    for name in ("euler", "heun", "dpm++", "unipc"):
        plain = prepare_(solver_for(name, scheduler_of("flow")), 4)
        shifted = prepare_(solver_for(name, scheduler_of("flow", shift=3.0)), 4)
        torch.testing.assert_close(shifted, 1000 * 3 * (plain / 1000) / (1 + 2 * plain / 1000))


def test_the_callback_sees_the_images_of_every_call() -> None:
    seen = []
    solver = solver_for("euler", scheduler_of("flow"))
    last = integrate(best_denoiser("flow"), solver, noise_of(), steps=3, each=lambda call, x: seen.append((call, x)))
    assert [call for call, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1], last)


@pytest.mark.parametrize(
    ("name", "scheduler", "said"),
    [
        ("ddim", scheduler_of("flow"), "'ddim'; use one of: euler"),
        ("euler", scheduler_of("epsilon"), "use one of: ddim"),
        ("rk4", scheduler_of("epsilon"), "'rk4'"),
        ("ddim", diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
        ("ddim", diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler"),
        ("euler", scheduler_of("flow", use_dynamic_shifting=True), "use_dynamic_shifting"),
    ],
)
def test_a_wrong_pair_is_told(name: str, scheduler: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        solver_for(name, scheduler)


def test_wrong_steps_and_answers_are_told() -> None:
    noise, solver = noise_of(), solver_for("ddim", scheduler_of("epsilon"))
    with pytest.raises(InputError, match="1 to 1000 steps"):
        prepare_(solver, 0)
    with pytest.raises(InputError, match="steps that divide"):
        prepare_(solver, 600)
    with pytest.raises(InputError, match="at most 996 steps"):
        prepare_(solver_for("unipc", scheduler_of("epsilon")), 1000)
    with pytest.raises(InputError, match="at call 3 of 5"):
        integrate(lambda x, t: x * (float("nan") if t < 600 else 1), solver, noise, steps=5)
    with pytest.raises(InputError, match="an answer of the images' shape"):
        integrate(lambda x, _: x[:, :, :4], solver, noise, steps=5)
    with pytest.raises(InputError, match="generator"):
        integrate(lambda x, _: x, solver_for("ddpm", scheduler_of("epsilon")), noise, steps=5)
    with pytest.raises(InputError, match="at least 1 step"):
        calls("heun", 0)


def test_what_a_scheduler_predicts() -> None:
    kinds = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow": "flow"}
    assert {kind: prediction_of(scheduler_of(kind)) for kind in kinds} == kinds
    assert baseline("flow") == ("euler", 50)
    assert baseline("v") == ("ddim", 50)


def test_ddim_keeps_the_noise_that_goes_with_a_clipped_image() -> None:
    noise, denoise, clipping = noise_of(), best_denoiser("epsilon"), scheduler_of("epsilon", clip_sample=True)

    def wrong(images: Tensor, timestep: Tensor) -> Tensor:
        return 1.05 * denoise(images, timestep)  # enough to be clipped at most noise

    fine = integrate(wrong, solver_for("dpm++", clipping), noise, steps=250)
    errors = [
        float((integrate(wrong, solver_for("ddim", clipping), noise, steps=steps) - fine).square().mean().sqrt())
        for steps in (25, 250)
    ]
    assert errors[1] < errors[0] / 4
