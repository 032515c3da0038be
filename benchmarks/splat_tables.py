"""What the splats' receipts say, for benchmarks/readme.py and the card: sizes, dB and costs beside the others'."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

NAME = "splats"
UNMEASURED = "Not measured yet."
OURS = {"sgs": "scrimp .sgs", "sog": "scrimp .sog", "spz3": "scrimp .spz 3", "spz4": "scrimp .spz 4"}
SEED = {"compgs": "CompGS' arithmetic", "compgs-short": "CompGS' arithmetic, 16-bit positions"}
_SHOWN = {
    "sgs": (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    "sog": (0.0, 256.0, 1024.0, 4096.0, 16384.0),
}
"""Settings that the card's tables hold; all of other ways."""
_SETTING = {"sgs": "rung {:g}", "sog": "{:,.0f} in the palette", "spz3": "{:g} bits", "spz4": "{:g} bits"}
_LOSSES = (-0.15, -0.20)
NOTE = (
    "PSNR: mean over 20 views of pictures of the decoded scene against pictures of the scene itself, at most 100 dB. "
    "Held out: against photographs that the scene was not trained on. CPU seconds: encoding alone for ours, the whole "
    "program with its start and reading for the others. What others wrote was taken back to .ply by splat-transform. "
    "CompGS' bytes are counted as its paper counts them, its steps before training are what is measured."
)
Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Scene:
    """One that is measured.

    Attributes:
        file: in the folder of the scenes.
        about: for tables.
        photographs: folder with poses, where there is one.
        format: endings of ways that only store again what the scene's file stored, and count for nothing.
    """

    file: str
    about: str
    photographs: str | None = None
    format: str = "-"


SCENES = {
    "fox60k": Scene("fox60k.ply", "fox60k: 60,000 Gaussians, degree 3", "fox"),
    "biker": Scene("biker.compressed.ply", "biker: 152,746 Gaussians, no harmonics", format="compressed"),
    "guitar": Scene("guitar.compressed.ply", "guitar: 90,854 Gaussians, no harmonics", format="compressed"),
}


def bytes_at(points: Points, wanted: float, figure: str = "psnr") -> float | None:
    """Bytes at which a curve reaches a figure: their logarithm is linear between points.

    A figure below the first point's takes the first point's bytes, for fewer were not tried; one above the last
    point's, or of a single point, none.
    """
    rows = _frontier(points, figure)
    if not rows or rows[-1][1] < wanted:
        return None
    if rows[0][1] >= wanted:
        return rows[0][0]
    for (few, low), (many, high) in itertools.pairwise(rows):
        if low < wanted <= high:
            return math.exp(math.log(few) + (wanted - low) / (high - low) * math.log(many / few))
    raise AssertionError("a frontier rises")


def figure_at(points: Points, size: float, figure: str = "psnr") -> float | None:
    """What a curve shows at so many bytes; its last point's where there are no more, None below the first."""
    rows = _frontier(points, figure)
    if not rows or size < rows[0][0]:
        return None
    for (few, low), (many, high) in itertools.pairwise(rows):
        if size < many:
            return low + (high - low) * math.log(size / few) / math.log(many / few)
    return rows[-1][1]


def _frontier(points: Points, figure: str) -> list[tuple[float, float]]:
    """Bytes and figure of the points that show more than all smaller ones."""
    rows: list[tuple[float, float]] = []
    for size, value in sorted((float(point["bytes"]), float(point[figure])) for point in points):
        if not rows or value > rows[-1][1]:
            rows.append((size, value))
    return rows


def by_way(receipts: Sequence[Receipt], scene: str) -> dict[str, Receipt]:
    """Ours first, then CompGS' arithmetic, then the others, by their names."""
    found = {one.way: one for one in receipts if one.name == f"{NAME}/{scene}"}
    order = [*OURS, *SEED, *sorted(set(found) - {*OURS, *SEED})]
    return {way: found[way] for way in order if way in found}


def peers_of(ways: Mapping[str, Receipt], scene: str) -> dict[str, Mapping[str, Any]]:
    """The point of each other program that wrote something of its own."""
    own = SCENES[scene].format
    return {
        way: one.curve[0]
        for way, one in ways.items()
        if way not in OURS and way not in SEED and one.curve and not way.endswith(own)
    }


