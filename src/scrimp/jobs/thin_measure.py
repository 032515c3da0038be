"""What a thinned model gives and costs: answers and FLOPs of every test image, images a second in turn with dense."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.adaptive import Controller
from scrimp.jobs.evaluate import ready
from scrimp.jobs.interrupt import Interrupted
from scrimp.jobs.thin_fit import ThinSetup, evaluation_rows
from scrimp.jobs.thin_methods import Build
from scrimp.meter import paired
from scrimp.primitives.draw import generator_for
from scrimp.primitives.files import write_atomic

EXPORTED = "model.pt2"
"""File of a model by torch.export."""
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model gave for each test image, in their order, on the CPU.

    Attributes:
        losses: nats, [images].
        right: whether the answer is, [images].
        costs: FLOPs, int64 [images].
        tokens: that left each block, int64 [images, blocks]; ``None`` with all tokens.
    """

    losses: Tensor
    right: Tensor
    costs: Tensor
    tokens: Tensor | None

    def flops(self) -> dict[str, float]:
        """Mean, percentiles (costs of images that are there, nearest rank) and the largest, FLOPs an image."""
        ranked = self.costs.sort().values
        found = {"mean": float(self.costs.double().mean())}
        for name, share in PERCENTILES.items():
            found[name] = float(ranked[max(0, math.ceil(share * len(ranked)) - 1)])
        return {**found, "worst": float(ranked[-1])}


def answers(
    setup: ThinSetup, model: nn.Module, controller: Controller | None, build: Build, stop: Callable[[], bool]
) -> Answers:
    """Run over all test images, shared out over the processes; all get all answers.

    Raises:
        Interrupted: a stop was asked for.
    """
    accelerator, test, rows = setup.accelerator, setup.data.test, evaluation_rows(setup.config)
    mine = torch.arange(len(test))[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[Tensor, ...]] = []
    for chosen in mine.split(rows):
        if accelerator.num_processes == 1 and stop():
            raise Interrupted
        labels = test.labels[chosen].to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            logits = model(ready(test.batch(chosen), setup.data, accelerator.device)).float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        found.append(
            (chosen, losses.cpu(), (logits.argmax(1) == labels).cpu(), *_spent(controller, len(chosen), build))
        )
    return _together(found, accelerator.num_processes, adaptive=controller is not None)


def _spent(controller: Controller | None, images: int, build: Build) -> tuple[Tensor, ...]:
    if controller is None:
        return (torch.full((images,), build.flops, dtype=torch.int64),)
    return cast(Tensor, controller.costs), cast(Tensor, controller.tokens)


def _together(found: list[tuple[Tensor, ...]], processes: int, *, adaptive: bool) -> Answers:
    parts: list[Any] = [found] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, found)
    columns = [torch.cat(column) for column in zip(*(row for part in parts for row in part), strict=True)]
    order = columns[0].argsort()
    losses, right, costs, *tokens = (column[order] for column in columns[1:])
    return Answers(losses, right, costs, tokens[0] if adaptive else None)


def speeds(
    setup: ThinSetup, thinned: nn.Module, dense: nn.Module, controller: Controller | None, stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Images a second of a model in turn with the dense one, at every batch size that the test images allow.

    On this process alone, one entry a batch size and form; forms that are one and the same are timed once, as ragged.

    Raises:
        Interrupted: a stop was asked for.
    """
    found = []
    order = torch.randperm(len(setup.data.test), generator=generator_for(setup.config.seed))
    for batch in setup.config.batches if setup.config.repeats else ():
        if batch > len(order):
            continue
        images = ready(setup.data.test.batch(order[:batch]), setup.data, setup.accelerator.device)
        forms = ("masked", "ragged") if controller is not None and controller.method.adaptive else ("ragged",)
        for form in forms:
            if stop():
                raise Interrupted
            found.append(_speed(setup, images, thinned, dense, controller, form))
    return found


def _speed(
    setup: ThinSetup, images: Tensor, thinned: nn.Module, dense: nn.Module, controller: Controller | None, form: Any
) -> dict[str, Any]:
    if controller is not None:
        controller.form = form
    try:
        with torch.no_grad(), setup.accelerator.autocast():
            times = paired(lambda: thinned(images), lambda: dense(images), setup.config.repeats)
        spent = None if controller is None or controller.costs is None else float(controller.costs.double().mean())
    finally:
        if controller is not None:
            controller.form = "auto"
    return {
        "batch": len(images),
        "form": form,
        "flops": spent,
        "cpu_seconds": times.a.cpu_seconds.median,
        "seconds": times.a.seconds.median,
        "dense_cpu_seconds": times.b.cpu_seconds.median,
        "dense_seconds": times.b.seconds.median,
        "cpu_ratio": asdict(times.cpu_ratio),
        "ratio": asdict(times.ratio),
    }


def forms_apart(setup: ThinSetup, model: nn.Module, controller: Controller, rows: int = 8) -> float | None:
    """Largest difference of the outputs of the masked and the ragged form; ``None`` where they are one."""
    if not controller.method.adaptive:
        return None
    chosen = torch.arange(min(rows, len(setup.data.test)))
    images = ready(setup.data.test.batch(chosen), setup.data, setup.accelerator.device)
    given = []
    try:
        for form in ("masked", "ragged"):
            controller.form = form  # type: ignore[assignment]
            with torch.no_grad(), setup.accelerator.autocast():
                given.append(model(images).float())
    finally:
        controller.form = "auto"
    return float((given[0] - given[1]).abs().max())


def export(setup: ThinSetup, model: nn.Module, folder: Path) -> dict[str, Any]:
    """Write a thinned model by torch.export, for batches of any size, or say why it cannot be.

    Returns:
        ``file``, ``bytes`` and ``largest difference`` of its outputs from the model's; or ``why not``.
    """
    rows = torch.arange(5) % len(setup.data.test)
    images = ready(setup.data.test.batch(rows), setup.data, setup.accelerator.device).contiguous()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about torch's
            sizes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
            program = torch.export.export(model, (images[:3],), dynamic_shapes=sizes, strict=False)
            apart = float((program.module()(images) - model(images)).abs().max())
            content = io.BytesIO()
            torch.export.save(program, content)
    except Exception as error:  # whatever torch's tracing raises, the run has its figures
        return {"why not": (str(error).strip() or type(error).__name__).splitlines()[0]}
    write_atomic(folder / EXPORTED, content.getvalue())
    return {"file": EXPORTED, "bytes": len(content.getvalue()), "largest difference": apart}


def spread_out(costs: Tensor, count: int) -> list[int]:
    """So many images from the cheapest to the dearest, at even ranks; rows of ``costs``."""
    order: Sequence[int] = costs.argsort(stable=True).tolist()
    count = min(count, len(order))
    return [order[round(place * (len(order) - 1) / max(count - 1, 1))] for place in range(count)]
