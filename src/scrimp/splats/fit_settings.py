"""How a scene is trained, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from scrimp.splats.scene import Splats
from scrimp.splats.strategy import Mcmc, Strategy
from scrimp.splats.thinning import Thinning


@dataclass(frozen=True)
class Rates:
    """Of Adam, by field; of the means in extents of the cameras. They suit some thousand steps.

    All are 3DGS's but the means', which 3DGS moves by 1.6e-4 over 30 000 steps; a tenth of the steps needs more.

    Attributes:
        final: factor of all rates but the means' at the end, reached from ``steady`` of the training on.
        means_final: factor of the means' at the end, reached exponentially.
    """

    means: float = 4e-4
    quaternions: float = 1e-3
    scales: float = 5e-3
    opacities: float = 5e-2
    colors: float = 2.5e-3
    harmonics: float = 2.5e-3 / 20
    means_final: float = 0.01
    final: float = 0.1
    steady: float = 0.7

    def at(self, share: float, extent: float) -> dict[str, float]:
        """By field, after a part of the training."""
        late = max(0.0, share - self.steady) / max(1e-9, 1 - self.steady)
        factor = self.final ** min(1.0, late)
        others = {name: getattr(self, name) * factor for name in ("quaternions", "scales", "opacities", "colors")}
        moved = self.means * extent * self.means_final**share
        return {"means": moved, "harmonics": self.harmonics * factor, **others}


@dataclass(frozen=True)
class FitSettings:
    """How a scene is trained.

    Attributes:
        degree: of the harmonics at the end.
        degree_share: part of the training after which each degree is added; 0 starts with all.
        count: Gaussians to begin with, where the set has no points.
        strategy: of more and fewer Gaussians; None leaves their number.
        thinning: removal of what shows least; None for none.
        unseen: part of the training after which Gaussians that no view trained on sees are removed; None to keep them.
            Left in, they widen what positions are rounded within.
        rates: of learning.
        ssim_weight: of the loss, beside the absolute difference.
        opacity_price, scale_price: of the mean opacity and the mean size, added to the loss.
        coarse: parts of the training up to which pictures are reduced, and by how much a side.
        antialias: see `scrimp.splats.render.rasterize`; as the scene begun with says when not given.
        random_background: draw the colour behind everything anew in each step, against holes that it shines through;
            for sets without transparent pictures.
        quantised_from: part of the training after which a quantiser, where one is passed, is put in between.
        requantise: steps after which it assigns anew.
    """

    degree: int = 3
    degree_share: float = 0.1
    count: int = 20_000
    strategy: Strategy | None = field(default_factory=Mcmc)
    thinning: Thinning | None = None
    unseen: float | None = 0.8
    rates: Rates = field(default_factory=Rates)
    ssim_weight: float = 0.2
    opacity_price: float = 0.01
    scale_price: float = 0.01
    coarse: tuple[tuple[float, int], ...] = ((0.4, 2),)
    antialias: bool | None = None
    random_background: bool = False
    quantised_from: float = 0.8
    requantise: int = 100


@dataclass(frozen=True)
class Progress:
    """After a step: how many are done, the loss of the view it saw, and the number of Gaussians."""

    done: int
    loss: float
    count: int


@dataclass(frozen=True, eq=False)
class Fitted:
    """What training gives.

    Attributes:
        splats: the scene; where a quantiser was passed, as its format stores it.
        encoded: the file in that format, of which ``splats`` is what a reader finds, in another order and with those
            too faint to be drawn; None without a quantiser.
        history: of every step.
        state: to go on from.
    """

    splats: Splats
    encoded: bytes | None
    history: tuple[Progress, ...]
    state: Mapping[str, Tensor]
