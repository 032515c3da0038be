"""Run by torchrun in test_distributed: every policy and both kinds of sharding in one set of processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import splats_worker
import thin_worker
import torch

from conftest import CLASSES, draw
from scrimp.data import ImageData, TensorImages
from scrimp.jobs.config import StudyConfig, TrainConfig
from scrimp.jobs.engine import finish, start
from scrimp.jobs.study import study
from scrimp.jobs.train import train
from scrimp.select import RoundSampler
from scrimp.select.presample import Gate

SETTINGS = {"batch_size": 16, "model": "convnet-8", "evaluations": 2, "json": True, "device": "cpu", "epochs": 3}
POLICIES = ("uniform", "history", "prune", "presample")


def main(out: Path) -> None:
    torch.set_num_threads(1)
    Gate.open = property(lambda self: self.tau > 0)
    images = TensorImages(*draw(192, 0)), TensorImages(*draw(48, 1))
    data = ImageData(train=images[0], test=images[1], classes=CLASSES, name="shapes", mean=(0.2,), std=(0.2,))
    accelerator = start(TrainConfig(**SETTINGS))
    drawn = record_draws()
    for policy in POLICIES:
        for parallel in ("ddp", "fsdp") if accelerator.num_processes > 1 else ("ddp",):
            drawn.clear()
            config = TrainConfig(
                **SETTINGS,
                sampling=policy,
                gate=1.0,
                augment="crop",
                parallel=parallel,
                out=out / f"{policy}-{parallel}",
            )
            train(config, data=data, accelerator=accelerator)
            if accelerator.is_main_process:
                (out / f"{policy}-{parallel}.json").write_text(json.dumps(drawn))
    shared = {key: value for key, value in SETTINGS.items() if key != "epochs"}
    config = StudyConfig(**shared, ways=("uniform", "history"), seeds=1, flops=5e8, out=out / "study")
    study(config, data=data, accelerator=accelerator)
    splats_worker.run(accelerator, out)
    thin_worker.run(accelerator, out)
    finish(accelerator)


def record_draws() -> list[list[int]]:
    """Every round planned from here on."""
    drawn: list[list[int]] = []
    plan = RoundSampler._planned

    def planned(self):
        fresh = self._plan is None
        selection = plan(self)
        if fresh:
            drawn.append(selection.indices.tolist())
        return selection

    RoundSampler._planned = planned
    return drawn


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
