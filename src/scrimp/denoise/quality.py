"""How near generated images come to real ones, in a network's features, or to the model's own exact samples."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

_PAIRS = 4_000_000  # distances held at once: 32 MB


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the normal distributions fitted to two sets of features, in float64.

    ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with means m and covariances A, B (Heusel et al. 2017, arXiv
    1706.08500, equation 6). The last trace is the sum of the singular values of ``A^(1/2) B^(1/2)``, so that no root
    of a matrix without symmetry is taken. The result is biased upwards by few rows: compare equal counts only.
    It is an FID only where the features are Inception's.

    Args:
        features_a: [rows, dim], at least two rows.
        features_b: [other rows, dim].

    Raises:
        InputError: too few rows, shapes that do not fit, or a feature that is not finite.
    """
    _check(features_a, features_b, least=2)
    mean_a, root_a, trace_a = _moments(features_a)
    mean_b, root_b, trace_b = _moments(features_b)
    cross = torch.linalg.svdvals(root_a @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + trace_a + trace_b - 2 * cross
    return max(float(distance), 0.0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated images that look real, and share of real ones the generator reaches.

    A point belongs to a set where it lies within the distance of some member to that member's k-th nearest other one
    (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    Args:
        real: features of real images [rows, dim], more than ``k`` rows.
        fake: features of generated images [other rows, dim], more than ``k`` rows.
        k: the neighbour whose distance is a member's reach.

    Returns:
        ``(precision, recall)``, each from 0 to 1.

    Raises:
        InputError: too few rows, shapes that do not fit, or a feature that is not finite.
    """
    if k < 1:
        raise InputError("k of at least 1", f"{k}", "count neighbours from 1")
    _check(real, fake, least=k + 1)
    real, fake = real.detach().double(), fake.detach().double()
    return _covered(fake, real, _reach(real, k)), _covered(real, fake, _reach(fake, k))


def paired_error(images: Tensor, reference: Tensor) -> Tensor:
    """Root mean square difference of each image to its reference, over the standard deviation of all references.

    Made for samples from the same noise: 0 is the same image, about 1.4 an unrelated one of the same kind. Unlike a
    distance between distributions it cannot improve by an accident of an undertrained network.

    Args:
        images: [batch, ...].
        reference: the same shape; their standard deviation is taken over all values of the batch together, so that
            a blank reference has an error too.

    Returns:
        float64 [batch]; NaN where an image holds one.

    Raises:
        InputError: shapes differ, nothing is there, or the references are all one value.
    """
    if images.shape != reference.shape or images.ndim < 2 or images.numel() == 0:
        raise InputError(
            "two batches of the same shape [batch, ...]",
            f"{list(images.shape)} and {list(reference.shape)}",
            "sample both from the same noise",
        )
    images, reference = images.detach().double(), reference.detach().double()
    spread = reference.std(correction=0)
    if not bool(spread > 0):
        raise InputError("references that differ from pixel to pixel", "one value or NaN", "check the model")
    return (images - reference).square().flatten(1).mean(1).sqrt() / spread


def _check(first: Tensor, second: Tensor, *, least: int) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or first.shape[1] == 0:
        raise InputError(
            "two sets of features [rows, dim] of the same dim",
            f"{list(first.shape)} and {list(second.shape)}",
            "take both from the same layer, flattened",
        )
    for features in (first, second):
        if len(features) < least:
            raise InputError(f"at least {least} rows of features", f"{len(features)}", "generate more images")
        if not bool(torch.isfinite(features).all()):
            raise InputError("finite features", "NaN or infinity", "check the images and the network")


def _moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, symmetric square root of the covariance, and the covariance's trace."""
    wide = features.detach().double()
    mean = wide.mean(0)
    centred = wide - mean
    covariance = centred.T @ centred / (len(wide) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return mean, root, covariance.trace()


def _distances(points: Tensor, members: Tensor) -> Tensor:
    # The quick form through a matrix product loses the zero between equal rows.
    return torch.cdist(points, members, compute_mode="donot_use_mm_for_euclid_dist")


def _reach(members: Tensor, k: int) -> Tensor:
    """Distance of each member to its k-th nearest other one."""
    found = []
    for first, part in _parts(members, len(members)):
        distances = _distances(part, members)
        rows = torch.arange(len(part), device=part.device)
        distances[rows, first + rows] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _covered(points: Tensor, members: Tensor, reach: Tensor) -> float:
    inside = [(_distances(part, members) <= reach).any(1) for _, part in _parts(points, len(members))]
    return float(torch.cat(inside).double().mean())


def _parts(points: Tensor, width: int) -> list[tuple[int, Tensor]]:
    rows = max(1, _PAIRS // width)
    return [(first, points[first : first + rows]) for first in range(0, len(points), rows)]
