"""Training on photographs of a fox: quality, CPU time, and files learnt with their rounding or rounded afterwards.

    python benchmarks/splat_training.py run         # some ten minutes of one core a seed; stop and start it at will
    python benchmarks/splat_training.py table       # from the receipts there are

Seven photographs are held out, all are 270 x 480. Every way takes as many steps as plain training, of which it shares
the beginning; its CPU time counts that beginning too. A file learnt with its rounding (quantisation-aware) stands
beside `encode_at` of the same scene trained without, at the same size, and beside the same settings applied to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from common import RECEIPTS
from scrimp.data.named import data_root
from scrimp.data.packed import cache_folder
from scrimp.meter import Cost, Reading
from scrimp.receipts import Receipt, save_receipt
from scrimp.splats.codec import Settings
from scrimp.splats.container import decode, encode
from scrimp.splats.dataset import Dataset, open_dataset
from scrimp.splats.fit import Fitting
from scrimp.splats.fit_settings import FitSettings, Rates
from scrimp.splats.optimise import scene_of
from scrimp.splats.quality import Quality, evaluate
from scrimp.splats.quantised import ContainerQuantiser
from scrimp.splats.rate import encode_at, settings_at
from scrimp.splats.scene import Splats
from scrimp.splats.sog_read import read_sog
from scrimp.splats.sog_write import write_sog
from scrimp.splats.spz import read_spz, write_spz
from scrimp.splats.strategy import Mcmc
from scrimp.splats.thinning import Thinning
from splat_training_tables import card

NAME = "splat-training"
PLAIN, THIN = "plain", "thin"
LEAVES = "model.leaves."


@dataclass(frozen=True)
class Way:
    """How a scene is trained.

    Attributes:
        begin: part of the training that is plain's own.
        rung: of the container whose rounding is learnt; None for none.
        thinning: of the Gaussians.
        beside: the way whose scene is rounded afterwards for comparison.
    """

    begin: float = 1.0
    rung: float | None = None
    thinning: Thinning | None = None
    beside: str = PLAIN


HALVED = Thinning(keep=0.5, window=(0.5, 0.8))
LATE = 0.8
"""Part of every training after which rates are those of `LATE_RATES`: high, where rounding is learnt, then falling."""
RATES = Rates(means=4e-4)
LATE_RATES = replace(RATES, harmonics=5e-4, steady=0.85, final=0.1)
WAYS = {
    PLAIN: Way(),
    THIN: Way(0.5, None, HALVED),
    "aware-1": Way(0.8, -1.0),
    "aware+0": Way(0.8, 0.0),
    "aware+1": Way(0.8, 1.0),
    "thin-aware+1": Way(0.5, 1.0, HALVED, THIN),
}
KEPT = (0.5, 0.8, 1.0)
"""Parts of plain training after which it is kept."""
RUNGS, PALETTES, BITS = (-1.0, 0.0, 1.0, 2.0), (64, 512, 4096), ((2, 1), (5, 4))


@dataclass(frozen=True)
class Run:
    """Train what is missing; every finished way and seed leaves its receipt."""

    ways: tuple[str, ...] = tuple(WAYS)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 1500
    cap: int = 40_000
    """Gaussians at most."""
    count: int = 20_000
    """Gaussians to begin with."""
    longest: int = 480
    data: Path | None = None
    """Folder with the photographs; scenes/fox where the shared data lies by default."""
    out: Path = RECEIPTS / NAME
    work: Path = cache_folder() / NAME
    """Where scenes and unfinished trainings are kept."""


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


@dataclass(frozen=True)
class Kept:
    """A training where it stood.

    Attributes:
        state: of `Fitting`.
        cpu: seconds it took so far.
    """

    state: Mapping[str, torch.Tensor]
    cpu: float

    def scene(self) -> Splats:
        leaves = {name: values for name, values in self.state.items() if name.startswith(LEAVES)}
        return scene_of({name.removeprefix(LEAVES): values for name, values in leaves.items()})


def run(order: Run) -> None:
    dataset = open_dataset(order.data or data_root() / "scenes" / "fox", longest=order.longest, on_missing="skip")
    for seed in order.seeds:
        for name in order.ways:
            path = order.out / f"{name}-s{seed}.json"
            if not path.is_file():
                for receipt in receipts_of(order, dataset, name, seed):
                    save_receipt(receipt, order.out / f"{receipt.way}-s{seed}.json")
                    print(receipt.way, seed, receipt.quality, f"{receipt.cost.cpu_seconds.value:.0f} s", flush=True)


def receipts_of(order: Run, dataset: Dataset, name: str, seed: int) -> Iterator[Receipt]:
    """Of a way; the way's own comes last, so that what is unfinished is done again."""
    way = WAYS[name]
    kept, data = trained(order, dataset, name, seed)
    scene = kept.scene() if data is None else decode(data)
    found = evaluate(scene, dataset)
    quality = {**figures(found), "gaussians": float(len(kept.scene())), "bytes": None}
    if data is None:
        for label, curve in afterwards(kept.scene(), dataset):
            yield receipt(order, dataset, (f"{name}-{label}", seed), kept.cpu, curve=curve)
    else:
        quality |= {"bytes": float(len(data)), **beside(order, dataset, way, seed, data)}
    yield receipt(order, dataset, (name, seed), kept.cpu, quality=quality, notes={"by view": dict(found.by_view)})


