"""The attentions that take softmax's place, what each costs, and what a model gives with one of them."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pretrained.task import Task
from scrimp import attend
from scrimp.meter import Reading, count_flops
from scrimp.primitives.draw import generator_for

Calls = Counter[Any]  # of `scrimp.attend.reroute.Call`: module, shape of the queries, shape of the keys


@dataclass(frozen=True)
class Way:
    """One attention with its settings; ``layers`` is the regular expression that takes the rerouted modules."""

    attention: str
    clusters: int | None = None
    topk: int | None = None
    layers: str | None = None

    @property
    def random(self) -> bool:
        return self.clusters is not None

    def function(self, generator: torch.Generator) -> Callable[..., Tensor]:
        if self.attention == "softmax":
            return attend.softmax_attention
        if self.attention == "linear":
            return attend.linear_attention
        settings: dict[str, Any] = {"clusters": self.clusters, "generator": generator}
        if self.attention == "clustered":
            return functools.partial(attend.clustered_attention, **settings)
        return functools.partial(attend.improved_clustered_attention, topk=self.topk, **settings)

    def settings(self) -> str:
        parts = [f"{self.clusters} clusters" if self.clusters else "", f"top {self.topk}" if self.topk else ""]
        return ", ".join(filter(None, parts)) or "-"


PLAIN = Way("softmax")


def grid(clusters: Sequence[int], topk: Sequence[int]) -> list[Way]:
    """Softmax, linear, clustered and improved clustered, in the order of the table."""
    plain = [Way("clustered", number) for number in clusters]
    return [
        Way("softmax"),
        Way("linear"),
        *plain,
        *(Way("improved", number, kept) for number in clusters for kept in topk),
    ]


@torch.no_grad()
def outputs_of(task: Task, way: Way, *, seed: int) -> tuple[list[Tensor], Calls, Calls]:
    """The task's outputs with the way inside the model; the calls it served, and those it left."""
    outputs, served, left = [], Counter(), Counter()
    for number in range(task.samples):
        fn = way.function(generator_for(seed, number))
        with attend.attention(fn, model=task.model, where=way.layers) as routed:
            outputs.append(task.output(number))
        served.update(routed.calls)
        left.update(routed.left)
    return outputs, served, left


class Price:
    """FLOPs of attention calls, each shape counted once by the meter while the operators run."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._known: dict[Any, Reading] = {}

    def of(self, way: Way, calls: Calls) -> float:
        """FLOPs of all the calls; softmax's only over the pairs that its queries may see."""
        seen = self._task.seen if way.attention == "softmax" else 1.0
        return seen * sum(count * (self._one(way, call).value or 0.0) for call, count in calls.items())

    def missed(self, way: Way, calls: Calls) -> list[str]:
        """Operators without a formula among them."""
        return sorted({name for call in calls for name in self._one(way, call).missed})

    def _one(self, way: Way, call: Any) -> Reading:
        name = (way.attention, way.clusters, way.topk, call.query, call.key)
        if name not in self._known:
            generator = generator_for(0)
            query, key, value = (torch.randn(shape, generator=generator) for shape in (call.query, call.key, call.key))
            fn, options = way.function(generator), {"causal": True} if self._task.causal else {}
            self._known[name] = count_flops(lambda: fn(query, key, value, **options))
        return self._known[name]


def row_of(
    task: Task, way: Way, price: Price, *, seed: int, original: Sequence[Tensor]
) -> tuple[dict[str, Any], list[Tensor]]:
    """One line of the table: settings, scores, distance from the ``original`` outputs, FLOPs; and the outputs."""
    outputs, served, left = outputs_of(task, way, seed=seed)
    flops = price.of(way, served) + price.of(PLAIN, left)
    row = {
        **asdict(way),
        "rerouted": len({call.module for call in served}),
        "modules": len({call.module for call in [*served, *left]}),
        "seed": seed if way.random else None,
        **task.score(outputs),
        "output_error": difference(original, outputs),
        "flops": flops,
        "flops_share": flops / price.of(PLAIN, served + left),
        "flops_share_of_all_pairs": flops / price.of(PLAIN, served + left) * task.seen,
        "flops_missed": price.missed(way, served),
    }
    return row, outputs


def partly(task: Task, way: Way, price: Price, *, share: float) -> Way | None:
    """The way in as few layers as bring the FLOPs down to ``share`` of softmax's; the others keep exact attention.

    Exact stay the layers whose attention the way changes most, seen on a sample that is not scored. ``None`` where
    the way costs more even in all of them.
    """
    errors, calls = layer_errors(task, way)
    whole, spent = price.of(PLAIN, calls), price.of(way, calls)
    if spent > share * whole:
        return None
    swapped = sorted(errors, key=lambda name: errors[name])
    while swapped:
        one = Counter({call: count for call, count in calls.items() if call.module == swapped[-1]})
        spent += price.of(PLAIN, one) - price.of(way, one)
        if spent > share * whole:
            break
        swapped.pop()
    return dataclasses.replace(way, layers=f"^({'|'.join(map(re.escape, sorted(swapped)))})$")


@torch.no_grad()
def layer_errors(task: Task, way: Way) -> tuple[dict[str, float], Calls]:
    """How far each layer's attention comes out from softmax's, given the inputs it has in the model as it is."""
    with attend.attention(attend.softmax_attention, model=task.model) as routed:
        task.output(task.samples)
    errors: dict[str, float] = {str(call.module): 0.0 for call in routed.calls}

    def probe(name: str) -> Callable[..., Tensor]:
        def both(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            exact = attend.softmax_attention(query, key, value, **options)
            near = way.function(generator_for(0))(query, key, value, **options)
            errors[name] = max(errors[name], float((near - exact).norm() / exact.norm()))
            return exact

        return both

    with attend.attention({f"^{re.escape(name)}$": probe(name) for name in errors}, model=task.model) as routed:
        task.output(task.samples)
    return errors, routed.calls


def difference(original: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Mean over samples of the relative Euclidean distance; of whole numbers, the share that changed."""

    def one(before: Tensor, after: Tensor) -> float:
        if not before.is_floating_point():
            return float((before != after).double().mean())
        return float((after - before).norm() / before.norm())

    return statistics.mean(one(*pair) for pair in zip(original, outputs, strict=True))
