"""The rows of training scenes on photographs, made from their receipts; for benchmarks/readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from scrimp.receipts import Receipt, load_receipt

NAME = "splat-training"
UNMEASURED = "Not measured yet."
PLAIN, THIN, AWARE = "plain", "thin", "aware"
FORMATS = {"sgs": ".sgs, rung", "sog": ".sog, entries of the palette", "spz": ".spz 3, bits of degree 1"}
NOTE = (
    "Seven photographs held out of 50, 270 x 480; 1,500 steps, mean ± deviation over seeds. CPU time is that of the "
    "whole training on one thread. aware and a rung: with the rounding of that rung of the container in the loop for "
    "the last fifth of the steps; thin: Gaussians removed from the middle of the training on. Rounded afterwards: the "
    "scene trained alike but without rounding, at the same size, and with the very same settings. Of .sgs, "
    "Gaussians of an alpha below 1 / 255 are left out. Rates and rungs were chosen by the held-out photographs of seed "
    "0."
)
Receipts = Sequence[Receipt]


def quality(receipts: Receipts) -> str:
    """Held-out PSNR of plain training, how far seeds lie apart, and CPU time."""
    runs = ways(receipts).get(PLAIN, [])
    if not runs:
        return "not measured yet"
    found = numbers(runs, "psnr")
    apart = f", {max(found) - min(found):.2f} dB from the worst to the best" if len(found) > 1 else ""
    return f"{spread(found, '.2f')} dB, {counted(runs)}{apart}; {seconds(runs)} CPU s; SSIM {mean(runs, 'ssim'):.3f}"


def files(receipts: Receipts) -> str:
    """Every way that learns its file's rounding: size, loss, gain over rounding afterwards."""
    every = ways(receipts)
    parts = [aware(name, every) for name in every if AWARE in name]
    return "; ".join(parts) if parts else "not measured yet"


def aware(name: str, every: dict[str, list[Receipt]]) -> str:
    runs = every[name]
    lost = differences(runs, every.get(PLAIN, []), "psnr")
    gains = [gain(run, PLAIN) for run in runs]
    own = [gain(run, THIN) for run in runs if f"{THIN}_sized_psnr" in run.quality]
    over = f", {spread(own, '+.2f')} over the thinned scene rounded afterwards" if own else ""
    return (
        f"{name}: {kilobytes(runs)} kB, {spread(lost, '+.2f')} dB to unquantised, {spread(gains, '+.2f')} dB over "
        f"rounding afterwards at the same size{over} ({counted(runs)})"
    )


def halved(receipts: Receipts) -> str:
    """What half of the Gaussians lose."""
    every = ways(receipts)
    runs = every.get(THIN, [])
    if not runs or PLAIN not in every:
        return "not measured yet"
    left = mean(runs, "gaussians") / mean(every[PLAIN], "gaussians")
    lost = differences(runs, every[PLAIN], "psnr")
    return f"{100 * left:.0f} % of the Gaussians, {spread(lost, '+.2f')} dB ({counted(runs)})"


def card(folder: Path) -> str:
    """The method card's figures: ways of training, and size against quality of the trained scenes in each format."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*.json"))]
    every = ways(receipts)
    rows = [way_row(name, runs) for name, runs in every.items()]
    if not rows:
        return UNMEASURED
    head = "| way | held out, dB | SSIM | Gaussians | kB | rounded afterwards, dB | CPU s | seeds |"
    return "\n".join([head, "|---" + "|--:" * 7 + "|", *rows, "", NOTE, "", *curve_rows(receipts)])


def way_row(name: str, runs: Receipts) -> str:
    base = THIN if any(f"{THIN}_sized_psnr" in run.quality for run in runs) else PLAIN
    after = "-"
    if f"{base}_sized_psnr" in runs[0].quality:
        after = ", ".join(f"{mean(runs, f'{base}_{what}_psnr'):.2f}" for what in ("sized", "same"))
    size = kilobytes(runs) if runs[0].quality.get("bytes") else "-"
    cells = [name, spread(numbers(runs, "psnr"), ".2f"), f"{mean(runs, 'ssim'):.3f}"]
    cells += [f"{mean(runs, 'gaussians'):,.0f}", size, after, seconds(runs), str(len(runs))]
    return f"| {' | '.join(cells)} |"


def curve_rows(receipts: Receipts) -> list[str]:
    """A row for each format, point by point: means over seeds."""
    rows = []
    for base in (PLAIN, THIN):
        for form, about in FORMATS.items():
            curves = [one.curve for one in receipts if one.name == NAME and one.way == f"{base}-{form}"]
            if curves:
                rows.append(f"| {base} | {about} | {', '.join(map(point, zip(*curves, strict=True)))} |")
    head = ["| rounded afterwards | format and setting | setting: kB, held-out dB |", "|---|---|---|"]
    return [*head, *rows] if rows else []


def point(same: Sequence[dict[str, float | None]]) -> str:
    """One setting of several seeds."""
    size, psnr = (statistics.fmean(float(one[key] or 0) for one in same) for key in ("bytes", "psnr"))
    return f"{same[0]['setting']:g}: {size / 1e3:.0f}, {psnr:.2f}"


def ways(receipts: Receipts) -> dict[str, list[Receipt]]:
    """Trainings, without the curves; plain ones first, then as they are called."""
    own = [one for one in receipts if one.name == NAME and "psnr" in one.quality]
    names = sorted({one.way for one in own}, key=lambda name: (AWARE in name, name))
    return {name: [one for one in own if one.way == name] for name in names}


def gain(run: Receipt, base: str) -> float:
    """dB over the scene of a way rounded afterwards to the same size."""
    return float(run.quality["psnr"] or 0) - float(run.quality[f"{base}_sized_psnr"] or 0)


def differences(runs: Receipts, others: Receipts, name: str) -> list[float]:
    """By seed, where both have it."""
    base = {one.seed: float(one.quality[name] or 0) for one in others}
    return [float(run.quality[name] or 0) - base[run.seed] for run in runs if run.seed in base]


def numbers(runs: Receipts, name: str) -> list[float]:
    return [float("nan") if (value := run.quality.get(name)) is None else value for run in runs]


def mean(runs: Receipts, name: str) -> float:
    return statistics.fmean(numbers(runs, name))


def kilobytes(runs: Receipts) -> str:
    return f"{mean(runs, 'bytes') / 1e3:.0f}"


def seconds(runs: Receipts) -> str:
    return f"{statistics.fmean(float(run.cost.cpu_seconds.value or 0) for run in runs):.0f}"


def counted(runs: Receipts) -> str:
    return f"{len(runs)} seed{'s' if len(runs) != 1 else ''}"


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"
