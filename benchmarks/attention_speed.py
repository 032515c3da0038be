"""Attention on the CPU beside what one would use instead: CPU time, wall time and memory, everything in one process.

    python benchmarks/attention_speed.py causal --peer peer/pypi --peer-native peer/native
    python benchmarks/attention_speed.py clustered --peer peer/pypi --peer-native peer/native

Batch 1, 8 heads, dim 64, float32, two threads. The sides take turns, round by round; what is written down are medians
of process CPU time and of wall time, and ratios taken round by round. `benchmarks/peers.py` says how to build the old
library; without it its columns stay empty. Run it on a quiet machine with OMP_WAIT_POLICY=PASSIVE: a thread that waits
by spinning is charged for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from torch import Tensor
from torch.nn.functional import elu

from common import RECEIPTS, keep
from peers import Attention, load_peer
from scrimp.attend import clustered_attention, improved_clustered_attention, linear_attention, softmax_attention
from scrimp.meter import Cost, Reading, count_flops, peak_resident
from scrimp.meter.clock import Spread, lap
from scrimp.primitives.draw import generator_for
from scrimp.receipts import Receipt

SOFTMAX, CHUNKED, CAUSAL_CLUSTERED = "softmax (SDPA)", "chunked torch", "improved clustered, causal"
PYPI, NATIVE = "old library, PyPI build", "old library, -march=native"


@dataclass(frozen=True)
class Speed:
    """Times of the family's members beside SDPA and the old library."""

    peer: Path | None = None
    """Folder of the old library's PyPI build."""
    peer_native: Path | None = None
    """Folder of its -march=native build."""
    tokens: tuple[int, ...] = (1024, 2048, 4096, 16384)
    rounds: tuple[int, ...] = (21, 15, 9, 5)
    """Alternating rounds at each number of tokens."""
    heads: int = 8
    dim: int = 64
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Causal(Speed):
    """Causal linear attention, and the causal form of the clustered one, forward and with backward."""

    out: Path = RECEIPTS / "attention" / "causal.json"


@dataclass(frozen=True)
class Clustered(Speed):
    """Clustered and improved clustered attention, forward and with backward."""

    clusters: int = 100
    topk: int = 32
    out: Path = RECEIPTS / "attention" / "clustered.json"


@dataclass(frozen=True)
class Side:
    """One way to compute attention: a call, and whether it wants [batch, tokens, heads, dim]."""

    call: Attention
    tokens_first: bool = False


def causal_sides(order: Causal, tokens: int) -> dict[str, Side]:
    sides = {
        "linear": Side(lambda q, k, v: linear_attention(q, k, v, causal=True)),
        CHUNKED: Side(chunked_linear),
        CAUSAL_CLUSTERED: Side(lambda q, k, v: improved_clustered_attention(q, k, v, causal=True)),
        SOFTMAX: Side(lambda q, k, v: softmax_attention(q, k, v, causal=True)),
    }
    for name, peer in _peers(order).items():
        sides[name] = Side(peer.causal_linear(tokens=tokens, dim=order.dim), tokens_first=True)
    return sides


def clustered_sides(order: Clustered, tokens: int) -> dict[str, Side]:
    c, k = order.clusters, order.topk
    sides = {
        "improved clustered": Side(lambda q, key, v: improved_clustered_attention(q, key, v, clusters=c, topk=k)),
        "clustered": Side(lambda q, key, v: clustered_attention(q, key, v, clusters=c)),
        SOFTMAX: Side(softmax_attention),
    }
    for name, peer in _peers(order).items():
        sides[f"{name}, improved"] = Side(peer.improved_clustered(tokens=tokens, clusters=c, topk=k), tokens_first=True)
        sides[f"{name}, clustered"] = Side(peer.clustered(tokens=tokens, clusters=c), tokens_first=True)
    return sides


def _peers(order: Speed) -> dict[str, Any]:
    named = {PYPI: order.peer, NATIVE: order.peer_native}
    return {name: load_peer(folder) for name, folder in named.items() if folder is not None}


