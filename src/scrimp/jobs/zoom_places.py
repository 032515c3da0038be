"""Where things lie: from a location of an attention map to a box of full-resolution pixels; all patches of an image.

Boxes are left, top, width, height in pixels of the full image; they may reach beyond it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def location_boxes(
    indices: Tensor, grid: tuple[int, int], view: tuple[int, int], sizes: Tensor, *, patch: int, trim: int = 0
) -> Tensor:
    """The square around the centre of each location's field of view.

    Along each axis a location i of n on a view of w pixels, of which the network loses ``trim`` at either end, has its
    centre at ``trim + (i + 1/2) (w - 2 trim) / n`` pixels of the view; the box starts half a patch before it, rounded.
    For ``trim`` 0 that is the published position map.

    Args:
        indices: int64 [batch, n], into the flattened grid.
        grid: rows and columns of the attention map.
        view: height and width of the view.
        sizes: int64 [batch, 2], width and height of each full image.
        patch: side in pixels.
        trim: pixels of the view that the network has no output for, at each end.

    Returns:
        int64 [batch, n, 4].
    """
    rows, columns = indices.div(grid[1], rounding_mode="floor"), indices % grid[1]
    starts = []
    for places, count, low, full in ((columns, grid[1], view[1], sizes[:, :1]), (rows, grid[0], view[0], sizes[:, 1:])):
        # Whole numbers, halves up: the same box on every machine.
        twice_centre = full * (2 * trim * count + (2 * places + 1) * (low - 2 * trim))
        starts.append((twice_centre + (1 - patch) * count * low).div(2 * count * low, rounding_mode="floor"))
    sides = torch.full_like(starts[0], patch)
    return torch.stack([*starts, sides, sides], -1)


def around(boxes: Tensor, patch: int) -> Tensor:
    """Boxes of another side around the same centres; [..., 4]."""
    moved = boxes.clone()
    moved[..., :2] += torch.div(boxes[..., 2:] - patch, 2, rounding_mode="floor")
    moved[..., 2:] = patch
    return moved


def tiles(size: tuple[int, int], patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Boxes side by side that cover an image, row by row: int64 [rows * columns, 4], and rows and columns."""
    columns, rows = (math.ceil(side / patch) for side in size)
    top, left = torch.meshgrid(torch.arange(rows) * patch, torch.arange(columns) * patch, indexing="ij")
    boxes = torch.stack([left, top, torch.full_like(left, patch), torch.full_like(left, patch)], -1)
    return boxes.flatten(0, 1), (rows, columns)


def mirrored(boxes: Tensor, width: int) -> Tensor:
    """The same boxes in the mirror image of an image so wide; [..., 4]."""
    turned = boxes.clone()
    turned[..., 0] = width - boxes[..., 0] - boxes[..., 2]
    return turned
