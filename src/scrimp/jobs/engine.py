"""Processes, devices, precision and sharding: accelerate, checked to have done what was asked."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from scrimp.jobs.device import pick_device
from scrimp.primitives.errors import InputError, require

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_LETTING_GO = 0.1  # seconds


class Accelerable(Protocol):
    """What a job's configuration says of devices: ``device`` as `scrimp.jobs.device.pick_device` takes it."""

    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def trackers(self) -> tuple[str, ...]: ...


def start(config: Accelerable, *, bf16_on_cpu: bool = False) -> Accelerator:
    """An accelerator on the device asked for, with as many processes as the launcher was asked for.

    Args:
        config: its device and precision, and trackers to check.
        bf16_on_cpu: let precision "auto" take bfloat16 on CPUs that multiply it natively.

    Raises:
        InputError: the device is not there, a tracker is unknown, or fewer processes came up than were launched.
        MissingExtraError: a tracker is not installed.
    """
    from accelerate import Accelerator

    _check_trackers(config.trackers)
    picked = pick_device(config.device)
    precision = _precision(config.precision, config.device, bf16_on_cpu=bf16_on_cpu and picked == "cpu")
    accelerator = Accelerator(
        cpu=picked == "cpu",
        mixed_precision=precision,
    )
    check_world(accelerator.num_processes, os.environ)
    return accelerator


def finish(accelerator: Accelerator) -> None:
    """End what `start` began, so that the next job of this process may choose another device or precision."""
    from accelerate.state import AcceleratorState

    alone = accelerator.num_processes == 1
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=alone)
    if not alone:
        # gloo's threads outlive the group where a wrapped model still refers to it. One that lets go of its last tensor
        # while Python ends aborts the process, so leave them the interpreter for a moment (torch 2.14).
        time.sleep(_LETTING_GO)


@contextmanager
def accelerated(
    config: Accelerable, given: Accelerator | None = None, *, bf16_on_cpu: bool = False
) -> Iterator[Accelerator]:
    """An accelerator as `start` gives, ended afterwards; also after an error, for the next job of this process.

    Among several processes one that fails alone may not wait for the others, who may be waiting for it.

    Args:
        config: see `start`.
        given: an accelerator of the caller's, taken instead and left as it is.
        bf16_on_cpu: see `start`.
    """
    if given is not None:
        yield given
        return
    accelerator = start(config, bf16_on_cpu=bf16_on_cpu)
    try:
        yield accelerator
    except BaseException:
        if accelerator.num_processes == 1:
            finish(accelerator)
        raise
    finish(accelerator)


def check_world(processes: int, environment: Any) -> None:
    """Refuse to go on with fewer processes than the launcher started: each would train the whole job alone."""
    asked = int(environment.get("WORLD_SIZE", "1"))
    if processes != asked:
        raise InputError(
            f"{asked} processes, as the launcher set WORLD_SIZE",
            f"{processes}",
            "start with torchrun --nproc-per-node N -m scrimp ...",
        )


def shared(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Let the first process decide (and write files); all get its answer, or all raise its error."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except InputError as error:
            answer[1] = error
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    decided: T = answer[0]
    return decided


def total(accelerator: Accelerator, value: float) -> float:
    """The sum over all processes."""
    if accelerator.num_processes == 1:
        return value
    summed: Any = accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="sum")
    return float(summed)


def slowest(accelerator: Accelerator, *seconds: float) -> tuple[float, ...]:
    """The largest of each of these over all processes."""
    times = torch.tensor(seconds, device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
    return tuple(times.tolist())


@contextmanager
def tracked(
    accelerator: Accelerator, trackers: tuple[str, ...], folder: Path, settings: dict[str, Any]
) -> Iterator[None]:
    """Log to these trackers, into the run's own folder, until the run is over."""
    if not trackers:
        yield
        return
    from accelerate.tracking import filter_trackers

    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(list(trackers), str(folder))
    accelerator.init_trackers("scrimp", config={key: str(value) for key, value in settings.items()})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def _check_trackers(names: tuple[str, ...]) -> None:
    """Accelerate drops trackers that are not installed without a word; a log that was asked for must not go missing."""
    known = {"tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
    for name in names:
        if name not in known:
            raise InputError(f"trackers out of: {', '.join(known)}", name, "correct --trackers")
        require(known[name], "trackers")


def spread(accelerator: Accelerator, model: nn.Module, parallel: str) -> nn.Module:
    """The model on its device, as replicas (DDP) or FSDP2 shards over all processes; checked to be that.

    Shards are made by torch's own ``fully_shard``: accelerate's FSDP plugin silently gives replicas on CPUs.

    Raises:
        InputError: the sharding asked for did not come about.
    """
    if parallel == "ddp" or (accelerator.num_processes == 1 and not torch.distributed.is_initialized()):
        if parallel == "fsdp":
            raise InputError("several processes for --parallel fsdp", "one", "start with torchrun")
        return accelerator.prepare_model(model.to(accelerator.device))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model = model.to(accelerator.device)
    for child in reversed(_blocks(model)):  # a unit inside another one has to be made first
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_sharded(model.parameters())
    return model


def check_sharded(parameters: Iterable[torch.Tensor]) -> None:
    """Refuse parameters that are not DTensor shards."""
    from torch.distributed.tensor import DTensor

    whole = sum(not isinstance(item, DTensor) for item in parameters)
    if whole:
        raise InputError("sharded parameters", f"{whole} whole ones", "use --parallel ddp or report this")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks, each its own unit of sharding; torch gathers one unit at a time."""
    lists = (nn.Sequential, nn.ModuleList)
    children = [child for layer in model.modules() if isinstance(layer, lists) for child in layer]
    return [child for child in children if not isinstance(child, lists) and sum(1 for _ in child.parameters()) > 2]


def _precision(asked: str, device: str, *, bf16_on_cpu: bool = False) -> str:
    if asked != "auto":
        return "no" if asked == "fp32" else asked
    if bf16_on_cpu:
        return "bf16" if native_bf16() else "no"
    on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "no"


def native_bf16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (elsewhere it is slower than float32)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