def chunked_linear(query: Tensor, key: Tensor, value: Tensor, *, chunk: int = 128) -> Tensor:
    """Causal linear attention as one writes it in torch: chunks, prefix sums of their states, autograd."""
    q, k = elu(query) + 1, elu(key) + 1
    q, k, v = (x.unflatten(2, (x.shape[2] // chunk, chunk)) for x in (q, k, value))
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    sums = (q @ k.transpose(-1, -2)).tril() @ v + q @ before
    return (sums[..., :-1] / (sums[..., -1:] + 1e-6)).flatten(2, 3)


def run(order: Causal | Clustered) -> Receipt:
    torch.set_num_threads(order.threads)
    sides = causal_sides if isinstance(order, Causal) else clustered_sides
    found = {
        str(tokens): at_length(sides(order, tokens), order, tokens, rounds)  # type: ignore[arg-type]
        for tokens, rounds in zip(order.tokens, order.rounds, strict=True)
    }
    first = next(iter(sides(order, order.tokens[-1]).values()))  # type: ignore[arg-type]
    longest = found[str(order.tokens[-1])]
    ours = longest["with backward"][next(iter(longest["with backward"]))]
    name = "causal-linear" if isinstance(order, Causal) else "clustered"
    work = {
        str(tokens): {
            "forward": count_flops(forward(first, inputs(order, tokens, first))).value,
            "with backward": count_flops(training(first, inputs(order, tokens, first))).value,
        }
        for tokens in order.tokens
    }
    return Receipt(
        kind="benchmark",
        name=f"attention-speed/{name}",
        way=next(iter(longest["forward"])),
        seed=order.seed,
        cost=Cost(
            seconds=Reading(ours["seconds"]["median"], "wall, median, forward and backward of the longest"),
            cpu_seconds=Reading(ours["cpu_seconds"]["median"], "process CPU, median, the same"),
            flops=Reading(work[str(order.tokens[-1])]["with backward"], "counted, the same"),
        ),
        config={key: _plain(value) for key, value in asdict(order).items() if key != "out"},
        notes={"tokens": found, "flops": work, "memory": memory(order)},
    )


def at_length(sides: dict[str, Side], order: Speed, tokens: int, rounds: int) -> dict[str, Any]:
    """Times of every side at this number of tokens, in turn."""
    tensors = {name: inputs(order, tokens, side) for name, side in sides.items()}
    passes = {"forward": forward, "with backward": training}
    return {
        what: in_turn({name: make(side, tensors[name]) for name, side in sides.items()}, rounds)
        for what, make in passes.items()
    }


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median and quartiles of each call's times, and of the other sides' over the first one's, round by round."""
    for call in calls.values():
        call()
    laps = [{name: lap(call) for name, call in calls.items()} for _ in range(rounds)]
    ours = next(iter(calls))
    return {
        name: {
            clock: asdict(Spread.of([each[name][index] for each in laps]))
            for index, clock in enumerate(("seconds", "cpu_seconds"))
        }
        | {
            f"{clock} over {ours}": asdict(Spread.of([each[name][index] / each[ours][index] for each in laps]))
            for index, clock in enumerate(("seconds", "cpu_seconds"))
        }
        for name in calls
    }


def inputs(order: Speed, tokens: int, side: Side) -> list[Tensor]:
    generator = generator_for(order.seed, tokens)
    shape = (1, order.heads, tokens, order.dim)
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    return [x.transpose(1, 2).contiguous() if side.tokens_first else x for x in tensors]


def forward(side: Side, tensors: list[Tensor]) -> Callable[[], Any]:
    query, key, value, _ = tensors

    def call() -> None:
        with torch.no_grad():
            side.call(query, key, value)

    return call


def training(side: Side, tensors: list[Tensor]) -> Callable[[], Any]:
    leaves, upstream = [x.detach().requires_grad_() for x in tensors[:3]], tensors[3]

    def call() -> None:
        torch.autograd.grad(side.call(*leaves), leaves, upstream)

    return call


def memory(order: Causal | Clustered) -> dict[str, Any]:
    """Peak resident set of a fresh process that runs ours forward and backward, over that of one with 64 tokens.

    Inputs, the upstream gradient, the output and the gradients are in it; it is set against inputs and gradients.
    """
    settings = (type(order).__name__, order.heads, order.dim, order.threads)
    least = peak_resident("attention_speed:once", 64, *settings).value
    found = {}
    for tokens in (order.tokens[-1], 4 * order.tokens[-1]):
        peak = peak_resident("attention_speed:once", tokens, *settings).value
        grown = None if peak is None or least is None else peak - least
        share = None if grown is None else grown / (6 * 4 * order.heads * tokens * order.dim)
        found[str(tokens)] = {"peak bytes": grown, "over inputs and gradients": share}
    return found


def once(tokens: int, kind: str, heads: int, dim: int, threads: int) -> None:
    """Forward and backward of ours, for `memory`."""
    torch.set_num_threads(threads)
    order = {"Causal": Causal, "Clustered": Clustered}[kind](heads=heads, dim=dim)
    sides = causal_sides if kind == "Causal" else clustered_sides
    side = next(iter(sides(order, tokens).values()))  # type: ignore[arg-type]
    training(side, inputs(order, tokens, side))()


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def main() -> None:
    causal = Annotated[Causal, tyro.conf.subcommand("causal")]
    clustered = Annotated[Clustered, tyro.conf.subcommand("clustered")]
    order = tyro.cli(Union[causal, clustered])  # type: ignore[arg-type]  # noqa: UP007
    keep(run(order), order.out)


if __name__ == "__main__":
    main()