def held_out(receipts: Sequence[Receipt]) -> str:
    """Line 1, fox60k: what is lost of the photographs held out, at the sizes wanted, and beside CompGS."""
    ways = by_way(receipts, "fox60k")
    if not {"sog", "sgs", "compgs"} <= set(ways):
        return "fox60k: not measured yet"
    parts = [f"the scene itself {ways['sgs'].notes['held out, the scene itself']:.2f} dB"]
    for way, wanted, size in (("sog", _LOSSES[0], 0.85e6), ("sgs", _LOSSES[1], 0.60e6)):
        points = ways[way].curve
        need, shown = bytes_at(points, wanted, "change"), figure_at(points, size, "change")
        parts.append(f".{way} {megabytes(need)} at {wanted:.2f} dB, {decibels(shown)} at {megabytes(size)}")
    parts += [f"{SEED[way]} {beside_seed(ways['sgs'].curve, ways[way].curve[0])}" for way in SEED if way in ways]
    return "fox60k, held out: " + "; ".join(parts)


def beside_seed(points: Points, seed: Mapping[str, Any]) -> str:
    """What .sgs loses at half the bytes that CompGS' arithmetic takes."""
    half = figure_at(points, 0.5 * seed["bytes"], "change")
    share = "-" if half is None else f"{half / seed['change']:.2f}x of that"
    return f"{megabytes(seed['bytes'])} at {decibels(seed['change'])}, .sgs at half of that {decibels(half)} ({share})"


def beside_peers(receipts: Sequence[Receipt]) -> str:
    """Line 1: bytes of .sgs over those of each other program at its PSNR, and at 45 dB over the smallest."""
    parts = []
    for scene in SCENES:
        ways = by_way(receipts, scene)
        peers = peers_of(ways, scene)
        if "sgs" not in ways or not peers:
            parts.append(f"{scene}: not measured yet")
            continue
        points = ways["sgs"].curve
        ratios = {way: ratio(points, point) for way, point in peers.items()}
        reached = {way: share for way, share in ratios.items() if share is not None}
        beyond = [way for way, share in ratios.items() if share is None]
        said = [f"{share:.2f}x {way}'s at {peers[way]['psnr']:.1f} dB" for way, share in top(reached)]
        if beyond:
            said.append("beyond the ladder " + ", ".join(f"{way} ({peers[way]['psnr']:.1f} dB)" for way in beyond))
        said.append(at_quality(points, peers, 45.0))
        parts.append(f"{scene}: {'; '.join(said)}")
    return ". ".join(parts)


def ratio(points: Points, point: Mapping[str, Any]) -> float | None:
    need = bytes_at(points, point["psnr"])
    return None if need is None else need / point["bytes"]


def top(shares: Mapping[str, float], count: int = 2) -> list[tuple[str, float]]:
    """Those hardest to beat."""
    return sorted(shares.items(), key=lambda item: -item[1])[:count]


def at_quality(points: Points, peers: Mapping[str, Mapping[str, Any]], wanted: float) -> str:
    good = {way: point["bytes"] for way, point in peers.items() if point["psnr"] >= wanted}
    need = bytes_at(points, wanted)
    if not good or need is None:
        return f"at {wanted:.0f} dB nothing to compare"
    best = min(good, key=lambda way: good[way])
    return f"at {wanted:.0f} dB {megabytes(need)}, {need / good[best]:.2f}x {best}'s, the smallest that reaches it"


def card(folder: Path, picture: Path | None = None) -> str:
    """Tables of docs/splats.md: a scene a table, what it costs, and the curves where there is a picture of them."""
    receipts = [load_receipt(path) for path in sorted(folder.glob("*/*.json"))]
    tables = [table_text(receipts, scene) for scene in SCENES]
    costs = folder.parent / "splat-cost.json"
    shown = [f"![PSNR against bytes](images/{picture.name})"] if picture is not None and picture.is_file() else []
    return "\n\n".join([*tables, NOTE, *shown, *([cost_table(load_receipt(costs))] if costs.is_file() else [])])


def table_text(receipts: Sequence[Receipt], scene: str) -> str:
    """A row a point, by way; what failed says why."""
    ways = by_way(receipts, scene)
    if not ways:
        return f"{SCENES[scene].about}: {UNMEASURED.lower()}"
    held = any("change" in point for one in ways.values() for point in one.curve)
    titles = ["way", "MB", "bytes a Gaussian", "PSNR, dB", *(["held out, dB"] if held else []), "CPU s"]
    rows = [f"**{SCENES[scene].about}**", "", f"| {' | '.join(titles)} |", "|---" + "|--:" * (len(titles) - 1) + "|"]
    for way, one in ways.items():
        for point in one.curve:
            if way not in _SHOWN or point["setting"] in _SHOWN[way]:
                rows.append(f"| {' | '.join(cells(one, point, held=held))} |")
        if not one.curve:
            rows.append(f"| {' | '.join([way, *['-'] * (len(titles) - 2), one.notes['problem']])} |")
    return "\n".join(rows)


