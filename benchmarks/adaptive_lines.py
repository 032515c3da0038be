"""The acceptance lines of adaptive transformers, for benchmarks/readme.py."""

from __future__ import annotations

import adaptive_accuracy_tables as trained
import adaptive_tables as adaptive
from acceptance import Line

ADAPTIVE_LINES = (
    Line(
        "1",
        "CPU time of fewer tokens over all tokens, in turns, beside the counted FLOPs",
        "adaptive_speed.py run",
        "adaptive-speed/*.json",
        adaptive.speed,
        "merging r = 13 at least 1.55x; token sampling and halting keep at least 85 % of the counted gain at every "
        "batch size; exported merging under OpenVINO in bf16 at least 3x",
        together=True,
    ),
    Line(
        "3",
        "trained on CIFAR-10, and the packaged ViT-S/14: points against all tokens and FLOPs saved; token sampling "
        "with no training",
        "adaptive_accuracy.py run",
        "adaptive-accuracy/*/*.json",
        trained.accuracy,
        "two methods within 0.5 points at 30 % fewer FLOPs or more, 3 seeds",
        together=True,
    ),
)
