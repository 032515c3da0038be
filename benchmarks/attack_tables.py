"""What the receipts of attack_runs.py say: figures of the acceptance lines, and tables of the method card."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

NAME, DEFENDED = "attack", "-defended"
TASKS = {"cifar10": "small transformer, CIFAR-10", "vit-s14": "packaged ViT-S/14, CIFAR-10"}
LABELS = {"avit": "halting (A-ViT)", "ats": "sampling (ATS)", "adavit": "gating (AdaViT)", "tome": "merging"}
PUBLISHED = {"avit": "100, 99; CIFAR-10 41", "ats": "35 to 60; CIFAR-10 34", "adavit": "40 (49 of the ceiling)"}
"""Attack Success of SlowFormer's patch of 8 %, %, on ImageNet and where given on CIFAR-10."""
MAIN = "patch 8 %"
CONTROLS = ("random patch", "accuracy-only patch")
ROWS = (
    *CONTROLS,
    "patch 0.5 %",
    "patch 2 %",
    "patch 5 %",
    MAIN,
    f"{MAIN}, preserve",
    f"{MAIN}, destroy",
    f"{MAIN}, centre",
    f"{MAIN}, anywhere",
    "universal 8/255",
    "universal 16/255",
    "per image 8/255",
    "per image 8/255, preserve",
    "per image 16/255",
    "queried patch 8 %",
    "queried per image 16/255",
    "flat colours",
    "noise",
)
OWN = "per image 16/255"
UNMEASURED = "Not measured yet."
NOTE = (
    "Attack Success: what an attack undoes of the saving against the model with all tokens, %, on means of the FLOPs "
    "of each image; in brackets accuracy, %; ± standard deviation over the seeds. Merging gives exactly 0 throughout. "
    "Attacks learn from training images and are measured on others; who attacks a defence knows it and optimises "
    "through it."
)

Audit = dict[str, Any]


def success(receipts: Sequence[Receipt]) -> str:
    """Line 1: the patch of 8 % on each model, controls, keeping accuracy, a static model."""
    parts = []
    for task, method, found in _groups(receipts, defended=False):
        audits = [item.notes["audit"] for item in found]
        if method == "tome":
            most = max(abs(trial["success"]) for audit in audits for trial in audit["trials"])
            parts.append(f"{TASKS[task]}, merging: {most:g} in all trials")
            continue
        main, kept = _values(audits, MAIN), _values(audits, f"{MAIN}, preserve")
        ceiling = _spread([100 * _trial(audit, MAIN)["success_ceiling"] for audit in audits])
        lost = _spread([100 * (audit["clean"]["accuracy"] - _trial(audit, f"{MAIN}, preserve")["accuracy"])
                        for audit in audits])  # fmt: skip
        controls = ", ".join(f"{name} {_spread(_values(audits, name))}" for name in CONTROLS)
        parts.append(
            f"{TASKS[task]}, {LABELS[method]}, {_seeds(found)}: {_spread(main)} % ({ceiling} of the ceiling), keeping "
            f"answers {_spread(kept)} % at {lost} points, {OWN} {_spread(_values(audits, OWN))} %; {controls}"
        )
    return "; ".join(parts) or UNMEASURED


def real_cost(receipts: Sequence[Receipt]) -> str:
    """Line 2: time under attack over clean, by execution; batch poisoning; energy."""
    parts = []
    for task, method, found in _groups(receipts, defended=False):
        audits = [item.notes["audit"] for item in found]
        times = ", ".join(
            f"{execution} {_spread(values, digits=2)}x"
            for execution in ("dense", "masked", "padded", "ragged")
            if (values := [rise for audit in audits if (rise := _rise(audit, execution, 1)) is not None])
        )
        poisoned = [_poisoning(audit, 16) for audit in audits if _poisoning(audit, 16)]
        if method == "tome" or not times:
            continue
        factor = _spread([one["factor"] for one in poisoned], digits=2) if poisoned else "-"
        parts.append(f"{TASKS[task]}, {LABELS[method]}: time under attack over clean, one image: {times}; one bad "
                     f"image in 16 makes each {factor}x as dear where batches are padded")  # fmt: skip
    energy = sorted({item.notes["audit"]["energy"]["how"] for item in receipts})
    return "; ".join([*parts, f"energy: {', '.join(energy)}"]) if parts else UNMEASURED


