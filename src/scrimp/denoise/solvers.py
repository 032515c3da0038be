"""Few-step solvers: diffusers' own schedulers, set up alike to be compared, and one loop to run any of them.

Left to their defaults, diffusers' schedulers start at different noise levels, some of them below the noise they are
given, which decides more at few steps than the order of the method does. Here every solver starts at the most noise and
ends at none, its levels evenly spaced ("trailing", Lin et al. 2024, arXiv:2305.08891, table 2; for flow models 1, 1 -
1/N, ..., 1/N, then shifted as the model asks). The higher-order ones leave out the levels whose lambda = log(signal /
sigma) is under -5.1: an answer in terms of the noise says nothing of the image there.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scrimp.denoise.solver_settings import beta_settings, check_even, flow_settings, prediction_of, space_
from scrimp.primitives.errors import InputError, require

__all__ = ["SOLVERS", "Solver", "baseline", "calls", "integrate", "prediction_of", "prepare_", "solver_for"]


@dataclass(frozen=True)
class Solver:
    """One way to go from noise to an image.

    Attributes:
        name: what to call it by.
        betas: diffusers' class for models trained on betas (epsilon, v or sample prediction); None: there is none.
        flow: diffusers' class for models trained by flow matching; None: there is none.
        options: further settings of the class.
        calls_per_step: network calls a step, the last step always being one call.
        random: whether it draws noise on the way, and so needs a generator.
    """

    name: str
    betas: str | None
    flow: str | None
    options: tuple[tuple[str, Any], ...] = ()
    calls_per_step: int = 1
    random: bool = False


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("ddim", "DDIMScheduler", None),
        Solver("ddpm", "DDPMScheduler", None, random=True),
        Solver("euler", None, "FlowMatchEulerDiscreteScheduler"),
        Solver("heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", calls_per_step=2),
        Solver(
            "dpm++", "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler", (("algorithm_type", "dpmsolver++"),)
        ),
        Solver("unipc", "UniPCMultistepScheduler", "UniPCMultistepScheduler"),
        Solver("deis", "DEISMultistepScheduler", None),
    )
}


def baseline(prediction: str) -> tuple[str, int]:
    """Name and steps of the sampler others are measured against: 50 steps of DDIM, or of Euler for a flow model."""
    return ("euler" if prediction == "flow" else "ddim", 50)


def calls(name: str, steps: int) -> int:
    """How often the network is called: the NFE of ``steps`` steps.

    Raises:
        InputError: no such solver, or fewer than one step.
    """
    solver = _named(name)
    if steps < 1:
        raise InputError("at least 1 step", repr(steps), "ask for more steps")
    return solver.calls_per_step * (steps - 1) + 1


def solver_for(name: str, scheduler: Any) -> Any:
    """A fresh diffusers scheduler of one solver, for the model that ``scheduler`` was saved with.

    A model whose scheduler clips the image it estimates to [-1, 1] (``clip_sample``) is clipped by every solver.

    Args:
        name: a key of `SOLVERS`.
        scheduler: the model's diffusers scheduler; stays as it is.

    Raises:
        InputError: no such solver, a solver of the other kind of model, or a noise schedule that is not understood.
    """
    solver, prediction = _named(name), prediction_of(scheduler)
    chosen = solver.flow if prediction == "flow" else solver.betas
    if chosen is None:
        fitting = [
            other.name
            for other in SOLVERS.values()
            if (other.flow if prediction == "flow" else other.betas) is not None
        ]
        raise InputError(
            f"a solver for a model of {prediction} prediction ({type(scheduler).__name__})",
            repr(name),
            f"use one of: {', '.join(fitting)}",
        )
    make = getattr(require("diffusers", "diffusers"), chosen)
    known = inspect.signature(make).parameters
    settings = flow_settings(scheduler) if prediction == "flow" else beta_settings(scheduler, known)
    settings.update(solver.options)
    with _numpy_hushed():
        return make(**{key: value for key, value in settings.items() if key in known})


def prepare_(scheduler: Any, steps: int, *, device: torch.device | str | None = None) -> Tensor:
    """Sets a scheduler from `solver_for` to a number of steps, evenly spaced as the module's head says.

    Args:
        scheduler: set in place, ready for its first step.
        steps: how many steps.
        device: of the timesteps.

    Returns:
        What the network is told, call by call: [calls].

    Raises:
        InputError: more steps than noise levels, or (DDIM, DDPM) a number that does not divide them nearly.
    """
    levels, kind = int(scheduler.config.num_train_timesteps), type(scheduler).__name__
    if not 1 <= steps <= levels:
        raise InputError(
            f"1 to {levels} steps, the noise levels of the model", str(steps), "ask for a number in between"
        )
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        check_even(levels, steps)
    with _numpy_hushed():
        scheduler.set_timesteps(steps, device=device)
    if kind not in ("DDIMScheduler", "DDPMScheduler"):
        space_(scheduler, steps, device)
    elif len(scheduler.timesteps) > steps:
        # Rounding in diffusers can append a level below the least.
        scheduler.timesteps = scheduler.timesteps[:steps]
    return scheduler.timesteps


def integrate(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    *,
    steps: int,
    generator: torch.Generator | None = None,
    each: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Goes from noise to images by a diffusers scheduler.

    Args:
        denoise: the network: (images [batch, channels, ...], timestep []) to what it predicts, of the images' shape.
            Twice the channels are mean and variance; the variance is dropped where the solver has no use for it.
        scheduler: from `solver_for`; is set anew, in place.
        noise: standard normal [batch, channels, ...]; stays as it is.
        steps: how many steps; the network calls are `calls`.
        generator: for solvers that draw noise on the way.
        each: told the call's number from 0 and the images after it.

    Returns:
        float32 images of the noise's shape.

    Raises:
        InputError: an answer that is not finite or of another shape, a missing generator, or steps `prepare_` refuses.
    """
    if type(scheduler).__name__ == "DDPMScheduler" and generator is None:
        raise InputError(
            "a generator: this solver draws noise at every step", "None", "pass generator=torch.Generator()"
        )
    timesteps = prepare_(scheduler, steps, device=noise.device)
    images = (
        noise.float() * float(scheduler.init_noise_sigma) if hasattr(scheduler, "init_noise_sigma") else noise.float()
    )
    options: dict[str, Any] = {"return_dict": False}
    known = inspect.signature(scheduler.step).parameters
    if "generator" in known:
        options["generator"] = generator
    if "use_clipped_model_output" in known:
        # Without it DDIM clips the image yet keeps the noise that went with the unclipped one: a bias at every step.
        options["use_clipped_model_output"] = bool(scheduler.config.clip_sample or scheduler.config.thresholding)
    learned = str(scheduler.config.get("variance_type") or "").startswith("learned")
    for call, timestep in enumerate(timesteps):
        given = scheduler.scale_model_input(images, timestep) if hasattr(scheduler, "scale_model_input") else images
        output = denoise(given, timestep).float()
        if output.shape[1] == 2 * images.shape[1] and not learned:
            output = output[:, : images.shape[1]]
        _check_answer(output, images, place=f"call {call + 1} of {len(timesteps)}", learned=learned)
        with _numpy_hushed():
            images = scheduler.step(output, timestep, images, **options)[0]
        if each is not None:
            each(call, images)
    if not bool(torch.isfinite(images).all()):
        raise InputError(
            "finite images", "NaN or infinite ones after the last step", "take another solver or more steps"
        )
    return images


@contextmanager
def _numpy_hushed() -> Iterator[None]:
    # numpy 2 warns of how diffusers' schedulers hand it tensors; nobody who samples can do anything about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*__array_.*")
        yield


def _named(name: str) -> Solver:
    if name not in SOLVERS:
        raise InputError(f"a solver out of {', '.join(SOLVERS)}", repr(name), "take one of these names")
    return SOLVERS[name]


def _check_answer(output: Tensor, images: Tensor, *, place: str, learned: bool) -> None:
    if output.shape != images.shape and not (learned and output.shape[1] == 2 * images.shape[1]):
        raise InputError(
            f"an answer of the images' shape {tuple(images.shape)}",
            str(tuple(output.shape)),
            "give integrate a function that returns the model's prediction (its .sample)",
        )
    if not bool(torch.isfinite(output).all()):
        raise InputError(
            "finite predictions",
            f"NaN or infinite values at {place}",
            "check the weights, the noise given and the precision (float16 overflows: use bfloat16 or float32)",
        )
