"""Tables out of the receipts of denoise_runs.py, and what they share with the acceptance lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scrimp.receipts import Receipt, load_receipt

NAME = "denoise"
TASKS = {"dit": "small DiT, Fashion-MNIST", "unet": "small UNet, Fashion-MNIST"}
PLAIN, THRIFTY, WITHOUT, LONG = "plain", "thrifty", "thrifty without ", "long"
SAMPLING, STUDENT, COVERAGE, PERSONAL, JUDGE = "sampling", "student", "coverage", "personal ", "judge"
STYLES = {"none": "the model as it was", "nola": "NOLA", "lora": "LoRA, rank 4"}
GATE = (10, 25, 50, 100)
SIGMAS = 2.0  # standard errors from which on a difference counts
UNMEASURED = "Not measured yet."
GATED = "not published: more steps are worse"
NOTE = (
    "FD: Frechet distance between drawn images and the 10,000 test images, in the features of a small classifier of "
    "them (not FID, and not to be compared with it); lower is better. ± standard deviation over the seeds, or with one "
    "seed the standard error by bootstrap. Paired error: root mean square distance of an image to the model's own "
    "100-step one (of DPM-Solver++) from the same noise, over the standard deviation of such; mean over the images. "
    "FLOPs are counted, those of reused steps as they run."
)

Setting = dict[str, Any]


def card(folder: Path, picture: Path | None = None) -> str:
    """All tables, and the picture where there is one; ``folder`` is that of all receipts."""
    receipts = [load_receipt(path) for path in sorted((folder / NAME).glob("*/*.json"))]
    if not receipts:
        return UNMEASURED
    tables = [_judged(receipts), _trained(receipts)]
    tables += [_sampled(receipts, task) for task in TASKS]
    tables += [_taught(receipts), _personal(receipts)]
    if picture is not None and picture.is_file():
        alt = "Settings of sampling: FLOPs against the error to the model's own 100-step samples"
        tables.append(f"![{alt}](images/{picture.name})")
    return "\n\n".join([*(table for table in tables if table), NOTE])


def base_of(receipt: Receipt) -> Setting:
    """The setting that the others of a sampling receipt are held against."""
    found: Setting = next(one for one in receipt.notes["settings"] if one["name"] == receipt.notes["baseline"])
    return found


def as_good(one: Setting, base: Setting, *, paired: bool = True) -> bool:
    """FD at most the baseline's standard error above it; where ``paired``, as near to the 100-step sample as it is."""
    known = one["fd"] is not None and base["fd"] is not None
    near = one["paired_error"] <= base["paired_error"] or not paired
    return known and one["fd"] <= base["fd"] + base["fd_error"] and near


def cheapest(receipt: Receipt, *, reuse: bool = True, paired: bool = True) -> Setting | None:
    """The setting of least FLOPs that is as good as the baseline; it may reuse features only where said."""
    base = base_of(receipt)
    known = [one for one in receipt.notes["settings"] if reuse or one["cache"] == "none"]
    good = [one for one in known if as_good(one, base, paired=paired)]
    return min(good, key=lambda one: one["flops"], default=None)


def front(settings: Iterable[Setting], *, reuse: bool | None = None, most: float = float("inf")) -> list[Setting]:
    """Settings from cheap to dear, below FLOPs of ``most``, each nearer to the 100-step sample than cheaper ones.

    With reuse, without, or (None) of both kinds.
    """
    kind = [one for one in settings if reuse in (None, one["cache"] != "none") and one["flops"] < most]
    best, found = float("inf"), []
    for one in sorted(kind, key=lambda one: (one["flops"], one["paired_error"])):
        if one["paired_error"] < best:
            best = one["paired_error"]
            found.append(one)
    return found


def gains_at_equal_error(receipt: Receipt) -> dict[str, float]:
    """FLOPs of solvers alone over those of each setting with reuse on the front of all, at its paired error.

    What solvers cost at that error is interpolated, in logarithms, between their own settings on either side.
    """
    settings = receipt.notes["settings"]
    most = base_of(receipt)["flops"]
    plain = front(settings, reuse=False, most=most)
    gains = {}
    for one in front(settings, reuse=True, most=most):
        dearer = [other for other in plain if other["paired_error"] <= one["paired_error"]]
        cheaper = [other for other in plain if other["paired_error"] > one["paired_error"]]
        if not dearer or not cheaper or cheaper[-1]["flops"] >= dearer[0]["flops"]:
            continue
        (low, high), error = (cheaper[-1], dearer[0]), math.log(one["paired_error"])
        ends = [math.log(other["paired_error"]) for other in (low, high)]
        share = (ends[0] - error) / (ends[0] - ends[1])
        gains[one["name"]] = low["flops"] ** (1 - share) * high["flops"] ** share / one["flops"]
    return gains


