"""What the report of a compressed scene shows: pictures of both, their difference, and the errors by field."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scrimp.jobs.splats_errors import FieldError
from scrimp.jobs.splats_pictures import difference, likeness, png
from scrimp.receipts import Receipt
from scrimp.report import Section, picture, units
from scrimp.report.parts import facts_table


def compress_sections(
    receipt: Receipt, before: Sequence[Tensor], after: Sequence[Tensor], errors: Sequence[FieldError]
) -> list[Section]:
    """The parts of the page.

    Args:
        before, after: pictures [h, w, 3] from the same places.
    """
    scores = likeness(after, before)
    worst = scores.index(min(scores))
    sections = [_pictures(before[worst], after[worst], worst, scores[worst])]
    if errors:
        headings = ("field", "unit", "root mean square", "weighted by visibility", "largest")
        figures = ((error, (error.rms, error.seen, error.largest)) for error in errors)
        rows = [(error.field, error.unit, *(f"{value:.3g}" for value in values)) for error, values in figures]
        sections.append(
            Section("What each number lost", facts_table("Errors by field", headings, rows), _text(receipt))
        )
    return sections


def _pictures(before: Tensor, after: Tensor, view: int, score: float) -> Section:
    shown = {
        "The scene as it was": before,
        f"Compressed, {score:.2f} dB": after,
        "Difference, eight times as strong": difference(after, before),
    }
    figures = "".join(picture(png(image), f"{said}, view {view}", caption=said) for said, image in shown.items())
    return Section(
        "The view that lost most", f'<div class="pair">{figures}</div>', f"View {view} of those compared.", first=True
    )


def _text(receipt: Receipt) -> str:
    notes = receipt.notes
    return (
        f"{units.count(notes['Gaussians'])} Gaussians, {units.count(notes['pruned Gaussians'])} of them pruned; "
        f"left out: {notes['left out']}. "
        "Of Gaussians that show little, and rotations of round ones, the codec keeps less."
    )
