"""Ways in which NOLA might be wrong, and the finding that must say so."""

from __future__ import annotations

import torch

from scrimp.adapt import independent, nola, orthogonal


def last_basis_dropped(numbers, count, **options):
    return independent(torch.cat([numbers[:-1], 0 * numbers[-1:]]), count, **options)


def one_stream_for_all(numbers, count, *, seed, stream, **options):
    return independent(numbers, count, seed=seed, stream=0, **options)


def seed_cut_to_32_bits(numbers, count, *, seed, **options):
    """The old library's generators took seeds of all kinds and used some of their bits."""
    return orthogonal(numbers, count, seed=seed % 2**32, **options)


def no_gradient_below_the_sum(numbers, count, **options):
    exact = orthogonal(numbers.detach(), count, **options)
    return exact + 0 * numbers.sum()


def scale_without_rank(rank, bases, seed, *, alpha, **options):
    return nola(rank, bases, seed, alpha=alpha * rank, **options)


BROKEN_ADAPT = [
    ("nola", {"independent": last_basis_dropped}, "independent, 16 bases of 64: values"),
    ("nola", {"independent": one_stream_for_all}, "independent, 5 bases of 24: values"),
    ("nola", {"orthogonal": seed_cut_to_32_bits}, "orthogonal, 37 bases of 100: values"),
    ("nola", {"orthogonal": no_gradient_below_the_sum}, "orthogonal, 64 bases of 33: gradients"),
    ("nola", {"method": scale_without_rank}, "delta of a layer: values"),
]
