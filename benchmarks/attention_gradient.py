"""Attention sampling without replacement: does the mean of its gradients point where the exact gradient points?

    python benchmarks/attention_gradient.py            # about three minutes on one core

Maps of 1,000 locations, 10 draws of each, rectified features of length 1, gradients towards the logits of the map along
a random direction. Beside this library's gradient, with and without its control variate and with replacement, stands
the formula of the published code. Figures of a small problem over every ordered sample come from the same check that
`scrimp compare attention-sampling --check` runs: largest biases, ratios of variances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from common import RECEIPTS, keep
from scrimp.compare.attention_sampling import check
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt
from scrimp.select import Locations, expected_features, sample_locations

CHUNK = 1000  # samples drawn together
DIM = 32
MAPS: dict[str, tuple[float, int] | None] = {
    "diffuse": None,
    "90_on_15": (0.9, 15),
    "99_on_10": (0.99, 10),
    "90_on_5": (0.9, 5),
}
Slope = Callable[[Tensor, Locations, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionGradient:
    """Cosine, bias and variance of the attention gradient, on diffuse and on concentrated maps."""

    locations: int = 1000
    """Locations of each map."""
    patches: int = 10
    """Draws of one sample."""
    draws: int = 100_000
    """Samples that are averaged; rounded down to thousands."""
    seed: int = 0
    out: Path = RECEIPTS / "attention-gradient.json"


@dataclass(frozen=True)
class Way:
    """A gradient: towards the map [batch, locations], for drawn features [batch, patches]."""

    slope: Slope
    replacement: bool = False


def run(order: AttentionGradient) -> Receipt:
    torch.set_num_threads(1)
    quality: dict[str, float | None] = {}
    for number, (name, peak) in enumerate(MAPS.items()):
        attention = attention_map(order, peak, generator_for(order.seed, number))
        along = directional(order.locations, generator_for(order.seed, 100 + number))
        for way, gradient in WAYS.items():
            found = mean_gradient(attention, along, gradient, order)
            quality.update({f"{what}_{name}_{way}": value for what, value in found.items()})
    return Receipt(
        kind="benchmark",
        name="attention-gradient",
        way="attention sampling",
        seed=order.seed,
        quality={**enumerated(order.seed), **quality},
        config={**asdict(order), "out": None},
        notes={"maps": "share of the mass and locations that hold it; diffuse: Dirichlet of 1", "dtype": "float64"},
    )


def enumerated(seed: int) -> dict[str, float]:
    """Largest bias over all ways and parts, and the ratios of variances, of every ordered sample of a small problem."""
    found = {item.what: item.figure for item in check(seed=seed)}

    def figure(start: str) -> float:
        (value,) = [value for what, value in found.items() if what.startswith(start)]
        return value

    return {
        "enumerated_bias": max(value for what, value in found.items() if what.endswith("bias")),
        "enumerated_variance_ratio": figure("variance without replacement over"),
        "enumerated_variance_ratio_control": figure("the same with the control variate"),
        "enumerated_variance_left_by_control": figure("variance that the control variate leaves"),
    }


def attention_map(order: AttentionGradient, peak: tuple[float, int] | None, generator: torch.Generator) -> Tensor:
    """[locations]: uneven everywhere, with a share of the mass on a few locations where told so."""
    parts = -torch.rand(order.locations, generator=generator, dtype=torch.float64).log()
    if peak is not None:
        mass, places = peak
        parts[:places] *= mass / parts[:places].sum()
        parts[places:] *= (1 - mass) / parts[places:].sum()
    return parts / parts.sum()


def directional(count: int, generator: torch.Generator) -> Tensor:
    """Rectified features of length 1 along a random direction, [count]."""
    features, direction = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((count, DIM), (DIM,))
    )
    return functional.normalize(features.relu(), dim=1) @ direction


def mean_gradient(attention: Tensor, along: Tensor, way: Way, order: AttentionGradient) -> dict[str, float]:
    """Mean over many samples against the exact gradient, and one sample's variance over that gradient's square."""
    exact = through_softmax(attention, along)
    maps, generator = attention.expand(CHUNK, -1), generator_for(order.seed, 200)
    total, squares = torch.zeros_like(exact), 0.0
    for _ in range(order.draws // CHUNK):
        chosen = sample_locations(maps, order.patches, replacement=way.replacement, generator=generator)
        slopes = through_softmax(maps, way.slope(maps, chosen, along[chosen.indices]))
        total += slopes.sum(0)
        squares += float((slopes - exact).square().sum())
    count, scale = order.draws // CHUNK * CHUNK, float(exact.norm())
    mean = total / count
    return {
        "cosine": float(torch.cosine_similarity(mean, exact, 0)),
        "bias": float((mean - exact).norm()) / scale,
        "variance": squares / count / scale**2,
    }


def through_softmax(attention: Tensor, slope: Tensor) -> Tensor:
    """From the gradient towards a softmax's output to that towards its logits, [..., locations]."""
    return attention * (slope - (attention * slope).sum(-1, keepdim=True))


def ours(attention: Tensor, chosen: Locations, along: Tensor, *, control: bool) -> Tensor:
    leaf = attention.clone().requires_grad_()
    values = expected_features(leaf, chosen, along.unsqueeze(2), control=control)
    return torch.autograd.grad(values.sum(), leaf)[0]


def published(attention: Tensor, chosen: Locations, along: Tensor) -> Tensor:
    """``(F_k m_k / a_k + sum_{j<k} f_j - (k - 1) f_k) / N`` on the k-th drawn attention."""
    drawn = attention.gather(1, chosen.indices)
    left = 1 - (drawn.cumsum(1) - drawn)
    steps = (drawn * along).cumsum(1) - drawn * along + left * along
    before = torch.arange(along.shape[1])
    slope = (steps * left / drawn + along.cumsum(1) - along - before * along) / along.shape[1]
    return torch.zeros_like(attention).scatter(1, chosen.indices, slope)


WAYS = {
    "ours": Way(partial(ours, control=True)),
    "uncontrolled": Way(partial(ours, control=False)),
    "with_replacement": Way(partial(ours, control=True), replacement=True),
    "published": Way(published),
}


def main() -> None:
    order = tyro.cli(AttentionGradient)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
