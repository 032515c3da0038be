"""The tables of an audit's page: threats, trials, defences, latencies, poisoned batches; from the report alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from scrimp.report import units
from scrimp.report.words import capital

Audit = Mapping[str, Any]
"""An audit's report, as in its JSON."""
Cell = str | tuple[str, str]
"""A text, or a text and the small print under it."""
CAN = {
    "T0": "Make nothing: the dearest of clean images, flat colours, noise",
    "T1": "Put one patch, the same one, on every image",
    "T2": "Add one faint change (l-infinity), the same one, to every image",
    "T3": "Add a faint change (l-infinity) made for the very image",
    "T4": "Make the attack on this model and use it on another",
    "T5": "Slip one attacked image into a batch that is padded to its longest",
    "black box": "Ask what images cost, without the model's weights",
}
"""What the attacker of each threat model can do."""
_DEAREST = ("mean", "p50", "p95", "p99", "worst")
_HEADINGS = ("trial", *_DEAREST, "accuracy", "AS", "spent")


def threats(report: Audit) -> str:
    """Each threat model: who, with what, how far it went, and what became of the answers."""
    controls = [trial for trial in report["trials"] if trial["kind"] == "control"]
    held = "What attacks are held against: patches not made to cost"
    rows: list[list[Cell]] = [["controls", held, *_furthest(controls)]]
    rows += [_threat(report, name) for name in CAN]
    headings = ("", "what the attacker can do", "trials", "highest AS", "by", "accuracy")
    note = (
        "AS, Attack Success: the share of the saving that is undone, (attacked - clean) / (dense - clean), on mean "
        "FLOPs an image. At 0 it has no effect, at 100 % images cost what they do dense. Accuracy: under that trial."
    )
    return table("Threat models", headings, rows, note, words=(1, 4))


def trials(report: Audit) -> str:
    """Every trial on the model as it is; folded below them, those behind a defence."""
    clean = report["clean"]
    rows: list[list[Cell]] = [
        ["clean", *_flops(clean["flops"]), units.percent(clean["accuracy"]), *[units.UNKNOWN] * 2]
    ]
    bare = [trial for trial in report["trials"] if trial["kind"] != "defended"]
    behind = [trial for trial in report["trials"] if trial["kind"] == "defended"]
    note = (
        "FLOPs an image: mean, percentiles and the dearest. Below the accuracy: answers that stay what they are clean. "
        "Below AS: against the highest cost that the policy can reach. Spent: images through forward and backward; "
        "below it those that were only asked the cost of."
    )
    found = table("All trials", _HEADINGS, rows + [_trial(trial, report["images"]) for trial in bare], note)
    if not behind:
        return found
    note = "AS: against clean images behind the same defence."
    folded = table("Trials behind a defence", _HEADINGS, [_trial(trial, report["images"]) for trial in behind], note)
    return f"{found}<details><summary>Trials behind a defence: {len(behind)}</summary>{folded}</details>"


def defences(report: Audit) -> str:
    """Each defence: what it costs clean, what it holds, also against an attacker who knows it."""
    headings = ["defence", "clean accuracy", "clean FLOPs", "attacked accuracy", "attacked FLOPs"]
    headings += ["AS", "AS, attacker knows", "bound"]
    rows: list[list[Cell]] = []
    for item in report["defences"]:
        bound = units.si(item["bound"], "")
        if item["bound"] is not None:
            held = {True: "never exceeded", False: "BROKEN", None: "not verified"}
            rows_bound: Cell = (bound, held[item["kept"]])
        else:
            rows_bound = units.UNKNOWN
        row = [item["name"], units.percent(item["clean_accuracy"]), units.si(item["clean_flops"], "")]
        row += [units.percent(item["attacked_accuracy"]), units.si(item["attacked_flops"], "")]
        rows.append([*row, percent(item["success"]), percent(item["adaptive_success"]), rows_bound])
    note = "FLOPs: mean of an image. Attacker knows: the attack was made through the defence."
    return table("Defences", headings, rows, note)


def detector(report: Audit) -> str:
    """Which trials the detector sees."""
    found = report["detector"]
    rows: list[list[Cell]] = [[name, percent(share)] for name, share in found["caught"].items()]
    note = (
        f"Asked to raise a false alarm on {percent(found['false_alarms'])} of clean images; on other clean images it "
        f"raised one on {percent(found['clean_alarms'])}."
    )
    return table("Detector on token statistics", ("trial", "images caught"), rows, note)


def latencies(report: Audit) -> str:
    """Time of a call in every execution, clean and attacked."""
    headings = ("execution", "images a call", "inputs", "p50", "p95", "p99", "over dense", "calls")
    rows: list[list[Cell]] = []
    for row in report["speed"]:
        if row.get("factor") is None:
            times = [units.seconds(row["seconds"][name]) for name in ("p50", "p95", "p99")]
            ratio = times_of(row["ratio"])
            rows.append([row["execution"], str(row["batch"]), row["inputs"], *times, ratio, str(row["calls"])])
    clocks = ", ".join(dict.fromkeys(row["clock"] for row in report["speed"]))
    note = (
        f"{capital(clocks)} seconds of a call; percentiles over calls, other images each; all executions in turn. "
        "Ragged: tokens that are gone are not computed; masked: all are; padded: up to the longest image of the batch, "
        "block by block; dense: the model without the method. Over dense: medians."
    )
    return table("Latency", headings, rows, note, words=(2,))


