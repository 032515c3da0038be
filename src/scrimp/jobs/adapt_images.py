"""Images as a pretrained model takes them: its number of channels, its mean and deviation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from scrimp.data import ImageData, load_images
from scrimp.data.images import Images
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.jobs.encoders import Encoder, EncoderFacts, load_encoder
from scrimp.jobs.thin_config import ThinConfig
from scrimp.primitives.errors import InputError


class Repeated:
    """Grey images, each repeated for the channels of a model of colours; else a set like another.

    Args:
        images: of one channel.
        channels: of the model.
    """

    def __init__(self, images: Images, channels: int) -> None:
        self.images, self.channels = images, channels

    @property
    def labels(self) -> Tensor:
        return self.images.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images.batch(indices).repeat(1, self.channels, 1, 1)

    def take(self, indices: Tensor) -> Repeated:
        return Repeated(self.images.take(indices), self.channels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return image.repeat(self.channels, 1, 1), label

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, rows = self.images.__getitems__(indices)
        return images.repeat(1, self.channels, 1, 1), labels, rows


def encoder_and_images(config: AdaptConfig | ThinConfig, source: Any) -> tuple[Encoder, ImageData]:
    """The pretrained network that a configuration names, and images of its size.

    Args:
        config: its ``model``, ``weights``, ``pretrained``, ``size`` and ``on_corrupt``.
        source: as `scrimp.data.load_images` takes it.

    Raises:
        InputError: no weights to begin with, or a network or images that cannot be read.
    """
    if not (config.pretrained or config.weights or Path(config.model).expanduser().exists()):
        got, remedy = f"{config.model} without any", "pass a weights file or run folder, --pretrained or --weights FILE"
        raise InputError("weights to begin with", got, remedy)
    encoder = load_encoder(
        config.model if config.weights is None else config.weights,
        model=None if config.weights is None else config.model,
        pretrained=config.pretrained,
        size=config.size,
        data=lambda: load_images(source, size=config.size, on_corrupt=config.on_corrupt),
    )
    return encoder, load_images(source, size=encoder.size, on_corrupt=config.on_corrupt)


def as_model_takes(data: ImageData, encoder: EncoderFacts) -> ImageData:
    """The images at the model's channels, to be normalised by its mean and std.

    Raises:
        InputError: images of colours for a model of grey ones, or of another size.
    """
    channels, height, width = data.train.shape
    if channels not in (1, encoder.channels):
        got = f"{channels}"
        raise InputError(f"images of {encoder.channels} channel(s) for {encoder.name}", got, "convert the images")
    if (height, width) != (encoder.size, encoder.size):
        wanted = f"images of {encoder.size} x {encoder.size} pixels for {encoder.name}"
        raise InputError(wanted, f"{height} x {width}", f"pass --size {height}, or resize the images")
    data = replace(data, mean=encoder.mean, std=encoder.std)
    if channels == encoder.channels:
        return data
    train, test = (Repeated(part, encoder.channels) for part in (data.train, data.test))
    return replace(data, train=train, test=test)
