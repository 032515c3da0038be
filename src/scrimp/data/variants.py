"""Sets made from sets: split, thinned to a long tail, with duplicates, with wrong labels. For honest benchmarks."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from scrimp.data.images import Images, TensorImages
from scrimp.primitives.errors import InputError

AnyImages = TypeVar("AnyImages", bound=Images)


def subset(images: AnyImages, indices: Tensor) -> AnyImages:
    """The images at ``indices`` (int64 [n]), in that order.

    Raises:
        InputError: an index out of range.
    """
    _check_indices(indices, len(images))
    return images.take(indices)


def stratified_split(labels: Tensor, *, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows for training and for testing: the same fraction of every class is held out.

    A class of two or more keeps at least one image on either side; a class of one is only trained on.

    Args:
        labels: int64 [N].
        fraction: share held out, between 0 and 1.

    Returns:
        Training rows and test rows, each int64 and ascending.

    Raises:
        InputError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise InputError("a test fraction between 0 and 1", str(fraction), "0.1 is usual")
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.bincount().nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def long_tail(images: TensorImages, *, ratio: float, generator: torch.Generator) -> TensorImages:
    """Thin the classes exponentially: class 0 keeps ``ratio`` times as many images as the last.

    As in Cui et al., Class-Balanced Loss Based on Effective Number of Samples (CVPR 2019). Every class keeps at least
    one image; the images kept stay in their order.

    Args:
        ratio: head over tail, at least 1.

    Raises:
        InputError: a smaller ratio.
    """
    if not ratio >= 1:
        raise InputError("a ratio of at least 1", str(ratio), "10 to 100 is usual")
    counts = images.labels.bincount()
    classes = counts.nonzero().flatten()
    decay = ratio ** -torch.linspace(0, 1, len(classes), dtype=torch.float64)
    # As many as possible while the shape stays exponential, also where the classes are not of one size.
    wanted = ((counts[classes] / decay).min() * decay).round().clamp(min=1).long()
    kept = []
    for label, count in zip(classes, wanted.tolist(), strict=True):
        members = (images.labels == label).nonzero().flatten()
        kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return images.take(torch.cat(kept).sort().values)


def duplicate(
    images: TensorImages,
    *,
    copies: int,
    fraction: float | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorImages:
    """Let some images occur ``copies`` times, as popular pictures do in crawled sets; the others stay single.

    Args:
        copies: how often each of them occurs in the result, at least 1.
        fraction: share of the images to repeat, drawn without replacement from ``generator``; or
        indices: int64, the images to repeat.

    Returns:
        The set with every repeated image's copies side by side.

    Raises:
        InputError: not exactly one of ``fraction`` (with its generator) and ``indices``, or values out of range.
    """
    if copies < 1:
        raise InputError("at least 1 copy", str(copies), "1 leaves the set as it is")
    if (fraction is None) == (indices is None):
        raise InputError("either a fraction or indices", "both or neither", "pass one of them")
    if indices is None:
        assert fraction is not None
        indices = _some(len(images), fraction, generator)
    _check_indices(indices, len(images))
    times = torch.ones(len(images), dtype=torch.int64)
    times[indices] = copies
    return images.take(torch.arange(len(images)).repeat_interleave(times))


def noisy_labels(images: TensorImages, *, fraction: float, classes: int, generator: torch.Generator) -> TensorImages:
    """Give a share of the images a wrong label, each of the other classes being as likely. Pixels are shared.

    Args:
        fraction: share of the images, 0 to 1; exactly that many, to the nearest one, change their label.
        classes: number of classes, at least 2.

    Raises:
        InputError: values out of range.
    """
    if classes < 2:
        raise InputError("at least 2 classes", str(classes), "a wrong label needs another class")
    rows = _some(len(images), fraction, generator)
    labels = images.labels.clone()
    shift = torch.randint(1, classes, (len(rows),), generator=generator)
    labels[rows] = (labels[rows] + shift) % classes
    return TensorImages(images.pixels, labels)


def _some(count: int, fraction: float, generator: torch.Generator | None) -> Tensor:
    if not 0 <= fraction <= 1:
        raise InputError("a fraction from 0 to 1", str(fraction), "choose another")
    if generator is None:
        raise InputError("a generator to draw with", "none", "pass generator=torch.Generator().manual_seed(0)")
    return torch.randperm(count, generator=generator)[: round(count * fraction)]


def _check_indices(indices: Tensor, count: int) -> None:
    outside = indices[(indices < 0) | (indices >= count)]
    if len(outside):
        raise InputError(f"indices from 0 to {count - 1}", str(int(outside[0])), "choose among the images there are")
