"""Losses of few-step students: straight pairs (ReFlow), consistency, and a flow map learnt on the student's own path.

All are of a velocity field ``u(x, sigma)``, the estimate of ``noise - clean`` for ``x = (1 - sigma) clean + sigma
noise``, so that one Euler step from sigma to 0 gives the clean estimate ``x - sigma u``. A pair is a noise and what a
teacher makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

if TYPE_CHECKING:
    from scrimp.denoise.process import Process

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``u(x, sigma)``: samples [batch, ...] at sigma [batch], in (0, 1], to the estimate of noise - clean, [batch, ...]."""

_HUBER = 0.00054  # of the root mean square difference, Song and Dhariwal 2023, section 3.3
_LEAST_SIGNAL = 0.994  # sigma up to which noise estimates are of use: a ratio of 1 to 165, that of `solvers`


def on_line(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) clean + sigma noise``, [batch, ...], for sigma [batch]."""
    level = _spread(sigma, clean)
    return (1 - level) * clean + level * noise


def u_shaped(count: int, *, steepness: float = 4.0, generator: torch.Generator) -> Tensor:
    """Levels sigma in (0, 1], float32 [count], dense at both ends, where straight pairs are hardest to tell.

    Density proportional to ``exp(a s) + exp(a (1 - s))``, drawn evenly: one in each of ``count`` strata of equal
    probability, in random order. Steepness 0 is uniform.

    Source: Lee, Lin, Fanti, "Improving the training of rectified flows", 2024 (arXiv 2405.20320), section 4.1.

    Args:
        count: levels to draw.
        steepness: a.
        generator: CPU generator.
    """
    if count < 1 or not steepness >= 0:
        raise InputError("a count of at least 1 and a steepness of at least 0", f"{count}, {steepness}", "correct them")
    places = (
        torch.arange(count, dtype=torch.float64) + torch.rand(count, generator=generator, dtype=torch.float64)
    ) / count
    places = places[torch.randperm(count, generator=generator)]
    upper, rest = places >= 0.5, (2 * places) % 1.0
    if steepness > 0:
        # The inverse of (exp(a s) - 1) / (exp(a) - 1); the lower half of the strata is mirrored.
        rest = torch.log1p(rest * torch.expm1(torch.tensor(steepness, dtype=torch.float64))) / steepness
    levels = torch.where(upper, rest, 1 - rest)
    return levels.clamp_(1e-5, 1.0).float()


def straight_loss(student: Velocity, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """ReFlow: the velocity at a point between noise and clean is their difference; mean square, [batch].

    With independent pairs this is flow matching; with a teacher's pairs the lines cross less, and the student's path is
    straighter than its teacher's.

    Source: Liu, Gong, Liu, "Flow straight and fast", 2022 (arXiv 2209.03003), equation 1.

    Args:
        student: with gradient.
        clean, noise: pairs [batch, ...].
        sigma: [batch], in (0, 1].
    """
    _check(clean, noise, sigma)
    return _mean_square(student(on_line(clean, noise, sigma), sigma) - (noise - clean))


def consistency_loss(
    student: Velocity,
    target: Velocity,
    clean: Tensor,
    noise: Tensor,
    *,
    sigma: Tensor,
    lower: Tensor,
    teacher: Velocity | None = None,
) -> Tensor:
    """Consistency: the clean estimates at two levels of one path agree; pseudo-Huber, [batch].

    The path from sigma to lower is the pair's line, or where a teacher is given its Euler step. At ``lower`` = 0 the
    estimate is the point itself.

    Source: Song et al., "Consistency models", 2023 (arXiv 2303.01469), equations 7 and 10; distance of Song and
    Dhariwal, 2023 (arXiv 2310.14189), section 3.3.

    Args:
        student: with gradient.
        target: asked without gradient, such as the student's moving average.
        clean, noise: pairs [batch, ...].
        sigma: [batch], in (0, 1].
        lower: [batch], in [0, sigma).
        teacher: velocity that makes the step; the pair's own where omitted.
    """
    _check(clean, noise, sigma)
    if lower.shape != sigma.shape or bool((lower >= sigma).any()) or bool((lower < 0).any()):
        raise InputError("lower levels [batch] in [0, sigma)", f"{lower.tolist()}", "correct them")
    upper = on_line(clean, noise, sigma)
    with torch.no_grad():
        slope = noise - clean if teacher is None else teacher(upper, sigma)
        point = upper - _spread(sigma - lower, upper) * slope
        # A level of 0 is asked for at the least level above it and then counts for nothing.
        asked = torch.where(lower > 0, lower, sigma)
        wanted = point - _spread(lower, point) * target(point, asked)
    found = upper - _spread(sigma, upper) * student(upper, sigma)
    return pseudo_huber(found - wanted)


def walk(velocity: Velocity, noise: Tensor, sigmas: Tensor, jumps: Tensor) -> Tensor:
    """Where Euler's steps lead, [batch, ...]: sample i takes the first ``jumps[i]`` of its steps. Without gradient.

    Args:
        velocity: asked with the samples that still move, so that standing ones cost nothing; they may be none of all.
        noise: [batch, ...], at the first level.
        sigmas: levels of each sample's steps, [batch, most + 1], falling.
        jumps: int64 [batch], from 0 to most.
    """
    if sigmas.shape[:1] != jumps.shape or jumps.shape != noise.shape[:1] or int(jumps.max()) >= sigmas.shape[1]:
        got = f"{list(noise.shape)}, {list(sigmas.shape)} and jumps {jumps.tolist()}"
        raise InputError("a row of levels and a number of jumps below its length for each sample", got, "correct them")
    points = noise.detach().clone()
    with torch.no_grad():
        for jump in range(int(jumps.max())):
            rows = (jumps > jump).nonzero().flatten()
            here, there = sigmas[rows, jump], sigmas[rows, jump + 1]
            points[rows] -= _spread(here - there, points) * velocity(points[rows], here)
    return points


def flow_map_loss(
    student: Velocity, target: Velocity, clean: Tensor, noise: Tensor, *, sigmas: Tensor, jumps: Tensor
) -> Tensor:
    """A map of few jumps: from where its own jumps lead, the student's estimate is the pair's clean end; [batch].

    Jump after jump of a grid of few levels; no other level is trained. With ``jumps`` 0 this is the one-step
    distillation of ReFlow's pairs; beyond, the point is the student's own instead of one on the pair's line, which no
    sampler visits: mean square of the clean estimates' difference.

    Source: Liu et al. 2022 (arXiv 2209.03003), section 2.2, distillation, along the path of Ross et al. 2011 (arXiv
    1011.0686): learn in the states that the learner itself comes to.

    Args:
        student: with gradient.
        target: makes the jumps, asked without gradient.
        clean, noise: pairs [batch, ...].
        sigmas: levels of each sample's grid, [batch, most + 1], falling from 1 and ending in 0.
        jumps: int64 [batch], jumps made before the one that is learnt.
    """
    points = walk(target, noise, sigmas, jumps)
    sigma = sigmas.gather(1, jumps[:, None])[:, 0]
    _check(clean, noise, sigma)
    return _mean_square(points - _spread(sigma, points) * student(points, sigma) - clean)


def pseudo_huber(difference: Tensor) -> Tensor:
    """``sqrt(mean square + c^2) - c``, [batch], of differences [batch, ...]; c = 0.00054."""
    return torch.sqrt(_mean_square(difference) + _HUBER**2) - _HUBER


def as_velocity(process: Process, predict: Velocity) -> Velocity:
    """Any trained denoiser as a velocity field: asked at its level of nearest signal-to-noise ratio.

    A process that keeps the variance sees ``x`` times ``signal + sigma`` of that level, its own mixture of the two.
    Of noise estimates the levels of hardly any signal are left out: nothing follows from them for the clean image.

    Args:
        process: of the denoiser.
        predict: ``predict(x, timestep)``, whatever it estimates.
    """
    scale = process.signal + process.sigma
    share = (process.sigma / scale).double().cpu()
    usable = share <= (_LEAST_SIGNAL if process.prediction == "epsilon" else 1.0)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        index = (share[usable] - sigma.double().cpu()[:, None]).abs().argmin(1).to(x.device)
        scaled = x * _spread(scale.to(x.device, x.dtype)[index], x)
        clean, noise = process.estimates(scaled, predict(scaled, process.timestep(index)), index)
        return noise - clean

    return velocity


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """[batch] as [batch, 1, ...] of the type of ``like``."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def _check(clean: Tensor, noise: Tensor, sigma: Tensor) -> None:
    if clean.shape != noise.shape or sigma.shape != clean.shape[:1]:
        got = f"{list(clean.shape)}, {list(noise.shape)} and {list(sigma.shape)}"
        raise InputError("pairs of one shape [batch, ...] and a level each", got, "correct them")
    if not bool(((sigma > 0) & (sigma <= 1)).all()):
        raise InputError("levels in (0, 1]", f"{sigma.tolist()}", "leave out the level without noise")
