"""Differentiable stand-ins for the cost, by kind of policy: each falls where the cost rises, one number an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

LAYER_WEIGHTS = (1.0, 0.2, 0.05, 0.01, 0.005)
"""Of the layers of token sampling, the last for all that follow (Navaneet et al. 2024, for small models)."""
_SURE = 1e-6  # halting scores above 1 - this are one to float32


def ponder_surrogate(layers: Tensor, rest: Tensor) -> Tensor:
    """Minus the mean over tokens of N + r: the ponder loss of halting, turned round (SlowFormer, CVPR 2024).

    Its gradient is that of the remainder r = 1 - (scores of the blocks before the last one that the token ran in), so
    a token that halts in the first block has none; see `scores_surrogate`.

    Args:
        layers: [n, tokens], blocks each token ran in.
        rest: [n, tokens], its remainder.

    Returns:
        [n], from minus (blocks + 1) to -1.
    """
    return -(layers + rest).mean(1)


def prior_surrogate(scores: Sequence[Tensor], *, depth: float, spread: float = 1.0) -> Tensor:
    """Minus KL(H || T) of an image's scores over blocks from the Gaussian of training (A-ViT, SlowFormer), by image.

    H[l] is the sum over tokens of the scores of block l as a share of all, T the Gaussian density at 1, 2, ..., blocks,
    scaled to sum to 1. The published loss is 1e-3 times this plus 5e-4 times `ponder_surrogate`. Moving away from the
    prior may as well halt tokens early: it is no stand-in for the cost when alone.

    Args:
        scores: of each block, [n, tokens], 0 for tokens that do not run.
        depth: mean of the Gaussian, blocks counted from 1.
        spread: its standard deviation, in blocks.

    Returns:
        [n], 0 at most; 0 for an image without any score.
    """
    mass = torch.stack([score.sum(1) for score in scores], 1)
    tiny = torch.finfo(mass.dtype).tiny
    share = mass / mass.sum(1, keepdim=True).clamp_min(tiny)
    place = torch.arange(1, len(scores) + 1, dtype=mass.dtype, device=mass.device)
    target = (-0.5 * ((place - depth) / spread) ** 2).log_softmax(0)
    return -(share * (share.clamp_min(tiny).log() - target)).sum(1)


def scores_surrogate(scores: Sequence[Tensor], layers: Tensor) -> Tensor:
    """Mean over tokens of the sum over blocks of -log(1 - h): every halting score h towards 0, wherever a token is.

    In the spirit of DeSparsify (NeurIPS 2024). Two things `ponder_surrogate` lacks: a token that halts in its first
    block has a gradient, and it is not the smaller the surer it halts, as that of h itself: it is h, times the scale.
    Blocks that a token did not run in count as a score of 1 - 1e-6, the highest told apart, so that to run longer is
    always less.

    Args:
        scores: of each block, [n, tokens], 0 for tokens that do not run.
        layers: [n, tokens], blocks each token ran in.

    Returns:
        [n], from 0 to 13.8 times the blocks.
    """
    most = -math.log(_SURE)
    run = torch.stack([-torch.log1p(-score.clamp(max=1 - _SURE)) for score in scores]).sum(0)
    return (run + most * (len(scores) - layers).to(run.dtype)).mean(1)


def running_surrogate(scores: Sequence[Tensor], *, full: float = 0.99, spread: float = 0.1) -> Tensor:
    """Minus the tokens that run in the blocks after the first, softly counted, as a mean over tokens; ours.

    A token runs in block l + 1 while its scores c = h_1 + ... + h_l are below ``full``; here sigmoid((full - c) /
    spread) of one does. So the gradient is where a little moves the count: at tokens that have just halted or are about
    to, which on the published losses weigh as much as those that nothing will move.

    Args:
        scores: of each block, [n, tokens], 0 for tokens that do not run.
        full: the sum at which a token halts, 1 - eps.
        spread: of the step.

    Returns:
        [n], from minus (blocks - 1) to 0.
    """
    spent = torch.stack(list(scores[:-1])).cumsum(0) if len(scores) > 1 else scores[0].new_ones(0, *scores[0].shape)
    return -((full - spent) / spread).sigmoid().sum(0).mean(1)


def attention_surrogate(
    attention: Sequence[Tensor], alive: Sequence[Tensor], *, prefix: int = 1, weights: Sequence[float] = LAYER_WEIGHTS
) -> Tensor:
    """Squared distance of the class token's attention from uniform (SlowFormer on ATS): the more even, the more stay.

    sum over layers w_l sum over heads, patch tokens i of (A[class, i] - 1/N)^2. N counts the tokens that are there,
    the prefix included, as an even row of attention has 1/N for each of them.

    Args:
        attention: of each layer that samples, [n, heads, tokens], rows of softmax; 0 for tokens that are gone.
        alive: of each of them, [n, tokens], bool.
        prefix: the first tokens, which are not summed over.
        weights: of the layers in their order; the last holds for all further ones.

    Returns:
        [n], from 0.
    """
    _check_layers(attention, alive)
    if not weights:
        raise InputError("a weight or more", "none", "pass weights=")
    parts = []
    for index, (row, there) in enumerate(zip(attention, alive, strict=True)):
        even = 1 / there.sum(1)[:, None, None].to(row.dtype)
        far = torch.where(there[:, None, prefix:], row[:, :, prefix:] - even, 0)
        parts.append(weights[min(index, len(weights) - 1)] * far.square().sum((1, 2)))
    return torch.stack(parts).sum(0)


def significance_surrogate(significance: Sequence[Tensor], alive: Sequence[Tensor]) -> Tensor:
    """KL(S || uniform) = log N - entropy of the significance of the N patch tokens, summed over layers.

    The form of DeSparsify (NeurIPS 2024) for token sampling: what is sampled from is itself made even.

    Args:
        significance: of each layer, [n, patches], from 0 up, not normalised.
        alive: of each of them, [n, patches], bool.

    Returns:
        [n], from 0 to the sum of log N.
    """
    _check_layers(significance, alive)
    parts = []
    for mass, there in zip(significance, alive, strict=True):
        mass = torch.where(there, mass, 0)
        tiny = torch.finfo(mass.dtype).tiny
        share = mass / mass.sum(1, keepdim=True).clamp_min(tiny)
        count = there.sum(1).clamp_min(1).to(mass.dtype)
        parts.append((share * share.clamp_min(tiny).log()).sum(1) + count.log() * share.sum(1))
    return torch.stack(parts).sum(0)


def samples_surrogate(significance: Sequence[Tensor], alive: Sequence[Tensor], *, samples: int | None) -> Tensor:
    """Minus the tokens that an even grid hits, in expectation, summed over layers; ours.

    A token of share S_i of the significance holds a stretch of that length of the cumulative distribution. Of a grid of
    K points at a random offset it is hit with probability min(1, K S_i). The sum is the count of tokens itself, where
    entropy also rewards what moves mass among tokens that are hit anyway.

    Args:
        significance: of each layer, [n, patches], from 0 up, not normalised.
        alive: of each of them, [n, patches], bool.
        samples: K; None, or above the number of patches: that.

    Returns:
        [n], from minus K times the layers to 0.
    """
    _check_layers(significance, alive)
    parts = []
    for mass, there in zip(significance, alive, strict=True):
        mass = torch.where(there, mass, 0)
        share = mass / mass.sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        count = mass.shape[1] if samples is None else min(samples, mass.shape[1])
        parts.append((count * share).clamp(max=1).sum(1))
    return -torch.stack(parts).sum(0)


def usage_surrogate(
    tokens: Tensor, heads: Tensor, layers: Tensor, *, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """Minus the usage loss of gating with targets 0 (SlowFormer on AdaViT): squares of the shares of open gates.

    Args:
        tokens: [n, gates], gates as numbers from 0 to 1 with a gradient, of patch tokens in all blocks.
        heads: likewise, of heads.
        layers: likewise, of attention and MLP layers.
        weights: of the three kinds.

    Returns:
        [n], from minus the sum of the weights to 0.
    """
    parts = zip((tokens, heads, layers), weights, strict=True)
    return -torch.stack([weight * gates.mean(1).square() for gates, weight in parts]).sum(0)


def exits_surrogate(logits: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of each exit's answer to the uniform one, summed over exits (DeepSloth, ICLR 2021): none is sure.

    Args:
        logits: of each exit that may end the run, [n, classes].

    Returns:
        [n], from exits * log(classes).
    """
    return torch.stack([-one.log_softmax(1).mean(1) for one in logits]).sum(0)


def _check_layers(seen: Sequence[Tensor], alive: Sequence[Tensor]) -> None:
    if not seen or len(seen) != len(alive):
        saw = f"{len(seen)} and {len(alive)}"
        raise InputError("what some layers saw, and as many of their tokens", saw, "sample in some block")
