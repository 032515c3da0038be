"""What a model looked at: the view with its attention as colour and the patches as frames."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scrimp.jobs.zoom_model import Looking
from scrimp.jobs.zoom_plan import Plan
from scrimp.jobs.zoom_readers import Readers, Views
from scrimp.report import Section, picture

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LONGEST = 360
"""Longer side of a picture in pixels."""
HEAT, FRAME, EDGE = (230, 80, 0), (0, 220, 255), (0, 40, 60)
"""Colours of attention and frames: orange and cyan, which are told apart with any of the three colour blindnesses."""
_STRONGEST = 0.65  # share of the heat's colour where attention is largest


@dataclass(frozen=True, eq=False)
class Seen:
    """One image, what the model says of it and where it looked.

    Attributes:
        row: in the gallery.
        outputs: [outputs], on the CPU.
        size: width and height in pixels.
        view: uint8 [C, h, w].
        attention: [maps, rows, columns] on the CPU, or ``None`` without attention.
        extent: the part of the image that the map covers: left, top, right, bottom in pixels.
        boxes: int64 [n, 4].
    """

    row: int
    outputs: Tensor
    size: tuple[int, int]
    view: Tensor
    attention: Tensor | None
    extent: tuple[float, float, float, float]
    boxes: Tensor


def look_at(
    plan: Plan, model: Looking, views: Views, rows: Sequence[int], *, device: torch.device, batch_size: int
) -> Iterator[Seen]:
    """What the model, in eval mode on this device, makes of images; in the order of ``rows``."""
    readers: Readers = views.readers
    for first in range(0, len(rows), batch_size):
        part = list(rows[first : first + batch_size])
        shown = torch.stack([views.get(row) for row in part])
        scenes = plan.scenes(readers, part, shown.to(device))
        with torch.inference_mode():
            look = model.look(scenes)
        for place, row in enumerate(part):
            width, height = scenes.sizes[place].tolist()
            attention = look.attention[place].float().cpu() if look.attention else None
            yield Seen(
                row=row,
                outputs=look.outputs[place].float().cpu(),
                size=(width, height),
                view=shown[place],
                attention=attention,
                extent=_extent(plan, model, (width, height), attention),
                boxes=look.boxes[place] if look.boxes else torch.zeros(0, 4, dtype=torch.int64),
            )


def overlay(seen: Seen) -> bytes:
    """A PNG of the image in its own form: attention in orange, a frame around every patch."""
    from PIL import Image, ImageDraw

    scale = LONGEST / max(seen.size)
    size = (max(1, round(seen.size[0] * scale)), max(1, round(seen.size[1] * scale)))
    pixels = seen.view.expand(3, -1, -1).permute(1, 2, 0).numpy()
    drawn = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR)
    if seen.attention is not None:
        drawn = Image.composite(Image.new("RGB", size, HEAT), drawn, _heat(seen, scale, size))
    pen = ImageDraw.Draw(drawn)
    for left, top, width, height in seen.boxes.tolist():
        corners = [left * scale, top * scale, (left + width) * scale, (top + height) * scale]
        pen.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=EDGE)
        pen.rectangle(corners, outline=FRAME)
    content = io.BytesIO()
    drawn.save(content, "PNG")
    return content.getvalue()


def overlay_section(items: Sequence[tuple[bytes, str, str]]) -> Section:
    """The part of a report that shows overlays: (PNG, what is said of it, the file's name) each."""
    figures = "".join(picture(png, f"{name}: {said}", caption=f"{name}: {said}") for png, said, name in items)
    text = "Orange: where attention lies. Frames: the patches that were read at full resolution."
    body = f'<div class="pair">{figures}</div>' if items else escape("-")
    return Section("What the model looked at", body, text, first=True)


def caption(said: str, truth: str | None) -> str:
    """The answer, beside the truth where that is known."""
    return said if truth is None or said == truth else f"{said} (is {truth})"


def _heat(seen: Seen, scale: float, size: tuple[int, int]) -> Picture:
    """How much of the heat's colour each pixel gets, as a grey picture; by the root, lest one peak hides the rest."""
    from PIL import Image

    assert seen.attention is not None
    total = seen.attention.sum(0)
    share = (total / total.max().clamp_min(1e-30)).sqrt() * (255 * _STRONGEST)
    left, top, right, bottom = (round(side * scale) for side in seen.extent)
    grid = Image.fromarray(share.round().to(torch.uint8).numpy())
    heat = Image.new("L", size)
    heat.paste(grid.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR), (left, top))
    return heat


def _extent(
    plan: Plan, model: Looking, size: tuple[int, int], attention: Tensor | None
) -> tuple[float, float, float, float]:
    width, height = size
    if attention is None:
        return 0.0, 0.0, width, height
    if plan.method == "abmil":
        side = plan.patch_size[0]
        return 0.0, 0.0, attention.shape[2] * side, attention.shape[1] * side
    trim = int(getattr(getattr(model, "attention", None), "trim", 0))
    across, down = trim * width / plan.shape[2], trim * height / plan.shape[1]
    return across, down, width - across, height - down
