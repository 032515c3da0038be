"""Vision transformers that spend less, beside themselves without: CPU time against counted FLOPs, in one process.

    python benchmarks/adaptive_speed.py run                                        # everything; goes on where it was
    python benchmarks/adaptive_speed.py run --shapes deit-s-224 --batches 1 8 --methods merging-13 halting
    python benchmarks/adaptive_speed.py export                                     # merging under other runtimes

Fresh weights and made-up images: nothing here depends on what a model has learnt, only on how many tokens go and where.
So that they go at unlike depths, as in a trained model, queries and keys are made larger, halting's scores and the
gates are set to the model's numbers, and the images are textured on unlike shares of their area. Dense and the others
take turns round by round; what is written down is process CPU time on one thread and medians of the rounds' ratios.
Numbers of pairs and samples are those of 196 patches; other sizes get as many in proportion. `export` wants onnx,
onnxscript, onnxruntime and openvino; what is not installed is left out and named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from torch import Tensor, nn

from adaptive_models import METHODS, SHAPES, Numbers, attach, build, numbers_of, pictures, twin
from attention_speed import in_turn
from common import RECEIPTS, keep
from scrimp.adaptive import image_costs, token_merging_
from scrimp.meter import Cost, Reading
from scrimp.primitives.errors import InputError
from scrimp.receipts import Receipt, load_receipt

NAME = "adaptive-speed"
FOLDER = RECEIPTS / NAME
DENSE = "dense"


@dataclass(frozen=True)
class Run:
    """Each method beside dense; one receipt a shape and batch. What a receipt has is not measured again."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    batches: tuple[int, ...] = (1, 8, 32)
    methods: tuple[str, ...] = METHODS
    rounds: int | None = None
    """Alternating rounds; by default 31 at batch 1, 9 at 8, 5 at 32."""
    threads: int = 1
    seed: int = 0
    folder: Path = FOLDER


@dataclass(frozen=True)
class Export:
    """Merging, exported by torch.export, under ONNX Runtime and OpenVINO, beside dense torch."""

    shapes: tuple[str, ...] = ("deit-s-224",)
    batches: tuple[int, ...] = (8,)
    r: int = 13
    rounds: int | None = None
    threads: int = 1
    seed: int = 0
    folder: Path = FOLDER


def measure(order: Run, shape: str, batch: int, methods: Sequence[str]) -> dict[str, Any]:
    """Counted and timed: what each of ``methods`` costs, and dense in the same rounds."""
    name, size = SHAPES[shape]
    model, images = build(name, size, seed=order.seed), pictures(batch, size, seed=order.seed)
    numbers = numbers_of(model, images)
    nothing = twin(model)
    token_merging_(nothing, 0)
    whole = float(image_costs(nothing, images[:1])[0])
    calls, found = {DENSE: partial(forward, model, images)}, {}
    for method in methods:
        thin = twin(model)
        controller, setting = attach(method, thin, numbers, seed=order.seed)
        flops = image_costs(thin, images)
        assert controller.tokens is not None
        last = controller.tokens[:, -1]
        calls[method] = partial(forward, thin, images)
        found[method] = {
            "setting": setting,
            "flops": float(flops.double().mean()),
            "flops gain": whole / float(flops.double().mean()),
            "tokens after the last block": [int(last.min()), int(last.max())],
        }
    times = in_turn(calls, order.rounds or rounds_for(batch))
    for method, item in found.items():
        item |= gain_of(times, method)
        item["dense flops"] = whole
        item["share kept"] = item["time gain"]["median"] / item["flops gain"]
    return found


def gain_of(times: dict[str, Any], side: str) -> dict[str, Any]:
    """Seconds of a side and of dense, and how many times as long dense takes."""
    over = times[side][f"cpu_seconds over {DENSE}"]
    gain = {"median": 1 / over["median"], "low": 1 / over["high"], "high": 1 / over["low"], "count": over["count"]}
    seconds = {"cpu_seconds": times[side]["cpu_seconds"], "dense cpu_seconds": times[DENSE]["cpu_seconds"]}
    return {**seconds, "time gain": gain}


