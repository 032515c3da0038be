"""Run by test_adapt_parallel in each process: adapters trained whole, replicated and sharded."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from scrimp.adapt.attach import attach_, detach_, use_
from scrimp.adapt.install import state_of, values_of
from scrimp.adapt.lora import lora
from scrimp.adapt.nola import nola
from scrimp.primitives.errors import InputError

METHODS = {"lora": lora(2), "nola": nola(2, 6, seed=3)}
STEPS, BATCH = 3, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + self.mlp(tokens)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.Linear(8, 3))


def draw(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 4, 6, generator=generator), torch.randn(BATCH, 4, 3, generator=generator)


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "replicas":
        return DistributedDataParallel(model)
    if how == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in (model[1], model[2]):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(method: str, how: str, rank: int, world: int) -> dict[str, Tensor]:
    """A few steps of one adapter, a few of another; both must come through."""
    model = build()
    for name in ("a", "b"):
        attach_(model, METHODS[method], name=name, where=r"^(0|1|2)\b", also=r"^3\.")
    use_(model, "a")
    outer = wrap(model, how)
    numbers = [item for item in model.parameters() if item.requires_grad]
    results = {}
    optimizer = torch.optim.SGD(numbers, lr=0.5)
    for name in ("a", "b", "a"):
        use_(model, name)
        for step in range(STEPS):
            inputs, targets = (part.chunk(world)[rank] for part in draw(step))
            loss = (outer(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():  # sharded modules stay whole after a pass without gradients
            results[f"{name} output"] = outer(draw(9)[0]).clone()
        results |= {f"{name} {key}": value for key, value in flat(model).items()}
    use_(model, None)
    with torch.no_grad():
        results["off"] = outer(draw(9)[0]).clone()
    use_(model, "b")
    with torch.no_grad():
        results["b again"] = outer(draw(9)[0]).clone()
    if how == "shards":
        check_refusals(model)
    return results


def flat(model: nn.Module) -> dict[str, Tensor]:
    values = values_of(model)
    return {"numbers": values.factors, **values.also}


def check_refusals(model: nn.Module) -> None:
    live = state_of(model).name
    for call in (lambda: attach_(model, lora(1), name="late"), lambda: detach_(model)):
        with pytest.raises(InputError, match="sharded over processes"):
            call()
    assert state_of(model).name == live


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for method in METHODS:
        one = train(method, "whole", 0, 1)
        for how in ("replicas", "shards"):
            found = train(method, how, rank, world)
            if rank == 0:
                save_file(one, out / f"{method}-whole.safetensors")
                save_file(found, out / f"{method}-{how}.safetensors")
    dist.destroy_process_group()
    time.sleep(0.1)  # for gloo's threads to let go, as in scrimp.jobs.engine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
