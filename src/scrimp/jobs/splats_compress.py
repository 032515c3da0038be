"""`scrimp splats compress`: a scene made small, and what that cost by field and in pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from scrimp.jobs.folder import RECEIPT, REPORT, choose_folder, plain, record_config
from scrimp.jobs.progress import add_bar, progress_bar
from scrimp.jobs.splats_config import SplatsCompressConfig
from scrimp.jobs.splats_errors import FieldError, field_errors
from scrimp.jobs.splats_ladder import Ladder, ladder_of, reaching, within
from scrimp.jobs.splats_pictures import Looks, choose_device, likeness, looks_at, pictures_of
from scrimp.jobs.splats_plain import pack_plain, unpack_plain
from scrimp.jobs.splats_report import compress_sections
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.report import units, write_report
from scrimp.splats.container import UNSEEN
from scrimp.splats.files import read
from scrimp.splats.ply import write_ply
from scrimp.splats.scene import Splats

PLAIN = "float16 + deflate"
"""The way that the codec stands beside."""
_PLAIN_RECEIPT = Path("baseline") / RECEIPT
_HIGHEST = {"sog": 3, "compressed.ply": 3, "splat": 0}  # degrees of the formats that do not hold all
_HOLD_EXTRA = ("sgs", "ply")
_STORED = "size of the file"
_SPENT = "every encoding that was tried, and the pictures that a PSNR was asked of"
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Compressed:
    """What the job leaves.

    Attributes:
        path: the scene's file.
        receipts: the baseline's and the file's own.
    """

    path: Path
    receipts: list[Receipt]


def splats_compress(config: SplatsCompressConfig, *, scene: Splats | None = None) -> Compressed:
    """Compress; writes the scene, its receipts, the configuration and a report to the run folder, all at the end.

    Args:
        config: see `SplatsCompressConfig`.
        scene: instead of the one in ``config.scene``, whose name is still used.

    Raises:
        InputError: something in the configuration or the scene cannot be used, or no encoding reaches the target.
    """
    config.check()
    name = stem(config.scene)
    folder = choose_folder(config.out, f"splats-{name}-{config.format}", resume=config.resume)
    path = folder / f"scene.{config.format}"
    if config.resume:
        record_config(folder, config, {})
        if (folder / RECEIPT).is_file():
            return Compressed(path, [load_receipt(folder / _PLAIN_RECEIPT), load_receipt(folder / RECEIPT)])
    with progress_bar(shown=not config.json) as progress:
        bar = add_bar(progress, f"splats {name}")

        def show(share: float, said: str = "") -> None:
            progress.update(bar, completed=share, figures=said)

        whole = read(config.scene, on_bad=config.on_bad) if scene is None else scene
        bench = Bench.of(whole.to("cpu", torch.float32), config, show)
        with ResidentPeak() as peak, EnergyWindow() as energy:
            rung, spent = _timed(lambda: choose(bench, config))
        cost = replace(spent, peak_bytes=peak.reading, joules=energy.reading)
        receipts = [_plain_receipt(bench, name), _receipt(bench, rung, name, cost)]
        sections = compress_sections(receipts[1], bench.originals, bench.pictures_at(rung), bench.errors(rung))
    record_config(folder, replace(config, resume=False), {})
    write_atomic(path, bench.encode(rung))
    write_report(receipts, folder / REPORT, sections=sections)
    save_receipt(receipts[0], folder / _PLAIN_RECEIPT)
    save_receipt(receipts[1], folder / RECEIPT)
    return Compressed(path, receipts)


def stem(path: Path) -> str:
    """A scene's name without its endings."""
    return path.resolve().name.split(".")[0] or "scene"


def choose(bench: Bench, config: SplatsCompressConfig) -> int:
    """The rung that answers the target of ``config``; its encoding and pictures are then at hand.

    Raises:
        InputError: no rung does.
    """
    most, rungs = config.most_bytes(), len(bench.ladder.told)
    if most is not None:
        return within(lambda rung: len(bench.encode(rung)), rungs, most)
    if config.psnr is not None:
        return reaching(lambda rung: mean(bench.scores(rung)), rungs, config.psnr)
    rung = bench.ladder.named[config.quality or "medium"]
    bench.encode(rung)
    return rung


