"""Puts the figures of the receipts there are into benchmarks/README.md and the method card, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import tyro

import adapt_tables as adapt
import adaptive_accuracy_tables as thinned
import adaptive_tables as adaptive
import attack_tables as attack
import attention_tables as attention
import denoise_tables as denoise
import distillation
import few_labels
import importance_sampling as sampling
import label_accuracy_tables as labels
import represent_tables as represent
import representations
import splat_tables as splat
import splat_training_tables as training
import zoom_tables as zoom
from acceptance import ADAPT_LINES, ATTENTION_LINES, LINES, REPRESENT_LINES, ZOOM_LINES, Line
from adaptive_lines import ADAPTIVE_LINES
from attack_lines import ATTACK_LINES
from denoise_lines import DENOISE_LINES
from label_lines import LABEL_LINES
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.receipts import load_receipt
from splat_lines import SPLAT_LINES
from splat_raster_peers import tables as raster

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
    attentive = ["## Attention", "", *head, *map(line_row, ATTENTION_LINES)]
    learning = ["## Representations", "", *head, *map(line_row, REPRESENT_LINES)]
    adapting = ["## Adapters", "", *head, *map(line_row, ADAPT_LINES)]
    zooming = ["## Large images", "", *head, *map(line_row, ZOOM_LINES)]
    splats = ["## Splats", "", *head, *map(line_row, SPLAT_LINES)]
    thinning = ["## Adaptive transformers", "", *head, *map(line_row, ADAPTIVE_LINES)]
    attacking = ["## Attacks on the cost", "", *head, *map(line_row, ATTACK_LINES)]
    labelling = ["## Labels", "", *head, *map(line_row, LABEL_LINES)]
    denoising = ["## Diffusion", "", *head, *map(line_row, DENOISE_LINES)]
    parts = [training, attentive, learning, adapting, zooming, splats, thinning, attacking, labelling, denoising]
    return "\n\n".join("\n".join(part) for part in parts)


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
        DOCS / "self-supervised.md": "\n\n".join(learned_tables()),
        DOCS / "distillation.md": table_of(distillation),
        DOCS / "adapters.md": adapt.card(RECEIPTS),
        DOCS / "attention-sampling.md": zoom.card(RECEIPTS, DOCS / "images" / "zoom.png"),
        DOCS / "splats.md": "\n\n".join(splat_tables()),
        DOCS / "adaptive.md": "\n\n".join([adaptive.card(RECEIPTS), thinned.card(RECEIPTS)]),
        DOCS / "audit.md": attack.card(RECEIPTS),
        DOCS / "diffusion.md": denoise.card(RECEIPTS, DOCS / "images" / "denoise.png"),
        DOCS / "label.md": "\n\n".join([labels.card(RECEIPTS), labels.speed_table(RECEIPTS)]),
    }


def splat_tables() -> list[str]:
    """Files beside other programs', training, and the rasteriser."""
    files = splat.card(RECEIPTS / "splats", DOCS / "images" / "splats.png")
    return [files, training.card(RECEIPTS), raster.card(RECEIPTS)]


def learned_tables() -> list[str]:
    """What a step of pretraining costs, what it gave, and the picture of that where there is one."""
    picture = represent.curves(DOCS / "images" / "representations.png")
    given = [table_of(representations), *([picture] if picture else []), table_of(few_labels)]
    return [represent.cost_table(RECEIPTS / "represent-cost.json"), *given]


def table_of(benchmark: ModuleType) -> str:
    """A benchmark's own table, where it has left receipts."""
    measured = any(benchmark.RECEIPTS.rglob("*.json"))
    return benchmark.table_text() if measured else represent.UNMEASURED


def line_row(line: Line) -> str:
    receipts = [load_receipt(path) for path in sorted(RECEIPTS.glob(line.receipt))]
    figures = [line.figure(receipts)] if line.together else map(line.figure, receipts)
    found = "; ".join(figures) if receipts else UNKNOWN
    cells = (line.number, line.what, line.command, f"`receipts/{line.receipt}`", found)
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
