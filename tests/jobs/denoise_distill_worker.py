"""Run by torchrun in test_denoise_distill: methods in one set of processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_denoise_distill import METHODS, config

from scrimp.jobs.denoise_distill import denoise_distill
from scrimp.jobs.engine import finish, start


def main(teacher: Path, out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = start(config(teacher, out))
    for method in METHODS[1:]:
        # More than one file of pairs, so that each process makes some.
        run = config(teacher, out / method, method=method, pairs=300, steps=4, teacher_steps=1, lr=1e-3)
        denoise_distill(run, accelerator=accelerator)
    finish(accelerator)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
