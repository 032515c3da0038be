"""The pretraining and distillation benchmarks' rows and tables, made from their receipts; for benchmarks/readme.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from scrimp.receipts import Receipt, load_receipt

UNMEASURED, NO_PAIR = "Not measured yet.", "no pair of runs yet"
OURS, EPOCHS_BESIDE = "constrained", "lightly-simsiam"
PEER = "lightly-"
KNN = "knn20_accuracy"
METHODS = {"byol": "BYOL", "mean-shift": "mean shift", "constrained": "constrained mean shift"}

LESSONS = (
    ("1-NN of a 4-layer head over a linear one", ("head-4", "knn1_accuracy"), ("head-1", "knn1_accuracy")),
    (
        "linear classifier of 1 % of the labels over training on them",
        ("head-4", "linear_1pct_accuracy"),
        ("scratch-1pct", "test_accuracy"),
    ),
    ("1-NN of kept over live features", ("head-4", "knn1_accuracy"), ("live", "knn1_accuracy")),
    ("1-NN of two teachers over one", ("two-teachers", "knn1_accuracy"), ("head-4", "knn1_accuracy")),
)
"""What line 3 compares: in words, and the way and quality on either side."""
KEPT, LIVE = "head-4", "live"
SEMI, ALONE = "pseudo-labels", "scratch"

Pairs = list[tuple[Receipt, Receipt]]


def cost(receipt: Receipt) -> str:
    """Line 1: FLOPs and saved activations against BYOL's, and the search beside the step."""
    found = {name: ratio(value) for name, value in receipt.quality.items()}
    flops = {way: value / 1e9 for way, value in receipt.notes["FLOPs an image"].items()}
    return (
        f"mean shift {found['mean_shift_flops_to_byol']}x BYOL's FLOPs ({flops['mean-shift']:.2f} against "
        f"{flops['byol']:.2f} GFLOP an image), {found['mean_shift_saved_to_byol']}x its saved activations; constrained "
        f"{found['constrained_flops_to_mean_shift']}x mean shift's FLOPs; search of {receipt.notes['memory']:,} "
        f"embeddings {percent(receipt.quality['search_time_to_step'])} of the step's CPU time "
        f"({percent(receipt.quality['search_flops_to_step'])} of its FLOPs)"
    )


def agreement(receipt: Receipt) -> str:
    """Line 6: the largest difference of any probe."""
    worst, pairs = receipt.quality["largest_difference_in_points"], receipt.notes["accuracies, ours and theirs"]
    return f"at most {worst:.2f} points apart, {len(pairs)} figures"


def cost_table(path: Path) -> str:
    """What an image costs in a step, way by way."""
    if not path.is_file():
        return UNMEASURED
    receipt = load_receipt(path)
    flops, saved = receipt.notes["FLOPs an image"], receipt.notes["saved bytes an image"]
    rows = ["| method | GFLOP an image | of BYOL's | saved activations, MB an image | of BYOL's |"]
    rows.append("|---|---|---|---|---|")
    for way in flops:
        cells = [METHODS.get(way, way), f"{flops[way] / 1e9:.2f}", f"{flops[way] / flops['byol']:.2f}x"]
        cells += [f"{saved[way] / 1e6:.2f}", f"{saved[way] / saved['byol']:.2f}x"]
        rows.append("| " + " | ".join(cells) + " |")
    share = percent(receipt.quality["search_time_to_step"])
    about = f"{receipt.notes['memory']:,} embeddings takes {share} of the CPU time of mean shift's step"
    batch = f"batches of {receipt.notes['batch']}, {receipt.notes['threads']} threads"
    return "\n".join([*rows, "", f"ResNet-18 with a stem for 32 pixels. The search of {about}, {batch}."])


def representations(receipts: Sequence[Receipt]) -> str:
    """Line 2, setting by setting: against the best of lightly's at equal FLOPs, against SimSiam at equal epochs."""
    return "; ".join(_beside_lightly(name, mine) for name, mine in by_setting(receipts).items())


def distillation(receipts: Sequence[Receipt]) -> str:
    """Line 3, setting by setting: paired differences in points, and the FLOPs of kept features."""
    parts = []
    for name, mine in by_setting(receipts).items():
        found = [
            f"{what} {points([difference(pair, quality, other_quality) for pair in pairs])}"
            for what, (way, quality), (other, other_quality) in LESSONS
            if (pairs := paired(mine, way, other))
        ]
        shares = [share for pair in paired(mine, KEPT, LIVE) if (share := flops_share(*pair)) is not None]
        found += [f"kept features {statistics.fmean(shares):.2f}x the live FLOPs"] if shares else []
        parts.append(f"{name}: {', '.join(found) or NO_PAIR}")
    return "; ".join(parts)


