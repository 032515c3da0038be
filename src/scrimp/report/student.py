"""Student's t distribution for whole degrees of freedom, without scipy."""

from __future__ import annotations

import math


def t_central(value: float, freedom: int) -> float:
    """The probability that |T| <= ``value``: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"expected at least 1 degree of freedom; got {freedom}; take the mean of two or more values")
    angle = math.atan2(value, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (step - 1) / step
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(confidence: float, freedom: int) -> float:
    """The half width t with P(|T| <= t) = ``confidence``, such as 4.303 for 0.95 and 2 degrees of freedom."""
    low, high = 0.0, 1.0
    while t_central(high, freedom) < confidence:
        high *= 2
    for _ in range(80):  # halves the bracket below the precision of a float
        middle = (low + high) / 2
        low, high = (middle, high) if t_central(middle, freedom) < confidence else (low, middle)
    return high
