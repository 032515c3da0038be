"""Regression onto frozen teachers: a small network learns to give what a large one gives.

Source: Navaneet, Koohpayegani, Tejankar and Pirsiavash, "SimReg: Regression as a Simple Yet Effective Tool for
Self-supervised Knowledge Distillation", BMVC 2021 (arXiv 2201.05131).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from scrimp.primitives.errors import InputError
from scrimp.represent.byol import byol_loss, reduced
from scrimp.represent.checks import check_pair, compute_type


def regression_loss(
    student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor], *, reduction: str = "mean"
) -> Tensor:
    """Squared distance of the student's prediction to the teacher's features, both as unit vectors.

    ``||g(f_s)/|g(f_s)| - f_t/|f_t| ||^2 = 2 - 2 cos`` (eq. 1 of the paper); the mean over teachers where there are
    several, each with a prediction of its own. Teacher and student must see the same view of each image.

    Args:
        student: predictions g(f_s) of the throw-away head, [batch, dim], or one such for each teacher.
        teacher: features f_t of the frozen teacher, [batch, dim], or one for each teacher; no gradient goes to them.
        reduction: ``"mean"``, or ``"none"`` for one value an image.

    Returns:
        A scalar, or [batch]; float32 or wider, in [0, 4].

    Raises:
        InputError: shapes that do not fit, or not as many predictions as teachers.
    """
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        got = f"{len(students)} for {len(teachers)} teachers"
        raise InputError("one prediction for each teacher", got, "give every teacher a head of its own")
    losses = [byol_loss(ours, theirs, reduction="none") for ours, theirs in zip(students, teachers, strict=True)]
    return reduced(torch.stack(losses).mean(0), reduction)


def logit_distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, reduction: str = "mean"
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the usual distillation and a baseline here.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    Args:
        student, teacher: logits, [batch, classes]; no gradient goes to the teacher's.
        temperature: T.
        reduction: ``"mean"``, or ``"none"`` for one value an image.

    Raises:
        InputError: shapes that do not fit, or a temperature that is not positive.
    """
    check_pair(student, teacher, names="student and teacher logits")
    if not temperature > 0:
        raise InputError("a temperature above 0", f"{temperature}", "pass 4, say")
    ours = (student.to(compute_type(student)) / temperature).log_softmax(1)
    theirs = (teacher.detach().to(compute_type(teacher)) / temperature).log_softmax(1)
    losses = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature**2
    return reduced(losses, reduction)