def defence(receipts: Sequence[Receipt]) -> str:
    """Line 3: trained against patches, attacked anew; the hard budget."""
    parts = []
    before = {(task, method): found for task, method, found in _groups(receipts, defended=False)}
    for task, method, found in _groups(receipts, defended=True):
        plain = {item.seed: item for item in before.get((task, method), [])}
        pairs = [(item, plain[item.seed]) for item in found if item.seed in plain]
        if pairs:
            now, then = (_spread([100 * side.quality["attack_success"] for side in sides])
                         for sides in zip(*pairs, strict=True))  # fmt: skip
            points = _spread([100 * (a.quality["test_accuracy"] - b.quality["test_accuracy"]) for a, b in pairs], "+")
            parts.append(f"{LABELS[method]}, {_seeds(pairs)}: {then} to {now} %, clean accuracy {points} points")
    budgets = [one for item in receipts for one in _tried(item.notes["audit"]) if one["name"] == "hard budget"]
    if budgets:
        most = max(one["adaptive_success"] for one in budgets)
        kept = sum(bool(one["kept"]) for one in budgets)
        parts.append(f"hard budget: kept by every image of {kept} of {len(budgets)} audits, attack success against one "
                     f"who knows it at most {100 * most:.0f} %")  # fmt: skip
    return "; ".join(parts) or UNMEASURED


def duration(receipts: Sequence[Receipt]) -> str:
    """Line 4: CPU time of whole audits of the small model, not interrupted."""
    small = [item for item in receipts if item.name == f"{NAME}/cifar10" and item.way != "tome"]
    minutes = [item.cost.cpu_seconds.value / 60 for item in small if item.cost.cpu_seconds.value is not None]
    if not minutes:
        return UNMEASURED
    text = (
        f"{statistics.median(minutes):.1f} minutes of one core, at most {max(minutes):.1f}, for each of {len(minutes)}"
    )
    return f"{text} audits of the usual budget and images; that one goes on to the same report is tested"


