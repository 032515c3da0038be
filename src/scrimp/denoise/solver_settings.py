"""How diffusers' schedulers are set up for `scrimp.denoise.solvers`: read from the model's own, and spaced alike."""

from __future__ import annotations

from typing import Any

import torch

from scrimp.denoise.process import FROM_DIFFUSERS
from scrimp.primitives.errors import InputError

LEAST_LOG_SNR = -5.1
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def prediction_of(scheduler: Any) -> str:
    """What the model of a diffusers scheduler answers with: ``epsilon``, ``v``, ``sample`` or ``flow``.

    Raises:
        InputError: the scheduler belongs to another kind of model (EDM, variance exploding, consistency, discrete).
    """
    config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
    if config.get("prediction_type") == "flow_prediction" or name.startswith("FlowMatch"):
        return "flow"
    # EDM, consistency and variance-exploding schedulers have no betas: their noise levels are another parametrisation.
    if getattr(scheduler, "alphas_cumprod", None) is None or config.get("prediction_type") not in FROM_DIFFUSERS:
        raise InputError(
            "a diffusers scheduler with betas and an epsilon, v or sample prediction, or one of flow matching",
            f"{name} (prediction_type {config.get('prediction_type')!r})",
            "load the scheduler that the model was saved with, such as DDPMScheduler.from_pretrained(folder, "
            'subfolder="scheduler")',
        )
    return FROM_DIFFUSERS[config["prediction_type"]]


def beta_settings(scheduler: Any, known: Any) -> dict[str, Any]:
    """What a solver class with parameters ``known`` is made with for a model trained on betas."""
    config = scheduler.config
    keep = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    settings = {key: config[key] for key in keep if key in config}
    if config.get("beta_schedule") not in SCHEDULES:
        settings |= {"beta_schedule": "linear", "trained_betas": scheduler.betas.tolist()}
    settings |= {"rescale_betas_zero_snr": config.get("rescale_betas_zero_snr", False), "timestep_spacing": "trailing"}
    # DDPM clips by default where a config says nothing; solvers of latent models must not.
    clips, reach = bool(config.get("clip_sample", False)), float(config.get("clip_sample_range", 1.0))
    if config.get("thresholding", False):
        ratio, most = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return settings | {
            "clip_sample": False,
            "thresholding": True,
            "dynamic_thresholding_ratio": ratio,
            "sample_max_value": most,
        }
    settings |= {"clip_sample": clips, "clip_sample_range": reach}
    if clips and "clip_sample" not in known:
        # With a largest value of 1 diffusers' dynamic thresholding is a plain clip to [-1, 1].
        if reach != 1.0:
            raise InputError(
                "a scheduler that clips at 1, for this solver", f"clip_sample_range {reach}", "use ddim or heun"
            )
        settings |= {"thresholding": True, "sample_max_value": 1.0}
    return settings


def flow_settings(scheduler: Any) -> dict[str, Any]:
    """What a solver class is made with for a model trained by flow matching."""
    config = scheduler.config
    odd = [key for key in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal") if config.get(key)]
    if odd:
        raise InputError(
            "a flow-matching scheduler of fixed shift",
            f"{type(scheduler).__name__} with {', '.join(odd)}",
            f"fix it for your image size: type(scheduler).from_config(scheduler.config, {odd[0]}=False, shift=...)",
        )
    shift = float(config.get("shift", config.get("flow_shift", 1.0)))
    return {
        "num_train_timesteps": config["num_train_timesteps"],
        "shift": shift,
        "flow_shift": shift,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    }


def check_even(levels: int, steps: int) -> None:
    """Refuses steps at which DDIM and DDPM would go wrong.

    Raises:
        InputError: they do not nearly divide the levels.
    """
    # diffusers steps down by levels // steps from levels spaced levels / steps apart: images end up at a noise level
    # other than the one the network is told of unless the two nearly agree.
    if (levels / steps - levels // steps) / (levels / steps) > 0.05:
        near = [other for other in range(1, levels + 1) if levels % other == 0]
        best = min(near, key=lambda other: abs(other - steps))
        raise InputError(f"steps that divide the model's {levels} noise levels (to 5 %)", str(steps), f"take {best}")


def space_(scheduler: Any, steps: int, device: torch.device | str | None) -> None:
    """Puts the noise levels of the module's head in place of the scheduler's own."""
    config = scheduler.config
    multistep = hasattr(scheduler, "model_outputs")
    if prediction_of(scheduler) == "flow":
        shift = float(config.get("shift", config.get("flow_shift", 1.0)))
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        sigmas = shift * even / (1 + (shift - 1) * even)
        timesteps = sigmas * config.num_train_timesteps
        if multistep:
            # The logarithm of the signal must stay finite; the network is still told of pure noise.
            sigmas = sigmas.clamp(max=1 - 1e-4)
        last = torch.zeros(1, dtype=torch.float64)
    else:
        kept = scheduler.alphas_cumprod.double().cpu()
        ratio = ((1 - kept) / kept).sqrt()
        usable = int((-ratio.log() >= LEAST_LOG_SNR).sum())
        if steps > usable:
            raise InputError(
                f"at most {usable} steps: the noise levels in use", str(steps), "ask for fewer, or take ddim"
            )
        # Halves are rounded up, not to even: no level comes twice.
        timesteps = (torch.linspace(usable, usable / steps, steps, dtype=torch.float64) + 0.5).floor() - 1
        sigmas = ratio[timesteps.long()]
        # diffusers' DEIS takes the logarithm of the last level, which must not be 0 therefore.
        ends_at_zero = type(scheduler).__name__ != "DEISMultistepScheduler"
        last = torch.zeros(1, dtype=torch.float64) if ends_at_zero else ratio[:1] / 2
    twice = type(scheduler).__name__ in ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    repeats = torch.full((steps,), 2 if twice else 1)
    repeats[0] = 1
    dtype = scheduler.timesteps.dtype if prediction_of(scheduler) != "flow" else torch.float32
    scheduler.timesteps = timesteps.repeat_interleave(repeats).to(device=device, dtype=dtype)
    scheduler.sigmas = torch.cat([sigmas.repeat_interleave(repeats), last]).float()