@dataclass
class Bench:
    """A scene with its pictures, and what of its encodings has been tried.

    Attributes:
        config: what was asked for.
        whole, scene: as read, and without what was pruned.
        ladder: of the scene.
        looks, device: from where and on what pictures are drawn.
        originals: pictures of the scene as read.
        show: takes the share done and a word on it.
        decode_cpu_seconds: of the last scene decoded.
    """

    config: SplatsCompressConfig
    whole: Splats
    scene: Splats
    ladder: Ladder
    looks: Looks
    device: str
    originals: list[Tensor]
    show: Callable[..., None]
    decode_cpu_seconds: float = math.nan
    _bytes: dict[int, bytes] = field(default_factory=dict)
    _cpu: dict[int, float] = field(default_factory=dict)
    _drawn: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, whole: Splats, config: SplatsCompressConfig, show: Callable[..., None]) -> Bench:
        """Draws the scene's own pictures."""
        looks, device = looks_at(whole, config, config.views), choose_device(config.device)
        scene = whole.take(whole.opacities.sigmoid() >= UNSEEN) if config.prune else whole
        ladder = ladder_of(scene, config.format, seed=config.seed, spz_version=config.spz_version)
        show(0.1, "the scene's own pictures")
        originals = pictures_of(whole.to(device), looks.cameras)
        return cls(config, whole, scene, ladder, looks, device, originals, show)

    def encode(self, rung: int) -> bytes:
        """The rung's bytes, made once."""
        if rung not in self._bytes:
            cpu = time.process_time()
            self._bytes[rung] = self.ladder.encode(rung)
            self._cpu[rung] = time.process_time() - cpu
            self._tell(rung)
        return self._bytes[rung]

    def pictures_at(self, rung: int) -> list[Tensor]:
        """Pictures of what the rung's bytes decode to; only the last rung's are kept."""
        if rung not in self._drawn:
            data = self.encode(rung)
            cpu = time.process_time()
            decoded = self.ladder.decode(data)
            self.decode_cpu_seconds = time.process_time() - cpu
            self._drawn = {rung: self.draw(decoded)}
            self._tell(rung, f", {mean(self.scores(rung)):.2f} dB")
        return self._drawn[rung]

    def scores(self, rung: int) -> list[float]:
        """PSNR of each view."""
        return likeness(self.pictures_at(rung), self.originals)

    def errors(self, rung: int) -> list[FieldError]:
        """By field, of the Gaussians that were not pruned."""
        return field_errors(self.ladder.matched(rung), self.ladder.decode(self.encode(rung)))

    def draw(self, splats: Splats) -> list[Tensor]:
        """Its pictures from the same cameras."""
        return pictures_of(splats.to(self.device), self.looks.cameras)

    def facts(self, rung: int) -> dict[str, Any]:
        """What is said of the rung in its receipt; after it was decoded."""
        size, ply = len(self.encode(rung)), len(write_ply(self.whole))
        return {
            **self.common(),
            "setting": self.ladder.told[rung],
            "pruned Gaussians": len(self.whole) - len(self.scene),
            "left out": ", ".join(left_out(self.whole, self.config.format)) or "nothing",
            "bytes a Gaussian": size / len(self.whole),
            "bytes of a .ply": ply,
            "times smaller than a .ply": ply / size,
            "encode CPU seconds": self._cpu[rung],
            "decode CPU seconds": self.decode_cpu_seconds,
            "encodings tried": len(self._bytes),
            "PSNR by view": [round(score, 3) for score in self.scores(rung)],
            "errors": {error.field: _words(error) for error in self.errors(rung)},
        }

    def common(self) -> dict[str, Any]:
        """What is said of every way."""
        return {
            "scene": str(self.config.scene),
            "Gaussians": len(self.whole),
            "degree of harmonics": self.whole.degree,
            "views": len(self.looks.cameras),
            "pictures": f"{self.looks.cameras[0].width} x {self.looks.cameras[0].height}",
            "seen from": self.looks.told,
            "device": self.device,
        }

    def _tell(self, rung: int, more: str = "") -> None:
        probes = 1 + math.log2(len(self.ladder.told))
        said = f"{self.ladder.told[rung]}: {units.size(len(self._bytes[rung]))}{more}"
        self.show(min(0.95, 0.1 + 0.8 * len(self._bytes) / probes), said)


def left_out(splats: Splats, format: str) -> list[str]:
    """What a format has no place for."""
    lost = [f"extra numbers {', '.join(splats.extra)}"] if splats.extra and format not in _HOLD_EXTRA else []
    high = splats.degree > _HIGHEST.get(format, splats.degree)
    return lost + ([f"harmonics above degree {_HIGHEST[format]}"] if high else [])


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _words(error: FieldError) -> dict[str, Any]:
    return {"rms": error.rms, "weighted by visibility": error.seen, "largest": error.largest, "unit": error.unit}


def _quality(scores: list[float]) -> dict[str, float | None]:
    return {"psnr": mean(scores), "worst_psnr": min(scores)}


def _receipt(bench: Bench, rung: int, name: str, cost: Cost) -> Receipt:
    config, quality = bench.config, _quality(bench.scores(rung))
    return Receipt(
        kind="run",
        name=f"splats {name}",
        way=config.format,
        seed=config.seed,
        quality=quality,
        cost=replace(cost, stored_bytes=Reading(float(len(bench.encode(rung))), _STORED)),
        config=plain(config),
        notes=bench.facts(rung),
    )


def _plain_receipt(bench: Bench, name: str) -> Receipt:
    data, cost = _timed(lambda: pack_plain(bench.whole))
    scores = likeness(bench.draw(unpack_plain(data, bench.whole)), bench.originals)
    return Receipt(
        kind="run",
        name=f"splats {name}",
        way=PLAIN,
        seed=bench.config.seed,
        baseline=True,
        quality=_quality(scores),
        cost=replace(cost, stored_bytes=Reading(float(len(data)), _STORED)),
        config=plain(bench.config),
        notes={**bench.common(), "left out": ", ".join(bench.whole.extra) or "nothing"},
    )


def _timed(call: Callable[[], _Result]) -> tuple[_Result, Cost]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    readings = Reading(seconds, f"wall clock: {_SPENT}"), Reading(cpu_seconds, f"process CPU time: {_SPENT}")
    return found, Cost(seconds=readings[0], cpu_seconds=readings[1])
