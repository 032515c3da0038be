"""Colours that change with the direction they are seen from: real spherical harmonics in 3DGS's order and signs."""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.splats.scene import COUNTS, SH_C0, Splats


def harmonic_basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics above degree 0.

    Args:
        directions: [n, 3], of length 1.
        degree: the highest, 0 to 4.

    Returns:
        [n, k], k of `COUNTS`.
    """
    x, y, z = directions.unbind(1)
    xx, yy, zz = x * x, y * y, z * z
    found = [
        *(-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x),
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy),
        0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy),
        1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
        2.5033429417967046 * x * y * (xx - yy),
        -1.7701307697799304 * y * z * (3 * xx - yy),
        0.9461746957575601 * x * y * (7 * zz - 1),
        -0.6690465435572892 * y * z * (7 * zz - 3),
        0.10578554691520431 * (zz * (35 * zz - 30) + 3),
        -0.6690465435572892 * x * z * (7 * zz - 3),
        0.47308734787878004 * (xx - yy) * (7 * zz - 1),
        -1.7701307697799304 * x * z * (xx - 3 * yy),
        0.6258357354491761 * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
    ]
    return torch.stack(found[: COUNTS[degree]], 1) if degree else directions[:, :0]


def colors_from(splats: Splats, position: Tensor, degree: int) -> Tensor:
    """Colours [n, 3] as seen from a position [3] of the world, not below 0."""
    found = 0.5 + SH_C0 * splats.colors
    if degree:
        basis = harmonic_basis(torch.nn.functional.normalize(splats.means - position, dim=1), degree)
        found = found + torch.einsum("nk,nkc->nc", basis, splats.harmonics[:, : COUNTS[degree]])
    return found.clamp_min(0)