def poisonings(report: Audit) -> str:
    """What one attacked image does to its batch: counted, and by the clock."""
    rows: list[list[Cell]] = []
    for item in report["poisoning"]:
        row = [str(item["batch"]), item["by"], *(units.si(item[key], "") for key in ("own", "clean", "poisoned"))]
        rows.append([*row, times_of(item["padding"]), times_of(item["factor"])])
    headings = ("batch", "attacked image", "own FLOPs", "clean batch", "with one", "padding", "poisoning")
    note = (
        "Counted, mean FLOPs an image: by itself, in a clean batch padded to its longest image, and in one with an "
        "attacked image. Padding and poisoning: by how much each makes every image of the batch dearer."
    )
    found = table("Poisoned batches, counted", headings, rows, note, words=(1,)) if rows else ""
    timed = [row for row in report["speed"] if row.get("factor") is not None]
    if not timed:
        return found
    lines: list[list[Cell]] = [
        [row["execution"], row["inputs"], times_of(row["factor"]["median"]), _quartiles(row["factor"])] for row in timed
    ]
    note = (
        "Time of a batch with one attacked image over that of the same batch without, pair by pair: median, quartiles."
    )
    clock = table("By the clock", ("execution", "inputs", "longer", "quartiles"), lines, note, words=(1,))
    return f'{found}<div style="margin-top:20px">{clock}</div>'


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]], note: str, *, words: Any = ()) -> str:
    """A table as HTML: row headers, figures to the right, columns ``words`` to the left; ``note`` explains it."""
    left = ' style="text-align:left;white-space:normal"'
    head = "".join(
        f'<th scope="col"{left if column in words else ""}>{escape(text)}</th>' for column, text in enumerate(headings)
    )
    lines = []
    for row in rows:
        cells = [f"<td{left if column in words else ''}>{_cell(cell)}</td>" for column, cell in enumerate(row)][1:]
        lines.append(f'<tr><th scope="row">{_cell(row[0])}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">\n<table class="figures">'
        f"<caption><span>{escape(note)}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def hardest(found: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial that went furthest, the first of equals; None of none."""
    return max(found, key=lambda trial: trial["success"], default=None)


def attacks(report: Audit, threat: str) -> list[Mapping[str, Any]]:
    """The attacks of a threat model on the model as it is, behind no defence; controls are none."""
    return [trial for trial in report["trials"] if trial["threat"] == threat and trial["kind"] == "attack"]


def percent(share: float | None) -> str:
    """A share, also below 0 or above 1; never a negative zero."""
    return units.UNKNOWN if not units.is_known(share) else f"{100 * share + 0.0:.1f} %".replace("-0.0 %", "0.0 %")


def times_of(ratio: float | None) -> str:
    """A ratio, such as 1.16x."""
    return units.UNKNOWN if not units.is_known(ratio) else f"{ratio:.3g}x"


def _threat(report: Audit, name: str) -> list[Cell]:
    can: list[Cell] = [name, CAN[name]]
    if name == "T4":
        found = hardest(report["transfer"])
        if found is not None:
            by = f"{found['by']}, on {found['to']}"
            return [*can, str(len(report["transfer"])), percent(found["success"]), by, units.UNKNOWN]
    elif name == "T5":
        worst = max(report["poisoning"], key=lambda item: item["factor"], default=None)
        if worst is not None:
            by = f"{worst['by']}, in a batch of {worst['batch']}"
            return [*can, str(len(report["poisoning"])), (times_of(worst["factor"]), "an image"), by, units.UNKNOWN]
    return [*can, *_furthest(attacks(report, name))]


def _furthest(tried: Sequence[Mapping[str, Any]]) -> list[Cell]:
    hard = hardest(tried)
    if hard is None:
        return ["not tried", units.UNKNOWN, units.UNKNOWN, units.UNKNOWN]
    return [str(len(tried)), percent(hard["success"]), hard["name"], units.percent(hard["accuracy"])]


def _trial(trial: Mapping[str, Any], images: int) -> list[Cell]:
    about = ["control"] if trial["kind"] == "control" else [trial["threat"]]
    about += [word for word in (trial["defence"], trial["goal"]) if word and word not in trial["name"]]
    count = len(trial["costs"])
    about += [f"{count} image{'' if count == 1 else 's'}"] if count != images else []
    right = units.percent(trial["accuracy"]), units.percent(trial["agreement"])
    reached = percent(trial["success"]), percent(trial["success_ceiling"])
    spent = units.count(trial["spent"]), units.count(trial["queries"])
    small = [pair[0] if pair[1] == units.UNKNOWN else pair for pair in (right, reached, spent)]
    return [(trial["name"], ", ".join(about)), *_flops(trial["flops"]), *small]


def _flops(flops: Mapping[str, float]) -> list[str]:
    return [units.si(flops[name], "") for name in _DEAREST]


def _quartiles(spread: Mapping[str, float | None]) -> str:
    return f"{times_of(spread['low'])} to {times_of(spread['high'])}"


def _cell(cell: Cell) -> str:
    return escape(cell) if isinstance(cell, str) else f"{escape(cell[0])}<small>{escape(cell[1])}</small>"