def card(folder: Path) -> str:
    """All tables; ``folder`` is that of all receipts."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*/*.json"))]
    if not receipts:
        return UNMEASURED
    tables = [table for task in TASKS for table in (_attacks(receipts, task), _costs(receipts, task))]
    tables += [_defences(receipts), _times(receipts)]
    return "\n\n".join([*(table for table in tables if table), NOTE])


def _attacks(receipts: Sequence[Receipt], task: str) -> str:
    groups = {
        m: [item.notes["audit"] for item in found] for t, m, found in _groups(receipts, defended=False) if t == task
    }
    groups.pop("tome", None)
    if not groups:
        return ""
    title = f"{TASKS[task]}: Attack Success against all tokens, % (accuracy, %)."
    seeds = {method: f"{LABELS[method]}, {_seeds(audits)}" for method, audits in groups.items()}
    rows = [
        ["no attack", *(f"- ({_spread([100 * a['clean']['accuracy'] for a in audits])})" for audits in groups.values())]
    ]
    for name in ROWS:
        rows.append([name, *(_cell(audits, name) for audits in groups.values())])
    rows.append(["published, patch of 8 %", *(PUBLISHED[method] for method in groups)])
    return _table(title, ["attack", *seeds.values()], rows)


def _costs(receipts: Sequence[Receipt], task: str) -> str:
    rows = []
    for found_task, method, found in _groups(receipts, defended=False):
        if found_task != task:
            continue
        audits = [item.notes["audit"] for item in found]
        for title, of in (("clean", None), (MAIN, MAIN), (OWN, OWN)):
            rows.append([LABELS[method], title, *_shares(audits, of)])
    heads = ["method", "images", "mean", "p50", "p95", "p99", "worst"]
    return _table(f"{TASKS[task]}: FLOPs of an image, % of all tokens; means over the seeds.", heads, rows)


def _tried(audit: Audit) -> list[dict[str, Any]]:
    """The defences, without a budget that is the dense cost: as many clean images cost that, it caps nothing."""
    return [one for one in audit["defences"] if one["bound"] is None or one["bound"] < audit["full"]]


def _shares(audits: Sequence[Audit], name: str | None) -> list[str]:
    """Mean and percentiles over the images, each a mean over the seeds, % of all tokens."""
    spreads = [(audit["clean"] if name is None else _trial(audit, name))["flops"] for audit in audits]
    pairs = list(zip(spreads, (audit["full"] for audit in audits), strict=True))
    keys = ("mean", "p50", "p95", "p99", "worst")
    return [f"{100 * statistics.mean(one[key] / full for one, full in pairs):.0f}" for key in keys]


def _strongest(audit: Audit) -> float:
    """Attack Success of the strongest universal patch, %."""
    return max(100 * one["success"] for one in audit["trials"] if one["kind"] == "attack" and one["threat"] == "T1")


def _defences(receipts: Sequence[Receipt]) -> str:
    rows = []
    plain = {(task, method): found for task, method, found in _groups(receipts, defended=False)}
    for (task, method), found in plain.items():
        audits = [item.notes["audit"] for item in found]
        for name in dict.fromkeys(one["name"] for audit in audits for one in _tried(audit)):
            tried = [(audit, one) for audit in audits for one in _tried(audit) if one["name"] == name]
            points = [100 * (one["clean_accuracy"] - audit["clean"]["accuracy"]) for audit, one in tried]
            columns = ([one["clean_flops"] / audit["full"] for audit, one in tried],
                       [one["success"] for _, one in tried], [one["adaptive_success"] for _, one in tried])  # fmt: skip
            cells = [_spread([100 * value for value in column]) for column in columns]
            rows.append([TASKS[task], LABELS[method], name, _spread(points, "+"), *cells])
    for task, method, found in _groups(receipts, defended=True):
        before = {item.seed: item for item in plain.get((task, method), [])}
        pairs = [(item, before[item.seed]) for item in found if item.seed in before]
        if pairs:
            points = [100 * (now.quality["test_accuracy"] - then.quality["test_accuracy"]) for now, then in pairs]
            clean = [
                100 * now.notes["audit"]["clean"]["flops"]["mean"] / now.notes["audit"]["full"] for now, _ in pairs
            ]
            after = [100 * now.quality["attack_success"] for now, _ in pairs]
            most = [_strongest(now.notes["audit"]) for now, _ in pairs]
            cells = [_spread(points, "+"), _spread(clean), _spread(after), _spread(most)]
            rows.append([TASKS[task], LABELS[method], "trained with patches", *cells])
    heads = ["model", "method", "defence", "points of clean accuracy", "clean FLOPs, %", "Attack Success, %",
             "by who knows it, %"]  # fmt: skip
    text = (
        "Defences. Attack Success of the strongest attack that was made without the defence, and of the strongest at "
        "all; for models trained with patches, of the patch of 8 % made anew on them, and of the strongest patch."
    )
    return _table(text, heads, rows)


def _times(receipts: Sequence[Receipt]) -> str:
    rows = []
    for task, method, found in _groups(receipts, defended=False):
        for batch in (1, 16):
            audits = [item.notes["audit"] for item in found]
            cells = [_ratios(audits, execution, batch) for execution in ("ragged", "padded", "masked")]
            factors = [one["factor"] for audit in audits if (one := _poisoning(audit, batch))]
            if any(cell != "-" for cell in cells):
                rows.append(
                    [TASKS[task], LABELS[method], str(batch), *cells, _spread(factors, digits=2) if factors else "-"]
                )
    heads = ["model", "method", "batch", "ragged", "padded", "masked", "one bad image in the batch"]
    text = (
        "Time over that of all tokens, clean images and attacked ones, medians over calls in turn and over seeds; and "
        "by how much one attacked image makes all of a padded batch dearer, in FLOPs."
    )
    return _table(text, heads, rows)


def _ratios(audits: Sequence[Audit], execution: str, batch: int) -> str:
    """Time over dense, clean and attacked."""
    pairs = [(one, two) for audit in audits for one, two in [_speeds(audit, execution, batch)] if one and two]
    return (
        ", ".join(f"{statistics.median(one['ratio'] for one in side):.2f}" for side in zip(*pairs, strict=True)) or "-"
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([title, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])


def _groups(receipts: Sequence[Receipt], *, defended: bool) -> Iterable[tuple[str, str, list[Receipt]]]:
    for task in TASKS:
        for method in LABELS:
            way = method + DEFENDED * defended
            found = [item for item in receipts if item.name == f"{NAME}/{task}" and item.way == way]
            if found:
                yield task, method, sorted(found, key=lambda item: item.seed or 0)


def _trial(audit: Audit, name: str) -> dict[str, Any]:
    return next(one for one in audit["trials"] if one["name"] == name)


def _values(audits: Sequence[Audit], name: str) -> list[float]:
    return [100 * _trial(audit, name)["success"] for audit in audits]


def _cell(audits: Sequence[Audit], name: str) -> str:
    right = [100 * value for audit in audits if (value := _trial(audit, name)["accuracy"]) is not None]
    return _spread(_values(audits, name)) + (f" ({statistics.mean(right):.0f})" if right else "")


def _speeds(audit: Audit, execution: str, batch: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Rows of an execution: clean, and under the first attack that was timed."""
    rows = [one for one in audit["speed"] if one["execution"] == execution and one["batch"] == batch]
    clean = next((one for one in rows if one["inputs"] == "clean"), None)
    return clean, next((one for one in rows if one["inputs"] != "clean"), None)


def _rise(audit: Audit, execution: str, batch: int) -> float | None:
    clean, attacked = _speeds(audit, execution, batch)
    return attacked["seconds"]["p50"] / clean["seconds"]["p50"] if clean and attacked else None


def _poisoning(audit: Audit, batch: int) -> dict[str, Any] | None:
    return next((one for one in audit["poisoning"] if one["batch"] == batch), None)


def _seeds(found: Sequence[object]) -> str:
    return f"{len(found)} seed{'s' * (len(found) != 1)}"


def _spread(values: Sequence[float], sign: str = "", *, digits: int = 1) -> str:
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


FIGURES: dict[str, Callable[[Sequence[Receipt]], str]] = {
    "1": success,
    "2": real_cost,
    "3": defence,
    "4": duration,
}
"""By the acceptance line that they are of."""