def sound(receipt: Receipt) -> bool:
    """Whether the baseline's solver is nowhere better with fewer steps than with 100: apart from overlapping errors."""
    solver = base_of(receipt)["name"].split()[0]
    known = {one["name"]: one for one in receipt.notes["settings"] if one["fd"] is not None}
    most, others = known[f"{solver} {GATE[-1]}"], [known[f"{solver} {steps}"] for steps in GATE[:-1]]
    return all(most["fd"] - one["fd"] <= most["fd_error"] + one["fd_error"] for one in others)


def _judged(receipts: Sequence[Receipt]) -> str:
    rows = [
        [
            f"{100 * item.quality['test_accuracy']:.1f} %",
            *(f"{item.quality[key]:.2f}" for key in ("fd_floor", "fd_noise", "fd_blurred")),
        ]
        for item in receipts
        if item.way == JUDGE
    ]
    heads = ["accuracy of the classifier", "FD of training images (the floor)", "of noise", "of blurred test images"]
    return table("What the distance can tell.", heads, rows)


def _trained(receipts: Sequence[Receipt]) -> str:
    rows = []
    for task in TASKS:
        plain = runs(receipts, task, PLAIN)
        ways = dict.fromkeys(item.way for item in receipts if item.name == f"{NAME}/{task}" and "fd" in item.quality)
        parts = sorted(way for way in ways if WITHOUT in way)
        order = [way for way in (PLAIN, THRIFTY, *parts, LONG) if way in ways]
        for way in order:
            found = runs(receipts, task, way)
            pairs = pairs_of(plain, found)
            share = f"{statistics.mean(flops(now) / flops(then) for then, now in pairs):.2f}x" if pairs else "-"
            mark = told(pairs) if pairs and way != PLAIN else ""
            cells = [_column(found, key, 2) for key in ("fd_solver", "precision", "recall")]
            rows.append([TASKS[task], way, share, _distances(found) + mark, *cells, str(len(found))])
    quality = ["FD, 50 steps of DDIM", "FD, 20 of DPM-Solver++", "precision", "recall"]
    heads = ["model", "recipe", "training FLOPs", *quality, "seeds"]
    title = (
        "Training: the plain recipe, the thrifty one, that without one of its parts; and, thrifty but on whole images "
        "and longer, what sampling is measured on."
    )
    return table(title, heads, rows)


def _sampled(receipts: Sequence[Receipt], task: str) -> str:
    found = runs(receipts, task, SAMPLING)
    if not found:
        return ""
    if not all(map(sound, found)):
        return f"{TASKS[task]}, sampling: {GATED}."
    names = {base_of(item)["name"]: "baseline" for item in found}
    for item in found:
        for one, why in _chosen(item):
            if one:
                names.setdefault(one["name"], f"{why}, seed {item.seed}")
    names |= {name: "" for name in _compared(found) if name not in names}
    rows = []
    for name, why in names.items():
        pairs = [(base_of(item), one) for item in found for one in item.notes["settings"] if one["name"] == name]
        shares = [base["flops"] / one["flops"] for base, one in pairs]
        times = [[1 / one[key] for _, one in pairs if one.get(key)] for key in ("cpu_ratio", "wall_ratio")]
        cells = [f"{spread(values, 2)}x" if values else "-" for values in (shares, *times)]
        distances = [one["fd"] for _, one in pairs if one["fd"] is not None]
        away = spread([one["paired_error"] for _, one in pairs], 3)
        rows.append([name, why, *cells, away, spread(distances, 2) if distances else "-", str(len(pairs))])
    heads = [
        "solver, steps, reuse",
        "",
        "fewer FLOPs",
        "less CPU time",
        "less wall time",
        "paired error",
        "FD",
        "seeds",
    ]
    return table(f"{TASKS[task]}, sampling.", heads, rows)


