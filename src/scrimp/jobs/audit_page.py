"""The page that `scrimp audit` leaves: a verdict in plain words, then everything it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from scrimp.jobs import audit_page_tables as tables
from scrimp.jobs.audit_page_chart import audit_table, costs_figure, headline
from scrimp.jobs.audit_page_tables import Audit, percent, times_of
from scrimp.jobs.audit_pictures import KEPT, enlarged
from scrimp.jobs.thin_config import LEARNT, VALUES
from scrimp.receipts import Receipt
from scrimp.report import Section, picture, units, write_report
from scrimp.report.words import capital

PAGE = "audit.html"
"""File of the page in a run folder."""
_BOX = "border:1px solid var(--line);border-left:4px solid var(--{});background:var(--quiet);padding:16px 20px"
_TILE = "flex:1 1 9em;min-width:9em"

__all__ = ["PAGE", "audit_sections", "audit_table", "write_audit_page"]


def write_audit_page(report: Audit, folder: Path, receipts: Sequence[Receipt]) -> Path:
    """Write ``folder / "audit.html"``, which loads nothing from anywhere, and return its path.

    Args:
        report: as in the audit's JSON; every number of the audit's own sections comes from it.
        folder: the run folder; patches are read from the files that the trials name, and kept tokens from
            `scrimp.jobs.audit_pictures.KEPT`, where they are there.
        receipts: of the trials, 1 or more; their tables follow.

    Raises:
        InputError: there are no receipts.
        OSError: the folder cannot be read or written.
    """
    return write_report(receipts, folder / PAGE, sections=audit_sections(report, folder))


def audit_sections(report: Audit, folder: Path) -> list[Section]:
    """The parts of the page that are the audit's own, in their order; parts that found nothing are left out."""
    found: list[Section | None] = [
        Section("Verdict", _verdict(report)),
        Section("Threat models", tables.threats(report), _about(report)),
        Section("What images cost", costs_figure(report), _CHART),
        Section("All trials", tables.trials(report)),
        _pictures(report, folder),
        _defences(report),
        _poisoned(report),
        _latency(report),
        Section("Energy", _energy(report)),
        Section("Against a static model", _break_even(report)),
        Section("What was not tested", _limits(report)),
    ]
    return [Section(part.title, part.content, part.text, first=True) for part in found if part is not None]


_CHART = (
    "Share of the images that cost no more than so many FLOPs: clean, under the control and under the attack of each "
    "kind that went furthest. Further right is dearer."
)


def _verdict(report: Audit) -> str:
    verdict, clean = report["verdict"], report["clean"]["flops"]
    worst = verdict["worst"]
    trial = tables.hardest(item for item in report["trials"] if item["kind"] == "attack")
    tiles = [
        (times_of(worst / clean["mean"]), f"the clean mean: the dearest image, by {verdict['worst_by']}"),
        (percent(worst / report["full"]), f"of dense, {units.flops(report['full'])}"),
    ]
    if trial is not None:
        tiles.append((percent(trial["success"]), f"of the saving undone, by {trial['name']}"))
    if verdict["recommended_budget"] is not None:
        tiles.append((units.flops(verdict["recommended_budget"]), "an image, the recommended budget"))
    drawn = "".join(
        f'<div style="{_TILE}"><b style="font-size:24px;white-space:nowrap">{escape(number)}</b>'
        f'<small style="font-size:14px">{escape(text)}</small></div>'
        for number, text in tiles
    )
    tone = "good" if verdict["kind"] == "static" else "accent" if verdict["kind"] == "bounded" else "bad"
    return (
        f'<div style="{_BOX.format(tone)}">'
        f'<p style="font-size:20px;margin:0 0 4px"><b>{escape(headline(report))}</b></p>'
        f'<p style="margin:0 0 14px;max-width:80ch">{escape(verdict["text"])}</p>'
        f'<div style="display:flex;flex-wrap:wrap;gap:14px 28px">{drawn}</div>{_command(report)}</div>'
    )


def _command(report: Audit) -> str:
    """What to type for the recommended budget; nothing for a model that `scrimp thin` cannot make."""
    budget = report["verdict"]["recommended_budget"]
    method, _, value = str(report["method"]).partition("-")
    if budget is None or method not in VALUES:
        return ""
    setting = f" --{VALUES[method]} {value}" if value and method not in LEARNT else ""
    line = f"scrimp thin MODEL DATA --method {method}{setting} --max-flops {budget}"
    text = '<p style="margin:14px 0 0">To hold every image to it: <code style="overflow-wrap:anywhere">{}</code></p>'
    return text.format(escape(line))


def _about(report: Audit) -> str:
    who, how, where = (_name(report[key] or units.UNKNOWN) for key in ("model", "method", "data"))
    loss = f" They follow the loss {report['surrogate']}." if report.get("surrogate") else ""
    return (
        f"{who} with {how}, on {where}: audited on {units.count(report['images'])} images, attacks made on "
        f"{units.count(report['learnt_from'])} others.{loss} {units.count(report['spent'])} of a budget of "
        f"{units.count(report['budget'])} images went through forward and backward. FLOPs are counted, image by "
        "image; 1 multiply-add = 2 FLOPs."
    )


