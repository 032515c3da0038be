"""Verdicts in plain words."""

from __future__ import annotations

from collections.abc import Iterable

from scrimp.report import units
from scrimp.report.summary import Spread, Verdict, WayRow

_SHORT = ("psnr", "ssim", "lpips")  # written in capitals
_SAME = 0.01  # budgets within 1 % of each other are called the same


def headline(verdicts: Iterable[Verdict], baseline: str) -> str:
    """One sentence for one quality: "Test accuracy: history and prune tie with uniform; presample is worse"."""
    grouped: dict[str, list[Verdict]] = {}
    for item in verdicts:
        grouped.setdefault(item.outcome, []).append(item)
    parts = [_outcome_of(outcome, [item.way for item in items], baseline) for outcome, items in grouped.items()]
    title = quality_title(next(iter(grouped.values()))[0].quality) if grouped else ""
    return f"{capital(title)}: {'; '.join(parts)}." if parts else ""


def sentence(item: Verdict, row: WayRow, base: WayRow) -> str:
    """The verdict whole, such as "history reached a test accuracy of 88.1 % against 87.9 % for uniform at the same
    900 GFLOP: a tie (difference +0.2 points, 95 % interval -0.3 to +0.7, 3 seeds)."
    """
    ours, theirs = (side.quality.get(item.quality, Spread()).mean for side in (row, base))
    if not (units.is_known(ours) and units.is_known(theirs)):
        return f"{item.way}: {quality_title(item.quality)} {item.outcome}."
    reached = (
        f"{item.way} reached {_with_article(quality_title(item.quality))} of {units.quality(item.quality, ours)} "
        f"against {units.quality(item.quality, theirs)} for {base.way}{_at_cost(row, base)}"
    )
    return f"{reached}: {_conclusion(item)}."


def _with_article(title: str) -> str:
    spelt = title.split(" ")[0] in ("SSIM", "LPIPS")
    return f"{'an' if spelt or title[:1] in 'aeiou' else 'a'} {title}"


def capital(title: str) -> str:
    """With a capital at its beginning, the rest as it is."""
    return f"{title[:1].upper()}{title[1:]}"


def quality_title(name: str) -> str:
    """Of a quality, as it stands within a sentence."""
    words = name.replace("_", " ").split(" ")
    return " ".join(word.upper() if word in _SHORT else word for word in words)


def listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _outcome_of(outcome: str, ways: list[str], baseline: str) -> str:
    one = len(ways) == 1
    if outcome == "tie":
        return f"{listed(ways)} {'ties' if one else 'tie'} with {baseline}"
    if outcome.endswith("no verdict"):
        return f"{listed(ways)}: {outcome.replace(': ', ', ')}"
    return f"{listed(ways)} {'is' if one else 'are'} {outcome} than {baseline}"


def _at_cost(row: WayRow, base: WayRow) -> str:
    ours, theirs = row.cost["flops"].mean, base.cost["flops"].mean
    if not (units.is_known(ours) and units.is_known(theirs)):
        return ""
    if abs(ours - theirs) <= _SAME * max(ours, theirs):
        return f" at the same {units.flops(theirs)}"
    return f", with {units.flops(ours)} against {units.flops(theirs)}"


def _conclusion(item: Verdict) -> str:
    if item.difference is None or item.low is None or item.high is None:
        return item.outcome.replace(": ", ", ")
    points = " points" if units.is_share(item.quality) else ""
    low, mean, high = units.differences(item.quality, item.low, item.difference, item.high)
    interval = f"95 % interval {low} to {high}, {item.pairs} seeds"
    if item.outcome == "tie":
        return f"a tie (difference {mean}{points}, {interval})"
    size = units.difference(item.quality, abs(item.difference), signed=False)
    return f"{item.outcome} by {size}{points} ({interval})"
