"""Run by torchrun in test_zoom: the same runs as on one process, killed and resumed among them."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch
from test_zoom import TOGETHER, Killed, config, galleries, stop_after

from scrimp.jobs.engine import finish, start
from scrimp.jobs.zoom import zoom_train


def main(data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = start(config(out))
    for name, settings in TOGETHER.items():
        zoom_train(config(out / name, **settings), data=galleries(data), accelerator=accelerator)
    settings = TOGETHER["zoom"]
    with suppress(Killed), stop_after(2):
        zoom_train(config(out / "resumed", **settings), data=galleries(data), accelerator=accelerator)
    zoom_train(config(out / "resumed", **settings, resume=True), data=galleries(data), accelerator=accelerator)
    finish(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
