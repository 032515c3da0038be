"""Road signs in photographs: at most one small sign, and things of the same colours, somewhere in megapixels.

The photographs are those of lomiri-wallpapers-16.04 (CC BY, CC BY-SA), the cut-outs of tuxpaint-stamps-default (GPL-2).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from pretrained.fetch import CUT_OUTS, PHOTOGRAPHS, debian, folder_of, photographs
from scrimp.primitives.errors import InputError
from zoom_items import Box, Example, check_split, fair_label, scattered, stream, uniform, whole_number

NONE = "none"
SIGNS = {
    "dead_end": "dead_end_sign",
    "give_way": "give_way_sign",
    "no_entry": "no_entry_sign",
    "roundabout": "roundabout",
    "school": "school_sign",
    "stop": "stop",
}
"""Our names, and the cut-outs'."""
DISTRACTORS = ("roadsigns/traffic_cone", "uk_post_box", "usps_mailbox")
ASPECT = (4, 3)
GAIN = (0.6, 1.1)  # factor on a cut-out's brightness
SEEDS = {"train": 0, "test": 1}


@dataclass(frozen=True, eq=False)
class RoadSigns:
    """Crops [h, w, 3] of photographs, never enlarged, four wide to three high.

    Every image has equally many cut-outs on it, so that only what they are tells the class.

    Args:
        paths: of the photographs.
        signs: RGBA cut-outs by class.
        distractors: RGBA cut-outs of no class.
        width: of the images in pixels.
        others: distractors beside a sign; one more where there is none.
        sides: pixels that the longer side of a cut-out has at least and at most, before it is tilted.
        tilt: degrees to either side at most.

    Raises:
        InputError: none of the photographs is large enough.
    """

    paths: Sequence[Path]
    signs: Mapping[str, Image.Image]
    distractors: Sequence[Image.Image]
    width: int = 2048
    others: int = 3
    sides: tuple[int, int] = (48, 112)
    tilt: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.fitting

    @property
    def classes(self) -> tuple[str, ...]:
        return NONE, *sorted(self.signs)

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.width * ASPECT[1] // ASPECT[0]

    @functools.cached_property
    def fitting(self) -> tuple[tuple[Path, float], ...]:
        """The photographs of at least `size`, and by how much their largest crop exceeds it."""
        sizes = [(path, _size_of(path)) for path in self.paths]
        scales = [(path, min(w / self.size[0], h / self.size[1])) for path, (w, h) in sizes]
        found = tuple((path, scale) for path, scale in scales if scale >= 1)
        if not found:
            wanted = " x ".join(map(str, self.size))
            raise InputError(f"photographs of {wanted} pixels", f"none of {len(sizes)}", "ask for smaller images")
        return found

    def make(self, number: int) -> Example:
        """
        Raises:
            InputError: so many cut-outs find no room.
        """
        generator, label = stream(number, seed=self.seed), fair_label(number, len(self.classes), seed=self.seed)
        ground = self._ground(generator)
        cut_outs = [self.distractors[row] for row in self._distractors(label, generator)]
        if label:
            cut_outs = [self.signs[self.classes[label]], *cut_outs]
        pasted = [varied(cut_out, self.sides, self.tilt, generator=generator) for cut_out in cut_outs]
        sizes = np.array([cut_out.size for cut_out in pasted], np.int64).reshape(-1, 2)
        corners = scattered(sizes, self.size, generator=generator).tolist() if pasted else []
        for (left, top), cut_out in zip(corners, pasted, strict=True):
            ground.paste(cut_out, (left, top), cut_out)
        boxes = (Box(*corners[0], *pasted[0].size, self.classes[label]),) if label else ()
        return Example(np.asarray(ground).copy(), label, boxes)

    def _distractors(self, label: int, generator: torch.Generator) -> list[int]:
        count = (self.others + (label == 0)) if self.distractors else 0
        return torch.randint(max(len(self.distractors), 1), (count,), generator=generator).tolist()

    def _ground(self, generator: torch.Generator) -> Image.Image:
        """A crop of a photograph at a random place and scale, mirrored or not."""
        path, largest = self.fitting[whole_number(len(self.fitting), generator=generator)]
        scale = uniform(1, largest, generator=generator)
        share = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        with Image.open(path) as picture:
            room = [side - scale * wanted for side, wanted in zip(picture.size, self.size, strict=True)]
            left, top = (max(spare, 0.0) * part for spare, part in zip(room, share, strict=True))
            right = min(left + scale * self.size[0], picture.width)
            bottom = min(top + scale * self.size[1], picture.height)
            crop = picture.convert("RGB").resize(self.size, Image.Resampling.BICUBIC, (left, top, right, bottom), 2.0)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if whole_number(2, generator=generator) else crop


def varied(cut_out: Image.Image, sides: tuple[int, int], tilt: float, *, generator: torch.Generator) -> Image.Image:
    """A cut-out at a random size, angle and brightness, without margins that nothing is on."""
    scale = uniform(*sides, generator=generator) / max(cut_out.size)
    size = tuple(max(1, round(side * scale)) for side in cut_out.size)
    angle, gain = uniform(-tilt, tilt, generator=generator), uniform(*GAIN, generator=generator)
    found = cut_out.resize(size, Image.Resampling.LANCZOS).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return trimmed(ImageEnhance.Brightness(found).enhance(gain))


def trimmed(cut_out: Image.Image) -> Image.Image:
    return cut_out.crop(cut_out.getchannel("A").getbbox())


def road_signs(split: str = "train", width: int = 2048, *, seed: int | None = None) -> RoadSigns:
    """Of every three photographs, by name, two are for training and one for the test; the same at every width.

    Raises:
        InputError: no such split; the packages are not there and cannot be downloaded.
    """
    held = check_split(split) == "test"
    paths = [path for row, path in enumerate(photographs()) if (row % 3 == 2) == held]
    signs = {name: stamp(f"roadsigns/{file}") for name, file in SIGNS.items()}
    distractors = [stamp(file) for file in DISTRACTORS]
    return RoadSigns(paths, signs, distractors, width, seed=SEEDS[split] if seed is None else seed)


def stamp(name: str) -> Image.Image:
    """A cut-out of the package, RGBA, without its empty margins."""
    with Image.open(debian(CUT_OUTS) / "usr/share/tuxpaint/stamps/town" / f"{name}.png") as picture:
        return trimmed(picture.convert("RGBA"))


def is_here() -> bool:
    """Whether the packages are on this machine, so that nothing has to be downloaded."""
    return all(folder_of(name).is_dir() for name in (PHOTOGRAPHS, CUT_OUTS))


def _size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
