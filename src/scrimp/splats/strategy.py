"""Where a scene gets more Gaussians while it is trained, and where it loses them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from scrimp.primitives.draw import draw_systematic, generator_for
from scrimp.splats.camera import Camera
from scrimp.splats.optimise import Model
from scrimp.splats.render import Rendered
from scrimp.splats.scene import Splats


@dataclass(frozen=True, eq=False)
class Turn:
    """Where training stands.

    Attributes:
        step: just done, from 0.
        steps: of the whole training.
        seed: of all that is drawn in this step.
        rate: of the means, units of the scene.
        extent: of the cameras, units of the scene.
        cameras: of the views trained on.
    """

    step: int
    steps: int
    seed: int
    rate: float
    extent: float
    cameras: tuple[Camera, ...]

    def due(self, window: tuple[float, float], every: int) -> bool:
        """Whether so many steps are over again, within a window given in parts of the whole."""
        done = self.step + 1
        return window[0] * self.steps <= done <= window[1] * self.steps and done % every == 0


class Strategy(Protocol):
    """How a scene is refined. `observe_` follows each gradient, `refine_` each update."""

    @property
    def places(self) -> bool:
        """Whether the gradient by the place in the picture is wanted."""

    def observe_(self, model: Model, rendered: Rendered, pulls: Tensor | None, camera: Camera) -> None:
        """Take note of the step's gradients; ``pulls`` [n, 2] by the place in the picture, pixels."""

    def refine_(self, model: Model, turn: Turn) -> bool:
        """Change the scene; whether rows were added, removed or exchanged."""


@dataclass(frozen=True)
class Mcmc:
    """3DGS as Markov chain Monte Carlo (Kheradmand et al. 2024, arXiv 2404.09591).

    Dead Gaussians move to living ones, drawn by opacity, with which they then share opacity and size so that the
    picture stays (equation 9 there); the number grows to a cap; noise moves those that are hardly seen.

    Attributes:
        cap: Gaussians at most.
        every: steps between refinements.
        growth: factor of the number at each.
        least: opacity below which a Gaussian is dead.
        noise: of the means, in their rate.
        farthest: that noise moves a Gaussian in a step along each axis, in extents of the cameras.
        window: of refinement, in parts of the training; the noise goes on to its end too.
    """

    cap: int = 60_000
    every: int = 100
    growth: float = 1.05
    least: float = 0.005
    noise: float = 5e5
    farthest: float = 0.02
    window: tuple[float, float] = (0.03, 0.8)

    @property
    def places(self) -> bool:
        return False

    def observe_(self, model: Model, rendered: Rendered, pulls: Tensor | None, camera: Camera) -> None:
        """Nothing is needed."""

    def refine_(self, model: Model, turn: Turn) -> bool:
        due = turn.due(self.window, self.every) and len(model) > 0
        if due:
            self._relocate(model, turn)
            self._grow(model, turn)
        if turn.step < self.window[1] * turn.steps:
            self._shake(model, turn)
        return due

    @torch.no_grad()
    def _relocate(self, model: Model, turn: Turn) -> None:
        opacities = model.leaves["opacities"].sigmoid()
        dead, alive = torch.nonzero(opacities <= self.least)[:, 0], torch.nonzero(opacities > self.least)[:, 0]
        if not len(dead) or not len(alive):
            return
        drawn = alive[_drawn(opacities[alive], len(dead), turn.seed, 0)]
        self._share(model, drawn)
        model.set_(dead, model.detached().take(drawn))

    @torch.no_grad()
    def _grow(self, model: Model, turn: Turn) -> None:
        more = min(self.cap, int(self.growth * len(model))) - len(model)
        if more > 0:
            drawn = _drawn(model.leaves["opacities"].sigmoid(), more, turn.seed, 1)
            self._share(model, drawn)
            model.append_(model.detached().take(drawn))

    def _share(self, model: Model, drawn: Tensor) -> None:
        """Give those drawn the opacity and size that they shall share with their copies."""
        rows, copies = drawn.unique(return_counts=True)
        before = model.detached().take(rows)
        opacity, factor = shared(before.opacities.sigmoid(), copies + 1)
        opacity = opacity.clamp(self.least, 1 - 1e-6)
        after = replace(before, opacities=opacity.logit(), scales=before.scales + factor.log()[:, None])
        model.set_(rows, after)

    @torch.no_grad()
    def _shake(self, model: Model, turn: Turn) -> None:
        opacities = model.leaves["opacities"].sigmoid()
        gate = torch.sigmoid(100 * (self.least - opacities))
        rows = torch.nonzero(gate > 1e-4)[:, 0]
        found = model.detached().take(rows)
        noise = torch.randn(len(rows), 3, generator=generator_for(turn.seed, 2)).to(found.means)
        spread = _turned(found.quaternions, noise, back=True) * (2 * found.scales).exp()
        step = _turned(found.quaternions, spread) * (gate[rows] * self.noise * turn.rate)[:, None]
        # The square of a large size would throw a faint Gaussian out of the scene in one step.
        most = self.farthest * turn.extent
        model.leaves["means"].detach()[rows] = found.means + step.clamp(-most, most)


