"""What the receipts of adaptive_speed.py say: the figure of the acceptance line, and tables of the method card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

NAME = "adaptive-speed"
EXPORT = f"{NAME}/export"
ENOUGH = 0.85
LABELS = {"deit-s": "DeiT-S", "vit-b": "ViT-B"}
WAYS = {
    "merging-8": "merging, r = 8",
    "merging-13": "merging, r = 13",
    "merging-16": "merging, r = 16",
    "keep-0.7": "keep 0.7",
    "sampling-110": "sampling, 110 samples",
    "sampling-110-masked": "sampling, masked",
    "halting": "halting",
    "gating": "gating",
}
STATED = ("merging-13", "sampling-110", "halting")
UNMEASURED, NONE = "Not measured yet.", "-"
NOTE = (
    "CPU time on one thread: how many times as long the model takes without the method, the median of alternate calls; "
    "in brackets how many times the FLOPs it takes. r and samples are those of 196 patches, more in proportion at 384 "
    "pixels. Weights are fresh: halting and gating stop and leave out at random."
)


def speed(receipts: Sequence[Receipt]) -> str:
    """Line 1: time gained and FLOPs saved of merging, the share kept of the ragged forms, and exported merging."""
    parts = [found for method in STATED if (found := _stated(method, receipts))]
    exports = [_exported(receipt) for receipt in _sorted(receipts) if receipt.name == EXPORT]
    return "; ".join([*parts, *exports]) or UNMEASURED


def _stated(method: str, receipts: Sequence[Receipt]) -> str:
    rows = [(receipt, item) for receipt, way, item in _measured(receipts) if way == method]
    cells = [
        f"{_shape(receipt)} batch {receipt.config['batch']} {_gain(item)}, {100 * item['share kept']:.0f} % kept"
        for receipt, item in rows
    ]
    return f"{WAYS[method]}: {', '.join(cells)}" if cells else ""


def _exported(receipt: Receipt) -> str:
    sides = receipt.notes["sides"]
    cells = [f"{side} {item['time gain']['median']:.2f}x" for side, item in sides.items()]
    left_out = receipt.notes["not installed"]
    without = [f"not installed: {', '.join(left_out)}"] if left_out else []
    about = f"{receipt.config['merging']} over dense torch fp32, {_shape(receipt)} batch {receipt.config['batch']}"
    return ", ".join([f"exported, {about}: {cells[0]}", *cells[1:], *without])


def card(folder: Path) -> str:
    """The tables: gains by shape and batch, where it does not pay, and other runtimes."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*.json"))]
    if not receipts:
        return UNMEASURED
    found = [gains_table(receipts), losses_table(receipts), export_table(receipts)]
    return "\n\n".join(filter(None, found))


def gains_table(receipts: Sequence[Receipt]) -> str:
    """A row for each shape and method, a column for each batch."""
    found = {(_shape(r), way, r.config["batch"]): item for r, way, item in _measured(receipts)}
    if not found:
        return ""
    batches = sorted({batch for _, _, batch in found})
    heads = [f"batch {batch}" for batch in batches]
    rows = [f"| model | method | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for shape in dict.fromkeys(shape for shape, _, _ in found):
        for way, about in WAYS.items():
            items = [found.get((shape, way, batch)) for batch in batches]
            if any(items):
                cells = [NONE if item is None else _gain(item) for item in items]
                rows.append(f"| {shape} | {about} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", NOTE])


def losses_table(receipts: Sequence[Receipt]) -> str:
    """Where it does not pay: dearer than dense, or less than 85 % of the counted gain kept as time."""
    losers = [row for row in _measured(receipts) if row[2]["time gain"]["median"] < 1 or row[2]["share kept"] < ENOUGH]
    if not any(True for _ in _measured(receipts)):
        return ""
    if not losers:
        return f"Nowhere is less than {100 * ENOUGH:.0f} % of the counted gain kept as time."
    head = "| where it does not pay | batch | FLOPs | CPU time | kept of the gain |"
    rows = [head, "|---|---|---|---|---|"]
    for receipt, way, item in losers:
        gains = f"{item['flops gain']:.2f}x | {item['time gain']['median']:.2f}x | {100 * item['share kept']:.0f} %"
        rows.append(f"| {_shape(receipt)}, {WAYS[way]} | {receipt.config['batch']} | {gains} |")
    about = f"Slower than without, or under {100 * ENOUGH:.0f} % of the counted gain kept: gain in time over in FLOPs."
    return "\n".join([*rows, "", about])


def export_table(receipts: Sequence[Receipt]) -> str:
    rows = ["| exported | batch | runtime | CPU time of dense torch fp32 over its | apart from torch |"]
    rows.append("|---|---|---|---|---|")
    for receipt in _sorted(receipts):
        if receipt.name == EXPORT:
            for side, item in receipt.notes["sides"].items():
                apart = item["apart from torch"]
                far = NONE if apart is None else f"{apart:.0e}"
                where = f"{_shape(receipt)}, {receipt.config['merging']} | {receipt.config['batch']}"
                rows.append(f"| {where} | {side} | {item['time gain']['median']:.2f}x | {far} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _measured(receipts: Sequence[Receipt]) -> Iterator[tuple[Receipt, str, dict[str, Any]]]:
    for receipt in _sorted(receipts):
        for way, item in receipt.notes.get("methods", {}).items():
            yield receipt, way, item


def _sorted(receipts: Sequence[Receipt]) -> list[Receipt]:
    return sorted(receipts, key=lambda receipt: (receipt.config["shape"], receipt.config["batch"]))


def _shape(receipt: Receipt) -> str:
    model, _, size = receipt.config["shape"].rpartition("-")
    return f"{LABELS.get(model, model)} {size}"


def _gain(item: dict[str, Any]) -> str:
    return f"{item['time gain']['median']:.2f}x ({item['flops gain']:.2f}x)"
