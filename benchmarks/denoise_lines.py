"""The acceptance lines of diffusion at lower cost, and what the receipts say of them, for benchmarks/readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from acceptance import Line
from denoise_tables import (
    COVERAGE,
    GATED,
    NAME,
    PERSONAL,
    PLAIN,
    SAMPLING,
    STUDENT,
    TASKS,
    THRIFTY,
    UNMEASURED,
    WITHOUT,
    base_of,
    cheapest,
    flops,
    groups,
    pairs_of,
    runs,
    seeds,
    sound,
    spread,
    told,
)
from denoise_tables import (
    gains_at_equal_error as equal,
)
from scrimp.receipts import Receipt


def training(receipts: Sequence[Receipt]) -> str:
    """Line 1: the thrifty recipe at a share of the plain one's FLOPs; what each of its parts gives."""
    parts = []
    for task in TASKS:
        plain = runs(receipts, task, PLAIN)
        pairs = pairs_of(plain, runs(receipts, task, THRIFTY))
        if not pairs:
            continue
        before, after = ([side.quality["fd"] for side in sides] for sides in zip(*pairs, strict=True))
        share = statistics.mean(flops(now) / flops(then) for then, now in pairs)
        parts.append(
            f"{TASKS[task]}, {seeds(pairs)}: FD {spread(before)} plain, {spread(after)} thrifty at {share:.2f}x the "
            f"FLOPs{told(pairs)}"
        )
        parts += [f"{way} {spread(change, sign='+')}{tie}" for way, change, tie in _ablation(receipts, task)]
    return "; ".join(parts) or UNMEASURED


def sampling(receipts: Sequence[Receipt]) -> str:
    """Line 2: FLOPs and time of 50 steps over those of the cheapest setting as good."""
    parts = []
    for task, found in groups(receipts, SAMPLING):
        good = [item for item in found if sound(item)]
        if len(good) < len(found):
            parts.append(f"{TASKS[task]}: {len(found) - len(good)} of {seeds(found)} {GATED}")
        parts += [f"{TASKS[task]}, {told}" for told in (_saved(good, paired=True), _saved(good, paired=False)) if told]
    return "; ".join(parts) or UNMEASURED


def _saved(good: Sequence[Receipt], *, paired: bool) -> str:
    chosen = [(base_of(item), one) for item in good if (one := cheapest(item, paired=paired))]
    if not chosen:
        return ""
    factors = [base["flops"] / one["flops"] for base, one in chosen]
    times = [[1 / one[key] for _, one in chosen if one.get(key)] for key in ("cpu_ratio", "wall_ratio")]
    cpu, wall = (f"{spread(time, 2)}x" if time else "-" for time in times)
    names = ", ".join(dict.fromkeys(one["name"] for _, one in chosen))
    how = "as good by both measures" if paired else "by FD alone"
    return (
        f"{seeds(chosen)}, {how}: {spread(factors, 2)}x fewer FLOPs, {cpu} less CPU time, {wall} less wall time than "
        f"{chosen[0][0]['name']} ({names})"
    )


def beyond_solvers(receipts: Sequence[Receipt]) -> str:
    """Line 2, second part: over the best few-step solver, by reuse and by distillation."""
    parts = []
    for task, found in groups(receipts, SAMPLING):
        students = {item.seed: item for item in runs(receipts, task, STUDENT)}
        for paired, how in ((True, ""), (False, " (by FD alone)")):
            pairs = [
                (plain["flops"] / reused["flops"])
                for item in found
                if sound(item)
                and (plain := cheapest(item, reuse=False, paired=paired))
                and (reused := cheapest(item, paired=paired))
            ]
            if pairs:
                parts.append(f"{TASKS[task]}, {seeds(pairs)}: through reuse {spread(pairs, 2)}x{how}")
        gains = [max(gain.items(), key=lambda one: one[1]) for item in found if sound(item) and (gain := equal(item))]
        if gains:
            names = ", ".join(dict.fromkeys(name for name, _ in gains))
            gain = spread([gain for _, gain in gains], 2)
            parts.append(f"{TASKS[task]}, {seeds(gains)}: through reuse at equal paired error up to {gain}x ({names})")
        taught = [(item, students[item.seed]) for item in found if sound(item) and item.seed in students]
        parts += [f"{TASKS[task]}, {seeds(taught)}: {_distilled(taught)}"] if taught else []
    return "; ".join(parts) or UNMEASURED


