"""Run by torchrun in test_denoise_train: the same runs as on one process, one of them killed and resumed."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import torch
from test_denoise_train import TOGETHER, Killed, config, dying, tiny_set

from scrimp.jobs.denoise import denoise_train
from scrimp.jobs.denoise_fit import DenoiseFitting
from scrimp.jobs.engine import finish, start
from scrimp.jobs.fit import Fitting


def main(out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = start(config(out))
    data, rank = tiny_set(), accelerator.process_index
    for name, settings in TOGETHER.items():
        denoise_train(config(out / name, **settings), data=data, accelerator=accelerator)
    settings = TOGETHER["dit"]
    with suppress(Killed), mock.patch.object(Fitting, "_pause", dying(10, save_at=6)):
        denoise_train(config(out / "resumed", **settings), data=data, accelerator=accelerator)
    evaluate = DenoiseFitting._evaluate

    def noted(self: DenoiseFitting) -> None:
        (out / f"scores-{rank}.json").write_text(json.dumps(self.scores.squares.tolist()))
        evaluate(self)

    with mock.patch.object(DenoiseFitting, "_evaluate", noted):
        denoise_train(config(out / "resumed", **settings, resume=True), data=data, accelerator=accelerator)
    finish(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]))
