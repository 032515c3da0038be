"""Diffusion: noise levels beside the sum over all of them, reuse beside every step; uniform levels as baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.compare import denoise_reuse
from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import deviation, spread_in_errors
from scrimp.compare.step import advance
from scrimp.denoise import (
    PREDICTIONS,
    ImportanceLevels,
    LevelSampler,
    Process,
    UniformLevels,
    denoising_loss,
    gradient_bound,
    min_snr,
    process_of,
    reuse,
)
from scrimp.primitives.draw import generator_for

_LEVELS, _POINTS, _HIDDEN = 24, 12, 12
_MANY = 1_000_000  # spread evenly, they give each level its chance to 1e-6
_BATCHES, _BATCH = 1_500, 8
_DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def check(
    *,
    seed: int = 0,
    sampler: Callable[..., ImportanceLevels] = ImportanceLevels,
    process: Callable[[Any], Process] = process_of,
    weigh: Callable[[Tensor, str], Tensor] = min_snr,
    bound: Callable[[Tensor], Tensor] = gradient_bound,
    attach: denoise_reuse.Attach = reuse,
) -> list[Finding]:
    """Hold draws, weights, the promised ratio and the process against sums over all levels, reuse against all steps."""
    toy = _toy()
    learned = _learned(toy, sampler, bound(toy.losses.flatten()))
    return [
        *_unbiased(toy, learned, seed),
        at_most(
            "gradient noise by learned levels over that by uniform ones",
            _noise(toy, learned.probabilities()) / _noise(toy, UniformLevels(_LEVELS)),
            1,
        ),
        at_most("variance ratio beside both second moments, relative", _ratio_apart(toy, sampler), 1e-9),
        *_processes(process, seed),
        at_most("one wrong image, weighted in all predictions, relative", _weights_apart(process, weigh, seed), 1e-5),
        *denoise_reuse.findings(attach, seed=seed),
    ]


def sides(*, seed: int = 0, device: str = "cpu", steps: int = 4, repeats: int = 30) -> Sides:
    """Training steps of a small convnet on 64 images at learned noise levels, beside uniform ones.

    The noise of the gradient is that of the check's problem, exact.
    """
    toy = _toy()
    learned = _learned(toy, ImportanceLevels, gradient_bound(toy.losses.flatten()))
    noise = (_noise(toy, learned.probabilities()), _noise(toy, UniformLevels(_LEVELS)))
    work = _Work(seed, device)
    return Sides(
        method=advance(work.steps(ImportanceLevels(1000)), steps),
        baseline=advance(work.steps(UniformLevels(1000)), steps),
        quality={"gradient_noise": noise},
        repeats=repeats,
    )


@dataclass(frozen=True)
class _Toy:
    """A half-trained network of points in the plane, float64, at every level: losses and their gradients.

    Attributes:
        losses: mean squared errors [levels, points].
        gradients: over all parameters, [levels, points, parameters].
    """

    losses: Tensor
    gradients: Tensor


class _Cosine:
    """What a scheduler of cosine betas shows of itself, without the library that has it."""

    def __init__(self, prediction: str = "epsilon", levels: int = _LEVELS) -> None:
        place = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        kept = ((place + 0.008) / 1.008 * torch.pi / 2).cos().square()
        self.betas = (1 - kept[1:] / kept[:-1]).clamp_max(0.999)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.config = {"prediction_type": _DIFFUSERS[prediction]}


def _scheduler(prediction: str) -> Any:
    if prediction == "flow":
        config = {"num_train_timesteps": _LEVELS, "use_flow_sigmas": True, "flow_shift": 2.0}
        return SimpleNamespace(config=config)
    return _Cosine(prediction)


@cache
def _toy() -> _Toy:
    generator, own = generator_for(1), process_of(_Cosine())
    points = torch.randn(_POINTS, 2, generator=generator, dtype=torch.float64) * 0.3 + torch.tensor([1.0, -0.5])
    noise = torch.randn(_LEVELS, _POINTS, 2, generator=generator, dtype=torch.float64)
    index = torch.arange(_LEVELS).repeat_interleave(_POINTS)
    clean, noise = points.repeat(_LEVELS, 1), noise.flatten(0, 1)
    told = torch.stack([own.signal, own.sigma, own.sigma.log()], 1).double()[index]
    inputs, targets = torch.cat([own.noisy(clean, noise, index), told], 1), own.target(clean, noise, index)
    shapes = [(_HIDDEN, 5), (_HIDDEN,), (2, _HIDDEN), (2,)]
    weights = [0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def loss(parts: list[Tensor], rows: Tensor, wanted: Tensor) -> Tensor:
        hidden = torch.tanh(functional.linear(rows, parts[0], parts[1]))
        return (functional.linear(hidden, parts[2], parts[3]) - wanted).square().mean(-1)

    for _ in range(60):
        slopes = torch.func.grad(lambda parts: loss(parts, inputs, targets).mean())(weights)
        weights = [part - 0.3 * slope for part, slope in zip(weights, slopes, strict=True)]
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, inputs, targets)
    gradients = torch.cat([part.flatten(1) for part in each], 1)
    return _Toy(loss(weights, inputs, targets).view(_LEVELS, -1), gradients.view(_LEVELS, _POINTS, -1))


def _learned(toy: _Toy, sampler: Callable[..., ImportanceLevels], norms: Tensor) -> ImportanceLevels:
    made = sampler(_LEVELS, bins=_LEVELS)
    made.update_(torch.arange(_LEVELS).repeat_interleave(_POINTS), norms)
    return made


def _noise(toy: _Toy, levels: Tensor | UniformLevels) -> float:
    """Of a batch of 64: a level by its chance, a point of it at random."""
    p = levels if isinstance(levels, Tensor) else torch.full((_LEVELS,), 1 / _LEVELS, dtype=torch.float64)
    return deviation(toy.gradients.flatten(0, 1), p.repeat_interleave(_POINTS) / _POINTS, 64)


def _unbiased(toy: _Toy, learned: LevelSampler, seed: int) -> list[Finding]:
    """The expected weighted gradient, all levels alike being what it must come to."""
    gradients, generator = toy.gradients.mean(1), generator_for(seed, 2)
    mean = gradients.mean(0)
    many = learned.draw(_MANY, generator=generator)
    shares = torch.zeros(_LEVELS, dtype=torch.float64).index_add_(0, many.index, many.weight.double()) / _MANY
    batches = torch.zeros(_BATCHES, _LEVELS, dtype=torch.float64)
    for row in batches:
        few = learned.draw(_BATCH, generator=generator)
        row.index_add_(0, few.index, few.weight.double() / _BATCH)
    found = batches @ gradients
    error = found.std(0) / _BATCHES**0.5
    return [
        at_most(
            f"gradient of {_MANY:,} weighted levels against all levels, relative",
            float((shares @ gradients - mean).norm() / mean.norm()),
            1e-3,
        ),
        at_most(
            f"mean gradient of {_BATCHES:,} batches of {_BATCH}, standard errors off",
            spread_in_errors(found.mean(0), mean, error),
            6,
        ),
    ]


def _ratio_apart(toy: _Toy, sampler: Callable[..., ImportanceLevels]) -> float:
    """Second moments of the gradient's length: uniform levels, and the best draws by Lagrange's rule, term by term."""
    norms = toy.gradients.norm(dim=2)
    found = _learned(toy, sampler, norms.flatten()).variance_ratio()
    squares = [sum(float(norm) ** 2 for norm in row) / _POINTS for row in norms]
    total = sum(square**0.5 for square in squares)
    uniform = sum(squares) / _LEVELS
    best = [square**0.5 / total for square in squares]
    least = sum(square / (_LEVELS * _LEVELS * p) for square, p in zip(squares, best, strict=True))
    return float("nan") if found is None else abs(found / (uniform / least) - 1)


def _processes(process: Callable[[Any], Process], seed: int) -> list[Finding]:
    """Noise added step by step, as betas say, and what a perfect network's output is taken for."""
    generator, index = generator_for(seed, 3), torch.arange(_LEVELS)
    clean, noise = (torch.randn(_LEVELS, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    added, astray = 0.0, 0.0
    for prediction in PREDICTIONS:
        scheduler = _scheduler(prediction)
        own = process(scheduler)
        noisy = own.noisy(clean, noise, index)
        found = own.estimates(noisy, own.target(clean, noise, index), index)
        # Where next to no signal is left, the float32 of the coefficients shows in the clean image.
        certain = slice(0, _LEVELS - 2)
        gaps = ((one - true)[certain].abs().max() for one, true in zip(found, (clean, noise), strict=True))
        astray = max(astray, *(float(gap) for gap in gaps))
        if prediction != "flow":
            added = max(added, float((noisy - _step_by_step(scheduler.betas, clean, noise)).abs().max()))
    return [
        at_most("noisy images beside betas step by step", added, 1e-6),
        at_most("clean image and noise from a perfect output", astray, 1e-5),
    ]


def _step_by_step(betas: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Each step scales what there is and adds variance beta (Ho et al. 2020, eq. 2)."""
    rows = []
    for level in range(_LEVELS):
        signal, variance = 1.0, 0.0
        for beta in betas[: level + 1].tolist():
            signal, variance = signal * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        rows.append(signal * clean[level] + variance**0.5 * noise[level])
    return torch.stack(rows)


def _weights_apart(process: Callable[[Any], Process], weigh: Callable[[Tensor, str], Tensor], seed: int) -> float:
    """Outputs that stand for one wrong clean image, weighted, beside min(snr, 5) times the squared error."""
    generator, index = generator_for(seed, 4), torch.arange(2, _LEVELS - 2)
    clean, noise, wrong = (torch.randn(len(index), 2, generator=generator, dtype=torch.float64) for _ in range(3))
    worst = 0.0
    for prediction in PREDICTIONS:
        own = process(_scheduler(prediction))
        noisy = own.noisy(clean, noise, index)
        signal, sigma = (part[index].double()[:, None] for part in (own.signal, own.sigma))
        output = own.target(clean + wrong, (noisy - signal * (clean + wrong)) / sigma, index)
        weights = weigh(own.snr(index), prediction)
        losses = denoising_loss(output, own.target(clean, noise, index), weight=weights)
        wanted = (signal / sigma).square().clamp_max(5)[:, 0] * wrong.square().mean(1)
        worst = max(worst, float((losses / wanted - 1).abs().max()))
    return worst


class _Work:
    """A small convnet that predicts v of 256 images of noise, at a learning rate of 0: the work stays the same."""

    def __init__(self, seed: int, device: str) -> None:
        self.seed, self.device, self.process = seed, device, process_of(_Cosine("v", 1000))
        generator = generator_for(seed, 5)
        with torch.random.fork_rng(devices=[]):  # layers draw their first weights, which are replaced
            self.model = nn.Sequential(
                nn.Conv2d(2, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()
            ).append(nn.Conv2d(32, 1, 3, padding=1))
        with torch.no_grad():
            for part in self.model.parameters():
                part.copy_(torch.randn(part.shape, generator=generator) / part[0].numel() ** 0.5)
        self.model.to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.images = torch.randn(256, 1, 16, 16, generator=generator).to(device)

    def steps(self, sampler: LevelSampler) -> Iterator[None]:
        """A training step for each item taken."""
        generator = generator_for(self.seed, 6)
        while True:
            rows = torch.randint(len(self.images), (64,), generator=generator)
            clean = self.images[rows.to(self.device)]
            noise = torch.randn(clean.shape, generator=generator).to(self.device)
            drawn = sampler.draw(len(clean), generator=generator)
            index, factors = drawn.index.to(self.device), drawn.weight.to(self.device)
            told = (index / self.process.levels).view(-1, 1, 1, 1).expand_as(clean)
            output = self.model(torch.cat([self.process.noisy(clean, noise, index), told], 1))
            losses = denoising_loss(output, self.process.target(clean, noise, index))
            sampler.update_(drawn.index, gradient_bound(losses))
            self.optimizer.zero_grad()
            (factors * losses).mean().backward()
            self.optimizer.step()
            yield
