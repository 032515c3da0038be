"""What a person can ask of `scrimp splats`; loads no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scrimp.jobs.config import Device, JobConfig
from scrimp.primitives.errors import InputError

Format = Literal["sog", "spz", "sgs", "compressed.ply", "splat", "ply"]
Up = Literal["auto", "y-down", "y-up", "z-up", "z-down", "x-up", "x-down"]
OnBad = Literal["refuse", "clamp", "drop"]

_Scene = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCENE")]
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LEAST_BYTES = {"sog": 12_000, "sgs": 2_000}
"""Of a trained scene: some hundred Gaussians."""


@dataclass(frozen=True, kw_only=True)
class LookConfig:
    """Where scenes are looked at from."""

    cameras: Path | None = None
    """Look from the cameras of these photographs (transforms.json, or a folder as COLMAP or nerfstudio leave it), not
    from a circle around the scene."""
    width: int | None = None
    """Of the pictures in pixels; by default the cameras' own, on a circle 800."""
    height: int | None = None
    """Of the pictures in pixels."""
    up: Up = "auto"
    """What points upwards in the scene. auto: as in the cameras' pictures, without cameras y-down, as COLMAP's scenes
    have it; nerfstudio's and Blender's have z-up."""
    on_bad: OnBad = "refuse"
    """A file with numbers that are not finite: refuse it, clamp infinite opacities and sizes of 0, or drop those
    Gaussians."""

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        for name in ("width", "height", "views", "orbit"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise InputError(f"--{name} of at least 1", f"{value}", "correct it")


@dataclass(frozen=True, kw_only=True)
class SplatsCompressConfig(LookConfig, JobConfig):
    """Make a scene of Gaussian splats small, and say what that cost: by field, and in pictures.

    Leaves a run folder with the scene, receipts and a report that shows both side by side. By default --quality medium.
    """

    scene: _Scene
    """A file or folder of any format that is read."""
    format: Format = "sog"
    """sog: opened by PlayCanvas' and many other viewers. spz: Niantic's. sgs: the smallest, for scrimp alone, which
    converts it back. The others have one size only."""
    size: str | None = None
    """The best that fits into this: 2MB, 600kB, 1.5MiB, or a number of bytes."""
    psnr: float | None = None
    """The smallest whose pictures reach this PSNR in dB against the scene's own, mean over the views."""
    quality: Literal["small", "medium", "high"] | None = None
    """One of three measures of loss."""
    prune: bool = False
    """Leave out Gaussians of an alpha below 1/255, which renderers pass over."""
    views: int = 8
    """Pictures to compare: from as many places around the scene, or of as many of --cameras."""
    spz_version: Literal[2, 3, 4] = 3
    """Of a .spz: fewest programs read 4, the smallest."""

    def check(self) -> None:
        """Refuse what no run can mean.

        Raises:
            InputError: several targets, one that is no size or quality, or a number out of its range.
        """
        super().check()
        given = [name for name in ("size", "psnr", "quality") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError("one of --size, --psnr and --quality", " and ".join(given), "leave the others out")
        if self.psnr is not None and not 0 < self.psnr < 100:
            raise InputError("--psnr between 0 and 100 dB", f"{self.psnr:g}", "ask for 30 to 60")
        if self.out is not None and self.out.name.lower().endswith((".sog", ".spz", ".sgs", ".ply", ".splat")):
            raise InputError("a folder for --out", f"{self.out}", "name a folder; --format says what is written")
        self.most_bytes()

    def most_bytes(self) -> int | None:
        """``size`` in bytes.

        Raises:
            InputError: it is none.
        """
        return bytes_of(self.size)


@dataclass(frozen=True, kw_only=True)
class SplatsFitConfig(JobConfig):
    """Train a scene of Gaussian splats on photographs with poses, for a file that is small from the start.

    Leaves a run folder with the scene, a page that shows it, receipts, and a report with held-out photographs beside
    what the scene shows. Several processes (torchrun) look at as many photographs in each step.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder as COLMAP or nerfstudio leave it, or a transforms.json."""
    minutes: float | None = None
    """How long to train, turned into steps by timing a few first. With neither --minutes nor --steps: 10."""
    steps: int | None = None
    """How many steps to train. With --minutes as well, the fewer hold."""
    size: str | None = None
    """Most bytes of the file: 1MB, 600kB, 1.5MiB, or a number. It also bounds the number of Gaussians."""
    gaussians: int | None = None
    """Most Gaussians; by default as many as --size and the photographs' pixels suggest."""
    format: Literal["sog", "sgs"] = "sog"
    """sog: opened by PlayCanvas' and many other viewers. sgs: the smallest, for scrimp alone, which converts it."""
    quantise: bool = True
    """Train the last fifth with the format's rounding in the loop, so that nothing is lost when the file is written."""
    baseline: bool = True
    """Train the last fifth a second time without rounding, to tell in the receipts what that was good for."""
    longest: int | None = 800
    """Most pixels of a photograph's longer side."""
    degree: Literal[0, 1, 2, 3] = 3
    """Of the harmonics: how much colours change with the direction."""
    init: Path | None = None
    """Go on from this scene, of any format that is read."""
    strategy: Literal["mcmc", "classic"] = "mcmc"
    """Where Gaussians are added and removed: as Markov chain Monte Carlo, or as 3DGS did first."""
    holdout: int = 8
    """Every so many photographs, the first among them, are held out to measure with; 0 for none."""
    on_missing: Literal["refuse", "skip"] = "refuse"
    """Photographs that the set names and that are absent: refuse the set, or do without them."""
    ply: bool = False
    """Write the scene as a .ply as well, as it was before the file's rounding."""
    evaluations: int = 5
    """Comparisons with held-out photographs over the training, the last at its end."""
    checkpoint_seconds: float = 30.0
    """Wall seconds between checkpoints."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, such as tensorboard, mlflow, trackio."""

    precision: ClassVar[str] = "fp32"

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range, or a size that no scene worth its while fits in.
        """
        ranges: dict[str, tuple[bool, str]] = {
            "minutes": (self.minutes is None or 0 < self.minutes < math.inf, "above 0"),
            "steps": (self.steps is None or self.steps >= 10, "at least 10"),
            "gaussians": (self.gaussians is None or self.gaussians >= 10, "at least 10"),
            "longest": (self.longest is None or self.longest >= 16, "at least 16"),
            "holdout": (self.holdout >= 0, "at least 0"),
            "evaluations": (self.evaluations >= 1, "at least 1"),
            "checkpoint_seconds": (self.checkpoint_seconds > 0, "above 0"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} {wanted}", f"{getattr(self, name)}", "correct it")
        if self.out is not None and self.out.name.lower().endswith((".sog", ".sgs", ".ply", ".html")):
            raise InputError("a folder for --out", f"{self.out}", "name a folder; --format says what is written")
        most, least = self.most_bytes(), LEAST_BYTES[self.format]
        if most is not None and most < least:
            raise InputError(f"a --size of at least {least} bytes for a .{self.format}", f"{self.size}", "allow more")

    def most_bytes(self) -> int | None:
        """``size`` in bytes.

        Raises:
            InputError: it is none.
        """
        return bytes_of(self.size)


def bytes_of(size: str | None) -> int | None:
    """A size as people write it, in bytes.

    Raises:
        InputError: it is none.
    """
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise InputError("a --size such as 2MB or 600kB", f"{size}", "write a number and kB, MB, KiB or MiB")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class SplatsRenderConfig(LookConfig, JobConfig):
    """Draw a scene of Gaussian splats: a PNG for each camera. ``seed`` is taken and changes nothing."""

    scene: _Scene
    """A file or folder of any format that is read."""
    orbit: int = 8
    """Pictures around the scene, where there are no --cameras."""
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Red, green and blue behind everything, 0 to 1."""
    antialias: bool | None = None
    """As scenes trained with Mip-Splatting's compensation are drawn; by default as the file says."""

    def check(self) -> None:
        """Refuse numbers that no run can mean.

        Raises:
            InputError: a number out of its range.
        """
        super().check()
        if not all(0 <= part <= 1 for part in self.background):
            raise InputError("--background of three numbers from 0 to 1", f"{self.background}", "correct it")


@dataclass(frozen=True, kw_only=True)
class SplatsDecompressConfig:
    """Convert a scene of Gaussian splats of any format to another one, by the name's ending: .ply, .compressed.ply,
    .splat, .spz, .sog or .sgs."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A file or folder of any format that is read."""
    out: Path | None = None
    """File to write; by default a .ply beside FILE."""
    lossy: bool = False
    """Leave out what the other format has no place for: harmonics, extra numbers."""
    on_bad: OnBad = "refuse"
    """Numbers that are not finite: refuse them, clamp infinite opacities and sizes of 0, or drop those Gaussians."""
    json: bool = False
    """Print what was written as JSON on standard output."""


@dataclass(frozen=True, kw_only=True)
class SplatsInfoConfig:
    """Say what a scene of Gaussian splats holds: how many, how large, what ranges, what is damaged."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A file or folder of any format that is read."""
    json: bool = False
    """Print it as JSON on standard output."""


@dataclass(frozen=True, kw_only=True)
class SplatsViewConfig(LookConfig):
    """Write one HTML page that shows a scene of Gaussian splats in any browser, offline."""

    scene: _Scene
    """A file or folder of any format that is read."""
    out: Path | None = None
    """Page to write; by default an .html beside the scene."""
    device: Device = "auto"
    """Where to draw the picture that is shown first."""


@dataclass(frozen=True, kw_only=True)
class SplatsCompareConfig(LookConfig):
    """Write one HTML page that shows two scenes of Gaussian splats under a slider, with what each takes and loses."""

    left: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """The scene that the other is held against."""
    right: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other one, such as the first compressed; figures of the run folder it lies in are shown too."""
    out: Path | None = None
    """Page to write; by default an .html beside B."""
    views: int = 8
    """Pictures to compare."""
    device: Device = "auto"
    """Where to draw them."""