def coverage(receipts: Sequence[Receipt]) -> str:
    """Line 3: how often the error estimate bounds the measured error."""
    parts = []
    for task, found in groups(receipts, COVERAGE):
        shares = [100 * item.quality["coverage"] for item in found]
        count = found[0].notes["images"]
        parts.append(f"{TASKS[task]}, {seeds(found)}: {spread(shares, 1)} % of {count:,} fresh samples")
    return "; ".join(parts) or UNMEASURED


def personal(receipts: Sequence[Receipt]) -> str:
    """Line 4: a style added by NOLA and by LoRA."""
    parts = []
    for task in TASKS:
        pairs = pairs_of(runs(receipts, task, f"{PERSONAL}lora"), runs(receipts, task, f"{PERSONAL}nola"))
        if pairs:
            lora, nola = ([side.quality["fd"] for side in sides] for sides in zip(*pairs, strict=True))
            sizes = [f"{side.cost.stored_bytes.value or 0:,.0f} bytes" for side in pairs[0]]
            parts.append(
                f"{TASKS[task]}, {seeds(pairs)}: NOLA {spread(nola)} in {sizes[1]}, LoRA r4 {spread(lora)} in "
                f"{sizes[0]}"
                f"{told(pairs)}"
            )
    return "; ".join(parts) or UNMEASURED


def _distilled(taught: Sequence[tuple[Receipt, Receipt]]) -> str:
    """Steps that solvers need for the FD of a student's steps, and whether any of these is as good as 50 steps."""
    gains = []
    for steps in sorted({row["steps"] for _, student in taught for row in student.notes["rows"]}):
        rows = [row for _, student in taught for row in student.notes["rows"] if row["steps"] == steps]
        factors = [row["needed"] / steps for row in rows if row["needed"]]
        distance = spread([row["fd"] for row in rows], 1)
        gains.append(f"{spread(factors, 2)}x at the FD of {steps} ({distance})" if factors else f"- at {steps}")
    good = sum(
        any(row["fd"] <= base_of(item)["fd"] + base_of(item)["fd_error"] for row in student.notes["rows"])
        for item, student in taught
    )
    return f"through distillation {', '.join(gains)}; as good as 50 steps on {good} of {seeds(taught)}"


def _ablation(receipts: Sequence[Receipt], task: str) -> Iterable[tuple[str, list[float], str]]:
    """How far FD moves without a part, seed by seed, and whether that is told from noise."""
    whole = runs(receipts, task, THRIFTY)
    for way in sorted({item.way for item in receipts if item.name == f"{NAME}/{task}" and WITHOUT in item.way}):
        pairs = pairs_of(whole, runs(receipts, task, way))
        if pairs:
            changes = [now.quality["fd"] - then.quality["fd"] for then, now in pairs]
            yield way.removeprefix(f"{THRIFTY} "), changes, told(pairs)


_SCRIPT, _RECEIPTS = "denoise_runs.py run", "denoise/*/*.json"

DENOISE_LINES = (
    Line(
        "1",
        "Frechet distance in a classifier's features (FD): the thrifty recipe beside the plain one, and its parts",
        _SCRIPT,
        _RECEIPTS,
        training,
        "the plain recipe's final FD with at most 0.6x its training FLOPs, 3 seeds; ties named",
        together=True,
    ),
    Line(
        "2",
        "sampling: the cheapest of solver, steps and reuse as good as 50 steps, by FD and paired error, or by FD alone",
        _SCRIPT,
        _RECEIPTS,
        sampling,
        "at least 5x fewer FLOPs and 4x less wall time; published only where more steps are not worse",
        together=True,
    ),
    Line(
        "2",
        "the same over the cheapest few-step solver alone: through reuse, or through distillation",
        _SCRIPT,
        _RECEIPTS,
        beyond_solvers,
        "at least 1.5x",
        together=True,
    ),
    Line(
        "3",
        "samples whose measured error of reuse is within the estimate; refreshing every step is tested bit for bit",
        _SCRIPT,
        _RECEIPTS,
        coverage,
        "95 % of samples",
        together=True,
    ),
    Line(
        "4",
        "a style of 500 images added to the trained model",
        _SCRIPT,
        _RECEIPTS,
        personal,
        "NOLA in at most 8 KB, its FD that of LoRA of rank 4",
        together=True,
    ),
)
