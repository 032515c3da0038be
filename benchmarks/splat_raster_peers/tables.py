"""What the receipts of the CPU rasteriser say: figures of the acceptance lines, and tables of the method card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

NAME = "splat-raster"
OURS, FORWARD, TORCH = "scrimp", "scrimp, forward alone", "tiled torch, no harmonics"
WHOLE, PART = "OpenSplat", "OpenSplat, no harmonics, projection forward alone"
ONE, TWO = "one thread", "two threads"
FOX = "fox, 270 x 480"
UNMEASURED, NONE = "Not measured yet.", "-"


def peers(receipt: Receipt) -> str:
    """Milliseconds of ours, and how many times as long the others take, scene by scene."""
    return "; ".join(_beside(name, found["times"]) for name, found in receipt.notes["scenes"].items())


def scaling(receipt: Receipt) -> str:
    """Time by the Gaussian and by the pixel at the largest, over that at a tenth of the Gaussians and at 800 x 800."""
    views = receipt.notes["views"]
    many, few = views["1,000,000 Gaussians"], views["100,000 Gaussians"]
    wide, usual = views["2000 x 2000"], views["800 x 800"]
    return (
        f"1,000,000 Gaussians {_ms(many)}, {_each(many, 'gaussians', 1e6):.2f} µs a Gaussian, "
        f"{_each(many, 'gaussians') / _each(few, 'gaussians'):.2f}x that of 100,000; 4 megapixels {_ms(wide)}, "
        f"{_each(wide, 'pixels', 1e9):.0f} ns a pixel, {_each(wide, 'pixels') / _each(usual, 'pixels'):.2f}x that of "
        "800 x 800"
    )


def threads(receipt: Receipt) -> str:
    """How many times as fast two threads are."""
    scenes = receipt.notes["scenes"].items()
    return "; ".join(f"{name} {found[ONE][f'seconds over {TWO}']['median']:.2f}x" for name, found in scenes)


def loss(receipt: Receipt) -> str:
    """Milliseconds of ours, and how many times as long torch's convolutions take."""
    times = receipt.notes["times"]
    others = ", ".join(f"{name} {_over(found)}" for name, found in times.items() if name != OURS)
    return f"{_ms(times[OURS])} of CPU; {others}"


def card(folder: Path) -> str:
    """Both tables: beside the others, and by the size of scene and picture."""
    paths = [folder / NAME / f"{name}.json" for name in ("peers", "scaling")]
    makers = (peers_table, scaling_table)
    found = [make(load_receipt(path)) for make, path in zip(makers, paths, strict=True) if path.is_file()]
    return "\n\n".join(found) or UNMEASURED


def peers_table(receipt: Receipt) -> str:
    scenes = receipt.notes["scenes"]
    rows = [f"| forward and backward, CPU ms on one thread | {' | '.join(scenes)} |", "|---" * (1 + len(scenes)) + "|"]
    for side in (OURS, FORWARD, WHOLE, PART, TORCH):
        cells = [_cell(found["times"].get(side), ratio=side not in (OURS, FORWARD)) for found in scenes.values()]
        rows.append(f"| {side} | {' | '.join(cells)} |")
    like = [value for found in scenes.values() for value in found["psnr to ours"].values()]
    about = (
        f"Their pictures are within {min(like):.0f} dB of ours. In brackets: median of the ratios of alternate calls."
    )
    return "\n".join([*rows, "", about])


def scaling_table(receipt: Receipt) -> str:
    rows = ["| Gaussians | pixels | CPU ms on one thread | µs a Gaussian | ns a pixel |", "|---|---|---|---|---|"]
    for found in receipt.notes["views"].values():
        cells = [f"{found['gaussians']:,}", f"{found['pixels']:,}", _ms(found, unit="")]
        cells += [f"{_each(found, 'gaussians', 1e6):.2f}", f"{_each(found, 'pixels', 1e9):.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _beside(name: str, times: dict[str, Any]) -> str:
    others = [f"{label} {_over(times[side])}" for side, label in _LABELS.items() if side in times]
    return f"{name}: {_ms(times[OURS])} ({', '.join(others)})"


_LABELS = {WHOLE: "OpenSplat", PART: "OpenSplat without harmonics and gradient of the projection", TORCH: "torch"}


def _cell(found: dict[str, Any] | None, *, ratio: bool) -> str:
    if found is None:
        return NONE
    return _ms(found, unit="") + (f" ({_over(found)})" if ratio else "")


def _ms(found: dict[str, Any], *, unit: str = " ms") -> str:
    value = 1e3 * found["cpu_seconds"]["median"]
    return f"{value:,.{1 if value < 10 else 0}f}{unit}"


def _over(found: dict[str, Any]) -> str:
    value = found[f"cpu_seconds over {OURS}"]["median"]
    return f"{value:.{1 if value < 10 else 0}f}x"


def _each(found: dict[str, Any], what: str, unit: float = 1.0) -> float:
    seconds: float = found["cpu_seconds"]["median"]
    return unit * seconds / found[what]