def _name(text: str) -> str:
    """A page goes to others, whom a machine's folders do not concern."""
    return Path(text).name if Path(text).is_absolute() else text


def _pictures(report: Audit, folder: Path) -> Section | None:
    patches = []
    for trial in report["trials"]:
        file = folder / trial["file"] if trial["file"] else None
        bare = trial["area"] is not None and trial["kind"] != "defended"
        if bare and file is not None and file.suffix == ".png" and file.is_file():
            about = f"{trial['name']}: AS {percent(trial['success'])}".replace(" %", "\u00a0%")
            patches.append(picture(enlarged(file.read_bytes()), f"The patch of {trial['name']}", caption=about))
    parts = f'<div style="display:flex;flex-wrap:wrap;gap:0 20px">{"".join(map(_narrow, patches))}</div>'
    kept = folder / KEPT
    if kept.is_file():
        text = (
            "Images without and with the patch, in turn, and their FLOPs; then what is left of them after blocks that "
            "took tokens. Those that are gone are dimmed."
        )
        parts += picture(kept.read_bytes(), "Kept tokens with and without the patch, block by block", caption=text)
    if not patches and not kept.is_file():
        return None
    return Section("The patch, and what is kept with and without it", parts, "Patches are enlarged pixel by pixel.")


def _narrow(figure: str) -> str:
    return f'<div style="width:170px">{figure}</div>'


def _defences(report: Audit) -> Section | None:
    parts = tables.defences(report) if report["defences"] else ""
    if report["detector"] is not None:
        parts += f'<div style="margin-top:20px">{tables.detector(report)}</div>'
    return Section("Defences", parts) if parts else None


def _poisoned(report: Audit) -> Section | None:
    found = tables.poisonings(report)
    return Section("One bad image in a batch", found) if found else None


def _latency(report: Audit) -> Section | None:
    return Section("Latency", tables.latencies(report)) if report["speed"] else None


def _energy(report: Audit) -> str:
    energy = report["energy"]
    clean, attacked = energy["clean_joules"], energy["attacked_joules"]
    if clean is None or attacked is None:
        text = f"{capital(energy['how'])}."
    else:
        text = f"{units.joules(clean)} an image clean, {units.joules(attacked)} attacked; {energy['how']}."
    if energy.get("clean_modelled") is not None:
        modelled = [units.joules(energy[f"{name}_modelled"]) for name in ("clean", "attacked")]
        text += f" Modelled, not measured: {modelled[0]} clean, {modelled[1]} attacked; {energy['how_modelled']}."
    return f"<p>{escape(text)}</p>"


def _break_even(report: Audit) -> str:
    found = report["break_even"]
    if found is None:
        return "<p>No static model of equal accuracy was found to hold it against.</p>"
    static = f"{found['static']} ({units.flops(found['static_flops'])}, {units.percent(found['static_accuracy'])})"
    if found["share"] is None:
        text = f"The static model {static} is never the cheaper one, not even if every image is attacked."
    elif found["share"] <= 0:
        text = f"The static model {static} is the cheaper one already on clean images."
    else:
        text = f"From {percent(found['share'])} attacked images on, the static model {static} is the cheaper one."
    means = f"{units.flops(found['clean_flops'])} clean, {units.flops(found['attacked_flops'])} attacked"
    text += f" Mean of the adaptive one: {means}."
    return f'<p style="color:var(--ink)">{escape(text)}</p>'


def _limits(report: Audit) -> str:
    lines = [
        "Attackers here know the weights, except those of the black box: one who does not will mostly do worse. One "
        "who spends more than this budget may do better: no attack found is no proof that there is none.",
        f"One seed, {report['seed']}: attacks start from chance, and another seed finds others.",
    ]
    missing = [name for name in tables.CAN if name not in ("T4", "T5") and not tables.attacks(report, name)]
    missing += ["T4"] if not report["transfer"] else []
    missing += ["T5"] if not report["poisoning"] else []
    if missing:
        lines.append(f"Not tried: {', '.join(missing)}.")
    few = [trial for trial in report["trials"] if len(trial["costs"]) < report["images"] and trial["threat"] != "T0"]
    if few:
        names = ", ".join(f"{trial['name']} ({len(trial['costs'])})" for trial in few)
        lines.append(f"On fewer than the {report['images']} audited images: {names}.")
    if report["ceiling"] is None:
        lines.append("The highest cost that the policy can reach is not known.")
    if report["energy"]["clean_joules"] is None:
        lines.append("Energy: FLOPs and time are no joules; an attack can raise them unalike.")
    lines.append("Training data were taken as they are: a poisoned training set is no part of this audit.")
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
