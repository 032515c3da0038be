"""What a file or format may not hold: numbers that are not finite, and what a format has no place for."""

from __future__ import annotations

from dataclasses import replace

import torch

from scrimp.primitives.errors import InputError
from scrimp.splats.activations import LEAST_SCALE, MOST_LOGIT
from scrimp.splats.scene import Splats

ON_BAD = ("refuse", "clamp", "drop", "keep")


def bad_fields(splats: Splats) -> dict[str, int]:
    """By field, how many Gaussians have numbers there that are not finite, or a quaternion of no length."""
    found = {}
    for name, values in splats.tensors().items():
        bad = torch.zeros(len(splats), dtype=torch.bool, device=values.device)
        # Both extremes are finite where all are, and cost a fraction of looking at each.
        if values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
            bad |= ~values.reshape(len(splats), -1).isfinite().all(1)
        if name == "quaternions":
            bad |= values.square().sum(1) == 0
        found[name] = int(bad.sum())
    return {name: count for name, count in found.items() if count}


def refuse_bad(splats: Splats, holder: str, remedy: str = "drop them: splats.take(splats.finite())") -> None:
    """Refuse Gaussians that are not finite or have a quaternion of no length.

    Args:
        holder: the file or format that holds or shall hold them.

    Raises:
        InputError: naming the fields, and in how many Gaussians.
    """
    found = bad_fields(splats)
    if found:
        listed = ", ".join(f"{name} of {count}" for name, count in found.items())
        got = f"NaN, infinity or a quaternion of length 0 in {listed} out of {len(splats)}"
        raise InputError(f"finite Gaussians in {holder}", got, remedy)


def settle_bad(splats: Splats, name: str, on_bad: str) -> Splats:
    """What `scrimp.splats.files.read` does about Gaussians that are not finite; see there."""
    if on_bad not in ON_BAD:
        raise InputError(f"on_bad out of: {', '.join(ON_BAD)}", repr(on_bad)[:80], "choose one of them")
    if on_bad == "keep" or not bad_fields(splats):
        return splats
    if on_bad == "drop":
        return splats.take(splats.finite())
    if on_bad == "clamp":
        splats = _clamped(splats)
    refuse_bad(splats, name, f"pass on_bad={'' if on_bad == 'clamp' else 'clamp, '}drop or keep")
    return splats


def refuse_loss(splats: Splats, holder: str, *, degree: int, lossy: bool) -> None:
    """Refuse, unless ``lossy``, what a format has no place for: extra numbers, harmonics above ``degree``.

    Raises:
        InputError: naming what would be lost.
    """
    lost = [f"harmonics of degree {splats.degree}"] if splats.degree > degree else []
    lost += [f"extra numbers {', '.join(splats.extra)}"] if splats.extra else []
    if lost and not lossy:
        expected = f"what {holder} can hold: harmonics up to degree {degree}, nothing extra"
        raise InputError(expected, " and ".join(lost), "pass lossy=True to leave it out")


def _clamped(splats: Splats) -> Splats:
    opacities, scales = splats.opacities, splats.scales
    return replace(
        splats,
        opacities=opacities.where(~opacities.isinf(), opacities.clamp(-MOST_LOGIT, MOST_LOGIT)),
        scales=scales.where(~scales.isneginf(), LEAST_SCALE),
    )
