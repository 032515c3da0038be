"""Feature maps of linear attention: phi with ``phi(q) . phi(k)`` in place of ``exp(q . k)``.

Any callable on the last dimension is a feature map; so is a pair of them, one for the queries and one for the keys.
What it gives should not be negative: the denominators are sums of ``phi(q) . phi(k)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scrimp.attend.precision import compute_dtype
from scrimp.primitives.errors import InputError

Map = Callable[[Tensor], Tensor]
FeatureMap = Map | tuple[Map, Map]


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``: x + 1 above zero, exp(x) below (Katharopoulos et al., ICML 2020, eq. 7).

    Written as exp(x): ``elu(x) + 1`` in bfloat16 rounds to 0 from x = -8 down, and the gradient of the attention to
    that of its ``eps``. [..., dim] -> [..., dim].
    """
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``. A query or all keys without a positive entry see nothing and give zeros. Shape kept."""
    return torch.relu(x)


def identity(x: Tensor) -> Tensor:
    """``x``: for queries and keys that are features already."""
    return x


class SoftmaxMimic(nn.Module):
    """A trainable map that learns to imitate softmax attention: ``[exp(W x), exp(-W x)]``.

    Source: Zhang et al., "The Hedgehog & the Porcupine", ICLR 2024 (arXiv 2402.04347), eq. 6. W begins as the identity
    times ``dim ** -0.25``, so that W q . W k is the exponent softmax attention takes.

    Args:
        dim: of queries and keys.
        heads: 1 for one W that all heads share, else a W for each head.

    [batch, heads, tokens, dim] -> [batch, heads, tokens, 2 dim]. Computed in float32 at least: exp outgrows float16.

    Raises:
        InputError: a size below 1.
    """

    def __init__(self, dim: int, *, heads: int = 1) -> None:
        super().__init__()
        if dim < 1 or heads < 1:
            raise InputError("dim >= 1 and heads >= 1", f"dim {dim}, heads {heads}", "pass the model's sizes")
        self.weight = nn.Parameter(torch.eye(dim).mul(dim**-0.25).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = compute_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            projected = x.to(wide) @ self.weight.to(wide).mT
            return torch.cat([projected.exp(), (-projected).exp()], -1).to(x.dtype)


class PositiveRandomFeatures(nn.Module):
    """One side of `random_features`; ``projection`` is [features, dim], each row a draw from a normal distribution."""

    projection: Tensor

    def __init__(self, projection: Tensor, *, stabilise: bool) -> None:
        super().__init__()
        self.register_buffer("projection", projection)
        self.stabilise = stabilise

    def forward(self, x: Tensor) -> Tensor:
        wide = compute_dtype(x.dtype)
        features, dim = self.projection.shape
        with torch.autocast(x.device.type, enabled=False):
            scaled = x.to(wide) * dim**-0.25
            exponents = scaled @ self.projection.to(wide).mT - scaled.square().sum(-1, keepdim=True) / 2
            if self.stabilise:
                exponents = exponents - exponents.detach().amax(-1, keepdim=True)
            return (exponents.exp() * features**-0.5).to(x.dtype)


def random_features(
    dim: int, features: int, *, generator: torch.Generator
) -> tuple[PositiveRandomFeatures, PositiveRandomFeatures]:
    """Maps whose products estimate the softmax kernel without bias: ``E[phi(q) . phi(k)] = exp(q . k / sqrt(dim))``.

    ``phi(x) = exp(w . x - |x|^2 / 2) / sqrt(features)`` with x divided by ``dim ** 0.25`` and orthogonal rows w
    (Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, arXiv 2009.14794, eq. 7 and section 2.4).
    A query's features are divided by the largest of them, which its output's numerator and denominator share. A key's
    are not: any factor would have to be the same for all keys, those of later steps of a recurrence included, and their
    mean is 1 already.

    Args:
        dim: of queries and keys.
        features: of the maps; more of them lower the variance.
        generator: CPU generator.

    Returns:
        The queries' map and the keys', for ``feature_map``; [..., dim] -> [..., features].

    Raises:
        InputError: a size below 1.
    """
    if dim < 1 or features < 1:
        raise InputError("dim >= 1 and features >= 1", f"dim {dim}, features {features}", "ask for more")
    projection = _orthogonal_normal(features, dim, generator)
    return PositiveRandomFeatures(projection, stabilise=True), PositiveRandomFeatures(projection, stabilise=False)


def _orthogonal_normal(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """[rows, dim], float32: every row normally distributed, the rows of each block of ``dim`` at right angles."""
    blocks = -(-rows // dim)
    normal = torch.randn(blocks, dim, dim, generator=generator, dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(normal)
    # Householder's signs are not random: with those of R's diagonal the factor is uniform over the rotations.
    orthogonal = orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    lengths = torch.randn(blocks, dim, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (orthogonal.mT * lengths).reshape(-1, dim)[:rows].float().contiguous()
