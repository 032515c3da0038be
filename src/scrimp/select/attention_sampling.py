"""Attention sampling: features of a few locations, drawn from an attention map, stand for those of all of them.

``Phi = sum_i a_i f_i`` is the expected feature under the map a, so that a few draws estimate it, and gradients reach
both the features and the map. Flatten grids of locations first, and fold several maps of one image into the batch.

Source: Katharopoulos and Fleuret, "Processing Megapixel Images with Deep Attention-Sampling Models", ICML 2019 (arXiv
1905.03711). Its gradient towards the attention is replaced: see `scrimp.select.attention_estimator`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scrimp.primitives.draw import check_budget
from scrimp.primitives.errors import InputError
from scrimp.select.attention_estimator import Estimate, step_masses, step_weights
from scrimp.select.attention_maps import check_attention

_LAST = 1e4  # beyond any logarithm of a float64: places locations without mass behind all others


@dataclass(frozen=True)
class Locations:
    """Which locations of each map to look at.

    Attributes:
        indices: [batch, budget], int64, in the order drawn.
        weights: [batch, budget], float32 or wider, without gradient; ``sum_q weights_q f_q`` estimates the expected
            feature ``sum_i a_i f_i``.
        replacement: whether a location may come more than once; ``None`` if nothing was drawn at random.
    """

    indices: Tensor
    weights: Tensor
    replacement: bool | None


def sample_locations(
    attention: Tensor, budget: int, *, replacement: bool = False, generator: torch.Generator
) -> Locations:
    """Draw ``budget`` locations of each map, each with its attention's probability.

    Without replacement by the ``budget`` largest of ``log a + Gumbel noise`` (Gumbel top-k), in the order of one draw
    after the other; here as the smallest of ``E / a`` with E exponential, which is the same. A map with mass on fewer
    locations than the budget gives those, then others in random order, which count nothing.

    Args:
        attention: [batch, locations], >= 0, rows that sum to 1; its gradient is not followed.
        budget: how many locations to draw of each map; without replacement at most ``locations``.
        replacement: draw independently, so that a location may come again.
        generator: of the device that is to draw, in float64; a CPU generator draws alike for every device.

    Returns:
        Locations on the device of ``attention``.

    Raises:
        InputError: no distributions over locations; a budget below 1 or, without replacement, above ``locations``.
    """
    check_attention(attention)
    _check_budget(attention, budget, repeat=replacement)
    probabilities = attention.detach().to(generator.device, torch.float64)
    draw = _independent if replacement else _distinct
    indices = draw(probabilities, budget, generator=generator).to(attention.device)
    values = attention.detach().to(_working(attention))
    masses = step_masses(values, indices, replacement=replacement)
    return Locations(indices, step_weights(values.gather(1, indices), masses, replacement=replacement), replacement)


def top_locations(attention: Tensor, budget: int) -> Locations:
    """The ``budget`` locations of most attention, for inference: no chance, and a bias instead.

    Their weights are their attention divided by its sum: the expectation under the map cut down to them, exact where
    they hold all mass; at most ``2 (1 - mass) max |f|`` off otherwise. Of equal ones those of lower index are taken.

    Args:
        attention: [batch, locations], >= 0, rows that sum to 1.
        budget: at most ``locations``.

    Raises:
        InputError: no distributions over locations; a budget below 1 or above ``locations``.
    """
    check_attention(attention)
    _check_budget(attention, budget, repeat=False)
    values, order = attention.detach().to(_working(attention)).sort(dim=1, descending=True, stable=True)
    values = values[:, :budget]
    return Locations(order[:, :budget], values / values.sum(1, keepdim=True), None)


def expected_features(attention: Tensor, selection: Locations, features: Tensor, *, control: bool = True) -> Tensor:
    """Estimate ``Phi = sum_i a_i f_i`` from the features at the selected locations.

    Value, gradient towards the features and gradient towards the attention are all unbiased. That towards the attention
    is exact only in the mean: for single draws it depends on the order. Of `top_locations` it is the ordinary gradient
    of the weighted sum.

    The control variate changes the gradient towards the attention only. It makes it indifferent to what all features
    have in common, which is most of a feature after a rectifier, and relies on attention that sums to 1 however it is
    moved, such as a softmax. With a budget of 1 there is nothing to take it from.

    The gradient towards an attention holds 1 / a and may overflow float16: keep maps in float32, as autocast does.

    Args:
        attention: [batch, locations], the very map that was drawn from.
        selection: from `sample_locations` or `top_locations`.
        features: [batch, budget, dim], at ``selection.indices``, in that order.
        control: take the mean of the other steps' estimates off each step's (leave one out).

    Returns:
        [batch, dim], in the dtype of ``features``; sums run in float32 or wider.

    Raises:
        InputError: the shapes do not belong together.
    """
    indices = selection.indices
    if (
        attention.ndim != 2
        or features.ndim != 3
        or features.shape[:2] != indices.shape
        or len(attention) != len(indices)
    ):
        raise InputError(
            f"attention [batch, locations] and features [batch, budget, dim] for indices {list(indices.shape)}",
            f"{list(attention.shape)} and {list(features.shape)}",
            "pass the map that was drawn from and one feature a location, in the order drawn",
        )
    wide = _working(attention, features)
    drawn = attention.gather(1, indices).to(wide)
    if selection.replacement is None:
        weights = drawn / drawn.sum(1, keepdim=True)
        return (weights.unsqueeze(2) * features.to(wide)).sum(1).to(features.dtype)
    masses = step_masses(attention.detach().to(wide), indices, replacement=selection.replacement)
    estimate: Tensor = Estimate.apply(drawn, features.to(wide), masses, selection.replacement, control)
    return estimate.to(features.dtype)


def _distinct(probabilities: Tensor, budget: int, *, generator: torch.Generator) -> Tensor:
    """Smallest arrival times of exponential clocks of these rates, first come first; [batch, budget]."""
    noise = torch.rand(probabilities.shape, generator=generator, dtype=torch.float64, device=generator.device)
    rates = torch.where(probabilities > 0, probabilities.log(), -_LAST)
    return ((-torch.log1p(-noise)).log() - rates).topk(budget, dim=1, largest=False, sorted=True).indices


def _independent(probabilities: Tensor, budget: int, *, generator: torch.Generator) -> Tensor:
    """By inverse transform; a location without mass is an interval of no width and never hit; [batch, budget]."""
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:].contiguous()
    noise = torch.rand((len(probabilities), budget), generator=generator, dtype=torch.float64, device=generator.device)
    found = torch.searchsorted(cumulative, noise * total, right=True)
    return torch.minimum(found, torch.searchsorted(cumulative, total))


def _check_budget(attention: Tensor, budget: int, *, repeat: bool) -> None:
    check_budget(budget)
    if not repeat and budget > attention.shape[1]:
        raise InputError(
            f"a budget of at most {attention.shape[1]}, the number of locations",
            f"{budget}",
            "ask for fewer, or sample with replacement",
        )


def _working(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide
