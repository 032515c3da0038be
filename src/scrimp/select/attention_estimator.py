"""The estimate of an expected feature from sampled locations, with a gradient that is unbiased as well.

Notation: a_k and f_k are attention and feature of the k-th location drawn, N the budget, m_k the mass the k-th step
drew from: without replacement what the earlier steps left, with replacement all. Each step gives an unbiased estimate

    F_k = sum_{j<k} a_j f_j + m_k f_k        (with replacement the sum is empty)

and their mean is the estimate. Given the earlier draws, step k's location has probability a_k / m_k, so

    d F_k := sum_{j<k} f_j da_j + (m_k / a_k) f_k da_k        estimates    sum_i f_i da_i

without bias. The published code's gradient leaves out how later steps depend on a_k, and its bias turns it round where
attention is concentrated.

The control variate takes a baseline b_k off every f in d F_k. As ``sum_i da_i = 0`` for attention that sums to 1, any
b_k is harmless that depends on the draws before k only, and so is every F_l of a later step l > k, because its
expectation given the first k draws is the exact value, whatever they were. So b_k is the mean of the other steps'
estimates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step_masses(attention: Tensor, indices: Tensor, *, replacement: bool) -> Tensor:
    """m_k: the mass each step drew from, [batch, budget].

    Summed from what was left, not taken off 1: where attention is concentrated the difference would be rounding error,
    and m_k / a_k with it.
    """
    if replacement:
        return attention.sum(1, keepdim=True).expand(indices.shape)
    left = attention.scatter(1, indices, 0.0).sum(1, keepdim=True)
    return left + attention.gather(1, indices).flip(1).cumsum(1).flip(1)


def step_weights(drawn: Tensor, masses: Tensor, *, replacement: bool) -> Tensor:
    """What each drawn feature counts in the estimate, [batch, budget]: ``(m_k + (N - k) a_k) / N``, or ``m_k / N``."""
    return (masses if replacement else masses + _steps_after(drawn) * drawn) / drawn.shape[1]


def _steps_after(drawn: Tensor) -> Tensor:
    return torch.arange(drawn.shape[1] - 1, -1, -1, device=drawn.device, dtype=drawn.dtype)


class Estimate(torch.autograd.Function):
    """(a [batch, N], f [batch, N, dim], m [batch, N], with replacement, with control variate) -> [batch, dim].

    All in one dtype, in the order drawn. The gradient towards a needs no more of f than its inner products with the
    incoming gradient, [batch, N]. Asked for a gradient of the gradient, it refuses.
    """

    @staticmethod
    def forward(ctx: Any, drawn: Tensor, features: Tensor, masses: Tensor, replacement: bool, control: bool) -> Tensor:
        ctx.save_for_backward(drawn, features, masses)
        ctx.replacement, ctx.control = replacement, control
        weights = step_weights(drawn, masses, replacement=replacement)
        return (weights.unsqueeze(2) * features).sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if (
            torch.is_grad_enabled()
        ):  # a graph of this gradient is asked for; a penalty on it would learn the wrong thing
            raise RuntimeError(
                "the gradient of sampled expected features is an estimate and has no gradient of its own; "
                "use scrimp.select.expectation where second derivatives are needed"
            )
        drawn, features, masses = ctx.saved_tensors
        for_attention = for_features = None
        if ctx.needs_input_grad[0]:
            inner = (features * gradient.unsqueeze(1)).sum(2)
            for_attention = _attention_gradient(
                drawn, inner, masses, replacement=ctx.replacement, control=ctx.control and drawn.shape[1] > 1
            )
        if ctx.needs_input_grad[1]:
            weights = step_weights(drawn, masses, replacement=ctx.replacement)
            for_features = weights.unsqueeze(2) * gradient.unsqueeze(1)
        return for_attention, for_features, None, None, None


def _attention_gradient(drawn: Tensor, inner: Tensor, masses: Tensor, *, replacement: bool, control: bool) -> Tensor:
    """The sum of all steps' d F_k / N, projected: ``inner`` holds f_k times the incoming gradient."""
    count = drawn.shape[1]
    known = torch.zeros_like(drawn) if replacement else (drawn * inner).cumsum(1) - drawn * inner
    steps = known + masses * inner
    baseline = (steps.sum(1, keepdim=True) - steps) / (count - 1) if control else torch.zeros_like(steps)
    # A location without mass is drawn when no other is left: nothing can be learnt of it, and m / a would be 0 / 0.
    found = torch.where(drawn > 0, masses / drawn, 0.0) * (inner - baseline)
    if not replacement:
        baselines_after = baseline.flip(1).cumsum(1).flip(1) - baseline
        found = found + _steps_after(drawn) * inner - baselines_after
    return found / count
