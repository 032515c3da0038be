"""Scenes of Gaussians at fewer and fewer bytes: what each format, ours and others', still shows.

    export SPLAT_TRANSFORM=node_modules/.bin/splat-transform SPLAT_PEERS_PYTHON=peers/bin/python  # splat_peers.py
    python benchmarks/splat_rate.py run           # a quarter of an hour of CPU time, most of it the others'
    python benchmarks/splat_rate.py table
    python benchmarks/splat_rate.py picture --out docs/images/splats.png

PSNR is the mean over 20 views of pictures of the decoded scene against pictures of the scene itself: for fox60k from
cameras of its photographs, for the others from a circle around them. fox60k is also held against the photographs that
it was not trained on. A way is a curve where it has a choice of size, else a point; its CPU seconds are those of
encoding alone for ours, and of the whole program for the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from common import RECEIPTS
from scrimp.data.named import data_root
from scrimp.jobs.splats_pictures import likeness, pictures_of
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError, MissingExtraError
from scrimp.primitives.files import write_atomic
from scrimp.receipts import Receipt, save_receipt
from scrimp.splats.camera import Camera
from scrimp.splats.container import decode, encode_prepared, prepare
from scrimp.splats.dataset import Dataset, open_dataset
from scrimp.splats.files import read
from scrimp.splats.orbit import orbit_cameras, orbit_of
from scrimp.splats.quality import evaluate
from scrimp.splats.rate import settings_at
from scrimp.splats.scene import Splats
from scrimp.splats.sog import read_sog, write_sog
from scrimp.splats.spz import read_spz, write_spz
from splat_peers import PEERS, Outcome, Peer, Tools, run_peer, seed_scene, sources, taken_back, versions_of
from splat_tables import NAME, SCENES, card, curve

_RUNGS = {True: [step / 2 for step in range(-4, 13)], False: [float(step) for step in range(-2, 7)]}
_PALETTES = (64, 256, 512, 1024, 2048, 4096, 16384)
_SPZ_BITS = ((5, 4), (8, 8))
_CHECKED = {"sog": 1024, "spz3": 4, "spz4": 4}
"""Settings of which splat-transform's reading is judged too."""
Point = dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """Measure; what other programs wrote into the work folder is used again."""

    scenes: tuple[str, ...] = tuple(SCENES)
    parts: tuple[str, ...] = ("ours", "seed", "peers")
    """Receipts of parts left out stay as they are."""
    tools: Tools = field(default_factory=Tools)
    data: Path | None = None
    """Folder of the scenes; ``scenes`` in the data folder if not given."""
    work: Path = Path("runs/splat-rate")
    """For the others' files."""
    limit: float = 300.0
    """CPU seconds after which another program is given up."""
    views: int = 20
    out: Path = RECEIPTS / NAME


@dataclass(frozen=True)
class Table:
    """Print the card's tables."""

    receipts: Path = RECEIPTS / NAME


@dataclass(frozen=True)
class Picture:
    """Draw PSNR against bytes of some scenes."""

    scenes: tuple[str, ...] = ("fox60k", "biker")
    receipts: Path = RECEIPTS / NAME
    out: Path = RECEIPTS.parent / "docs" / "images" / "splats.png"


@dataclass(frozen=True, eq=False)
class Judge:
    """Tells how much of a scene another shows.

    Attributes:
        cameras, originals: from where, and the scene's own pictures.
        photographs: with views held out, if there are any.
        held_out: PSNR of the scene itself on them, dB.
    """

    cameras: list[Camera]
    originals: list[Tensor]
    photographs: Dataset | None = None
    held_out: float | None = None

    @classmethod
    def of(cls, splats: Splats, cameras: list[Camera], photographs: Dataset | None) -> Judge:
        own = None if photographs is None else evaluate(splats, photographs).psnr
        return cls(cameras, pictures_of(splats, cameras), photographs, own)

    def point(self, setting: float | None, stored: int, splats: Splats) -> Point:
        scores = likeness(pictures_of(splats, self.cameras), self.originals)
        found: Point = {"setting": setting, "bytes": stored, "psnr": sum(scores) / len(scores), "worst": min(scores)}
        if self.photographs is not None and self.held_out is not None:
            shown = evaluate(splats, self.photographs).psnr
            found |= {"held_out": shown, "change": shown - self.held_out}
        return found


