"""The stage that makes a classifier of an encoder: a linear probe on the features of the labelled images."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from scrimp.data import Images
from scrimp.jobs.distill_teachers import put_together, shared_out
from scrimp.jobs.encode import as_encoder_takes
from scrimp.jobs.encoders import Encoder, features_of, load_encoder
from scrimp.jobs.engine import shared, total
from scrimp.jobs.evaluate import EVALUATION_BATCH
from scrimp.jobs.folder import RECEIPT
from scrimp.jobs.once import HOW
from scrimp.jobs.stages import Context, Stage
from scrimp.meter import Cost, EnergyWindow, Reading, ResidentPeak, count_flops, register_flops
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic
from scrimp.primitives.weights import pack_weights
from scrimp.receipts import Receipt, load_receipt, save_receipt
from scrimp.represent.linear import LinearProbe, fit_linear_probe

PROBE = "probe.safetensors"
"""File of a linear probe: `mean`, `std` [dim], `weight` [classes, dim], `bias` [classes], and the names of the classes.

Logits of an image are ``weight @ ((f / |f| - mean) / std) + bias`` for the features f that the encoder in
``weights.safetensors`` beside it gives.
"""

_STATISTICS = 2000  # images that mean and deviation of the features are taken from, where fewer are labelled
_OTHERS = 4  # key of the draw of the others among them
_COUNTED = 8  # images of the forward pass that is counted


def load_probe(path: str | os.PathLike[str]) -> LinearProbe:
    """The linear probe in a file such as a study leaves beside the weights of an encoder, see `PROBE`.

    Raises:
        InputError: no such file, or no probe in it.
    """
    try:
        return LinearProbe(**load_file(path))
    except Exception as error:  # safetensors' own error class has no stable home
        raise InputError(f"a linear probe ({PROBE})", f"{path} ({error})", "pass a file that a study wrote") from error


def probe_stage() -> Stage:
    """No budget but the forward passes it takes; the classifier's own FLOPs, which none can foresee, are added to the
    run's."""
    return Stage("probe", 0.0, _run, fixed=_feature_flops)


def encoded_rows(context: Context) -> Tensor:
    """The training images whose features are taken, int64: the labelled ones first, then some without their labels."""
    labelled, count = context.labelled, len(context.setup.data.train)
    known = torch.zeros(count, dtype=torch.bool)
    known[labelled] = True
    order = torch.randperm(count, generator=generator_for(context.seed, _OTHERS))
    others = order[~known[order]][: max(0, _STATISTICS - len(labelled))]
    return torch.cat([labelled, others])


def _feature_flops(context: Context) -> float:
    return context.setup.cost.score * len(encoded_rows(context))


def _run(context: Context) -> Receipt:
    return probe_receipt(context, "probe", encoded_rows(context), lambda features: torch.arange(len(context.labelled)))


def probe_receipt(context: Context, name: str, rows: Tensor, choose: Callable[[Tensor], Tensor]) -> Receipt:
    """Fit a probe, and leave it and its receipt in the stage's folder; one that is there is read back on resumption.

    Args:
        name: of the stage.
        rows: training images whose features are taken; mean and deviation come from all of them.
        choose: places among ``rows`` of those whose labels are used, from all their features; called on one process,
            and twice with the same result, as counting FLOPs slows it down.

    Raises:
        InputError: no encoder before it.
    """
    done = context.folder / RECEIPT
    if context.resume and done.is_file():
        return load_receipt(done)
    accelerator, data = context.setup.accelerator, context.setup.data
    if context.encoder is None:
        raise InputError(f"a stage before {name} that makes an encoder", "none", f"write pretrain+{name}")
    encoder = load_encoder(context.encoder)
    encoder.model.to(accelerator.device)

    def fit() -> tuple[Tensor, LinearProbe]:
        places = choose(features)
        labels, classes = data.train.labels[rows[places]], len(data.classes)
        return places, fit_linear_probe(features[places], labels, classes=classes, unlabelled=features)

    with ResidentPeak() as peak, EnergyWindow() as energy:
        begin, cpu = time.perf_counter(), time.process_time()
        features = _features(encoder, data.train, rows, context)
        places, probe = shared(accelerator, fit)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    flops = shared(accelerator, lambda: counted_passes(encoder, data.train, len(rows), fit))
    size = shared(accelerator, lambda: save_probe(probe, context.folder / PROBE, data.classes))
    cost = Cost(
        seconds=Reading(seconds, HOW["seconds"]),
        cpu_seconds=Reading(total(accelerator, cpu_seconds), HOW["cpu_seconds"]),
        flops=flops,
        peak_bytes=peak.reading,
        joules=energy.reading,
        stored_bytes=Reading(float(size), HOW["stored_bytes"]),
        samples=Reading(0.0, HOW["samples"]),
        labels=Reading(float(len(places)), HOW["labels"]),
    )
    test = _features(encoder, data.test, torch.arange(len(data.test)), context)
    labelled = (features[places], data.train.labels[rows[places]])
    receipt = _receipt(context, name, len(rows), probe_quality(probe, labelled, (test, data.test.labels)), cost)
    if accelerator.is_main_process:
        save_receipt(receipt, done)
    accelerator.wait_for_everyone()
    return receipt


