"""How well a denoiser knows the clean image: one figure for all predictions, weights and ways of drawing timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from scrimp.data.images import Images
from scrimp.jobs.denoise_models import Denoiser
from scrimp.primitives.draw import generator_for

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG10_SNR = (2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0)
"""Where the error is measured: at the levels whose signal-to-noise ratio is nearest to these powers of ten."""
GAMMA = 5.0
_NOISE = 23  # key of the fixed noise
_AT_ONCE = 2**18  # numbers of images in a forward pass


@dataclass(frozen=True)
class CleanError:
    """Error of the estimates of clean images.

    Attributes:
        loss: mean over `LOG10_SNR` of min(snr, 5) times the mean squared error of the clean image.
        by_snr: the mean squared error itself, images in [-1, 1], at each.
    """

    loss: float
    by_snr: dict[str, float]


def clean_error(
    denoiser: Denoiser, images: Images, accelerator: Accelerator, *, limit: int, labelled: bool
) -> CleanError:
    """Measure on ``limit`` images, the same with the same noise each time; on every rank.

    The error of the clean image at equal signal-to-noise ratios means the same whatever the network predicts and
    whatever it was trained by, so that recipes can be compared.
    """
    chosen = torch.randperm(len(images), generator=generator_for(0))[:limit]
    place = torch.arange(len(chosen)) % len(LOG10_SNR)
    index = levels_near(denoiser)[place]
    noise = torch.randn(len(chosen), *images.shape, generator=generator_for(0, _NOISE))
    world, device = accelerator.num_processes, accelerator.device
    sums = torch.zeros(len(LOG10_SNR), dtype=torch.float64, device=device)
    mine = torch.arange(accelerator.process_index, len(chosen), world)
    for rows in mine.split(max(1, _AT_ONCE // noise[0].numel())):
        clean = images.batch(chosen[rows]).to(device).float() / 127.5 - 1
        labels = images.labels[chosen[rows]].to(device) if labelled else None
        with torch.no_grad(), accelerator.autocast():
            errors = _errors(denoiser, clean, noise[rows].to(device), index[rows].to(device), labels)
        sums.index_add_(0, place[rows].to(device), errors.double())
    counts = torch.bincount(place, minlength=len(LOG10_SNR)).double()
    means = cast(Tensor, accelerator.reduce(sums, reduction="sum")).cpu() / counts
    found = {f"{10**power:.3g}": float(mean) for power, mean in zip(LOG10_SNR, means, strict=True) if mean == mean}
    weighted = [min(10**power, GAMMA) * float(mean) for power, mean in zip(LOG10_SNR, means, strict=True)]
    kept = [value for value, count in zip(weighted, counts.tolist(), strict=True) if count]
    return CleanError(sum(kept) / len(kept), found)


def levels_near(denoiser: Denoiser) -> Tensor:
    """The levels of the process that are nearest to `LOG10_SNR`, int64."""
    process = denoiser.process
    powers = process.snr(torch.arange(process.levels)).clamp(1e-9, 1e9).log10()
    return (powers[None] - torch.tensor(LOG10_SNR)[:, None]).abs().argmin(1)


def _errors(denoiser: Denoiser, clean: Tensor, noise: Tensor, index: Tensor, labels: Tensor | None) -> Tensor:
    process = denoiser.process
    noisy = process.noisy(clean, noise, index)
    output = denoiser.predict(noisy, process.timestep(index), labels).float()
    estimate, _ = process.estimates(noisy, output, index)
    return (estimate - clean).square().flatten(1).mean(1)
