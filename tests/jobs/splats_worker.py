"""Called by the worker of test_distributed: a scene fitted by as many processes as there are, and the whole job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from splats_photographs import scene, write_photographs

from scrimp.jobs.splats_config import SplatsFitConfig
from scrimp.jobs.splats_fit import splats_fit
from scrimp.splats import Classic, ContainerQuantiser, FitSettings, Fitting, Mcmc, Together, open_dataset

STRATEGIES = {
    "mcmc": Mcmc(cap=70, every=3, window=(0.0, 1.0)),
    "classic": Classic(cap=90, every=3, pull=1e-5, window=(0.0, 1.0), reset=1.0),
}


def run(accelerator: Any, out: Path) -> None:
    """Two views a step, whoever looks at them; then, of several processes, the job."""
    rank, world = accelerator.process_index, accelerator.num_processes
    photos = write_photographs(out / f"photos-{rank}", 5)
    start = replace(scene(), opacities=torch.zeros(60))
    together = Together(rank, world, torch.distributed.all_reduce) if world > 1 else None
    for name, strategy in STRATEGIES.items():
        settings = FitSettings(degree=0, strategy=strategy, quantised_from=0.7, requantise=2)
        fitting = Fitting(
            open_dataset(photos),
            steps=10,
            start=start,
            settings=settings,
            quantiser=ContainerQuantiser(),
            views=2,
            together=together,
        )
        for _ in range(10):
            fitting.step()
        save_file(fitting.state_dict(), out / f"splats-{name}-{rank}.safetensors")
    if world > 1:
        settings = {"steps": 10, "gaussians": 50, "degree": 0, "evaluations": 1, "device": "cpu", "json": True}
        config = SplatsFitConfig(images=photos, out=out / "splats", format="sgs", **settings)
        splats_fit(config, accelerator=accelerator)
