"""The attention benchmarks' rows and tables, made from their receipts; for benchmarks/readme.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

Found = dict[str, Any]
SOFTMAX = "softmax (SDPA)"
PEERS = {"PyPI build": "old library, PyPI build", "native build": "old library, -march=native"}
LIMIT = 98e9
"""FLOPs a second that sgemm reaches on one core of the machine the receipts are from."""


def causal(receipt: Receipt) -> str:
    """Line 1: CPU time against the old library's two builds and SDPA, against the machine's limit, and memory."""
    tokens, flops = receipt.notes["tokens"], receipt.notes["flops"]
    longest, shortest = tokens["16384"]["with backward"], tokens["1024"]["with backward"]
    cpu = longest["linear"]["cpu_seconds"]["median"]
    limit = flops["16384"]["with backward"] / LIMIT
    against = [
        f"{name} {times(longest[side])}" for name, side in (*PEERS.items(), ("SDPA", SOFTMAX)) if side in longest
    ]
    memory = ", ".join(
        f"{int(size):,}: {ratio(item['over inputs and gradients'])}x" for size, item in receipt.notes["memory"].items()
    )
    return (
        f"forward and backward, CPU time of the others over ours, 16,384 tokens: {', '.join(against)}; 1,024 tokens: "
        f"SDPA {times(shortest[SOFTMAX])}; {1e3 * cpu:.0f} ms of CPU at 16,384, {cpu / limit:.1f}x the limit of "
        f"{1e3 * limit:.0f} ms; peak memory over inputs and gradients, {memory}"
    )


def clustered(receipt: Receipt) -> str:
    """Line 3: where it is faster than SDPA, and by how much at 16,384 tokens, CPU and wall."""
    tokens = receipt.notes["tokens"]
    parts = []
    for what in ("forward", "with backward"):
        rows = [
            f"{int(size):,}: {times(found[what][SOFTMAX])} CPU, {times(found[what][SOFTMAX], 'seconds')} wall"
            for size, found in tokens.items()
        ]
        parts.append(f"SDPA's time over improved clustered's, {what}: {'; '.join(rows)}")
    longest = tokens["16384"]["forward"]
    peers = [
        f"{name} {times(longest[f'{side}, improved'])} CPU"
        for name, side in PEERS.items()
        if f"{side}, improved" in longest
    ]
    return "; ".join([*parts, f"the old library's improved form at 16,384, forward: {', '.join(peers)}"])


def generation(receipt: Receipt) -> str:
    """Line 2: throughput, latency and the cost of the last tenth, network by network."""
    parts = []
    for name, found in receipt.notes.items():
        if "ratios" not in found:
            continue
        at = {key: item["median"] for key, item in found["ratios"].items()}
        alone = f"{at['no cache']:,.0f}x without a cache, " if "no cache" in at else ""
        parts.append(
            f"{name}: {at['throughput']:.1f}x images a second (batches {found['best']['linear batch']} and "
            f"{found['best']['softmax batch']}), {at['latency']:.2f}x at batch 1, {alone}"
            f"last tenth {at['last to first tenth']:.2f}x of the first (batch 1: "
            f"{at['last to first tenth latency']:.2f}x)"
        )
    return "; ".join(parts)


def pretrained(receipt: Receipt) -> str:
    """Line 4: the recommended setting of one model."""
    found, notes = receipt.quality, receipt.notes
    return (
        f"{receipt.name.rpartition('/')[2]} ({notes['tokens']:,} tokens, {notes['metric']}): "
        f"{100 * found['share']:.1f} % (seeds {100 * found['share_lowest_seed']:.1f} to "
        f"{100 * found['share_highest_seed']:.1f}) at {found['flops_share']:.2f}x the FLOPs with "
        f"{found['clusters']:.0f} clusters, top {found['topk']:.0f}, {found['rerouted']:.0f} of "
        f"{found['modules']:.0f} layers"
    )


def pretrained_table(folder: Path) -> str:
    """Every model's table, as its own benchmark prints it."""
    import pretrained_attention

    return pretrained_attention.tables(folder) or "Not measured yet."


def times(found: Found, clock: str = "cpu_seconds") -> str:
    (name,) = [key for key in found if key.startswith(f"{clock} over ")]
    median = found[name]["median"]
    return f"{median:.0f}x" if median >= 10 else f"{median:.1f}x"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def speed_table(path: Path, passes: tuple[str, ...] = ("forward", "with backward")) -> str:
    """CPU milliseconds of every side at every length."""
    if not path.is_file():
        return "Not measured yet."
    tokens = load_receipt(path).notes["tokens"]
    sides = list(next(iter(tokens.values()))["forward"])
    head = ["tokens", "pass", *sides]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size, found in tokens.items():
        for what in passes:
            cells = [f"{1e3 * found[what][side]['cpu_seconds']['median']:.0f}" for side in sides]
            rows.append("| " + " | ".join([f"{int(size):,}", what, *cells]) + " |")
    return "\n".join([*rows, "", "Milliseconds of CPU time, all threads."])
