"""The adapter benchmark's rows, tables and picture, made from its receipts alone; for benchmarks/readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

UNMEASURED = "Not measured yet."
METRICS = {"cifar10": ("accuracy", 1), "elpv": ("accuracy", 1), "shakespeare": ("perplexity", -1)}
"""The quality of each task that counts; 1 where more is better."""
BASELINE, OURS = "lora-4", "nola"
TENTH, NEAR = 0.1, 0.5  # of LoRA r4's bytes; points of accuracy, or twice that in percent of perplexity
RANGE = (1_000, 100_000)  # bytes between which NOLA's curve is to be above the others

Runs = Mapping[int, Receipt]


def beside_lora(receipts: Sequence[Receipt]) -> str:
    """Line 1, task by task: the best of NOLA's files of at most a tenth of LoRA r4's bytes, against LoRA r4."""
    parts = []
    for task, ways in by_task(receipts).items():
        base = ways.get(BASELINE)
        small = {way: runs for way, runs in ways.items() if base and is_small(runs, base) and way.startswith(OURS)}
        if not base or not small:
            parts.append(f"{task}: not both sides yet")
            continue
        way = max(small, key=lambda name: statistics.fmean(gains(task, small[name], base) or [float("-inf")]))
        unit = "points" if METRICS[task][1] > 0 else "% of perplexity"
        share = size_of(small[way]) / size_of(base)
        apart = spread(apart_from(task, small[way], base), 1)
        parts.append(f"{task}: {way} ({size_of(small[way]):,} bytes, {share:.3f}x) {apart} {unit}")
    return "; ".join(parts)


def rounding(receipts: Sequence[Receipt]) -> str:
    """What storing NOLA's numbers at 4 bits changes, file by file of the same training."""
    parts = []
    for task, ways in by_task(receipts).items():
        pairs = [(f"{way}-4bit", way) for way in ways if f"{way}-4bit" in ways]
        found = [f"{whole} {spread(apart_from(task, ways[short], ways[whole]), 2)}" for short, whole in pairs]
        parts.append(f"{task}: {', '.join(found)}")
    return "; ".join(parts)


def curve_above(receipts: Sequence[Receipt]) -> str:
    """Line 2, task by task: files of others between 1 and 100 KB, and whether a file of NOLA as small is as good."""
    parts = []
    for task, ways in by_task(receipts).items():
        others = {way: runs for way, runs in ways.items() if not way.startswith(OURS) and within(size_of(runs))}
        behind = [text for way, runs in others.items() if (text := beaten_by(task, ways, way, runs))]
        said = f"; not above {', '.join(behind)}" if behind else ""
        parts.append(f"{task}: above {len(others) - len(behind)} of {len(others)} files{said}")
    return ". ".join(parts)


def beaten_by(task: str, ways: Mapping[str, Runs], way: str, runs: Runs) -> str:
    """How far the best of NOLA's files of at most these bytes is behind, where it is."""
    mine = [other for name, other in ways.items() if name.startswith(OURS) and size_of(other) <= size_of(runs)]
    best = max((statistics.fmean(found) for other in mine if (found := gains(task, other, runs))), default=None)
    if best is None:
        return f"{way} (no file so small)"
    return f"{way} ({best:+.1f})" if best < 0 else ""


def step_times(receipts: Sequence[Receipt]) -> str:
    """CPU time of a training step over LoRA r4's."""
    found = sorted((receipt.name.split("/")[1], receipt.way, receipt.quality) for receipt in receipts)
    return "; ".join(
        f"{task} {way} {quality['cpu_ratio']:.2f}x ({quality['cpu_ratio_low']:.2f} to {quality['cpu_ratio_high']:.2f})"
        for task, way, quality in found
        if way.startswith(OURS)
    )


def memory(receipt: Receipt) -> str:
    """Line 4: peaks over LoRA's, and switching."""
    quality = receipt.quality
    peaks = ", ".join(
        f"{name.removesuffix('_peak_to_lora').replace('_', ' ')} {value:.3f}x"
        for name, value in quality.items()
        if name.endswith("_peak_to_lora")
    )
    changed = quality["adapters_changed"]
    return f"peak to LoRA's: {peaks}; switching {quality['switch_ms']:.1f} ms CPU, {changed:.0f} adapters changed"


def by_task(receipts: Sequence[Receipt]) -> dict[str, dict[str, dict[int, Receipt]]]:
    """Runs by task, way and seed."""
    found: dict[str, dict[str, dict[int, Receipt]]] = {}
    for receipt in receipts:
        if receipt.seed is not None:
            found.setdefault(receipt.name.split("/")[1], {}).setdefault(receipt.way, {})[receipt.seed] = receipt
    return {task: found[task] for task in METRICS if task in found}


def apart_from(task: str, runs: Runs, base: Runs) -> list[float]:
    """Distance from another way's run of the same seed: points of accuracy, or % of perplexity."""
    metric, better = METRICS[task]
    pairs = [(runs[seed].quality[metric], base[seed].quality[metric]) for seed in runs if seed in base]
    return [100 * (mine - other) if better > 0 else 100 * (mine / other - 1) for mine, other in pairs]


def gains(task: str, runs: Runs, base: Runs) -> list[float]:
    """The same, positive where it is better."""
    return [METRICS[task][1] * value for value in apart_from(task, runs, base)]


