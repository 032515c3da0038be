"""A transformer thinned by as many processes as there are: as it is, with gates that learn, and against patches.

Called by the worker of test_distributed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from test_thin import config, shapes_of, tiny_vit

from scrimp.jobs.thin import thin

_QUICK: dict[str, Any] = {"repeats": 0, "pictures": 0}
_WAYS: dict[str, dict[str, Any]] = {
    "ats": {"samples": (9,)},
    "adavit": {"epochs": 1, "evaluations": 1, "optimizer": "sgd"},
    "avit": {
        "epochs": 1,
        "evaluations": 1,
        "lr": 1e-3,
        "gate_scale": 2.0,
        "gate_center": 1.0,
        "baseline": "given",
        "defend": 2,
        "defend_steps": 4,
        "defend_images": 16,
    },
}


def run(accelerator: Any, out: Path) -> None:
    """Leaves a run folder ``thin-METHOD`` for each."""
    for method, settings in _WAYS.items():
        asked = config(out / f"thin-{method}", method=method, **settings, **_QUICK)
        thin(asked, model=tiny_vit(), data=shapes_of(24, 11), accelerator=accelerator)