def rounds_for(batch: int) -> int:
    return max(5, min(31, 72 // batch))


def forward(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(images)
    return out


def run(order: Run) -> None:
    """Measure what the receipts do not have yet, shape by shape and batch by batch.

    Raises:
        InputError: no such shape or method, or a receipt with other settings.
    """
    check(order.shapes, SHAPES, "a shape")
    check(order.methods, METHODS, "a method")
    torch.set_num_threads(order.threads)
    for shape in order.shapes:
        for batch in order.batches:
            path = order.folder / f"{shape}-{batch}.json"
            config = {"shape": shape, "batch": batch, "threads": order.threads, "seed": order.seed}
            had = measured(path, config)
            methods = [method for method in order.methods if method not in had]
            if methods:
                found = {**had, **measure(order, shape, batch, methods)}
                keep(receipt_of(config, {name: found[name] for name in METHODS if name in found}), path)


def check(names: Sequence[str], known: Sequence[str] | dict[str, Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{what} out of {', '.join(known)}", name, "correct it")


def measured(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The methods that a receipt has.

    Raises:
        InputError: it was made with other settings.
    """
    if not path.is_file():
        return {}
    receipt = load_receipt(path)
    if receipt.config != config:
        raise InputError(f"a receipt of {config}", f"{path.name} of {receipt.config}", "remove it, or set folder")
    methods: dict[str, Any] = receipt.notes["methods"]
    return methods


def receipt_of(config: dict[str, Any], methods: dict[str, Any]) -> Receipt:
    way = "merging-13" if "merging-13" in methods else next(iter(methods))
    cpu, flops = methods[way]["cpu_seconds"]["median"], methods[way]["flops"] * config["batch"]
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/{config['shape']}",
        way=way,
        seed=config["seed"],
        cost=Cost(
            cpu_seconds=Reading(cpu, "process CPU, median, forward of a batch"),
            flops=Reading(flops, "counted by the controller, the same"),
        ),
        config=config,
        notes={"methods": methods},
    )


def run_export(order: Export) -> None:
    """Measure what has no receipt yet."""
    check(order.shapes, SHAPES, "a shape")
    torch.set_num_threads(order.threads)
    for shape in order.shapes:
        for batch in order.batches:
            path = order.folder / f"export-{shape}-{batch}.json"
            if not path.is_file():
                keep(exported(order, shape, batch), path)


def exported(order: Export, shape: str, batch: int) -> Receipt:
    from adaptive_runtimes import RUNTIMES

    name, size = SHAPES[shape]
    model, images = build(name, size, seed=order.seed), pictures(batch, size, seed=order.seed)
    thin = twin(model)
    _, setting = attach(f"merging-{order.r}", thin, Numbers(0, 1), seed=order.seed)
    models = {DENSE: model, "merging": thin}
    calls: dict[str, Callable[[], Any]] = {DENSE: partial(forward, model, images)}
    calls["torch fp32, merging"] = partial(forward, thin, images)
    missing, apart = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for runtime, (packages, make) in RUNTIMES.items():
            if absent := [package for package in packages if not installed(package)]:
                missing.append(f"{runtime}: no {', '.join(absent)}")
                continue
            for what, each in models.items():
                call = make(each, images, Path(folder) / f"{what}.onnx", order.threads)
                wanted = forward(each, images)
                apart[f"{runtime}, {what}"] = float((torch.as_tensor(call()) - wanted).norm() / wanted.norm())
                calls[f"{runtime}, {what}"] = call
        times = in_turn(calls, order.rounds or rounds_for(batch))
    config = {"shape": shape, "batch": batch, "threads": order.threads, "seed": order.seed, "merging": setting}
    sides = {side: gain_of(times, side) | {"apart from torch": apart.get(side)} for side in calls if side != DENSE}
    return Receipt(
        kind="benchmark",
        name=f"{NAME}/export",
        way=list(sides)[-1],
        seed=order.seed,
        cost=Cost(cpu_seconds=Reading(list(sides.values())[-1]["cpu_seconds"]["median"], "process CPU, median")),
        config=config,
        notes={"sides": sides, "not installed": missing},
    )


def installed(package: str) -> bool:
    with suppress(ModuleNotFoundError):
        import_module(package)
        return True
    return False


def main() -> None:
    orders = [Annotated[Run, tyro.conf.subcommand("run")], Annotated[Export, tyro.conf.subcommand("export")]]
    order = tyro.cli(Union[tuple(orders)])  # type: ignore[arg-type]  # noqa: UP007
    run(order) if isinstance(order, Run) else run_export(order)


if __name__ == "__main__":
    main()
