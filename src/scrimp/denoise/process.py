"""The forward process: how noise enters an image, and what a network is asked to predict of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError, require

Prediction = Literal["epsilon", "v", "sample", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
FROM_DIFFUSERS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""By the ``prediction_type`` of a diffusers scheduler."""
_TO_DIFFUSERS: dict[str, str] = {ours: theirs for theirs, ours in FROM_DIFFUSERS.items()}


@dataclass(frozen=True, eq=False)
class Process:
    """x_t = signal_t * clean + sigma_t * noise, at T levels from the least noise (0) to the most (T - 1).

    Attributes:
        prediction: what the network gives: the noise (``epsilon``, Ho et al. 2020), ``v`` = signal * noise - sigma *
            clean (Salimans and Ho 2022), the clean image (``sample``), or the velocity noise - clean of a straight path
            (``flow``, Lipman et al. 2023, Liu et al. 2023).
        signal, sigma: [T] float32.
        given: [T], what the network is told as its timestep: float32 for ``flow``, else int64.
    """

    prediction: Prediction
    signal: Tensor
    sigma: Tensor
    given: Tensor

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(f"a prediction out of: {', '.join(PREDICTIONS)}", f"{self.prediction}", "name one of them")
        shapes = [tuple(values.shape) for values in (self.signal, self.sigma, self.given)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not self.signal.numel():
            raise InputError("signal, sigma and given of one shape [levels]", f"{shapes}", "pass one number a level")
        if self.prediction == "epsilon" and not bool((self.signal > 0).all()):
            raise InputError(
                "some signal at every level to predict noise by",
                "a level of pure noise (rescale_betas_zero_snr)",
                "train on v or sample, or leave the betas as they are",
            )

    @property
    def levels(self) -> int:
        """T, the number of noise levels."""
        return len(self.signal)

    def noisy(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Images with noise.

        Args:
            clean, noise: [batch, ...] of one shape.
            index: noise levels [batch], int64.
        """
        self._check(clean, noise, index)
        signal, sigma = self._coefficients(index, clean)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """What the network should give for `noisy` of the same arguments, in the shape of ``clean``."""
        self._check(clean, noise, index)
        if self.prediction == "epsilon":
            return noise.clone()
        if self.prediction == "sample":
            return clean.clone()
        if self.prediction == "flow":
            return noise - clean
        signal, sigma = self._coefficients(index, clean)
        return signal * noise - sigma * clean

    def estimates(self, noisy: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The clean image and the noise that an output of the network stands for; of the exact target, the exact two.

        Args:
            noisy, output: [batch, ...] of one shape.
            index: noise levels [batch], int64.

        Returns:
            (clean, noise), each in the shape of ``noisy``.
        """
        self._check(noisy, output, index)
        signal, sigma = self._coefficients(index, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * output) / signal, output.clone()
        if self.prediction == "sample":
            return output.clone(), (noisy - signal * output) / sigma
        if self.prediction == "flow":
            return noisy - sigma * output, noisy + signal * output
        return signal * noisy - sigma * output, sigma * noisy + signal * output

    def snr(self, index: Tensor) -> Tensor:
        """Signal to noise, signal^2 / sigma^2, of levels [batch], float32."""
        self._check_index(index)
        return (self.signal.to(index.device)[index] / self.sigma.to(index.device)[index]).square()

    def timestep(self, index: Tensor) -> Tensor:
        """What the network is told at levels [batch]."""
        self._check_index(index)
        return self.given.to(index.device)[index]

    def _coefficients(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = (v.to(like.device, like.dtype)[index.to(like.device)] for v in (self.signal, self.sigma))
        return signal.view(shape), sigma.view(shape)

    def _check(self, first: Tensor, second: Tensor, index: Tensor) -> None:
        if first.shape != second.shape or len(first) != len(index):
            raise InputError(
                "two tensors of one shape [batch, ...] and one level an image",
                f"{list(first.shape)}, {list(second.shape)} and {len(index)} levels",
                "draw noise and levels for this batch",
            )
        self._check_index(index)

    def _check_index(self, index: Tensor) -> None:
        if index.ndim != 1 or index.dtype != torch.int64:
            got = f"{str(index.dtype).removeprefix('torch.')} of shape {list(index.shape)}"
            raise InputError("noise levels [batch] as int64", got, "pass level numbers, not timesteps or sigmas")
        # On a GPU the check would wait for the device, which refuses indices past the end by itself.
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.levels:
            got = f"{int(index.min())} to {int(index.max())}"
            raise InputError(f"noise levels from 0 to {self.levels - 1}", got, "draw them from this process's levels")


def process_of(scheduler: Any) -> Process:
    """The process a diffusers scheduler was made for, whatever its solver.

    Args:
        scheduler: with ``alphas_cumprod`` (DDPM, DDIM, DPM-Solver, UniPC, Euler, ...), or one of flow matching.

    Raises:
        InputError: its process is another (variance exploding, consistency), or its prediction is not known here.
    """
    config: Mapping[str, Any] = getattr(scheduler, "config", None) or {}
    name = type(scheduler).__name__
    if (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    ):
        shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", config.get("flow_shift")) or 1)
        return _flow(int(config["num_train_timesteps"]), shift)
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(cumulative, Tensor) or config.get("timestep_type", "discrete") != "discrete":
        raise InputError(
            "a scheduler of discrete levels with alphas_cumprod, or of flow matching",
            name,
            "use the scheduler the model was trained with, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler",
        )
    prediction = FROM_DIFFUSERS.get(str(config.get("prediction_type")))
    if prediction is None:
        got = f"{config.get('prediction_type')} of {name}"
        raise InputError(f"a prediction_type out of: {', '.join(FROM_DIFFUSERS)}", got, "check the scheduler's config")
    cumulative = cumulative.detach().to("cpu", torch.float32)
    return Process(prediction, cumulative.sqrt(), (1 - cumulative).sqrt(), torch.arange(len(cumulative)))


def new_scheduler(prediction: str, levels: int = 1000) -> Any:
    """The diffusers scheduler that a new model of images in [-1, 1] is saved with.

    Cosine betas (Nichol and Dhariwal 2021) with the last step on the noisiest level, where sampling starts (Lin et al.
    2024); for ``flow`` a straight path without shift.

    Args:
        prediction: ``epsilon``, ``v``, ``sample`` or ``flow``.
        levels: noise levels, at least 2.
    """
    if prediction not in PREDICTIONS:
        raise InputError(f"a prediction out of: {', '.join(PREDICTIONS)}", prediction, "name one of them")
    if levels < 2:
        raise InputError("at least 2 noise levels", f"{levels}", "use 1000, as is usual")
    diffusers = require("diffusers", "diffusers")
    if prediction == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels)
    return diffusers.DDPMScheduler(
        num_train_timesteps=levels,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=_TO_DIFFUSERS[prediction],
        clip_sample=True,
        timestep_spacing="trailing",
    )


def denoising_loss(
    output: Tensor, target: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of each image, times its weight; in float32 at least.

    Args:
        output, target: [batch, channels, height, width] (any [batch, ...] without a mask).
        weight: [batch].
        mask: [batch, 1, height, width] bool, the pixels that count, at least one an image.

    Returns:
        Losses [batch].
    """
    if output.shape != target.shape:
        got = f"{list(output.shape)} and {list(target.shape)}"
        raise InputError("output and target of one shape", got, "check the model's output channels")
    dtype = torch.promote_types(output.dtype, torch.float32)
    apart = output.to(dtype) - target.to(dtype)
    if mask is None:
        losses = apart.square().flatten(1).mean(1)
    else:
        if mask.shape != (len(output), 1, *output.shape[2:]) or mask.dtype != torch.bool:
            got = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise InputError(f"a bool mask {[len(output), 1, *output.shape[2:]]}", got, "pass one value a pixel")
        pixels = mask.flatten(1).sum(1)
        if not bool(pixels.all()):
            raise InputError("at least one pixel an image in the mask", "an image with none", "keep more of the image")
        # Not a product, and before the square: what stands outside may be anything, NaN included, gradients as well.
        losses = apart.masked_fill(~mask, 0).square().flatten(1).sum(1) / (pixels * output.shape[1])
    return losses if weight is None else losses * weight.to(losses.device, dtype)


def _flow(levels: int, shift: float) -> Process:
    sigma = torch.arange(1, levels + 1, dtype=torch.float32) / levels
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return Process("flow", 1 - sigma, sigma, sigma * levels)
