"""How much an image's error counts at its noise level: weights of the mean squared error of any prediction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError

Weighting = Callable[[Tensor, str], Tensor]


def constant(snr: Tensor, prediction: str) -> Tensor:
    """The plain mean squared error of what the network predicts.

    Args:
        snr: signal to noise [batch], at least 0.
        prediction: ``epsilon``, ``v``, ``sample`` or ``flow``.

    Returns:
        Weights [batch], to be multiplied with the mean squared errors of this prediction.
    """
    _from_noise(torch.ones_like(snr), snr, prediction)
    return torch.ones_like(snr)


def min_snr(snr: Tensor, prediction: str, *, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) on the error of the clean image, whatever is predicted (Hang et al. 2023).

    Levels with little noise, where the clean image is nearly given, stop outweighing the rest.

    Args:
        snr: signal to noise [batch], at least 0.
        prediction: ``epsilon``, ``v``, ``sample`` or ``flow``.
        gamma: the most that a level counts.

    Returns:
        Weights [batch]. At snr 0 that of ``epsilon`` is 1, the others are 0.
    """
    if not gamma > 0:
        raise InputError("gamma above 0", f"{gamma}", "use 5, as the paper does")
    return _from_noise((gamma / snr).clamp_max(1), snr, prediction)


def p2(snr: Tensor, prediction: str, *, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + snr)^gamma on the error of the noise, whatever is predicted (Choi et al. 2022).

    Args:
        snr: signal to noise [batch], at least 0.
        prediction: ``epsilon``, ``v``, ``sample`` or ``flow``.
        k: keeps the weight of noisy levels finite.
        gamma: 0 gives the plain error of the noise.

    Returns:
        Weights [batch].
    """
    if not k > 0 or not gamma >= 0:
        raise InputError("k above 0 and gamma at least 0", f"{k} and {gamma}", "use 1 and 1, as the paper does")
    return _from_noise((k + snr) ** -gamma, snr, prediction)


WEIGHTINGS: dict[str, Weighting] = {"constant": constant, "min-snr": min_snr, "p2": p2}


def _from_noise(weight: Tensor, snr: Tensor, prediction: str) -> Tensor:
    """A weight of the squared error of the noise as one of another prediction's.

    An error e of the clean image is one of sqrt(snr) e of the noise and e / sigma of v and of the flow, where
    sigma^2 = 1 / (1 + snr) if variance is kept, and sigma = 1 / (1 + sqrt(snr)) on a straight path.
    """
    if prediction == "epsilon":
        return weight
    if prediction == "sample":
        return weight * snr
    if prediction == "v":
        return weight * (snr / (1 + snr))
    if prediction == "flow":
        return weight * (snr / (1 + snr.sqrt()).square())
    raise InputError("a prediction out of: epsilon, v, sample, flow", prediction, "name one of them")
