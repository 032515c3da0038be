"""Checkpoints that are whole or refused: a digest in front, written atomically, read without unpickling code."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

if TYPE_CHECKING:
    from accelerate import Accelerator

_MAGIC = b"scrimp checkpoint 1\n"


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write tensors, numbers, strings and containers of them; SHA-256 first, so that damage is seen."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    return write_atomic(path, _MAGIC + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, on the CPU.

    Raises:
        InputError: the file is absent, damaged, or no checkpoint.
    """
    remedy = "restore it from a copy, or delete the run folder and start again"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError("a checkpoint", f"{path}: {error.strerror}", "start without --resume") from error
    head = len(_MAGIC) + 32
    if not content.startswith(_MAGIC):
        raise InputError("a scrimp checkpoint", f"{path}, another kind of file", remedy)
    if hashlib.sha256(content[head:]).digest() != content[len(_MAGIC) : head]:
        raise InputError("a whole checkpoint", f"{path}, damaged (its SHA-256 differs)", remedy)
    state: dict[str, Any] = torch.load(io.BytesIO(content[head:]), map_location="cpu", weights_only=True)
    return state


def gather_training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full state dicts of model and optimiser on the CPU, whatever the sharding; call it on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def restore_training_state_(
    model: nn.Module, optimizer: torch.optim.Optimizer, states: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Load what `gather_training_state` gave, in place, under any sharding."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=StateDictOptions(full_state_dict=True),
    )


def gather_random_states(accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """Every process's global generators (dropout draws from them), in the order of ranks; call it on every rank."""
    mine = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    states: list[Any] = [mine] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(states, mine)
    return states


def restore_random_state_(states: list[dict[str, torch.Tensor]], accelerator: Accelerator) -> None:
    """Set this process's generators; another number of processes than before keeps its fresh seeds."""
    if len(states) != accelerator.num_processes:
        return
    mine = states[accelerator.process_index]
    torch.set_rng_state(mine["cpu"])
    if accelerator.device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], accelerator.device)
