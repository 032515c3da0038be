"""What choosing labels must show: the lines of benchmarks/README.md about it."""

from __future__ import annotations

import label_accuracy_tables as labels
from acceptance import Line

LABEL_LINES = (
    Line(
        "1",
        "labels to 90 % of the accuracy of all labels, and accuracy beside scikit-activeml 1.0",
        "label_accuracy.py run",
        "label-accuracy/*/*.json",
        labels.figures,
        "at most 0.5x random's labels; at no budget worse than the best of scikit-activeml",
        together=True,
    ),
    Line(
        "2",
        "one round: 100 of 50,000 images, 512 numbers each, 100 classes",
        "label_speed.py",
        "label-speed/*.json",
        labels.speed,
        "at most 2 s and 300 MB on 2 cores",
        together=True,
    ),
)
