"""Run by torchrun in test_distill: every method, as replicas and as shards, in one set of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_distill import METHODS, config, encoder

from conftest import CLASSES, draw
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.distill import distill
from scrimp.jobs.engine import finish, start


def main(out: Path) -> None:
    torch.set_num_threads(1)
    images = TensorImages(*draw(70, 0)), TensorImages(*draw(24, 1))
    data = ImageData(train=images[0], test=images[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))
    accelerator = start(config(out))
    for name, settings in METHODS.items():
        kept = {"cache_folder": out / "kept"} if name == "kept" else {}
        for parallel in ("ddp", "fsdp") if accelerator.num_processes > 1 else ("ddp",):
            kept = kept if parallel == "ddp" else {}
            run = config(out / f"{name}-{parallel}", **settings, **kept, parallel=parallel, epochs=2.0, optimizer="sgd")
            distill(run, data=data, teachers=[encoder()], accelerator=accelerator)
    finish(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
