"""Draw the pictures of the attention cards from their receipts, in headless Chromium (needs the test tools).

python scripts/make_attention_pictures.py receipts docs/images
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from make_picture import draw

from scrimp.receipts import load_receipt
from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

SOFTMAX = "softmax (SDPA)"
PASSES = {"forward": "forward", "with backward": "forward and backward"}
MARKS = ("circle", "diamond", "triangle-up", "star", "cross", "pentagon")


def main(receipts: str, pictures: str) -> None:
    root, out = Path(receipts), Path(pictures)
    draw([speed(root / "attention" / "causal.json", what) for what in PASSES], out / "linear-attention.png")
    kept = [kept_by(path) for path in sorted((root / "pretrained-attention").glob("*.json"))]
    draw(
        [speed(root / "attention" / "clustered.json", "forward"), quality(kept)],
        out / "clustered-attention.png",
    )


def speed(path: Path, what: str) -> go.Figure:
    """CPU milliseconds by tokens, both axes by their logarithm."""
    tokens = load_receipt(path).notes["tokens"]
    figure = empty_figure()
    colours = iter(zip(COLOURS, MARKS, strict=True))
    for side in next(iter(tokens.values()))[what]:
        if "march" in side:  # on top of the other build
            continue
        colour, mark = (BASELINE_COLOUR, "square") if side == SOFTMAX else next(colours)
        figure.add_scatter(
            x=[int(size) for size in tokens],
            y=[1e3 * found[what][side]["cpu_seconds"]["median"] for found in tokens.values()],
            name=side,
            mode="lines+markers",
            line={"color": colour, "dash": "dot" if side == SOFTMAX else "solid"},
            marker={"symbol": mark, "size": 8},
        )
    sizes = [int(size) for size in tokens]
    figure.update_xaxes(
        type="log", rangemode="normal", title_text="tokens", tickvals=sizes, ticktext=[f"{size:,}" for size in sizes]
    )
    figure.update_yaxes(type="log", title_text=f"CPU milliseconds, {PASSES[what]}")
    return figure


def kept_by(path: Path) -> tuple[str, dict[str, list[Any]]]:
    """A model's name, and for each attention the settings that swap every layer as [FLOPs, share of the metric]."""
    receipt = load_receipt(path)
    points: dict[str, dict[Any, list[tuple[float, float]]]] = {}
    for row in receipt.notes["table"]:
        if row["layers"] is None:
            settings = points.setdefault(row["attention"], {}).setdefault((row["clusters"], row["topk"]), [])
            settings.append((row["flops_share"], 100 * row["share"]))
    means = {
        name: [tuple(map(statistics.mean, zip(*rows, strict=True))) for rows in settings.values()]
        for name, settings in points.items()
    }
    return receipt.name.rpartition("/")[2], means


def quality(models: list[tuple[str, dict[str, list[Any]]]]) -> go.Figure:
    """Share of the original's metric by share of its attention FLOPs; a colour a model, a mark a kind of attention."""
    figure = empty_figure()
    for (name, kinds), colour in zip(models, COLOURS, strict=False):
        for kind, mark in (("improved", "circle"), ("clustered", "x"), ("linear", "triangle-down")):
            rows = sorted(kinds.get(kind, []))
            figure.add_scatter(
                x=[row[0] for row in rows],
                y=[row[1] for row in rows],
                name=f"{name}" if kind == "improved" else f"{name}, {kind}",
                showlegend=kind == "improved",
                mode="markers",
                marker={"color": colour, "symbol": mark, "size": 8},
            )
    figure.add_hline(y=99, line={"color": BASELINE_COLOUR, "dash": "dot"})
    figure.add_vline(x=0.5, line={"color": BASELINE_COLOUR, "dash": "dot"})
    figure.update_xaxes(
        title_text="attention FLOPs, share of softmax (circle: improved, x: clustered, triangle: linear)"
    )
    figure.update_xaxes(tickformat=".1f")
    figure.update_yaxes(title_text="% of the original's metric", rangemode="tozero")
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:3])
