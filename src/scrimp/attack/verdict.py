"""What an audit comes to, from its numbers alone: static, bounded, or unbounded within the dense cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scrimp.primitives.errors import InputError

Judgement = Literal["static", "bounded", "unbounded within dense"]


@dataclass(frozen=True)
class Verdict:
    """See `judge`.

    Attributes:
        kind: ``static``: every image costs the same; ``bounded``: there is a ceiling below the dense cost that the
            model keeps by construction, and no image was above it; else ``unbounded within dense``.
        worst: the dearest image seen, FLOPs; ``worst_by``: the trial it was in.
        recommended: a budget an image to set, FLOPs; None where there is nothing to gain.
        text: one or two sentences for people.
    """

    kind: Judgement
    worst: int
    worst_by: str
    recommended: int | None
    text: str


def judge(costs: Mapping[str, Tensor], *, full: int, ceiling: int | None, recommended: int | None = None) -> Verdict:
    """Judge a model by what images cost it.

    Args:
        costs: FLOPs of the images of each trial, [n], n >= 1; the first one is of clean images.
        full: the dense cost.
        ceiling: the highest cost by construction; None where it is not known.
        recommended: a budget that the model can keep; left out of a static model's verdict.

    Raises:
        InputError: no trial, or one without images.
    """
    if not costs or not all(len(found) for found in costs.values()):
        raise InputError("trials of 1 image or more each", f"{list(costs)[:3]}", "measure some images")
    tops = {name: int(found.max()) for name, found in costs.items()}
    worst_by = max(tops, key=lambda name: tops[name])  # the first of equals
    worst, clean = tops[worst_by], next(iter(costs.values()))
    usual = float(clean.double().mean())
    said = f"the dearest image, under '{worst_by}', costs {worst / usual:.2f} times the clean mean"
    said += f" and {100 * worst / full:.1f} % of dense"
    if worst == min(int(found.min()) for found in costs.values()):
        text = "Every image of every trial costs the same: there is nothing to attack."
        if ceiling is None or ceiling > worst:
            text = "Every image of every trial cost the same, but nothing in the model says that they must."
        return Verdict("static", worst, worst_by, None, text)
    advice = "" if recommended is None else f" A budget of {recommended} FLOPs an image would cap it."
    if ceiling is not None and ceiling < full and worst <= ceiling:
        text = f"No image can cost more than {100 * ceiling / full:.1f} % of dense; {said}.{advice}"
        return Verdict("bounded", worst, worst_by, recommended, text)
    broken = ceiling is not None and worst > ceiling
    above = " The ceiling that the model claims was broken." if broken else ""
    text = f"Nothing short of the dense cost bounds an image: {said}.{above}{advice}"
    return Verdict("unbounded within dense", worst, worst_by, recommended, text)
