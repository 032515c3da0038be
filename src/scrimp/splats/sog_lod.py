"""Streamed SOG, version 1 (developer.playcanvas.com, "The Streamed SOG Format"): parts of a scene at several levels.

lod-meta.json holds a tree. Each node of it may name, for every level, a range of Gaussians in one of many unpacked
SOGs; level 0 is the finest.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch

from scrimp.splats.reading import damaged
from scrimp.splats.scene import Splats
from scrimp.splats.sog_fields import dequantise
from scrimp.splats.sog_read import Meta, inside, parse_json, read_unpacked

_MOST_META = 1 << 26
Ranges = dict[str, list[tuple[int, int]]]
"""Offsets and counts of Gaussians, by file."""


def read_lod(path: Path) -> Splats:
    """The finest level there is of every part of a streamed scene, then its surroundings where it has some.

    Args:
        path: of lod-meta.json.

    Raises:
        InputError: damaged, or naming files that are absent or shorter than it says.
    """
    name = str(path)
    meta = Meta(parse_json(path.read_bytes(), name, most=_MOST_META), name)
    if meta.value.get("version", 1) != 1:
        raise damaged("streamed SOG", name, f"version {str(meta.value['version'])[:20]}, where 1 is read")
    parts = [_part(path, title, ranges, name) for title, ranges in _finest(meta).items()]
    surroundings = meta.value.get("environment")
    if isinstance(surroundings, str):
        parts.append(_part(path, surroundings, None, name))
    return join(parts)


def join(parts: list[Splats]) -> Splats:
    """Several scenes as one, in this order, harmonics as high as the highest; without extra numbers.

    Antialiased only where all of them are.
    """
    if not parts:
        empty = torch.zeros(0, 3)
        return Splats(empty, torch.zeros(0, 4), empty, torch.zeros(0), empty, torch.zeros(0, 0, 3))
    degree = max(part.degree for part in parts)
    tensors = [part.of_degree(degree).tensors() for part in parts]
    found: dict[str, Any] = {key: torch.cat([each[key] for each in tensors]) for key in tensors[0]}
    return Splats(**found, antialiased=all(part.antialiased for part in parts))


def _part(path: Path, title: str, ranges: list[tuple[int, int]] | None, name: str) -> Splats:
    """These Gaussians of one file, or all, in its order."""
    scene = dequantise(read_unpacked(inside(path.parent, title, name), f"{name}: {title[:80]}"))
    if ranges is None:
        return scene
    wanted = torch.zeros(len(scene), dtype=torch.bool)
    for offset, count in ranges:
        if offset + count > len(scene):
            raise damaged("streamed SOG", name, f"{title[:80]} with {len(scene)} Gaussians, fewer than it says")
        wanted[offset : offset + count] = True
    return scene.take(wanted)


def _finest(meta: Meta) -> Ranges:
    """What to take of which file; nodes of which a level is missing are taken at the finest they have."""
    titles = meta.value.get("filenames")
    if not isinstance(titles, list) or not all(isinstance(title, str) for title in titles):
        raise damaged("streamed SOG", meta.name, "no list of file names")
    found: Ranges = {}
    nodes: list[Any] = [meta.value.get("tree")]
    while nodes:
        node = Meta(nodes.pop(), meta.name)
        levels, children = node.value.get("lods") or {}, node.value.get("children") or []
        if not isinstance(levels, dict) or not isinstance(children, list):
            raise damaged("streamed SOG", meta.name, "a tree of another shape")
        nodes += children
        numbered = sorted(int(level) for level in levels if level.isdecimal() and len(level) < 9)
        if numbered:
            part = node.part("lods").part(str(numbered[0]))
            offset, count = part.whole("offset", 1 << 28), part.whole("count", 1 << 28)
            if count:
                title = str(PurePosixPath(titles[part.whole("file", len(titles) - 1)]))  # one name for one file
                found.setdefault(title, []).append((offset, count))
    return found
