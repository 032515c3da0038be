"""Weights of the loss: the papers' formulas, and the same weight of the clean image's error whatever is predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scrimp.denoise import PREDICTIONS, WEIGHTINGS, Process, constant, denoising_loss, min_snr, p2
from scrimp.primitives.errors import InputError

SNR = torch.tensor([1e-6, 0.01, 0.3, 1.0, 4.9, 5.1, 100.0, 1e5], dtype=torch.float64)


@given(st.floats(1e-4, 1e4), st.floats(0.1, 50))
def test_min_snr_is_the_papers(snr: float, gamma: float) -> None:
    ratio = torch.tensor([snr], dtype=torch.float64)
    for prediction, want in {
        "sample": min(snr, gamma),
        "epsilon": min(snr, gamma) / snr,
        "v": min(snr, gamma) / (snr + 1),
    }.items():
        assert float(min_snr(ratio, prediction, gamma=gamma)) == pytest.approx(want)


@given(st.floats(1e-4, 1e4), st.floats(0.1, 5), st.floats(0, 3))
def test_p2_is_the_papers(snr: float, k: float, gamma: float) -> None:
    ratio = torch.tensor([snr], dtype=torch.float64)
    assert float(p2(ratio, "epsilon", k=k, gamma=gamma)) == pytest.approx(1 / (k + snr) ** gamma)


@pytest.mark.parametrize("weigh", [min_snr, p2])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_same_weight_of_the_clean_images_error(weigh: Any, prediction: str) -> None:
    """One wrong clean image, said in each prediction: its weighted loss is what ``sample`` would have."""
    ratio = SNR.sqrt()
    flow = prediction == "flow"
    sigma = 1 / (1 + ratio) if flow else 1 / (1 + SNR).sqrt()
    signal = 1 - sigma if flow else ratio * sigma
    own = Process(prediction, signal, sigma, torch.arange(len(SNR)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = (torch.randn(len(SNR), 1, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    index = torch.arange(len(SNR))
    noisy = own.noisy(clean, noise, index)
    shape = (-1, 1, 1, 1)
    # The output whose clean estimate is clean + wrong, for the same noisy image.
    belied = noise - signal.view(shape) / sigma.view(shape) * wrong
    output = own.target(clean + wrong, belied, index)
    assert torch.allclose(own.estimates(noisy, output, index)[0], clean + wrong)
    loss = denoising_loss(output, own.target(clean, noise, index), weight=weigh(SNR, prediction))
    want = wrong.square().flatten(1).mean(1) * weigh(SNR, "sample")
    assert torch.allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_constant_is_one(prediction: str) -> None:
    assert torch.equal(constant(SNR, prediction), torch.ones_like(SNR))


def promise(weigh: Any) -> None:
    """A finite weight from 0 up for each image, of any signal to noise from none on; the argument stays."""
    for prediction in PREDICTIONS:
        for snr in (torch.cat([torch.zeros(1), SNR.float()]), torch.zeros(0), torch.tensor([1e12])):
            before = snr.clone()
            weight = weigh(snr, prediction)
            assert weight.shape == snr.shape
            assert weight.dtype == snr.dtype
            assert bool(torch.isfinite(weight).all())
            assert bool((weight >= 0).all())
            weight += 1
            assert torch.equal(snr, before)
    with pytest.raises(InputError, match="prediction out of"):
        weigh(SNR, "x0")


def dividing(snr: torch.Tensor, prediction: str) -> torch.Tensor:
    """min(snr, 5) / snr as written: no number where there is no signal."""
    return snr.clamp_max(5) / snr


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_promises(name: str) -> None:
    promise(WEIGHTINGS[name])


def test_promises_fail_on_a_broken_weighting() -> None:
    with pytest.raises(AssertionError):
        promise(dividing)


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="gamma above 0"):
        min_snr(SNR, "v", gamma=0)
    with pytest.raises(InputError, match="k above 0"):
        p2(SNR, "v", k=0)