@dataclass(frozen=True)
class Classic:
    """3DGS's own densification (Kerbl et al. 2023, arXiv 2308.04079, section 5.2).

    Where the place in the picture is pulled at on average, small Gaussians are cloned and large ones split in two;
    faint and, after the first reset, huge ones are removed; opacities are set back from time to time.

    Attributes:
        cap: Gaussians at most.
        every: steps between refinements.
        pull: mean gradient by the place, in halves of the picture, from which a Gaussian is cloned or split.
        small: part of the cameras' extent up to which a Gaussian is cloned.
        huge: part of the extent above which it is removed.
        least: opacity below which it is removed.
        window: of refinement, in parts of the training.
        reset: part of the training between resets of the opacities, within the window.
    """

    cap: int = 1_000_000
    every: int = 100
    pull: float = 2e-4
    small: float = 0.01
    huge: float = 0.1
    least: float = 0.005
    window: tuple[float, float] = (1 / 60, 0.5)
    reset: float = 0.1

    @property
    def places(self) -> bool:
        return True

    def observe_(self, model: Model, rendered: Rendered, pulls: Tensor | None, camera: Camera) -> None:
        seen = rendered.radii > 0
        size = model.leaves["means"].new_tensor([camera.width / 2, camera.height / 2])
        length = torch.zeros_like(rendered.radii) if pulls is None else (pulls * size).norm(dim=1)
        kept = model.statistics
        kept["pull"] = kept.get("pull", torch.zeros_like(length)) + length * seen
        kept["views"] = kept.get("views", torch.zeros_like(length)) + seen

    def refine_(self, model: Model, turn: Turn) -> bool:
        between = max(self.every, round(self.reset * turn.steps))
        due = turn.due(self.window, self.every)
        if due:
            self._densify(model, turn)
            self._prune(model, turn, huge=turn.step >= between)
            for values in model.statistics.values():
                values.zero_()
        if turn.due((0.0, self.window[1]), between) and turn.step + 1 < self.window[1] * turn.steps:
            self._reset(model)
        return due

    @torch.no_grad()
    def _densify(self, model: Model, turn: Turn) -> None:
        if "pull" not in model.statistics:
            return
        mean = model.statistics["pull"] / model.statistics["views"].clamp_min(1)
        wanted = torch.nonzero(mean > self.pull)[:, 0]
        room = max(0, self.cap - len(model))
        if len(wanted) > room:
            wanted = wanted[mean[wanted].argsort(descending=True, stable=True)[:room]]
        large = model.leaves["scales"][wanted].amax(1).exp() > self.small * turn.extent
        found = model.detached()
        clones, parents = found.take(wanted[~large]), found.take(wanted[large])
        halves = [_half(parents, turn.seed, half) for half in (3, 4)]
        model.set_(wanted[large], halves[0])
        model.append_(clones)
        model.append_(halves[1])

    @torch.no_grad()
    def _prune(self, model: Model, turn: Turn, *, huge: bool) -> None:
        kept = model.leaves["opacities"].sigmoid() >= self.least
        if huge:
            kept &= model.leaves["scales"].amax(1).exp() <= self.huge * turn.extent
        if bool(kept.any()):
            model.take_(kept)

    @torch.no_grad()
    def _reset(self, model: Model) -> None:
        most = math.log(2 * self.least / (1 - 2 * self.least))
        everything = torch.arange(len(model), device=model.leaves["means"].device)
        found = model.detached()
        model.set_(everything, replace(found, opacities=found.opacities.clamp(max=most)), ["opacities"])


def shared(opacities: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity and factor of the size of so many equal Gaussians that look as one did.

    Together they let as much light through at the centre, and cover as much along a line through it: equation 9 of
    Kheradmand et al. 2024 (arXiv 2404.09591), whose alternating sum is evaluated as the integral that it comes from,
    the integral of 1 - (1 - x g(t))^N for g(t) = exp(-t^2 / 2), since the sum has no correct digits for large N.

    Args:
        opacities: [n], 0 to 1.
        counts: [n], whole, from 1.

    Returns:
        Two tensors [n].
    """
    each = 1 - (1 - opacities.double()).pow(1 / counts.double())
    places = torch.linspace(-9, 9, 145, dtype=torch.float64, device=opacities.device)
    bell = torch.exp(-places.square() / 2)
    covered = 1 - (1 - each[:, None] * bell).pow(counts.double()[:, None])
    covered = covered.sum(1) * (places[1] - places[0]) / math.sqrt(2 * math.pi)
    factor = opacities.double() / covered.clamp_min(1e-300)
    return each.to(opacities), factor.to(opacities)


def _drawn(weights: Tensor, count: int, seed: int, stream: int) -> Tensor:
    shares = weights.detach().double().clamp_min(1e-12)
    return draw_systematic(shares / shares.sum(), count, generator=generator_for(seed, stream))


def _half(parents: Splats, seed: int, stream: int) -> Splats:
    """Smaller ones, each somewhere within a parent."""
    noise = torch.randn(len(parents), 3, generator=generator_for(seed, stream)).to(parents.means)
    means = parents.means + _turned(parents.quaternions, noise * parents.scales.exp())
    return replace(parents, means=means, scales=parents.scales - math.log(1.6))


def _turned(quaternions: Tensor, vectors: Tensor, *, back: bool = False) -> Tensor:
    unit = torch.nn.functional.normalize(quaternions, dim=1)
    axis, real = unit[:, 1:] * (-1 if back else 1), unit[:, :1]
    across = torch.linalg.cross(axis, vectors)
    return vectors + 2 * (real * across + torch.linalg.cross(axis, across))
