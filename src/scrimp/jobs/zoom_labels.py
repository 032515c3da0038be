"""What is to be learnt of an image, from a text: a class, several labels or a number; its loss and its quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.jobs.zoom_config import Task
from scrimp.primitives.errors import InputError


@dataclass(frozen=True)
class Target:
    """The task, and how texts become numbers.

    Attributes:
        task: ``"classes"``, ``"labels"`` or ``"regression"``.
        classes: name of each class or label; none for regression.
        shift, scale: of a regression's numbers in training: it learns (number - shift) / scale.
    """

    task: Task
    classes: tuple[str, ...] = ()
    shift: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """Width of the classifier."""
        return len(self.classes) or 1

    def encode(self, texts: Sequence[str]) -> Tensor:
        """int64 [N] of classes, float32 [N, classes] of labels, float32 [N] of numbers.

        Raises:
            InputError: a text that is none of the classes or no number.
        """
        if self.task == "regression":
            numbers = torch.tensor([_number(text) for text in texts], dtype=torch.float64)
            return ((numbers - self.shift) / self.scale).float()
        place = {name: number for number, name in enumerate(self.classes)}
        if self.task == "classes":
            return torch.tensor([place[self._known(text)] for text in texts], dtype=torch.int64)
        found = torch.zeros(len(texts), len(self.classes))
        for row, text in enumerate(texts):
            for name in split(text):
                found[row, place[self._known(name)]] = 1
        return found

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[batch]: cross-entropy in nats, the mean of the labels' binary ones, or the squared error."""
        outputs = outputs.float()
        if self.task == "classes":
            return functional.cross_entropy(outputs, labels, reduction="none")
        if self.task == "labels":
            return functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)
        return (outputs[:, 0] - labels).square()

    def quality(self, outputs: Tensor, labels: Tensor) -> dict[str, float | None]:
        """Figures over a whole set.

        ``loss``; of classes ``accuracy``, the share of right answers; of labels ``accuracy``, the share of images with
        all of them right, and ``mean_average_precision`` over the labels that occur; of numbers ``mean_error``, their
        mean absolute error in their own unit.
        """
        found: dict[str, float | None] = {"loss": float(self.losses(outputs, labels).double().mean())}
        if self.task == "classes":
            return found | {"accuracy": float((outputs.argmax(1) == labels).double().mean())}
        if self.task == "regression":
            return found | {"mean_error": float((outputs[:, 0] - labels).abs().double().mean()) * self.scale}
        right = ((outputs > 0) == (labels > 0)).all(1)
        precisions = [average_precision(*columns) for columns in zip(outputs.T, labels.T, strict=True)]
        known = [value for value in precisions if value is not None]
        mean = sum(known) / len(known) if known else None
        return found | {"accuracy": float(right.double().mean()), "mean_average_precision": mean}

    def answers(self, outputs: Tensor) -> tuple[list[str], list[list[float]]]:
        """What outputs [batch, outputs] say in words, and their probabilities (none of a regression)."""
        if self.task == "regression":
            return [f"{value * self.scale + self.shift:.6g}" for value in outputs[:, 0].tolist()], [[]] * len(outputs)
        if self.task == "classes":
            shares = outputs.double().softmax(1)
            return [self.classes[place] for place in outputs.argmax(1).tolist()], shares.tolist()
        shares = outputs.double().sigmoid()
        said = [";".join(name for name, on in zip(self.classes, row > 0, strict=True) if on) for row in outputs]
        return said, shares.tolist()

    def _known(self, name: str) -> str:
        if name not in self.classes:
            few = ", ".join(self.classes[:5]) + (" ..." if len(self.classes) > 5 else "")
            raise InputError(f"labels out of: {few}", f"{name!r}", "correct the labels")
        return name


def find_target(texts: Sequence[str], task: Task, *, sorted_folders: bool = False) -> Target:
    """The task that training labels are of.

    Raises:
        InputError: fewer than two classes, an image without any, or what is no number.
    """
    if task == "auto":
        task = "labels" if not sorted_folders and any(";" in text for text in texts) else "classes"
    if task == "regression":
        numbers = torch.tensor([_number(text) for text in texts], dtype=torch.float64)
        spread = float(numbers.std(correction=0))
        return Target(task, (), float(numbers.mean()), spread if spread > 0 else 1.0)
    split_: Callable[[str], list[str]] = split if task == "labels" else lambda text: [text]
    classes = tuple(sorted({name for text in texts for name in split_(text)}))
    if "" in classes:
        raise InputError("a label for every image", "an empty one", "fill it in; with --task labels it means none")
    if len(classes) < (1 if task == "labels" else 2):
        got = f"{len(classes)} ({', '.join(classes)})" if classes else "none"
        raise InputError("labels of at least two classes", got, "check the labels")
    return Target(task, classes)


def split(text: str) -> list[str]:
    """The labels in a text; an empty one holds none."""
    return [name.strip() for name in text.split(";") if name.strip()]


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Mean precision at each right answer, by falling score, ties shared; ``None`` where there is no right answer.

    Args:
        scores: [N].
        labels: [N], above 0 where right.
    """
    right = (labels > 0).double()
    if not bool(right.any()):
        return None
    order = scores.double().argsort(descending=True, stable=True)
    ordered, hits = scores[order], right[order].cumsum(0)
    # One threshold a distinct score: all of equal score are found at once.
    last = torch.ones_like(hits, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    hits, found = hits[last], (torch.arange(len(hits), device=hits.device) + 1)[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / found).sum() / right.sum())


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError("a number as the label of every image", f"{text!r}", "correct it, or leave out --task")
    return value