def beside(order: Run, dataset: Dataset, way: Way, seed: int, data: bytes) -> dict[str, float | None]:
    """The scenes trained without rounding, rounded afterwards: at the same size, and with the same settings."""
    result: dict[str, float | None] = {}
    for name in dict.fromkeys((PLAIN, way.beside)):
        scene = trained(order, dataset, name, seed)[0].scene()
        sized = encode_at(scene, size=len(data), prune=True)
        same = encode(scene, settings=settings_of(way), prune=True)
        for what, coded in (("sized", sized), ("same", same)):
            result[f"{name}_{what}_psnr"] = evaluate(decode(coded), dataset).psnr
            result[f"{name}_{what}_bytes"] = float(len(coded))
    return result


def afterwards(scene: Splats, dataset: Dataset) -> Iterator[tuple[str, list[dict[str, float | None]]]]:
    """Size against quality of a trained scene in each format."""
    coders: dict[str, tuple[tuple[Any, ...], Callable[[Any], bytes], Callable[[bytes], Splats]]] = {
        "sgs": (RUNGS, lambda rung: encode(scene, settings=settings_at(rung), prune=True), decode),
        "sog": (PALETTES, lambda size: write_sog(scene, palette_size=size), lambda data: read_sog(data, "ours.sog")),
        "spz": (BITS, lambda bits: write_spz(scene, sh_bits=bits), lambda data: read_spz(data, "ours.spz")),
    }
    for name, (choices, write, read) in coders.items():
        curve = []
        for choice in choices:
            data = write(choice)
            setting = float(choice[0] if isinstance(choice, tuple) else choice)
            curve.append({"setting": setting, "bytes": float(len(data)), **figures(evaluate(read(data), dataset))})
        yield name, curve


def trained(order: Run, dataset: Dataset, name: str, seed: int) -> tuple[Kept, bytes | None]:
    """A way's scene and file: read where they are kept, else made."""
    if name == PLAIN:
        return plain(order, dataset, seed, 1.0), None
    place, way = order.work / f"{name}-s{seed}.pt", WAYS[name]
    fitting, spent = resumed(order, dataset, way, seed, plain(order, dataset, seed, way.begin))
    if place.is_file():
        kept = read(place)
        fitting.load_state_dict(kept.state)
        return kept, fitting.encode()
    begin = time.process_time()
    advance(fitting, order, way, order.steps)
    data = fitting.encode()
    return keep(place, fitting, spent + time.process_time() - begin), data