def few_labels(receipts: Sequence[Receipt]) -> str:
    """Line 4, share by share of the labels: pretraining with pseudo-labels over training on the same labels alone."""
    parts = []
    for share, mine in by_setting(receipts).items():
        pairs = paired(mine, SEMI, ALONE)
        found = points([difference(pair, "test_accuracy") for pair in pairs]) if pairs else NO_PAIR
        parts.append(f"{100 * float(share):g} % of the labels: {found}")
    return "; ".join(parts)


def curves(picture: Path) -> str:
    """The picture of quality against FLOPs, as a page in its folder's parent shows it; nothing where there is none."""
    about = "20-NN accuracy at the ends of runs of different length, against their FLOPs, method by method"
    return f"![{about}]({picture.parent.name}/{picture.name})" if picture.is_file() else ""


def by_setting(receipts: Sequence[Receipt]) -> dict[str, list[Receipt]]:
    """Receipts by the last part of their name."""
    names = sorted({receipt.name.rpartition("/")[2] for receipt in receipts})
    return {name: [receipt for receipt in receipts if receipt.name.rpartition("/")[2] == name] for name in names}


def paired(receipts: Sequence[Receipt], way: str, other: str) -> Pairs:
    """The runs of two ways with the same seed."""
    others = {receipt.seed: receipt for receipt in receipts if receipt.way == other}
    return [(receipt, others[receipt.seed]) for receipt in receipts if receipt.way == way and receipt.seed in others]


def difference(pair: tuple[Receipt, Receipt], quality: str, other: str | None = None) -> float | None:
    """First less second, in points, of one quality or of one each; ``None`` where one does not say."""
    ours, theirs = pair[0].quality.get(quality), pair[1].quality.get(other or quality)
    return None if ours is None or theirs is None else 100 * (ours - theirs)


def flops_share(one: Receipt, other: Receipt) -> float | None:
    ours, theirs = one.cost.flops.value, other.cost.flops.value
    return None if ours is None or not theirs else ours / theirs


def points(values: Sequence[float | None]) -> str:
    """Mean and deviation of differences, signed."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):+.1f}"
    return f"{text} ± {statistics.stdev(known):.1f} points" if len(known) > 1 else f"{text} points (1 seed)"


def at_epochs(receipts: Sequence[Receipt], passes: float) -> float | None:
    """20-NN accuracy at ``passes`` over the images, between the ends of two runs where no run was so long; 0 to 1.

    ``None`` where all runs were longer, or all shorter.
    """
    ends = sorted((run.notes["passes"], value) for run in receipts if (value := run.quality.get(KNN)) is not None)
    for (first, low), (last, high) in pairwise(ends):
        if first <= passes <= last and first < last:
            return low + (high - low) * (passes - first) / (last - first)
    return next((value for end, value in ends if end == passes), None)


def _beside_lightly(name: str, receipts: list[Receipt]) -> str:
    ours = [receipt for receipt in receipts if way_of(receipt) == OURS]
    best = _best_peer([receipt for receipt in receipts if _whole(receipt)])
    if not ours or best is None:
        return f"{name}: not both sides yet"
    same = [receipt for receipt in receipts if way_of(receipt) == best]
    whole = {receipt.seed: receipt for receipt in same if _whole(receipt)}
    equal = [difference((run, whole[run.seed]), KNN) for run in ours if _whole(run) and run.seed in whole]
    epochs = [
        100 * (mine - (run.quality[KNN] or 0.0))
        for run in receipts
        if way_of(run) == EPOCHS_BESIDE
        and (mine := at_epochs([one for one in ours if one.seed == run.seed], run.notes["passes"])) is not None
    ]
    return (
        f"{name}: 20-NN at equal FLOPs {points(equal)} to {best}, the best of lightly's; at equal epochs "
        f"{points(epochs)} to SimSiam"
    )


def way_of(receipt: Receipt) -> str:
    """The way without its share of the budget."""
    return str(receipt.config.get("way", receipt.way))


def _whole(receipt: Receipt) -> bool:
    return receipt.config.get("share", 1.0) == 1.0


def _best_peer(receipts: Sequence[Receipt]) -> str | None:
    """The peer with the highest mean 20-NN accuracy over its seeds."""
    found: dict[str, list[float]] = {}
    for receipt in receipts:
        value = receipt.quality.get(KNN)
        if way_of(receipt).startswith(PEER) and value is not None:
            found.setdefault(way_of(receipt), []).append(value)
    return max(found, key=lambda way: statistics.fmean(found[way])) if found else None


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
