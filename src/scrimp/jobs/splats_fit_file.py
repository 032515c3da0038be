"""The file of a trained scene: how finely to round so that it fits, and what to do where it does not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_ladder import ladder_of, within
from scrimp.primitives.errors import InputError
from scrimp.splats.camera import Camera
from scrimp.splats.container import UNSEEN, decode, encode_prepared, prepare
from scrimp.splats.quantised import ContainerQuantiser, Quantiser
from scrimp.splats.quantised_sog import SogQuantiser
from scrimp.splats.rate import COARSEST, settings_at
from scrimp.splats.scene import Splats
from scrimp.splats.sog_read import read_sog
from scrimp.splats.sog_write import write_sog
from scrimp.splats.thinning import view_weights

_AIM = 0.96  # of the size: the training that follows moves the bytes a little
_USUAL, _FINEST_TRAINED = 0.0, 3.0  # rungs of the container
_STEPS = 4  # of a rung
_PALETTES = (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)
_SHARED = 64  # Gaussians to an entry of a palette


@dataclass(frozen=True, eq=False)
class Stored:
    """A scene as bytes.

    Attributes:
        data: of the file.
        told: how it was rounded, in words.
        dropped: Gaussians left out so that the rest fits.
    """

    data: bytes
    told: str
    dropped: int = 0


def decoded(data: bytes, format: str) -> Splats:
    """The scene that a reader of the file finds."""
    return decode(data) if format == "sgs" else read_sog(data, "scene.sog")


def quantiser_for(splats: Splats, config: SplatsFitConfig) -> tuple[Quantiser, str]:
    """The finest rounding whose file of this scene fits the size, and what it is in words.

    Without a size, the usual one. The same for the same scene, so that a resumed run finds it again.
    """
    most = config.most_bytes()
    if config.format == "sgs":
        rung = _USUAL if most is None else _rung_within(splats, _AIM * most)
        return ContainerQuantiser(settings_at(rung)), f"rung {rung:g}"
    entries = _entries_within(splats, None if most is None else _AIM * most, config.seed)
    return SogQuantiser(palette_size=entries, seed=config.seed), f"{entries} harmonics in the palette"


def stored_within(splats: Splats, format: str, most: int | None, *, cameras: Sequence[Camera], seed: int = 0) -> Stored:
    """A scene rounded after it was trained, as finely as the size allows.

    Where no rounding is coarse enough, Gaussians that the cameras see least of are left out.

    Args:
        most: bytes; None for the usual measure.

    Raises:
        InputError: a size that not even one Gaussian fits in.
    """
    try:
        return _rounded(splats, format, most, seed)
    except InputError:
        if most is None:
            raise
    order = view_weights(splats, cameras).argsort(descending=True, stable=True)
    count = len(splats)
    while count > 1:
        count = int(0.93 * count)
        try:
            found = _rounded(splats.take(order[:count].sort().values), format, most, seed)
        except InputError:
            continue
        return Stored(found.data, found.told, len(splats) - count)
    raise InputError("a --size that a scene fits in", f"{most}", "allow more")


def perceptual() -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) of pictures [h, w, 3], where its package and the weights that it
    stands on are there; None otherwise. Nothing is downloaded."""
    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob("vgg16-*.pth")):
        return None
    try:
        network = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False).eval()
    except ImportError:
        return None

    def distance(shown: Tensor, target: Tensor) -> Tensor:
        one, other = (2 * each.permute(2, 0, 1)[None].cpu().float() - 1 for each in (shown, target))
        found: Tensor = network(one, other)
        return found.mean()

    return distance


def _rounded(splats: Splats, format: str, most: int | None, seed: int) -> Stored:
    ladder = ladder_of(splats.take(splats.opacities.sigmoid() >= UNSEEN), format, seed=seed)
    encode = functools.cache(ladder.encode)
    if most is not None and len(encode(0)) > most:  # before finer ones are made in vain
        raise InputError(f"a --size of at least {len(encode(0))} bytes", f"{most}", "allow more")
    rung = ladder.named["medium"] if most is None else within(lambda rung: len(encode(rung)), len(ladder.told), most)
    return Stored(encode(rung), ladder.told[rung])


def _rung_within(splats: Splats, most: float) -> float:
    scene = prepare(splats, prune=True)
    rungs = [COARSEST + step / _STEPS for step in range(round((_FINEST_TRAINED - COARSEST) * _STEPS) + 1)]
    low, high = 0, len(rungs)
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(encode_prepared(scene, settings_at(rungs[middle]))) <= most
        low, high = (middle, high) if fits else (low, middle)
    return rungs[low]


def _entries_within(splats: Splats, most: float | None, seed: int) -> int:
    wanted = [size for size in _PALETTES if size <= max(_PALETTES[-1], len(splats) // _SHARED)]
    if most is None or not splats.degree:
        return wanted[0]
    for size in wanted:
        if len(write_sog(splats, palette_size=size, seed=seed, lossy=True)) <= most:
            return size
    return wanted[-1]