def plain(order: Run, dataset: Dataset, seed: int, share: float) -> Kept:
    """Plain training up to a part of it, from where it was kept last."""
    places = {part: order.work / f"{PLAIN}-s{seed}-{round(part * order.steps)}.pt" for part in KEPT if part <= share}
    there = [part for part, place in places.items() if place.is_file()]
    if there and max(there) == share:
        return read(places[share])
    begin = time.process_time()
    if there:
        fitting, spent = resumed(order, dataset, WAYS[PLAIN], seed, read(places[max(there)]))
    else:
        fitting, spent = Fitting(dataset, steps=order.steps, settings=settings(order, WAYS[PLAIN]), seed=seed), 0.0
    for part in [part for part in places if part > max(there, default=0)]:
        advance(fitting, order, WAYS[PLAIN], round(part * order.steps))
        kept = keep(places[part], fitting, spent + time.process_time() - begin)
    return kept


def resumed(order: Run, dataset: Dataset, way: Way, seed: int, kept: Kept) -> tuple[Fitting, float]:
    """A training that goes on as ``way``, and the CPU seconds before."""
    quantiser = None if way.rung is None else ContainerQuantiser(settings_of(way))
    options = {"steps": order.steps, "seed": seed, "settings": settings(order, way), "quantiser": quantiser}
    fitting = Fitting(dataset, start=kept.scene(), **options)  # type: ignore[arg-type]
    fitting.load_state_dict(kept.state)
    return fitting, kept.cpu


def advance(fitting: Fitting, order: Run, way: Way, until: int) -> None:
    """Step by step, with the rates of the part of the training it is in."""
    early, late = (settings(order, way, rates=rates) for rates in (RATES, LATE_RATES))
    while fitting.done < until:
        fitting.settings = late if fitting.done >= round(LATE * order.steps) else early
        fitting.step()


def settings(order: Run, way: Way, *, rates: Rates = RATES) -> FitSettings:
    """Written out, whatever the defaults become."""
    return FitSettings(
        count=order.count,
        strategy=Mcmc(cap=order.cap),
        thinning=way.thinning,
        unseen=0.8,
        rates=rates,
        opacity_price=0.01,
        scale_price=0.01,
        coarse=((0.4, 2),),
        quantised_from=max(way.begin, way.thinning.window[1]) if way.thinning else way.begin,
        requantise=100,
    )


def settings_of(way: Way) -> Settings:
    return settings_at(way.rung or 0.0)


def keep(place: Path, fitting: Fitting, cpu: float) -> Kept:
    place.parent.mkdir(parents=True, exist_ok=True)
    found = Kept(fitting.state_dict(), cpu)
    whole = place.with_suffix(".part")
    torch.save({"state": dict(found.state), "cpu": found.cpu}, whole)
    whole.replace(place)
    return found


def read(place: Path) -> Kept:
    found = torch.load(place, weights_only=True)
    return Kept(found["state"], found["cpu"])


def figures(found: Quality) -> dict[str, float | None]:
    return {"psnr": found.psnr, "ssim": found.ssim}


def receipt(order: Run, dataset: Dataset, what: tuple[str, int], cpu: float, **rest: Any) -> Receipt:
    name, seed = what
    size = dataset.train[0].camera
    notes = {
        "photographs": len(dataset.train),
        "held out": len(dataset.test),
        "pixels": [size.width, size.height],
        **rest.pop("notes", {}),
    }
    config = {"steps": order.steps, "cap": order.cap, "count": order.count, "longest": order.longest}
    last = rest.get("curve", [{}])[-1].get("bytes", rest.get("quality", {}).get("bytes"))
    cost = Cost(
        cpu_seconds=Reading(cpu, "process CPU time of training from its first step, one thread"),
        stored_bytes=Reading(last, "size of the file") if last else Reading(),
        samples=Reading(float(order.steps), "photographs looked at"),
    )
    return Receipt("benchmark", NAME, name, seed=seed, cost=cost, config=config, notes=notes, **rest)


def main() -> None:
    work = {Run: run, Table: lambda order: print(card(order.out))}
    order = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    torch.set_num_threads(1)
    work[type(order)](order)


if __name__ == "__main__":
    main()
