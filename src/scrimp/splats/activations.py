"""What files store of a Gaussian, and what `Splats` holds: alphas and logits, colours and coefficients, sizes and logs.

An alpha of 0 or 1 has no finite logit and a size of 0 no finite logarithm. Both are read as the limits here, which no
picture of 8 bits tells from them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from scrimp.splats.scene import SH_C0

MOST_LOGIT = math.log((1 - 1e-6) / 1e-6)
"""Of alpha 1; its negative of alpha 0."""
LEAST_SCALE = -20.0
"""Logarithm of a size of 0."""


def logits_of(alphas: Any) -> np.ndarray:
    """Opacities as `Splats` holds them, float32, of alphas in 0 to 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.asarray(alphas, np.float64)
        return np.clip(np.log(values) - np.log1p(-values), -MOST_LOGIT, MOST_LOGIT).astype(np.float32)


def alphas_of(logits: Any) -> np.ndarray:
    """The other way, float64."""
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-np.asarray(logits, np.float64))))


def coefficients_of(rgb: Any) -> np.ndarray:
    """Coefficients of degree 0, float32, of colours in 0 to 1."""
    return ((np.asarray(rgb) - 0.5) / SH_C0).astype(np.float32)


def rgb_of(coefficients: Any) -> np.ndarray:
    """The other way, float64, not clamped."""
    return np.asarray(np.asarray(coefficients, np.float64) * SH_C0 + 0.5)


def logs_of(sizes: Any) -> np.ndarray:
    """Scales as `Splats` holds them, float32, of standard deviations along the axes; below 0 has none: NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.asarray(sizes, np.float32)).clip(LEAST_SCALE)
