"""The forward process: number by number in float64, beside diffusers' schedulers, and its losses."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scrimp.denoise import PREDICTIONS, Process, denoising_loss, new_scheduler, process_of
from scrimp.primitives.errors import InputError


def process(prediction: str, levels: int = 7) -> Process:
    """A small process of unlike numbers: variance kept, or a straight path for flow."""
    if prediction == "flow":
        sigma = torch.linspace(0.05, 1, levels)
        return Process("flow", 1 - sigma, sigma, sigma * levels)
    angle = torch.linspace(0.1, 1.5, levels)
    return Process(prediction, angle.cos(), angle.sin(), torch.arange(levels))  # type: ignore[arg-type]


def batch(shape: tuple[int, ...], levels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return clean, noise, torch.randint(levels, shape[:1], generator=generator)


def wanted(prediction: str, signal: float, sigma: float, clean: float, noise: float) -> float:
    return {
        "epsilon": noise,
        "sample": clean,
        "v": signal * noise - sigma * clean,
        "flow": noise - clean,
    }[prediction]


@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_targets_and_estimates_number_by_number(
    prediction: str, images: int, channels: int, height: int, width: int, levels: int
) -> None:
    own = process(prediction, levels)
    clean, noise, index = batch((images, channels, height, width), levels)
    noisy, target = own.noisy(clean, noise, index), own.target(clean, noise, index)
    assert noisy.shape == target.shape == clean.shape
    assert noisy.dtype == target.dtype == torch.float64
    for i, level in enumerate(index.tolist()):
        signal, sigma = float(own.signal[level]), float(own.sigma[level])
        rows = zip(clean[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True)
        pairs = list(rows)
        assert noisy[i].flatten().tolist() == pytest.approx([signal * c + sigma * n for c, n in pairs])
        assert target[i].flatten().tolist() == pytest.approx(
            [wanted(prediction, signal, sigma, *pair) for pair in pairs]
        )
    for found, true in zip(own.estimates(noisy, target, index), (clean, noise), strict=True):
        # The stored float32 keeps signal^2 + sigma^2 = 1 to 1e-7 only.
        assert torch.allclose(found, true, atol=3e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimates_carry_gradients_to_the_output(prediction: str) -> None:
    own = process(prediction)
    clean, noise, index = batch((3, 1, 2, 2), own.levels)
    noisy = own.noisy(clean, noise, index)
    output = own.target(clean, noise, index).requires_grad_()
    assert torch.autograd.gradcheck(lambda out: own.estimates(noisy, out, index), (output,))


def test_signal_to_noise_and_timesteps() -> None:
    own = process("v")
    index = torch.tensor([6, 0, 3, 3])
    for level, found in zip(index.tolist(), own.snr(index).tolist(), strict=True):
        assert found == pytest.approx((float(own.signal[level]) / float(own.sigma[level])) ** 2, rel=1e-5)
    assert own.timestep(index).tolist() == [6, 0, 3, 3]
    assert bool((own.snr(torch.arange(7)).diff() < 0).all())


SCHEDULERS: dict[str, Any] = {
    "ddpm": lambda kind: diffusers.DDPMScheduler(prediction_type=kind),
    "ddim cosine": lambda kind: diffusers.DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type=kind),
    "scaled linear": lambda kind: diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    ),
    "dpm": lambda kind: diffusers.DPMSolverMultistepScheduler(50, prediction_type=kind),
    "unipc": lambda kind: diffusers.UniPCMultistepScheduler(50, prediction_type=kind),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_same_noise_as_the_scheduler(name: str, kind: str) -> None:
    scheduler = SCHEDULERS[name](kind)
    own = process_of(scheduler)
    assert own.levels == scheduler.config.num_train_timesteps
    clean, noise, index = (
        each.float() if each.is_floating_point() else each for each in batch((6, 2, 3, 3), own.levels)
    )
    index[:2] = torch.tensor([0, own.levels - 1])
    assert own.timestep(index).tolist() == index.tolist()
    # The multistep solvers look levels up among their timesteps; the betas are the same.
    theirs = diffusers.DDPMScheduler(trained_betas=scheduler.betas.tolist(), prediction_type=kind)
    assert torch.equal(theirs.alphas_cumprod, scheduler.alphas_cumprod)
    assert torch.equal(own.noisy(clean, noise, index), theirs.add_noise(clean, noise, index))
    velocity = theirs.get_velocity(clean, noise, index)
    target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
    assert torch.equal(own.target(clean, noise, index), target)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_same_clean_estimate_as_the_scheduler(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(100, prediction_type=kind, clip_sample=False)
    own, level = process_of(scheduler), 40
    noisy, output, _ = batch((2, 1, 3, 3), 100)
    step = scheduler.step(output, level, noisy, generator=torch.Generator().manual_seed(0))
    clean, _ = own.estimates(noisy, output, torch.tensor([level, level]))
    assert torch.allclose(clean, step.pred_original_sample, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_same_noise_as_the_flow_scheduler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=40, shift=shift)
    own = process_of(scheduler)
    assert own.prediction == "flow"
    assert torch.allclose(own.given.flip(0), scheduler.timesteps)
    assert torch.allclose(own.sigma.flip(0), scheduler.sigmas[:40])
    clean, noise, index = (each.float() if each.is_floating_point() else each for each in batch((4, 2, 3, 3), 40))
    theirs = scheduler.scale_noise(clean, scheduler.timesteps[39 - index], noise)
    assert torch.allclose(own.noisy(clean, noise, index), theirs, atol=1e-6)


def test_a_scheduler_that_has_sampled_gives_the_process_of_a_fresh_one() -> None:
    for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)):
        before = process_of(scheduler)
        scheduler.set_timesteps(7)
        after = process_of(scheduler)
        assert torch.equal(before.sigma, after.sigma)
        assert torch.equal(before.given, after.given)


def test_solvers_of_flow_models() -> None:
    plain = process_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    for solver in (diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler):
        own = process_of(solver(**flow))
        assert own.prediction == "flow"
        assert torch.equal(own.sigma, plain.sigma)
    # Shifted by the resolution when sampling; trained on what the job draws.
    dynamic = process_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))
    assert float(dynamic.sigma[499]) == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.EDMEulerScheduler(),
        lambda: diffusers.CMStochasticIterativeScheduler(),
        lambda: diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        lambda: diffusers.ScoreSdeVeScheduler(),
        lambda: diffusers.DDPMScheduler(rescale_betas_zero_snr=True),
        lambda: object(),
    ],
    ids=["edm", "consistency", "continuous", "exploding", "no signal", "no scheduler"],
)
def test_schedulers_of_another_process_are_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"^expected .*; got .*; .*$"):
        process_of(make())


def test_pure_noise_is_fine_for_predictions_that_can_say_something_of_it() -> None:
    own = process_of(diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert float(own.snr(torch.tensor([999]))) == 0
    clean, noise, _ = batch((1, 1, 2, 2), 1)
    index = torch.tensor([999])
    found, _ = own.estimates(own.noisy(clean, noise, index), own.target(clean, noise, index), index)
    assert torch.allclose(found, clean)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_new_schedulers(prediction: str) -> None:
    scheduler = new_scheduler(prediction, 50)
    own = process_of(scheduler)
    assert own.prediction == prediction
    assert own.levels == 50
    assert bool((own.sigma.diff() > 0).all())
    scheduler.set_timesteps(5)
    assert int(scheduler.timesteps[0]) == int(own.given[-1])  # sampling starts at the most noise
    with pytest.raises(InputError, match="noise levels"):
        new_scheduler(prediction, 1)
    with pytest.raises(InputError, match="prediction out of"):
        new_scheduler("v_prediction")


def test_wrong_input() -> None:
    own = process("v")
    clean, noise, index = batch((3, 1, 2, 2), 7)
    for bad, said in (
        (torch.tensor([0, 1, 7]), "from 0 to 6"),
        (torch.tensor([0, -1, 2]), "from 0 to 6"),
        (torch.tensor([0.0, 1.0, 2.0]), "int64"),
        (torch.tensor([0, 1]), "one level an image"),
    ):
        with pytest.raises(InputError, match=said):
            own.noisy(clean, noise, bad)
    with pytest.raises(InputError, match="one shape"):
        own.target(clean, noise[:, :, :1], index)
    with pytest.raises(InputError, match="prediction out of"):
        Process("x0", own.signal, own.sigma, own.given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one shape"):
        Process("v", own.signal, own.sigma[:3], own.given)


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_loss_number_by_number(
    images: int, channels: int, height: int, width: int, masked: bool, weighted: bool
) -> None:
    output, target, _ = batch((images, channels, height, width), 1)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(images, 1, height, width, generator=generator) < 0.5
    mask[:, 0, 0, 0] = True
    weight = torch.rand(images, generator=generator, dtype=torch.float64)
    output.requires_grad_()
    losses = denoising_loss(output, target, weight=weight if weighted else None, mask=mask if masked else None)
    losses.sum().backward()
    assert output.grad is not None
    for i in range(images):
        factor = float(weight[i]) if weighted else 1.0
        places = [
            (c, y, x)
            for c in range(channels)
            for y in range(height)
            for x in range(width)
            if not masked or bool(mask[i, 0, y, x])
        ]
        apart = {place: float(output[i][place].detach() - target[i][place]) for place in places}
        total = math.fsum(gap * gap for gap in apart.values())
        assert float(losses[i].detach()) == pytest.approx(factor * total / len(places))
        slopes = torch.zeros_like(target[i])
        for place, gap in apart.items():
            slopes[place] = 2 * factor * gap / len(places)
        assert torch.allclose(output.grad[i], slopes)


def test_loss_ignores_what_stands_outside_the_mask() -> None:
    output, target, _ = batch((2, 2, 3, 3), 1)
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1] = True
    want = denoising_loss(output, target, mask=mask)
    broken = torch.where(mask, output, torch.nan).requires_grad_()
    found = denoising_loss(broken, target, mask=mask)
    assert torch.equal(found, want)
    (slopes,) = torch.autograd.grad(found.sum(), broken)
    assert bool((slopes.masked_select(~mask) == 0).all())


def test_loss_of_halves_is_summed_in_float32() -> None:
    output = torch.full((1, 1, 64, 64), 0.1, dtype=torch.bfloat16)
    losses = denoising_loss(output, torch.zeros_like(output))
    assert losses.dtype == torch.float32
    assert float(losses) == pytest.approx(float(output[0, 0, 0, 0]) ** 2, rel=1e-5)


def test_wrong_losses() -> None:
    output, target, _ = batch((2, 2, 3, 3), 1)
    with pytest.raises(InputError, match="one shape"):
        denoising_loss(output, target[:, :1])
    with pytest.raises(InputError, match="bool mask"):
        denoising_loss(output, target, mask=torch.ones(2, 1, 3, 3))
    with pytest.raises(InputError, match="bool mask"):
        denoising_loss(output, target, mask=torch.ones(2, 2, 3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="at least one pixel"):
        denoising_loss(output, target, mask=torch.zeros(2, 1, 3, 3, dtype=torch.bool))


def promise_untouched(own: Process) -> None:
    """Arguments stay, and nothing given back shares their memory, so that it may be changed."""
    for act in ("noisy", "target", "estimates"):
        clean, noise, index = batch((3, 1, 2, 2), own.levels)
        given = getattr(own, act)(clean, noise, index)
        for out in given if isinstance(given, tuple) else (given,):
            out.add_(1)
        for now, before in zip((clean, noise, index), batch((3, 1, 2, 2), own.levels), strict=True):
            assert torch.equal(now, before)


def promise_round_trip(own: Process) -> None:
    clean, noise, index = batch((9, 1, 2, 2), own.levels)
    found = own.estimates(own.noisy(clean, noise, index), own.target(clean, noise, index), index)
    assert torch.allclose(found[0], clean, atol=1e-5)
    assert torch.allclose(found[1], noise, atol=1e-5)


class Sharing(Process):
    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        return noise


class Swapped(Process):
    def estimates(self, noisy: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        clean, noise = super().estimates(noisy, output, index)
        return noise, clean


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_promises(prediction: str) -> None:
    promise_untouched(process(prediction))
    promise_round_trip(process(prediction))


def test_promises_fail_on_broken_processes() -> None:
    own = process("epsilon")
    parts: tuple[Any, ...] = (own.prediction, own.signal, own.sigma, own.given)
    with pytest.raises(AssertionError):
        promise_untouched(Sharing(*parts))
    with pytest.raises(AssertionError):
        promise_round_trip(Swapped(*parts))
