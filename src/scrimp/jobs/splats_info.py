"""`scrimp splats info`: what a scene holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scrimp.jobs.splats_config import SplatsInfoConfig
from scrimp.report import units
from scrimp.splats.checks import bad_fields
from scrimp.splats.container import UNSEEN
from scrimp.splats.files import read
from scrimp.splats.scene import SH_C0, Splats

if TYPE_CHECKING:
    from rich.table import Table

Range = tuple[float, float] | None


@dataclass(frozen=True)
class Info:
    """What a scene holds.

    Attributes:
        path: file or folder.
        gaussians, degree: how many, and of which harmonics.
        bytes, bytes_a_gaussian: on disk; of a folder all that lies in it. None without Gaussians.
        ranges: smallest and largest finite number by field; ``x``, ``y`` and ``z`` are the scene's bounds, sizes are
            standard deviations, alphas and colours (degree 0) from 0 to 1. None where there is none.
        nearly_invisible: share of an alpha below 1 / 255; None without Gaussians.
        extra: names of further numbers.
        not_finite: by field, in how many Gaussians; those of no rotation with quaternions.
    """

    path: str
    gaussians: int
    degree: int
    bytes: int
    bytes_a_gaussian: float | None
    ranges: dict[str, Range]
    nearly_invisible: float | None
    extra: list[str]
    not_finite: dict[str, int]


def splats_info(config: SplatsInfoConfig) -> Info:
    """Read a scene and count.

    Raises:
        InputError: it cannot be read.
    """
    splats = read(config.file, on_bad="keep")
    size, n = stored(config.file), len(splats)
    alphas = splats.opacities.double().sigmoid()
    return Info(
        path=str(config.file),
        gaussians=n,
        degree=splats.degree,
        bytes=size,
        bytes_a_gaussian=size / n if n else None,
        ranges=_ranges(splats, alphas),
        nearly_invisible=float((alphas < UNSEEN).double().mean()) if n else None,
        extra=list(splats.extra),
        not_finite=bad_fields(splats),
    )


def info_table(info: Info) -> Table:
    """For the terminal."""
    from rich.table import Table

    table = Table(title=info.path, show_header=False)
    rows = {
        "Gaussians": units.count(info.gaussians),
        "degree of harmonics": f"{info.degree}",
        "stored": units.size(info.bytes),
        "bytes a Gaussian": units.number(info.bytes_a_gaussian),
        "nearly invisible": units.percent(info.nearly_invisible),
        "not finite": ", ".join(f"{name} of {count}" for name, count in info.not_finite.items()) or "none",
        "extra numbers": ", ".join(info.extra) or "none",
    }
    for name, said in (rows | {name: _said(found) for name, found in info.ranges.items()}).items():
        table.add_row(name, said)
    return table


def _said(found: Range) -> str:
    return units.UNKNOWN if found is None else f"{found[0]:.4g} to {found[1]:.4g}"


def _ranges(splats: Splats, alphas: Tensor) -> dict[str, Range]:
    fields = dict(zip("xyz", splats.means.unbind(1), strict=True)) | {
        "size": splats.scales.double().exp(),
        "alpha": alphas,
        "colour": 0.5 + SH_C0 * splats.colors,
        "harmonics": splats.harmonics,
        "length of quaternions": splats.quaternions.double().norm(dim=1),
    }
    return {name: _range(values) for name, values in (fields | dict(splats.extra)).items()}


def _range(values: Tensor) -> Range:
    finite = values[values.isfinite()].double()
    if not finite.numel():
        return None
    low, high = torch.aminmax(finite)
    return float(low), float(high)


def stored(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
