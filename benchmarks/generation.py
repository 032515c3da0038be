"""Images written pixel by pixel: linear attention beside softmax attention with a cache and without one.

    python benchmarks/generation.py            # about ten minutes on two cores

The paper's networks, random weights: 8 layers and 784 pixels (1 x 28 x 28), 16 layers and 3,072 pixels (3 x 32 x 32),
8 heads of 32. All sides share all code but attention (`scrimp.jobs.pixels_step`), the drawing of pixels included. The
softmax side reads a preallocated cache, by torch's fused kernel or by plain products, whichever is quicker.

A whole image of the slow sides would take minutes to hours. So nothing is run to its end: windows of a few pixels are
timed at five places, the middles of the fifths of the image, and the mean cost of a pixel there stands for all (exact
where the cost grows evenly, as with a cache; 1 % low where it grows as the square). Caches and states hold noise.
Sides take turns window by window; a figure is the median over rounds, a ratio the median of each round's ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import tyro

from common import RECEIPTS, keep
from scrimp.jobs.pixels_model import PixelTransformer
from scrimp.jobs.pixels_output import DRAWS
from scrimp.jobs.pixels_step import CachedDecoder, Decoder, LinearDecoder, RecomputingDecoder, plain_step
from scrimp.meter import Cost, Reading
from scrimp.meter.clock import Spread
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)
TENTHS = (0.05, 0.95)


@dataclass(frozen=True)
class Generation:
    """Speed of generating images with linear and with softmax attention."""

    grey: tuple[int, int] = (28, 8)
    """Side and layers of the first network; 0 layers leave it out."""
    colour: tuple[int, int] = (32, 16)
    """Side and layers of the second, with three channels."""
    heads: int = 8
    head_dim: int = 32
    weights: tuple[str, ...] = ("float", "int8")
    """Forms of the weights, the same for both sides; each is measured on its own."""
    linear_batches: tuple[int, ...] = (32, 64, 128, 256)
    """Batches of which the best is found."""
    softmax_batches: tuple[int, ...] = (1, 4, 16, 64)
    none_batches: tuple[int, ...] = (1, 4)
    cache_bytes: float = 4e9
    """Batches whose cache would be larger are left out."""
    rounds: int = 7
    window: float = 0.2
    """Seconds of a window at least."""
    threads: int = 2
    seed: int = 0
    out: Path = RECEIPTS / "generation.json"


@dataclass
class Side:
    """A decoder with what feeds it, and how many pixels make a window."""

    decoder: Decoder
    uniforms: torch.Tensor
    pixels: int = 1
    laps: dict[float, list[tuple[float, float]]] = field(default_factory=dict)

    def run(self, place: float, pixels: int) -> tuple[float, float]:
        """Wall and CPU seconds of one pixel of one image, around a place (0 to 1) of the image."""
        decoder, draw = self.decoder, self.decoder.model.output.draw
        middle = round(place * decoder.model.tokens)
        decoder.place = max(0, min(decoder.model.tokens - pixels, middle - pixels // 2))
        last = torch.zeros(decoder.batch, dtype=torch.int64)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(pixels):
            last = draw(decoder.step_(last), self.uniforms)
        shared = pixels * decoder.batch
        return (time.perf_counter() - wall) / shared, (time.process_time() - cpu) / shared

    def fit(self, window: float) -> None:
        """Choose the pixels of a window, after a pixel unmeasured."""
        self.run(0.5, 1)
        seconds = self.run(0.5, 1)[0] * self.decoder.batch
        self.pixels = max(1, min(round(window / seconds), self.decoder.model.tokens // 10))

    def lap(self, place: float) -> None:
        self.laps.setdefault(place, []).append(self.run(place, self.pixels))

    def means(self, clock: int = 0, places: tuple[float, ...] = PLACES) -> list[float]:
        """For each round the mean over places of the seconds a pixel."""
        return [fmean(lap[clock] for lap in laps) for laps in zip(*(self.laps[place] for place in places), strict=True)]


Maker = Callable[[int], Decoder]


class Network:
    """Both attentions in one size, and the sides that can be made of them."""

    def __init__(self, order: Generation, shape: tuple[int, int, int], layers: int) -> None:
        self.order, self.shape, self.layers = order, shape, layers
        size = {"layers": layers, "heads": order.heads, "head_dim": order.head_dim}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(order.seed)
            self.linear, self.softmax = (
                PixelTransformer(shape, attention=kind, **size).eval() for kind in ("linear", "softmax")
            )
        self.generator = generator_for(order.seed)

    def side(self, maker: Maker, batch: int) -> Side:
        decoder = maker(batch)
        for item in _memory(decoder):
            item.uniform_(0.1, 1.0, generator=self.generator)
        side = Side(decoder, torch.rand(batch, DRAWS, generator=self.generator))
        side.fit(self.order.window)
        return side

    def linear_maker(self, weights: str) -> Maker:
        return lambda batch: LinearDecoder(self.linear, batch, weights=weights)

    def softmax_makers(self, weights: str) -> dict[str, Maker]:
        return {
            "fused": lambda batch: CachedDecoder(self.softmax, batch, weights=weights),
            "plain": lambda batch: CachedDecoder(self.softmax, batch, weights=weights, attend=plain_step),
        }

    def none_maker(self) -> Maker:
        return lambda batch: RecomputingDecoder(self.softmax, batch)

    def bytes_read(self) -> float:
        """Bytes of keys and values that the mean pixel reads."""
        tokens = self.softmax.tokens
        return 2 * 4 * self.layers * self.order.heads * self.order.head_dim * (tokens + 1) / 2

    def affordable(self, batch: int) -> bool:
        return 2 * batch * self.bytes_read() <= self.order.cache_bytes


def run(order: Generation) -> Receipt:
    torch.set_num_threads(order.threads)
    begin, notes, quality = time.perf_counter(), {}, {}
    sizes = [
        ((1, order.grey[0], order.grey[0]), order.grey[1]),
        ((3, order.colour[0], order.colour[0]), order.colour[1]),
    ]
    for shape, layers in sizes:
        if not layers:
            continue
        network = Network(order, shape, layers)
        for weights in order.weights:
            found = compared(network, weights)
            name = f"{network.linear.tokens} pixels, {layers} layers, {weights} weights"
            notes[name] = found
            suffix = f"{network.linear.tokens}_{weights}"
            quality |= {f"{key.replace(' ', '_')}_{suffix}": ratio["median"] for key, ratio in found["ratios"].items()}
    return Receipt(
        kind="benchmark",
        name="generation",
        way="linear beside softmax attention",
        seed=order.seed,
        quality=quality,
        cost=Cost(seconds=Reading(time.perf_counter() - begin, "wall clock of the whole benchmark")),
        config={**asdict(order), "out": None},
        notes=notes | {"how": "windows of pixels at five places of the image, their mean for all pixels"},
    )


@torch.inference_mode()
def compared(network: Network, weights: str) -> dict[str, Any]:
    order = network.order
    linear, softmax = {"linear": network.linear_maker(weights)}, network.softmax_makers(weights)
    best = {
        "linear": quickest(network, linear, order.linear_batches),
        "softmax": quickest(network, softmax, [item for item in order.softmax_batches if network.affordable(item)]),
    }
    many = {name: network.side(*choice[1:]) for name, choice in best.items()}
    turns(list(many.values()), (*PLACES, *TENTHS), order.rounds)
    kernel, alone, _ = quickest(network, softmax, [1])
    one = {"linear": network.side(linear["linear"], 1), "softmax": network.side(alone, 1)}
    turns(list(one.values()), (*PLACES, *TENTHS), order.rounds)
    # Without a cache there is no step whose weights could be rounded.
    none = without_cache(network) if weights == "float" else {}
    return {
        "ratios": ratios(many, one, none),
        "best": {
            "linear batch": best["linear"][2],
            "softmax batch": best["softmax"][2],
            "softmax kernel": best["softmax"][0],
            "softmax kernel at batch 1": kernel,
        },
        **speeds(many, one, none, network.linear.tokens),
        "cache read, GB/s at best": network.bytes_read() / median(many["softmax"].means()) / 1e9,
    }


def ratios(many: dict[str, Side], one: dict[str, Side], none: dict[str, Side]) -> dict[str, Any]:
    """Linear's gain at each side's best batch and at batch 1, and how its cost keeps from first to last tenth."""
    found = {
        "throughput": ratio(many["softmax"].means(), many["linear"].means()),
        "latency": ratio(one["softmax"].means(), one["linear"].means()),
        "latency cpu": ratio(one["softmax"].means(1), one["linear"].means(1)),
        "last to first tenth": last_to_first(many["linear"]),
        "last to first tenth latency": last_to_first(one["linear"]),
        "last to first tenth softmax": last_to_first(many["softmax"]),
    }
    if none:
        quick = many["linear"].means()
        found["no cache"] = ratio(none["none"].means() * len(quick), quick)
    return found


def speeds(many: dict[str, Side], one: dict[str, Side], none: dict[str, Side], tokens: int) -> dict[str, Any]:
    named = many | {f"{name}, batch 1": side for name, side in one.items()} | none
    return {
        "images a second": {name: 1 / tokens / median(side.means()) for name, side in (many | none).items()},
        "images a cpu second": {name: 1 / tokens / median(side.means(1)) for name, side in many.items()},
        "seconds an image at batch 1": {name: tokens * median(side.means()) for name, side in one.items()},
        "microseconds a pixel by place": {
            name: {str(place): round(1e6 * median(lap[0] for lap in laps), 2) for place, laps in side.laps.items()}
            for name, side in named.items()
        },
    }


def without_cache(network: Network) -> dict[str, Side]:
    """The side that computes everything anew, measured in one round: a pixel alone may take seconds."""
    _, maker, batch = quickest(network, {"none": network.none_maker()}, network.order.none_batches)
    side = network.side(maker, batch)
    turns([side], PLACES, 1)
    return {"none": side}


def quickest(network: Network, makers: dict[str, Maker], batches: Any) -> tuple[str, Maker, int]:
    """The maker and batch that take the least time a pixel of an image, by a window each in the first and last half."""
    found = []
    for name, maker in makers.items():
        for batch in batches:
            side = network.side(maker, batch)
            turns([side], (0.25, 0.75), 1)
            found.append((median(side.means(places=(0.25, 0.75))), name, batch))
    _, name, batch = min(found)
    return name, makers[name], batch


def turns(sides: list[Side], places: tuple[float, ...], rounds: int) -> None:
    """Time the sides in turn at each place, round after round."""
    for _ in range(rounds):
        for place in places:
            for side in sides:
                side.lap(place)


def ratio(slow: list[float], quick: list[float]) -> dict[str, Any]:
    return asdict(Spread.of([a / b for a, b in zip(slow, quick, strict=True)]))


def last_to_first(side: Side) -> dict[str, Any]:
    first, last = (side.means(places=(place,)) for place in TENTHS)
    return ratio(last, first)


def _memory(decoder: Decoder) -> list[torch.Tensor]:
    if isinstance(decoder, CachedDecoder):
        return [decoder.cache]
    return [item for state in getattr(decoder, "states", []) for item in (state.kv, state.normaliser)]


def main() -> None:
    order = tyro.cli(Generation)
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
