"""Images as a pretrained model takes them: its number of channels, its mean and deviation."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from scrimp.data import ImageData
from scrimp.data.images import Images
from scrimp.jobs.encoders import EncoderFacts
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
