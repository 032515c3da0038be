"""Fewer Gaussians for nearly the same pictures: which are seen, and training that does without the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scrimp.splats.camera import Camera
from scrimp.splats.optimise import Model
from scrimp.splats.render import rasterize
from scrimp.splats.scene import SH_C0, Splats
from scrimp.splats.strategy import Turn


@dataclass(frozen=True)
class Thinning:
    """Fewer Gaussians for nearly the same pictures: a price on opacity, and removal of what shows least.

    After Compact3D's opacity regularisation (Navaneet et al. 2024, arXiv 2311.18159, section 3.2), which removes those
    that became faint; what shows least in the views trained on is removed beyond them until a given part is left.

    Attributes:
        keep: part of the Gaussians that is left at most, over all removals; a strategy may add others in between.
        times: of removal, evenly spread over the window.
        price: of the mean opacity within the window, added to the loss.
        least: opacity below which a Gaussian is removed in any case.
        window: in parts of the training.
    """

    keep: float = 0.5
    times: int = 4
    price: float = 0.01
    least: float = 0.005
    window: tuple[float, float] = (0.5, 0.8)

    def price_at(self, step: int, steps: int) -> float:
        """Of the mean opacity, in this step."""
        return self.price if self.window[0] * steps <= step < self.window[1] * steps else 0.0

    def refine_(self, model: Model, turn: Turn) -> bool:
        """Remove Gaussians where it is time to."""
        places = [self.window[0] + (self.window[1] - self.window[0]) * i / self.times for i in range(1, self.times + 1)]
        if turn.step + 1 not in {round(place * turn.steps) for place in places} or not len(model):
            return False
        found = model.detached()
        weights = view_weights(found, turn.cameras)
        weights[found.opacities.sigmoid() < self.least] = 0
        left = max(1, math.ceil(self.keep ** (1 / self.times) * len(model)))
        kept = weights.argsort(descending=True, stable=True)[:left]
        kept = kept[weights[kept] > 0].sort().values
        model.take_(kept if len(kept) else torch.arange(len(model), device=weights.device))
        return True


def view_weights(splats: Splats, cameras: Iterable[Camera]) -> Tensor:
    """[n]: by how much each Gaussian is seen, the sum of its weights over all pixels of all views.

    A pixel is the sum of colours, each times its weight; the weights are therefore the gradient by the colours.
    """
    scene = splats.of_degree(0).to(splats.means.device)
    total = torch.zeros_like(splats.opacities)
    for camera in cameras:
        colors = torch.zeros_like(scene.colors).requires_grad_()
        with torch.enable_grad():
            picture = rasterize(replace(scene, colors=colors), camera).color
            (pull,) = torch.autograd.grad(picture[..., 0].sum(), colors)
        total += pull[:, 0] / SH_C0
    return total


def prune_unseen(splats: Splats, cameras: Iterable[Camera], *, least: float = 0.0) -> Splats:
    """The scene without the Gaussians whose `view_weights` do not exceed ``least`` pixels."""
    return splats.take(view_weights(splats, cameras) > least)
