"""Features of a whole set of images by an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.data import Images, normalise
from scrimp.data.images import Progress
from scrimp.primitives.errors import InputError

# How models refuse images of another form.
_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError, TypeError)


def encode(
    encoder_model: nn.Module,
    images: Images,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: str | torch.device,
    size: int | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Features of all images, [N, dim], float32 on the CPU, without gradient; the model's modes are left as they were.

    Args:
        encoder_model: on ``device``, [n, C, H, W] -> [n, dim].
        mean, std: a number a channel; grey images are repeated for a model of more channels.
        size: side in pixels that images of another size are resized to (square ones only); as they are where omitted.
        batch_size: images a forward pass.
        progress: called with images done and images in all.

    Raises:
        InputError: no images, images that do not suit the model, or a model that gives something else.
    """
    if len(images) == 0:
        raise InputError("one image or more", "none", "add images")
    found = torch.empty(0)
    with torch.no_grad(), _evaluating(encoder_model):
        for rows in torch.arange(len(images)).split(batch_size):
            batch = as_encoder_takes(images.batch(rows).to(device), mean=mean, std=std, size=size)
            features = run_encoder(encoder_model, batch)
            if not len(found):
                found = torch.empty(len(images), features.shape[1])
            found[rows[0] : rows[-1] + 1] = features.float().cpu()
            if progress is not None:
                progress(int(rows[-1]) + 1, len(images))
    return found


def as_encoder_takes(images: Tensor, *, mean: Sequence[float], std: Sequence[float], size: int | None = None) -> Tensor:
    """uint8 [n, C, H, W] -> float32 [n, len(mean), size, size], normalised, channels last.

    Raises:
        InputError: images of colours for an encoder of grey ones, or images to be resized that are not square.
    """
    count, channels, height, width = images.shape
    if channels not in (1, len(mean)):
        raise InputError(f"images of {len(mean)} channel(s) for this encoder", f"{channels}", "convert the images")
    ready = normalise(images.expand(count, len(mean), height, width), mean, std)
    if size is not None and (height, width) != (size, size):
        if height != width:
            raise InputError(f"images of {size} x {size} pixels", f"{height} x {width}", f"load them with size={size}")
        ready = functional.interpolate(ready, (size, size), mode="bilinear", antialias=True)
    return ready.contiguous(memory_format=torch.channels_last)


def run_encoder(model: nn.Module, batch: Tensor) -> Tensor:
    """Features [n, dim] of a batch that is ready.

    Raises:
        InputError: the model refuses the batch, or gives something else.
    """
    try:
        features = model(batch)
    except _REFUSALS as error:
        if isinstance(error, (InputError, torch.OutOfMemoryError)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = f"images [n, C, H, W] = {list(batch.shape)} that the encoder takes"
        raise InputError(wanted, reason, "check their size") from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError("an encoder that gives features [n, dim]", f"{got}", "pool its output")
    return features


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
