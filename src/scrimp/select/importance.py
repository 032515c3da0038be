"""Importance sampling: draw by a bound on each sample's gradient norm, weigh so that the mean stays unbiased.

Source: Katharopoulos and Fleuret, "Not All Samples Are Created Equal: Deep Learning with Importance Sampling",
ICML 2018 (arXiv 1803.00942).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.native import load
from scrimp.primitives.draw import check_budget, check_scores, draw_with_replacement
from scrimp.primitives.errors import InputError
from scrimp.select.selection import Selection


def importance_sample(scores: Tensor, budget: int, *, generator: torch.Generator) -> Selection:
    """Draw ``budget`` samples with replacement, p_i = s_i / sum s, with weights 1 / (N p_i) (Algorithm 1, lines 6-8).

    A sample with score 0 is never drawn: the bound says its gradient is zero. If all scores are 0 the draw is uniform.

    Args:
        scores: [count], finite, >= 0, such as `gradient_norm_bound`.
        budget: number of draws.
        generator: CPU generator.

    Returns:
        Selection on the device of ``scores``; weights have the dtype of ``scores`` (float32 if it is not floating).

    Raises:
        InputError: scores of another shape, negative or not finite; ``budget`` below 1.
    """
    check_scores(scores)
    check_budget(budget)
    probabilities = normalised(scores)
    indices = draw_with_replacement(probabilities, budget, generator=generator)
    weights = 1.0 / (len(scores) * probabilities[indices])
    return Selection(indices, weights.to(scores.dtype if scores.is_floating_point() else torch.float32))


def normalised(scores: Tensor) -> Tensor:
    """Scores as probabilities, float64, [count]; uniform where all are zero."""
    values = scores.detach().double()
    total = values.sum()
    return values / total if float(total) > 0 else torch.full_like(values, 1.0 / len(values))


def gradient_norm_bound(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Upper bound, up to one factor common to all samples, on the norm of each sample's cross-entropy gradient.

    ``||softmax(z_i) - y_i||_2``, the norm of the loss gradient with respect to the last pre-activations (eq. 20 of the
    paper); for sequences and maps the norm runs over every position.

    Args:
        logits: [batch, classes, ...], as for ``torch.nn.functional.cross_entropy``.
        targets: class indices [batch, ...] (int64) or probabilities [batch, classes, ...].
        ignore_index: positions of class targets that count nothing.

    Returns:
        [batch], without gradient, float32 or wider; in [0, sqrt(2)] for one position a sample.

    Raises:
        InputError: the shapes do not belong together.
    """
    if logits.ndim < 2 or targets.shape not in (logits.shape, logits.shape[:1] + logits.shape[2:]):
        raise InputError(
            "logits [batch, classes, ...] and targets [batch, ...] or [batch, classes, ...]",
            f"{list(logits.shape)} and {list(targets.shape)}",
            "pass what cross_entropy takes",
        )
    values = logits.detach()
    if _fits_native(values, targets) and (native := load()) is not None:
        bounds = torch.empty(len(values))
        arguments = (values.data_ptr(), targets.data_ptr(), *values.shape, ignore_index, bounds.data_ptr())
        native.gradient_norm_bound(*arguments)
        return bounds
    return gradient_norm_bound_twin(values, targets, ignore_index)


def _fits_native(logits: Tensor, targets: Tensor) -> bool:
    """Whether the compiled kernel takes these: one position a sample, float32 and int64, on the CPU, packed."""
    return (
        logits.ndim == 2
        and targets.ndim == 1
        and logits.device.type == targets.device.type == "cpu"
        and logits.dtype == torch.float32
        and targets.dtype == torch.int64
        and logits.is_contiguous()
        and targets.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def gradient_norm_bound_twin(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`gradient_norm_bound` in torch: what runs on GPUs and everywhere else, and the compiled kernel's reference."""
    values = logits.detach()
    probabilities = torch.softmax(values, 1, dtype=torch.promote_types(values.dtype, torch.float32))
    if targets.shape == logits.shape:
        return (probabilities - targets).flatten(1).norm(dim=1)
    ignored = (targets == ignore_index).unsqueeze(1)
    expected = targets.unsqueeze(1).masked_fill(ignored, 0)
    difference = probabilities.scatter_add(
        1, expected, torch.full_like(probabilities[:, :1], -1.0).expand(expected.shape)
    )
    return difference.masked_fill(ignored, 0).flatten(1).norm(dim=1)


def output_gradient_norm(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """The same bound for any loss: one backward from the losses to the model's outputs, none through the model.

    Args:
        loss: maps outputs [batch, ...] to losses [batch], each a function of its own sample's outputs only.
        outputs: the last pre-activations, [batch, ...].

    Returns:
        ``||dL_i / dz_i||_2``, [batch], without gradient.

    Raises:
        InputError: ``loss`` does not give one value a sample.
    """
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(leaf)
        if losses.shape != outputs.shape[:1]:
            raise InputError(f"losses [{len(outputs)}]", f"shape {list(losses.shape)}", "use reduction='none'")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return gradient.reshape(len(gradient), -1).norm(dim=1)


def variance_reduction(scores: Tensor) -> float:
    """tau: by how much sampling by these scores shrinks the gradient noise, as a factor on its standard deviation.

    ``1/tau = sqrt(1 - ||g - u||^2 / sum_i g_i^2)`` with g the normalised scores and u = 1/B (section 3.3 of the paper);
    here in the equal closed form ``tau = sqrt(B sum_i g_i^2)``, between 1 (all alike) and sqrt(B).

    The paper reads tau as a factor on the batch size. The variance of a mean falls as 1 / batch, so the batch worth the
    same is tau**2 times as large; gating on tau is the cautious choice.

    Raises:
        InputError: scores of another shape, negative or not finite.
    """
    check_scores(scores)
    probabilities = normalised(scores)
    return float((len(scores) * probabilities.square().sum()).sqrt().clamp_min(1.0))


def speedup_threshold(pool: int, batch: int, *, forward: float = 1.0, backward: float = 2.0) -> float:
    """The tau above which scoring ``pool`` samples to train on ``batch`` of them pays (eq. 29 of the paper).

    ``(pool * f + batch * (f + b)) / (batch * (f + b))``: the cost of a scored step over that of a plain one. Pass
    measured costs: backward is not twice forward on every machine.

    Args:
        pool: samples scored by a forward pass each step.
        batch: samples trained on each step.
        forward: cost of one sample's forward pass, in any unit.
        backward: cost of one sample's backward pass, in the same unit.

    Raises:
        InputError: a size below 1 or a cost that is not positive.
    """
    if pool < 1 or batch < 1 or forward <= 0 or backward <= 0:
        raise InputError(
            "sizes >= 1 and costs > 0", f"pool {pool}, batch {batch}, costs {forward}, {backward}", "measure them first"
        )
    plain = batch * (forward + backward)
    return (pool * forward + plain) / plain
