"""How far attacks on the cost of adaptive transformers go: `scrimp audit` on trained ones, and on ones trained against.

    python benchmarks/attack_runs.py run                       # about two hours of one core; stop and start at will
    python benchmarks/attack_runs.py run --tasks cifar10 --methods avit --seeds 0
    python benchmarks/attack_runs.py table                     # from those there are in receipts/attack

cifar10: the small transformers that `adaptive_accuracy.py run` left in its --work, of the same seed: with halting,
sampling and gating fine-tuned, and with merging, which no image can make dearer. The audit is that of the command line.
Defended: these fine-tuned for as long again, half of the batches carrying one of a growing set of patches (`scrimp thin
--defend`); and audited anew, so that the attacker knows the defence.

vit-s14: a packaged ViT-S/14 in DINOv2's layout on images of CIFAR-10 made larger, under a linear classifier; with
sampling as it comes, and with halting after one pass over 2,000 images.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from adaptive_accuracy import METHODS, SHARE, TUNING
from attack_models import Large
from attack_tables import NAME, card
from scrimp.data.packed import cache_folder
from scrimp.jobs.audit import Audited, audit
from scrimp.jobs.audit_config import AuditConfig
from scrimp.jobs.folder import CONFIG, RECEIPT
from scrimp.jobs.thin import thin
from scrimp.jobs.thin_config import VALUES, ThinConfig
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt, save_receipt

RECEIPTS = Path(__file__).resolve().parent.parent / "receipts" / NAME
TASKS: dict[str, tuple[str, ...]] = {
    "cifar10": ("avit", "ats", "adavit", "tome", "avit-defended", "adavit-defended", "ats-defended"),
    "vit-s14": ("avit", "ats"),
}
BUDGETS = {"cifar10": 40_000, "vit-s14": 1_500}
IMAGES = {"cifar10": 256, "vit-s14": 48}
DEFENCE: dict[str, Any] = {"defend": 5, "defend_steps": 120, "defend_images": 512, "defend_clean": 0.5}
_DEFENDED = "-defended"


@dataclass(frozen=True)
class Run:
    """Measure what is missing; every audit leaves its receipt, an unfinished one its run folder in --work."""

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = ()
    """By default all of a task."""
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    out: Path = RECEIPTS
    work: Path = cache_folder() / NAME
    models: Path = cache_folder() / "adaptive-accuracy"
    """--work of adaptive_accuracy.py."""


@dataclass(frozen=True)
class Table:
    """Print the tables of the receipts there are."""

    out: Path = RECEIPTS


def run(order: Run) -> None:
    known = {method for methods in TASKS.values() for method in methods}
    strange = [*set(order.tasks).difference(TASKS), *set(order.methods).difference(known)]
    if strange:
        wanted = f"tasks out of {', '.join(TASKS)} and methods out of {', '.join(sorted(known))}"
        raise InputError(wanted, strange[0], "correct it")
    torch.set_num_threads(order.threads)
    for task in order.tasks:
        for seed in order.seeds:
            for method in TASKS[task]:
                file = order.out / task / f"{method}-s{seed}.json"
                if (not order.methods or method in order.methods) and not file.is_file():
                    publish(file, task, method, seed, *measure(order, task, method, seed))


def measure(order: Run, task: str, method: str, seed: int) -> tuple[Audited, float, dict[str, Any]]:
    """The audit, its process CPU seconds (nan if it was interrupted before), and what else is to be said."""
    home, notes = order.work / task / f"s{seed}" / method, {}
    if task == "vit-s14":
        arguments: dict[str, Any] = Large(seed, home.parent).victim(method)
        config: dict[str, Any] = {"model": task}
    else:
        folder = order.models / "cifar10" / f"s{seed}"
        if method.endswith(_DEFENDED):
            way, notes = defended(folder, home.parent, method.removesuffix(_DEFENDED), seed)
        else:
            way = folder / f"{method}-tuned" / way_of(method)
        if not (way / RECEIPT).is_file():
            raise InputError("the models of adaptive_accuracy.py", f"none in {way.parent.name}", "run that first")
        arguments, config = {}, {"model": str(way)}
    again = (home / CONFIG).is_file()
    settings = AuditConfig(
        data="cifar10",
        seed=seed,
        images=IMAGES[task],
        budget=BUDGETS[task],
        out=home,
        resume=again,
        device="cpu",
        json=True,
        **config,
    )
    start = time.process_time()
    found = audit(settings, **arguments)
    return found, float("nan") if again else time.process_time() - start, notes


def way_of(method: str) -> str:
    (value,) = METHODS[method].trained[VALUES[method]]  # type: ignore[index]
    return f"{method}-{value:g}"


def defended(base: Path, home: Path, method: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """The folder of the way trained against patches, and what its defence was."""
    flops = SHARE * load_receipt(base / "dense" / RECEIPT).config["budget_flops"]
    folder = home / f"{method}-training"
    settings: dict[str, Any] = {**TUNING, **METHODS[method].trained, **DEFENCE, "flops": flops, "baseline": "given"}
    config = ThinConfig(
        model=str(base / f"{method}-tuned" / way_of(method)),
        data="cifar10",
        method=method,  # type: ignore[arg-type]
        seed=seed,
        out=folder,
        resume=(folder / CONFIG).is_file(),
        **settings,
    )
    thin(config)
    way = folder / way_of(method)
    told = load_receipt(way / "training" / RECEIPT).notes["defence"]
    return way, {"defence": told}


def publish(
    file: Path, task: str, method: str, seed: int, found: Audited, seconds: float, notes: dict[str, Any]
) -> None:
    """A receipt with all of the audit but what each image cost."""
    content = dict(found.content)
    content["clean"] = {key: value for key, value in content["clean"].items() if key != "costs"}
    content["trials"] = [{key: value for key, value in one.items() if key != "costs"} for one in content["trials"]]
    content["model"] = task
    by_name = {one["name"]: one for one in content["trials"]}
    main = by_name["patch 8 %"]
    cpu = Reading(seconds if seconds == seconds else None, "process CPU: the whole audit")
    receipt = Receipt(
        kind="benchmark",
        name=f"{NAME}/{task}",
        way=method,
        seed=seed,
        quality={"test_accuracy": content["clean"]["accuracy"], "attack_success": main["success"]},
        cost=Cost(flops=Reading(content["clean"]["flops"]["mean"], "of a clean image, mean, counted"), cpu_seconds=cpu),
        config={"images": IMAGES[task], "budget": BUDGETS[task]},
        notes={**notes, "audit": content},
    )
    save_receipt(receipt, file)
    print(f"{task} {method} seed {seed}: {receipt.quality}", flush=True)


def main() -> None:
    order: Any = tyro.extras.subcommand_cli_from_dict({"run": Run, "table": Table}, args=sys.argv[1:])
    if isinstance(order, Run):
        run(order)
    else:
        print(card(order.out.parent))


if __name__ == "__main__":
    main()
