"""Run by torchrun in test_adapt: adapters as replicas and as shards, killed and resumed, in one set of processes."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from test_adapt import PARALLEL, TOGETHER, Killed, config, shapes_of, stop_after

from scrimp.jobs.adapt import adapt
from scrimp.jobs.engine import finish, start


def main(base: str, out: Path) -> None:
    torch.set_num_threads(1)
    data = shapes_of(48, 24)
    accelerator = start(config(out, model=base))
    for name, method in PARALLEL.items():
        for parallel in ("ddp", "fsdp"):
            run = config(out / f"{name}-{parallel}", model=base, **TOGETHER, **method, parallel=parallel)
            adapt(run, data=data, accelerator=accelerator)
    settings = {"model": base, "parallel": "fsdp", **TOGETHER, **PARALLEL["nola"]}
    with suppress(Killed), stop_after(3):
        adapt(config(out / "resumed", **settings), data=data, accelerator=accelerator)
    adapt(config(out / "resumed", **settings, resume=True), data=data, accelerator=accelerator)
    finish(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], Path(sys.argv[2]))
