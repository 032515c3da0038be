"""The network that is taught, and the losses it may be taught by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.jobs.distill_config import DistillConfig
from scrimp.represent import logit_distillation_loss, regression_head, regression_loss
from scrimp.represent.linear import LinearProbe

Objective = Callable[[list[Tensor], list[Tensor], Tensor], Tensor]
"""``(outputs of the student's heads, features of the teachers, labels [n]) -> loss of each image [n]``."""


class Student(nn.Module):
    """A backbone, and the heads that training needs and use does not.

    Args:
        backbone: images [n, C, H, W] -> features [n, m].
        heads: features -> what each teacher gives, or logits.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleList(heads)

    def forward(self, views: list[Tensor], *, features: bool = False) -> list[Tensor]:
        """What each head makes of one view; the backbone's features of each view alone where asked for."""
        maps = [self.backbone(view) for view in views]
        return maps if features else [head(item) for item in maps for head in self.heads]


class Answers(nn.Module):
    """A student as a classifier: images -> the logits of its one head."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.student([images])[0]
        return logits


def make_student(
    backbone: nn.Module, features: int, config: DistillConfig, *, dims: Sequence[int], classes: int
) -> Student:
    """A student whose heads' initial weights are fixed by the seed.

    Args:
        features: numbers the backbone gives.
        dims: numbers each teacher gives.
        classes: of the data, for a head that gives logits.

    Raises:
        InputError: a head of 0 layers between different widths.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed + 1)
        if config.method != "regression":
            return Student(backbone, [nn.Linear(features, classes)])
        return Student(backbone, [regression_head(features, dim, layers=config.head_layers) for dim in dims])


def regress(outputs: list[Tensor], targets: list[Tensor], labels: Tensor) -> Tensor:
    """SimReg's loss, the mean over teachers; see `scrimp.represent.regression_loss`."""
    return regression_loss(outputs, targets, reduction="none")


def classify(outputs: list[Tensor], targets: list[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy with the labels; teachers are not asked."""
    return functional.cross_entropy(outputs[0], labels, reduction="none")


def follow_logits(probes: Sequence[LinearProbe], *, temperature: float) -> Objective:
    """Hinton's loss, the mean over teachers, each with a linear classifier on its features."""

    def losses(outputs: list[Tensor], targets: list[Tensor], labels: Tensor) -> Tensor:
        asked = [probe.logits(target) for probe, target in zip(probes, targets, strict=True)]
        each = [logit_distillation_loss(outputs[0], item, temperature=temperature, reduction="none") for item in asked]
        return torch.stack(each).mean(0)

    return losses
