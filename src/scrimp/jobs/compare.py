"""`scrimp compare`: a method against its reference, then beside its baseline, with a receipt of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scrimp.compare import Comparison, Finding, find_comparisons
from scrimp.jobs.config import CompareConfig
from scrimp.jobs.device import pick_device
from scrimp.jobs.folder import choose_folder, plain, record_config
from scrimp.jobs.progress import console as errors
from scrimp.jobs.timing import timed_cost
from scrimp.meter import paired
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import units

if TYPE_CHECKING:
    from rich.table import Table

_FILES = ("method.json", "baseline.json")
_REPEATS = 3  # of the passes that count FLOPs and bytes; times come from the alternating pairs


def compare(config: CompareConfig) -> int:
    """List, check, or check and measure comparisons; returns the shell's exit code, 1 if a check failed.

    A method that fails its check is not measured.

    Raises:
        InputError: no comparison of that name, no such device, or a run folder that cannot be used.
    """
    rows = find_comparisons(config.name)
    if config.list:
        _list(rows, as_json=config.json)
        return 0
    findings = {row.name: _checked(row, config) for row in rows}
    sound = [row for row in rows if all(item.passed for item in findings[row.name])]
    if config.check and config.json:
        print(json.dumps([_verdict(row, findings[row.name]) for row in rows], indent=2))
    if not config.check and sound:
        _measure_all(sound, findings, config)
    if len(sound) < len(rows):
        failed = ", ".join(row.name for row in rows if row not in sound)
        errors.print(f"scrimp: {failed}: not as the reference has it", markup=False, highlight=False)
        return 1
    return 0


def _checked(row: Comparison, config: CompareConfig) -> list[Finding]:
    with _threads(1):  # a check's tensors are small: a second thread would only spin
        found = row.check(seed=config.seed)
    if not config.json:
        out = _console()
        out.print(f"{row.name}: {row.method} against {row.reference}", markup=False, highlight=False)
        for item in found:
            out.print(f"  {_mark(item.passed, out.encoding)} {item}", markup=False, highlight=False, soft_wrap=True)
    return found


def _mark(passed: bool, encoding: str) -> str:
    try:
        "✓✗".encode(encoding)
    except UnicodeEncodeError:
        return "ok" if passed else "FAILED"
    return "✓" if passed else "✗"


def _verdict(row: Comparison, findings: list[Finding]) -> dict[str, Any]:
    record = {"name": row.name, "method": row.method, "reference": row.reference}
    return {
        **record,
        "passed": all(item.passed for item in findings),
        "findings": [item.to_dict() for item in findings],
    }


def _measure_all(rows: list[Comparison], findings: dict[str, list[Finding]], config: CompareConfig) -> None:
    device = pick_device(config.device)
    folder = choose_folder(config.out, f"compare-{config.name}", resume=config.resume)
    record_config(folder, config, {})
    receipts: list[Receipt] = []
    for row in rows:
        home = folder / row.name if config.name == "all" else folder
        pair = _receipts(row, home / "receipts", findings[row.name], device=device, config=config)
        receipts += pair
        if not config.json:
            _console().print(_table(row, *pair))
    if config.json:
        print(json.dumps([receipt.to_dict() for receipt in receipts], indent=2))
    else:
        errors.print(f"receipts: {folder}", markup=False, highlight=False, soft_wrap=True)


def _receipts(
    row: Comparison, folder: Path, findings: list[Finding], *, device: str, config: CompareConfig
) -> tuple[Receipt, Receipt]:
    """Method's and baseline's receipts, written to ``folder``, or read from it where an interrupted run left them."""
    files = [folder / name for name in _FILES]
    if config.resume and all(file.is_file() for file in files):
        return load_receipt(files[0]), load_receipt(files[1])
    if not config.json:  # a line, not a live display: its thread's CPU time would be measured as well
        errors.print(f"measuring {row.name} beside its baseline", markup=False, highlight=False)
    receipts = _measured(row, findings, device=device, config=config)
    for receipt, file in zip(receipts, files, strict=True):
        save_receipt(receipt, file)
    return receipts


def _measured(
    row: Comparison, findings: list[Finding], *, device: str, config: CompareConfig
) -> tuple[Receipt, Receipt]:
    sides = row.sides(seed=config.seed, device=device)
    with _threads(sides.threads):
        times = paired(sides.method, sides.baseline, sides.repeats)
        costs = [
            timed_cost(call, timing, passes=_REPEATS)
            for call, timing in ((sides.method, times.a), (sides.baseline, times.b))
        ]
        notes = {
            "reference": row.reference,
            "findings": [item.to_dict() for item in findings],
            "device": device,
            "ratios": {"cpu_seconds": asdict(times.cpu_ratio), "seconds": asdict(times.ratio)},
        }
        method, baseline = (
            Receipt(
                kind="compare",
                name=row.name,
                way=way,
                baseline=way == row.baseline,
                seed=config.seed,
                quality={name: pair[side] for name, pair in sides.quality.items()},
                cost=costs[side],
                config=plain(config),
                notes=notes,
            )
            for side, way in enumerate((row.method, row.baseline))
        )
    return method, baseline


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _list(rows: list[Comparison], *, as_json: bool) -> None:
    columns = ("name", "method", "reference", "baseline")
    if as_json:
        print(json.dumps([{column: getattr(row, column) for column in columns} for row in rows], indent=2))
        return
    table = _empty_table("")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for row in rows:
        table.add_row(*(getattr(row, column) for column in columns))
    _console().print(table)


def _table(row: Comparison, method: Receipt, baseline: Receipt) -> Table:
    """Both sides in columns, one line a figure, the ratio beside them; made from the receipts alone."""
    table = _empty_table(f"{row.name}: one call of each side")
    table.add_column("")
    for heading in (method.way, baseline.way, "ratio"):
        table.add_column(heading, justify="right", overflow="fold")
    for name in method.quality:
        ours, theirs = method.quality[name], baseline.quality.get(name)
        table.add_row(
            name.replace("_", " "), units.quality(name, ours), units.quality(name, theirs), _ratio(ours, theirs)
        )
    for field, (title, show) in units.COSTS.items():
        ours, theirs = getattr(method.cost, field).value, getattr(baseline.cost, field).value
        if ours is None and theirs is None:
            continue
        spread = method.notes["ratios"].get(field)
        table.add_row(title, show(ours), show(theirs), _spread(spread) if spread else _ratio(ours, theirs))
    pairs = method.notes["ratios"]["cpu_seconds"]["count"]
    table.caption = f"times: medians of {pairs} alternating pairs; ratio by pair (quartiles)"
    if method.cost.joules.value is None:
        table.caption += f"\nenergy {method.cost.joules.how}"
    return table


def _ratio(ours: float | None, theirs: float | None) -> str:
    return units.UNKNOWN if ours is None or not theirs else f"{ours / theirs:.3f}"


def _spread(ratio: dict[str, Any]) -> str:
    if ratio["median"] is None:
        return units.UNKNOWN
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _empty_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title or None, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _console() -> Any:
    from rich.console import Console

    return Console()