def _features(encoder: Encoder, images: Images, rows: Tensor, context: Context) -> Tensor:
    """Features of these images, float32 [n, dim] on the CPU; on every process, each gets all."""
    accelerator = context.setup.accelerator
    mine = images.take(shared_out(rows, accelerator))
    found = features_of(encoder, mine, device=accelerator.device, batch_size=EVALUATION_BATCH)
    return put_together(found.to(accelerator.device), len(rows), accelerator).cpu()


def counted_passes(encoder: Encoder, images: Images, rows: int, fit: Callable[[], Any]) -> Reading:
    """FLOPs of the forward passes and of the classifier, which is fitted again for it: counting slows it down."""
    _linear_algebra()
    few = torch.arange(min(_COUNTED, len(images)))
    device = next(encoder.model.parameters()).device
    shown = as_encoder_takes(images.batch(few).to(device), mean=encoder.mean, std=encoder.std)
    with torch.no_grad():
        readings = count_flops(lambda: encoder.model(shown)), count_flops(fit)
    passes, fitted = (reading.value for reading in readings)
    known = passes is not None and fitted is not None
    value = passes * rows / len(few) + fitted if known else None  # type: ignore[operator]
    return Reading(value, HOW["flops"], tuple(sorted({name for reading in readings for name in reading.missed})))


@functools.cache
def _linear_algebra() -> None:
    """Formulas for what the classifier's fit makes of its Hessian: factor n^3 / 3, solve 2 n^2 for each column."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten.linalg_cholesky_ex: lambda matrix, *_, **__: matrix[-1] ** 3 // 3,
        torch.ops.aten.cholesky_solve: lambda right, matrix, *_, **__: 2 * matrix[-1] ** 2 * right[-1],
        torch.ops.aten._linalg_check_errors: lambda *_, **__: 0,
    }
    for operator, formula in formulas.items():
        with suppress(InputError):  # the caller has given one
            register_flops(operator, formula)


def save_probe(probe: LinearProbe, path: Path, classes: tuple[str, ...]) -> int:
    """Write the classifier; returns the file's bytes."""
    content = pack_weights(vars(probe), {"format": "pt", "kind": "linear probe", "classes": "\n".join(classes)})
    write_atomic(path, content)
    return len(content)


def probe_quality(
    probe: LinearProbe, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, float | None]:
    """Accuracy and mean cross-entropy in nats, as of any classifier."""
    logits = probe.logits(test[0])
    return {
        "test_accuracy": int((logits.argmax(1) == test[1]).sum()) / len(logits),
        "train_loss": float(functional.cross_entropy(probe.logits(train[0]), train[1])),
        "test_loss": float(functional.cross_entropy(logits, test[1])),
    }


def _receipt(context: Context, name: str, seen: int, quality: dict[str, float | None], cost: Cost) -> Receipt:
    point: dict[str, float | None] = {key: getattr(cost, key).value for key in ("flops", "seconds", "cpu_seconds")}
    return Receipt(
        kind="run",
        name=context.stage_name,
        way=name,
        seed=context.seed,
        quality=quality,
        cost=cost,
        curve=[{**point, "samples": 0.0, **quality}],
        config={"budget_flops": context.budget},
        notes={
            "features of": f"{seen} training images",
            "train_loss measured on": f"{int(cost.labels.value or 0)} fixed training images",
        },
    )