def _chosen(item: Receipt) -> list[tuple[Setting | None, str]]:
    return [
        (cheapest(item, reuse=False), "cheapest solver as good"),
        (cheapest(item), "cheapest of all"),
        (cheapest(item, reuse=False, paired=False), "cheapest solver by FD alone"),
        (cheapest(item, paired=False), "cheapest of all by FD alone"),
    ]


def _compared(found: Sequence[Receipt]) -> list[str]:
    """Settings whose FD is known, by FLOPs."""
    known = {one["name"]: one["flops"] for item in found for one in item.notes["settings"] if one["fd"] is not None}
    return sorted(known, key=lambda name: -known[name])


def _taught(receipts: Sequence[Receipt]) -> str:
    rows = []
    for task, found in groups(receipts, STUDENT):
        for steps in sorted({one["steps"] for item in found for one in item.notes["rows"]}):
            lines = [one for item in found for one in item.notes["rows"] if one["steps"] == steps]
            cells = [spread([one[side] for one in lines], 2) for side in ("fd", "solver_fd")]
            names = ", ".join(dict.fromkeys(one["solver"] for one in lines))
            needed = ", ".join(dict.fromkeys(str(one["needed"] or "more than tried") for one in lines))
            rows.append([TASKS[task], str(steps), *cells, names, needed, str(len(lines))])
    best = "FD of the best solver at these FLOPs"
    heads = ["model", "steps", "FD of the student", best, "solver", "steps that solvers need for its FD", "seeds"]
    return table("A student of few steps beside its teacher.", heads, rows)


def _personal(receipts: Sequence[Receipt]) -> str:
    rows = []
    for task in TASKS:
        for style, label in STYLES.items():
            found = runs(receipts, task, f"{PERSONAL}{style}")
            if found:
                size = found[0].cost.stored_bytes.value
                bytes_ = "-" if size is None else f"{size:,.0f}"
                rows.append([TASKS[task], label, bytes_, _distances(found), str(len(found))])
    heads = ["model", "adapter", "bytes", "FD to held-out images of the style", "seeds"]
    return table("A style of 500 images.", heads, rows)


def told(pairs: Sequence[tuple[Receipt, Receipt]]) -> str:
    """ " (tie)" where FD differs by less than two standard errors: over seeds, or with one by bootstrap."""
    changes = [now.quality["fd"] - then.quality["fd"] for then, now in pairs]
    if len(changes) > 1:
        error = statistics.stdev(changes) / len(changes) ** 0.5
    else:
        error = sum((side.quality["fd_error"] or 0) ** 2 for side in pairs[0]) ** 0.5
    return " (tie)" if abs(statistics.mean(changes)) <= SIGMAS * error else ""


def _distances(found: Sequence[Receipt]) -> str:
    if len(found) == 1:
        return f"{found[0].quality['fd']:.2f} ± {found[0].quality['fd_error']:.2f}"
    return spread([item.quality["fd"] for item in found], 2)


def _column(found: Sequence[Receipt], key: str, digits: int) -> str:
    values = [value for item in found if (value := item.quality.get(key)) is not None]
    return spread(values, digits) if values else "-"


def flops(receipt: Receipt) -> float:
    return receipt.cost.flops.value or float("nan")


def runs(receipts: Sequence[Receipt], task: str, way: str) -> list[Receipt]:
    found = [item for item in receipts if item.name == f"{NAME}/{task}" and item.way == way]
    return sorted(found, key=lambda item: item.seed or 0)


def groups(receipts: Sequence[Receipt], way: str) -> Iterable[tuple[str, list[Receipt]]]:
    for task in TASKS:
        if found := runs(receipts, task, way):
            yield task, found


def pairs_of(before: Sequence[Receipt], after: Sequence[Receipt]) -> list[tuple[Receipt, Receipt]]:
    """Receipts of the same seed."""
    known = {item.seed: item for item in before}
    return [(known[item.seed], item) for item in after if item.seed in known]


def seeds(found: Sequence[object]) -> str:
    return f"{len(found)} seed{'s' * (len(found) != 1)}"


def spread(values: Sequence[float], digits: int = 2, *, sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([title, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines]) if lines else ""
