"""Ways in which the splat container might be wrong, and the finding that must say so."""

from __future__ import annotations

from dataclasses import replace

import torch

from scrimp.splats.container import decode, encode


def last_of_an_odd_number_dropped(splats, **options):
    return encode(splats.take(torch.arange(len(splats) // 2 * 2)) if len(splats) > 2 else splats, **options)


def half_a_step_off(splats, **options):
    """Numbers cut off where they should be rounded lie half a step too low, and some by a whole one."""
    return encode(replace(splats, colors=splats.colors - 0.5 * options["settings"].color), **options)


def axes_exchanged(data):
    found = decode(data)
    return replace(found, means=found.means[:, [0, 2, 1]])


def second_nearest(values, centres):
    labels = torch.cdist(values, centres).topk(2, largest=False).indices[:, 1]
    return labels, torch.zeros(len(values))


BROKEN_SPLATS = [
    ("splat-codec", {"encode": last_of_an_odd_number_dropped}, "257 Gaussians, rung 2: left out"),
    ("splat-codec", {"encode": half_a_step_off}, "257 Gaussians, rung -1: colors over their bound"),
    ("splat-codec", {"decode": axes_exchanged}, "2 Gaussians, rung 2: means over their bound"),
    ("splat-codec", {"nearest": second_nearest}, "codes: farther than the nearest"),
]