def opened(name: str, folder: Path, views: int) -> tuple[Splats, Judge]:
    """A scene, and its judge."""
    scene = SCENES[name]
    if not (folder / scene.file).is_file():
        raise InputError("the scenes of the benchmark", f"no {scene.file}", "pass --data, the folder that has them")
    splats = read(folder / scene.file)
    if scene.photographs is None:
        return splats, Judge.of(splats, orbit_cameras(orbit_of(splats), views, width=800, height=800), None)
    # The scene was trained on a black background at this size.
    photographs = open_dataset(folder / scene.photographs, on_missing="skip", longest=480, background=(0, 0, 0))
    every = photographs.views
    cameras = [every[step * len(every) // views].camera for step in range(views)]
    return splats, Judge.of(splats, cameras, photographs)


@dataclass(frozen=True)
class Encoder:
    """One way of ours: its settings, and how each is encoded and decoded."""

    ending: str
    settings: tuple[float, ...]
    encode: Callable[[float], bytes]
    decode: Callable[[bytes], Splats]


def encoders(splats: Splats) -> dict[str, Encoder]:
    many = splats.degree > 0
    bits = {float(most): (low, most) for low, most in (_SPZ_BITS if many else _SPZ_BITS[:1])}

    def spz(version: int) -> Encoder:
        return Encoder(
            ".spz",
            tuple(bits),
            lambda most: write_spz(splats, version=version, sh_bits=bits[most]),
            lambda data: read_spz(data, "ours"),
        )

    return {
        "sgs": Encoder(
            ".sgs", tuple(_RUNGS[many]), lambda rung: encode_prepared(prepare(splats), settings_at(rung)), decode
        ),
        "sog": Encoder(
            ".sog",
            tuple(map(float, _PALETTES)) if many else (0.0,),
            lambda size: write_sog(splats, palette_size=int(size) or None),
            read_sog,
        ),
        "spz3": spz(3),
        "spz4": spz(4),
    }


def points_of(order: Run, name: str, judge: Judge, found: tuple[str, Encoder]) -> tuple[list[Point], Point | None]:
    """A way's curve, and what splat-transform makes of one of its files."""
    (way, encoder), points, checked = found, [], None
    for setting in encoder.settings:
        begin = time.process_time()
        data = encoder.encode(setting)
        middle = time.process_time()
        decoded = encoder.decode(data)
        spent = {"encode_cpu_seconds": middle - begin, "decode_cpu_seconds": time.process_time() - middle}
        points.append({**judge.point(setting, len(data), decoded), **spent})
        if order.tools.splat_transform and setting in (_CHECKED.get(way), 0.0) and encoder.ending != ".sgs":
            path = write_atomic(order.work / name / f"ours-{way}{encoder.ending}", data)
            path.with_name(f"{path.name}.ply").unlink(missing_ok=True)
            back = taken_back(order.tools, path)[0]
            checked = judge.point(setting, len(data), back)
    return points, checked


def measure_ours(order: Run, name: str, splats: Splats, judge: Judge) -> Iterator[Receipt]:
    """The curves of our formats."""
    for way, encoder in encoders(splats).items():
        try:
            points, checked = points_of(order, name, judge, (way, encoder))
        except MissingExtraError as error:
            print(f"{name}: {way} passed over, {error}")
            continue
        yield receipt_of(order, name, way, splats, points, {"through splat-transform": checked, "reader": "scrimp"})


def measure_seed(order: Run, name: str, splats: Splats, judge: Judge) -> Iterator[Receipt]:
    """CompGS' arithmetic after training."""
    for way, short in (("compgs", False), ("compgs-short", True)):
        found, size, seconds = seed_scene(splats, short=short)
        point = {**judge.point(None, size, found), "encode_cpu_seconds": seconds}
        yield receipt_of(order, name, way, splats, [point], {"reader": "scrimp", "stored": "counted"})


def measure_peers(order: Run, name: str, splats: Splats, judge: Judge) -> Iterator[Receipt]:
    """What other programs write, each in its turn."""
    own = sources(splats, order.work / name)
    for peer in PEERS:
        target = order.work / name / f"{peer.way}{peer.ending}"
        outcome = run_peer(peer, order.tools, own[peer.unit], target, limit=order.limit)
        if outcome is None:
            print(f"{name}: {peer.way} passed over, {peer.tool} is not there")
            continue
        yield peer_receipt(order, name, splats, judge, (peer, target, outcome))


def peer_receipt(order: Run, name: str, splats: Splats, judge: Judge, found: tuple[Peer, Path, Outcome]) -> Receipt:
    peer, target, outcome = found
    notes: dict[str, Any] = {"program": peer.tool, "problem": outcome.problem, "cpu seconds": outcome.cpu_seconds}
    if outcome.stored is None:
        return receipt_of(order, name, peer.way, splats, [], notes)
    back, reader = taken_back(order.tools, target)
    point = {**judge.point(None, outcome.stored, back), "encode_cpu_seconds": outcome.cpu_seconds}
    return receipt_of(order, name, peer.way, splats, [point], {**notes, "reader": reader, "Gaussians back": len(back)})


def receipt_of(order: Run, name: str, way: str, splats: Splats, points: list[Point], notes: dict[str, Any]) -> Receipt:
    """``setting`` of a point: a rung of .sgs, entries of the palette of a .sog, bits of the harmonics of a .spz."""
    last = points[-1] if points else {}
    spent = last.get("encode_cpu_seconds", notes.get("cpu seconds"))
    cost = Cost(
        cpu_seconds=Reading(spent, "process CPU time of the last point's encoding"),
        stored_bytes=Reading(last.get("bytes"), notes.get("stored", "size of the last point's file")),
    )
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/{name}",
        way=way,
        seed=0,
        quality={key: last.get(key) for key in ("psnr", "held_out", "change")},
        cost=cost,
        curve=points,
        config={"views": order.views, "limit": order.limit},
        notes={"Gaussians": len(splats), "degree": splats.degree, "torch": torch.__version__, **notes},
    )


_PARTS = {"ours": measure_ours, "seed": measure_seed, "peers": measure_peers}


def run(order: Run) -> None:
    folder = order.data or data_root() / "scenes"
    versions = versions_of(order.tools)
    for name in order.scenes:
        splats, judge = opened(name, folder, order.views)
        stored = (folder / SCENES[name].file).stat().st_size
        facts = {"held out, the scene itself": judge.held_out, "bytes of the file": stored, "programs": versions}
        for part in order.parts:
            for receipt in _PARTS[part](order, name, splats, judge):
                save_receipt(
                    replace(receipt, notes={**receipt.notes, **facts}), order.out / name / f"{receipt.way}.json"
                )
                print(name, receipt.way, *[f"{point['bytes']:,.0f}: {point['psnr']:.2f}" for point in receipt.curve],
                      receipt.notes.get("problem", ""), flush=True)  # fmt: skip


def picture(order: Picture) -> None:
    sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
    from make_picture import draw

    draw([curve(order.receipts, name) for name in order.scenes], order.out)


def main() -> None:
    commands = {"run": Run, "table": Table, "picture": Picture}
    work = {Run: run, Table: lambda order: print(card(order.receipts)), Picture: picture}
    order = tyro.extras.subcommand_cli_from_dict(commands, args=sys.argv[1:])
    torch.set_num_threads(1)
    work[type(order)](order)


if __name__ == "__main__":
    main()