def values_of(task: str, runs: Runs) -> list[float]:
    """Accuracy in %, or perplexity as it is."""
    metric, better = METRICS[task]
    return [(100 if better > 0 else 1) * receipt.quality[metric] for receipt in runs.values()]


def size_of(runs: Runs) -> int:
    return int(next(iter(runs.values())).notes["adapter_bytes"])


def is_small(runs: Runs, base: Runs) -> bool:
    return 0 < size_of(runs) <= TENTH * size_of(base)


def within(size: int) -> bool:
    return RANGE[0] <= size <= RANGE[1]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and sample deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def loaded(out: Path, task: str) -> dict[str, dict[int, Receipt]]:
    """The receipts of a task by way and seed."""
    return by_task([load_receipt(path) for path in sorted((out / task).glob("*-s*.json"))]).get(task, {})


def table_text(out: Path, task: str) -> str:
    """One task's table in markdown, by bytes; "-" is what was not measured."""
    ways = loaded(out, task)
    if not ways:
        return UNMEASURED
    unit = ("accuracy, %", "points to LoRA r4") if METRICS[task][1] > 0 else ("perplexity", "% to LoRA r4")
    head = ["way", "numbers", "bytes on disk", "bytes a number", *unit, "CPU time a step", "saved activations", "seeds"]
    about = next(iter(next(iter(ways.values())).values())).notes.get("task", task)
    rows = [f"{about}.", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for way in sorted(ways, key=lambda name: (size_of(ways[name]), name)):
        rows.append(_row(out, task, way, ways))
    return "\n".join(rows)


def _row(out: Path, task: str, way: str, ways: Mapping[str, Runs]) -> str:
    runs, base = ways[way], ways.get(BASELINE, {})
    first = next(iter(runs.values()))
    numbers, size = first.notes["trainable"], size_of(runs)
    each = f"{size / numbers:.2f}" if numbers else "-"
    quality = [spread(values_of(task, runs), 1), spread(apart_from(task, runs, base), 1)]
    step = step_cells(out, task, first.config.get("training_of", way))
    cells = [first.config.get("about", way), f"{numbers:,}", f"{size:,}", each, *quality, *step, str(len(runs))]
    return "| " + " | ".join(cells) + " |"


def step_cells(out: Path, task: str, way: str) -> list[str]:
    path = out / task / "step-time" / f"{way}.json"
    if not path.is_file():
        return ["-", "-"]
    quality = load_receipt(path).quality
    return [f"{quality['cpu_ratio']:.2f}x", f"{quality['saved_ratio']:.2f}x"]


def card(receipts: Path) -> str:
    """The method card's tables: every task that was measured, and memory."""
    tasks = [table_text(receipts / "adapters", task) for task in METRICS if (receipts / "adapters" / task).is_dir()]
    peaks = receipts / "adapter-memory.json"
    return "\n\n".join([*tasks, *([memory_table(peaks)] if peaks.is_file() else [])]) or UNMEASURED


def memory_table(path: Path) -> str:
    notes = load_receipt(path).notes
    rows = ["| frozen layers | trained | peak of the process, MB | to LoRA's |", "|---|---|---|---|"]
    for stack, peaks in notes["peak bytes"].items():
        for way, peak in peaks.items():
            share = f"{peak / peaks[BASELINE]:.3f}x"
            rows.append(f"| {stack} | {way} | {peak / 1e6:,.0f} | {share} |")
    switched = notes["switching"]
    ending = (
        f"Switching among 1,000 adapters stored on a ViT-Ti: {switched['median ms']:.1f} ms of CPU time, median; "
        f"{switched['adapters changed']:.0f} came back changed."
    )
    return "\n".join([*rows, "", ending])


def curve(out: Path, task: str) -> Any:
    """The metric against bytes on disk, logarithmic: lines of NOLA, marks of the others."""
    from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

    figure, ways = empty_figure(), loaded(out, task)
    points = {way: (size_of(runs), statistics.fmean(values_of(task, runs))) for way, runs in ways.items()}
    lines = {
        "NOLA, 32 bits": lambda way: not way.endswith("bit"),
        "NOLA, 4 bits": lambda way: way.endswith("-4bit"),
        "NOLA, 2 bits": lambda way: way.endswith("-2bit"),
    }
    for (label, wanted), colour in zip(lines.items(), COLOURS, strict=False):
        mine = [at for way, at in points.items() if way.startswith(OURS) and "trained" not in way and wanted(way)]
        x, y = zip(*sorted(mine), strict=True) if mine else ((), ())
        figure.add_scatter(x=list(x), y=list(y), name=label, mode="lines+markers", line={"color": colour})
    others = {way: at for way, at in points.items() if not way.startswith(OURS) and at[0]}
    figure.add_scatter(
        x=[size for size, _ in others.values()],
        y=[value for _, value in others.values()],
        text=list(others),
        name="peft and the usual",
        mode="markers+text",
        textposition="top center",
        textfont={"size": 9},
        marker={"color": BASELINE_COLOUR, "symbol": "square", "size": 7},
    )
    figure.update_xaxes(type="log", range=[2, 7], title_text=f"{task}: bytes on disk")
    figure.update_yaxes(title_text="accuracy, %" if METRICS[task][1] > 0 else "perplexity")
    return figure
