"""Puts the figures of the receipts there are into benchmarks/README.md and the method card, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

import attention_tables as attention
import importance_sampling as sampling
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt

README = Path(__file__).resolve().parent / "README.md"
RECEIPTS = README.parent.parent / "receipts"
DOCS = README.parent.parent / "docs"
MARKERS = ("<!-- figures -->", "<!-- /figures -->")
UNKNOWN = "not measured yet"
THRIFTY = [policy for policy in sampling.POLICIES if policy != "uniform"]


@dataclass(frozen=True)
class Readme:
    """Rewrite the tables of benchmarks/README.md from the receipts."""

    path: Path = README


@dataclass(frozen=True)
class Line:
    """One acceptance line: its number and claim, what measures it, what it found, what was wanted."""

    number: str
    what: str
    script: str
    receipt: str
    figure: Callable[[Receipt], str]
    target: str


def study_time(receipt: Receipt) -> str:
    seconds, cpu = receipt.cost.seconds.value, receipt.cost.cpu_seconds.value
    runs, cores = receipt.notes["runs"], receipt.notes["cores"]
    return f"{number(seconds, '.0f')} s wall, {number(cpu, '.0f')} s CPU, {cores} cores, {runs} runs"


def mean_gradient(receipt: Receipt) -> str:
    quality, notes = receipt.quality, receipt.notes
    return (
        f"{percent(quality['mean_gradient_error'])} with {notes['images a draw']:,} images a draw "
        f"(its noise: {percent(quality['mean_gradient_noise'])}; by uniform draws "
        f"{percent(quality['mean_gradient_noise_uniform'])}); with {notes['images a draw, one batch']} images a draw "
        f"{percent(quality['mean_gradient_error_one_batch'])} "
        f"(noise {percent(quality['mean_gradient_noise_one_batch'])})"
    )


def correlation(receipt: Receipt) -> str:
    seen, unseen = (receipt.quality[f"spearman_{part}_images"] for part in ("training", "test"))
    return f"{number(seen, '.3f')} on training images, {number(unseen, '.3f')} on test images"


def overhead(receipt: Receipt) -> str:
    own, ratios = receipt.notes["own work"], receipt.notes["ratios"]
    alone = ", ".join(
        f"{name} {percent(item['share'])} ({microseconds(item['cpu_seconds'])} a step)" for name, item in own.items()
    )
    spreads = {name: item["cpu_seconds"] for name, item in ratios.items()}
    whole = ", ".join(
        f"{name} {change(item['median'])} ({change(item['low'])} to {change(item['high'])})"
        for name, item in spreads.items()
    )
    pairs = next(iter(spreads.values()))["count"]
    return f"own work: {alone}; paired, median and quartiles of {pairs} pairs: {whole}"


def flop_error(receipt: Receipt) -> str:
    quality = receipt.quality
    return (
        f"forward {percent(quality['forward_error'], 3)}, with backward {percent(quality['training_error'], 3)} off; "
        f"torch's own counter {percent(1 - (quality['share_counted_by_torch'] or math.nan), 1)} short"
    )


LINES = (
    Line(
        "1",
        "`scrimp study` from nothing to table and report",
        "study_time.py",
        "study-time.json",
        study_time,
        "under 240 s wall on 2 cores",
    ),
    Line(
        "3",
        "mean of the weighted gradient over 2,000 draws, against the full batch's",
        "unbiased.py",
        "unbiased.json",
        mean_gradient,
        "within 1 %",
    ),
    Line(
        "3",
        "Spearman of the bound and exact per-sample gradient norms, trained network",
        "unbiased.py",
        "unbiased.json",
        correlation,
        "above 0.9",
    ),
    Line(
        "4",
        "CPU time that a policy with its gate shut adds",
        "overhead.py",
        "overhead.json",
        overhead,
        "under 1 %",
    ),
    Line(
        "4",
        "FLOP counter on ViT-Ti/16, CPU",
        "flop_counter.py",
        "flop-counter.json",
        flop_error,
        "within 0.1 %",
    ),
)
ATTENTION_LINES = (
    Line(
        "1",
        "causal linear attention, batch 1, 8 heads, dim 64",
        "attention_speed.py causal",
        "attention/causal.json",
        attention.causal,
        "at 16,384 tokens 4x (PyPI build), 2x (native build), 35x (SDPA); at 1,024 2x (SDPA); within 4x of the limit; "
        "memory at most 1.5x",
    ),
    Line(
        "2",
        "generation from the recurrent form against softmax with a key-value cache",
        "generation.py",
        "generation.json",
        attention.generation,
        "last tenth within 1.1x of the first; 20x images a second at 784 tokens, 60x at 3,072; 2x at batch 1; "
        "1,000x without a cache",
    ),
    Line(
        "3",
        "clustered attention, 100 clusters, top 32, batch 1, 8 heads, dim 64",
        "attention_speed.py clustered",
        "attention/clustered.json",
        attention.clustered,
        "above 1x forward from 2,048 tokens, with backward from 1,024; at 16,384 forward 12x SDPA and 1.8x the old "
        "library",
    ),
    Line(
        "4",
        "improved clustered attention in pretrained models, at least 1,024 tokens",
        "pretrained_attention.py run",
        "pretrained-attention/*.json",
        attention.pretrained,
        "99 % of the metric at half the attention FLOPs",
    ),
)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e6 * seconds:.0f} µs"


def change(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.2f} %"


def tables() -> str:
    """Both tables: the acceptance lines, and line 2 setting by setting."""
    first, *others = [line_row(line) for line in LINES]
    head = ["| line | what | command | receipt | figure | target |", "|---|---|---|---|---|---|"]
    wanted = "to at most 0.7x the FLOPs on two of five settings, never above 1.02x, accuracy at most 0.3 points under"
    folder = f"`receipts/{sampling.NAME}/SETTING/*.json`"
    command = "`python benchmarks/importance_sampling.py run`"
    what = "FLOPs to uniform's final training loss, and test accuracy, at equal FLOPs"
    second = "| " + " | ".join(["2", what, command, folder, "; ".join(map(verdict, THRIFTY)), wanted]) + " |"
    training = ["## Training under a fixed budget", "", *head, first, second, *others, "", *setting_rows()]
    return "\n".join([*training, "", "## Attention", "", *head, *map(line_row, ATTENTION_LINES)])


def cards() -> dict[Path, str]:
    """The method cards and the tables between their markers."""
    return {
        DOCS / "importance-sampling.md": sampling.table_text(),
        DOCS / "linear-attention.md": attention.speed_table(RECEIPTS / "attention" / "causal.json"),
        DOCS / "clustered-attention.md": "\n\n".join(
            [
                attention.pretrained_table(RECEIPTS / "pretrained-attention"),
                attention.speed_table(RECEIPTS / "attention" / "clustered.json"),
            ]
        ),
    }


def line_row(line: Line) -> str:
    paths = sorted(RECEIPTS.glob(line.receipt))
    found = "; ".join(line.figure(load_receipt(path)) for path in paths) if paths else UNKNOWN
    cells = (line.number, line.what, f"`python benchmarks/{line.script}`", f"`receipts/{line.receipt}`", found)
    return "| " + " | ".join([*cells, line.target]) + " |"


def verdict(policy: str) -> str:
    """One policy over the settings that were measured, held against the three parts of the target."""
    pairs = {name: sampling.paired_with_uniform(name, policy) for name in sampling.SETTINGS}
    measured = [pair for pair in pairs.values() if pair]
    if not measured:
        return f"{policy}: {UNKNOWN}"
    cheap = sum(statistics.mean(item.share for item in pair) <= 0.7 for pair in measured)
    lost = sum(any(item.share > 1.02 for item in pair) for pair in measured)
    worst = min(statistics.mean(item.accuracy for item in pair) for pair in measured)
    return (
        f"{policy}: at most 0.7x on {cheap} of {len(measured)} settings measured, not reached by some seed on {lost}, "
        f"accuracy {worst:+.2f} points at worst"
    )


def setting_rows() -> list[str]:
    head = "| setting | policy | FLOPs to uniform's final training loss | test accuracy, points to uniform's | seeds |"
    rows = [head, "|---|---|---|---|---|"]
    for name, setting in sampling.SETTINGS.items():
        for policy in THRIFTY:
            pairs = sampling.paired_with_uniform(name, policy)
            cells = (
                [shares([item.share for item in pairs]), accuracies([item.accuracy for item in pairs]), str(len(pairs))]
                if pairs
                else [UNKNOWN, UNKNOWN, "0"]
            )
            rows.append("| " + " | ".join([setting.about, policy, *cells]) + " |")
    return rows


def shares(values: list[float]) -> str:
    """Mean and spread; marked where a run at the smallest share trained was not yet above uniform's loss."""
    reached = [value for value in values if math.isfinite(value)]
    bounded = any(value in sampling.SHARES[1:] for value in values)
    text = f"{'at most ' if bounded else ''}{spread(reached, '.2f', 'x')}" if reached else ""
    missed = len(values) - len(reached)
    return "; ".join(filter(None, [f"not within 1.00x by {missed} of {len(values)} seeds" if missed else "", text]))


def accuracies(values: list[float]) -> str:
    return spread(values, "+.2f", "")


def spread(values: list[float], form: str, unit: str) -> str:
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):.2f}{unit}" if len(values) > 1 else f"{mean}{unit} (1 seed)"


def filled(text: str, content: str | None = None) -> str:
    """The page with what stands between its markers made anew: this page's tables, or ``content``.

    Raises:
        InputError: a marker is missing or stands there twice.
    """
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"one {begin} and one {end}", "a page without, or with more", "put the markers back")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{tables() if content is None else content}\n\n{end}{after}"


def main() -> None:
    path = tyro.cli(Readme).path
    write_atomic(path, filled(path.read_text(encoding="utf-8")))
    for card, content in cards().items():
        write_atomic(card, filled(card.read_text(encoding="utf-8"), content))


if __name__ == "__main__":
    main()
