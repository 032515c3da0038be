"""Solar modules of 6 x 10 photographed cells, whole or with one broken cell somewhere.

The cells are elpv-dataset's 300 x 300 electroluminescence photographs (CC BY-NC-SA; Buerhop-Lutz et al. 2018), of which
only those count that its experts were sure about.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrained.fetch import folder_of
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from zoom_items import Box, Example, check_split, fair_label, stream, whole_number

CLASSES = ("whole", "defect")
GRID = (6, 10)  # cells down and across
TEST_SHARE = 0.3
SEEDS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Cell:
    """A photograph of one cell, whether it is broken, and whether of mono- or polycrystalline silicon."""

    path: Path
    broken: bool
    kind: str


@dataclass(frozen=True, eq=False)
class SolarModules:
    """Images [6 * side, 10 * side] of cells of one kind, each mirrored at random, none twice in an image.

    Args:
        cells: what modules are made of.
        side: of a cell in pixels; the photographs' is 300.
        grid: cells down and across.

    Raises:
        InputError: there is no broken cell, or too few whole ones, of some kind.
    """

    cells: Sequence[Cell]
    side: int = 300
    grid: tuple[int, int] = GRID
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = self.grid[0] * self.grid[1]
        if self.side < 1 or wanted < 1:
            raise InputError("cells of one pixel or more", f"{self.side} pixels, {wanted} cells", "make them larger")
        if not self._pools or any(len(whole) < wanted or not broken for whole, broken in self._pools):
            got = ", ".join(f"{len(whole)} and {len(broken)}" for whole, broken in self._pools) or "no cells"
            raise InputError(f"{wanted} whole cells and a broken one of each kind", got, "pass more cells")

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    @property
    def size(self) -> tuple[int, int]:
        return self.side * self.grid[1], self.side * self.grid[0]

    def make(self, number: int) -> Example:
        generator, label = stream(number, seed=self.seed), fair_label(number, len(CLASSES), seed=self.seed)
        whole, broken = self._pools[whole_number(len(self._pools), generator=generator)]
        rows, columns = self.grid
        chosen = [whole[row] for row in torch.randperm(len(whole), generator=generator)[: rows * columns].tolist()]
        place, defect = (whole_number(below, generator=generator) for below in (rows * columns, len(broken)))
        if label:
            chosen[place] = broken[defect]
        flips = torch.randint(2, (len(chosen), 2), generator=generator).tolist()
        shown = [self._shown(cell, flip) for cell, flip in zip(chosen, flips, strict=True)]
        pixels = np.block([shown[row * columns : (row + 1) * columns] for row in range(rows)])
        top, left = (self.side * step for step in divmod(place, columns))
        boxes = (Box(left, top, self.side, self.side, CLASSES[1]),) if label else ()
        return Example(pixels, label, boxes)

    def _shown(self, cell: Cell, flip: Sequence[int]) -> np.ndarray:
        with Image.open(cell.path) as picture:
            grey = picture.convert("L")
        if grey.size != (self.side, self.side):
            grey = grey.resize((self.side, self.side), Image.Resampling.LANCZOS)
        down, across = (1 - 2 * step for step in flip)
        return np.asarray(grey)[::down, ::across]

    @functools.cached_property
    def _pools(self) -> list[tuple[list[Cell], list[Cell]]]:
        """Whole and broken cells of each kind."""
        kinds = sorted({cell.kind for cell in self.cells})
        own = [[cell for cell in self.cells if cell.kind == kind] for kind in kinds]
        return [([c for c in cells if not c.broken], [c for c in cells if c.broken]) for cells in own]


def solar_modules(split: str = "train", width: int = 3000, *, seed: int | None = None) -> SolarModules:
    """Modules ``width`` pixels wide (rounded down to whole cells) of the training or the test cells.

    Raises:
        InputError: no such split; the package is not there and cannot be downloaded.
    """
    from adapt_tasks import elpv_folder

    cells = of_split(sure_cells(elpv_folder()), split)
    return SolarModules(cells, width // GRID[1], seed=SEEDS[split] if seed is None else seed)


def sure_cells(folder: Path) -> list[Cell]:
    """The cells in ``labels.csv`` (path, probability of a defect, kind) that are surely whole or surely broken."""
    lines = [line.split() for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines()]
    return [Cell(folder / path, float(share) == 1.0, kind) for path, share, kind in lines if float(share) in (0.0, 1.0)]


def of_split(cells: Sequence[Cell], split: str) -> list[Cell]:
    """`TEST_SHARE` of the whole and of the broken cells of each kind, always the same ones; or the others."""
    held = check_split(split) == "test"
    found: list[Cell] = []
    for group in sorted({(cell.kind, cell.broken) for cell in cells}):
        own = [cell for cell in cells if (cell.kind, cell.broken) == group]
        order = torch.randperm(len(own), generator=generator_for(17)).tolist()
        cut = round(TEST_SHARE * len(own))
        found += [own[row] for row in (order[:cut] if held else order[cut:])]
    return found


def is_here() -> bool:
    """Whether the cells are on this machine, so that nothing has to be downloaded."""
    return folder_of("elpv-dataset-1.0.0.post1").is_dir()