def cells(one: Receipt, point: Mapping[str, Any], *, held: bool) -> list[str]:
    size, setting = float(point["bytes"]), point["setting"]
    said = f", {_SETTING[one.way].format(setting)}" if setting and one.way in _SETTING else ""
    title = OURS.get(one.way, SEED.get(one.way, one.way)) + (", rung 0" if setting == 0 and one.way == "sgs" else said)
    change = [decibels(point.get("change"))] if held else []
    figures = [f"{size / 1e6:.3f}", f"{size / one.notes['Gaussians']:.1f}", f"{point['psnr']:.2f}"]
    return [title, *figures, *change, f"{point['encode_cpu_seconds']:.1f}"]


def costs(receipt: Receipt) -> str:
    """Line 2, format by format: encoding from small to large, and decoding and memory of the largest."""
    measured = receipt.notes["measured"]
    largest = list(measured)[-1]
    parts = []
    for way in measured[largest]:
        spent = [f"{scene} in {rows[way]['encode cpu seconds']:.1f} CPU s" for scene, rows in measured.items()]
        row = measured[largest][way]
        parts.append(
            f".{way}: {', '.join(spent)}; {largest} encoded in {row['encode seconds']:.0f} s wall, decoded at "
            f"{row['decoded a second'] / 1e6:.1f} M a second, peaks {row['encode memory ratio']:.1f}x and "
            f"{row['decode memory ratio']:.1f}x the .ply"
        )
    return ". ".join(parts)


def cost_table(receipt: Receipt) -> str:
    titles = ["scene", "format", "MB", "encode, CPU s", "encode, s", "decode, M a s", "decode, M a CPU s",
              "encode, peak / .ply", "decode, peak / .ply"]  # fmt: skip
    rows = [f"| {' | '.join(titles)} |", "|---|---" + "|--:" * (len(titles) - 2) + "|"]
    for scene, formats in receipt.notes["measured"].items():
        for way, row in formats.items():
            figures = [f"{row['bytes'] / 1e6:.2f}", f"{row['encode cpu seconds']:.1f}", f"{row['encode seconds']:.1f}"]
            figures += [f"{row[name] / 1e6:.2f}" for name in ("decoded a second", "decoded a cpu second")]
            figures += [f"{row[name]:.1f}" for name in ("encode memory ratio", "decode memory ratio")]
            rows.append(f"| {' | '.join([scene, f'.{way}', *figures])} |")
    return "\n".join([*rows, "", receipt.notes["about"]])


def curve(folder: Path, scene: str) -> Any:
    """PSNR against bytes, logarithmic: lines of ours, marks of the others."""
    from scrimp.report.drawing import BASELINE_COLOUR, COLOURS, empty_figure

    figure = empty_figure()
    ways = by_way([load_receipt(path) for path in sorted((folder / scene).glob("*.json"))], scene)
    for (way, label), colour in zip(OURS.items(), itertools.cycle(COLOURS), strict=False):
        points = ways[way].curve if way in ways else []
        x, y = [point["bytes"] for point in points], [point["psnr"] for point in points]
        figure.add_scatter(x=x, y=y, name=label, mode="lines+markers", line={"color": colour})
    peers = peers_of(ways, scene)
    families = {"others' .sog": "-sog", "others' .spz": "-spz", "others' compressed .ply": "-compressed"}
    groups = {label: [point for way, point in peers.items() if mark in way] for label, mark in families.items()}
    groups["CompGS' arithmetic"] = [ways[way].curve[0] for way in SEED if way in ways]
    for (label, points), symbol in zip(groups.items(), ("square", "diamond", "cross", "x"), strict=True):
        x, y = [point["bytes"] for point in points], [point["psnr"] for point in points]
        marker = {"color": BASELINE_COLOUR, "symbol": symbol, "size": 8}
        figure.add_scatter(x=x, y=y, name=label, mode="markers", marker=marker)
    figure.update_xaxes(type="log", dtick="D2", title_text=f"{scene}: bytes")
    figure.update_yaxes(title_text="PSNR, dB")
    return figure


def megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.3f} MB"


def decibels(change: float | None) -> str:
    return "-" if change is None else f"{change:+.2f} dB"
