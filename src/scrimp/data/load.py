"""One call from whatever a person has, to training and test images that are ready to be drawn from."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.data.folders import folder_source, unlabelled_source
from scrimp.data.foreign import dataset_source
from scrimp.data.images import Images, OnDemandImages, Progress, TensorImages, pair_of, read_all
from scrimp.data.named import BUILTIN, NAMED, builtin_source, named_source
from scrimp.data.source import Source, listed
from scrimp.data.variants import stratified_split
from scrimp.primitives.errors import InputError

_MEASURED, _MEASURED_FILES = 10_000, 1_000  # images that mean and std are taken from: in memory, to be decoded


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images to train and to test on.

    Attributes:
        classes: name of each class number.
        name: what receipts call the data.
        mean, std: of each channel of the training images, for pixels in 0 to 1; see `scrimp.data.normalise`.
        skipped: images left out because they cannot be decoded.
    """

    train: Images
    test: Images
    classes: tuple[str, ...]
    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()


def load_images(
    data: Any = None,
    *,
    test: Any = None,
    size: int | tuple[int, int] | None = None,
    on_corrupt: str = "refuse",
    cache_bytes: float = 2e9,
    root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    test_fraction: float = 0.1,
    unlabelled: bool = False,
    progress: Progress | None = None,
) -> ImageData:
    """Load a set of images, labelled as a rule.

    Args:
        data: one of

            - ``None`` or ``"builtin"``: a sample of Fashion-MNIST that comes with the package;
            - ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, ``"cifar100"``: see `named_source`;
            - a folder: see `folder_source` (one with such a name: ``"./mnist"``);
            - a map-style data set of torch or Hugging Face, a pair (train, test) of them (or of folders), or a
              ``DatasetDict``: see `dataset_source`;
            - an `ImageData`, given back as it is.

            What comes without test images is split, the same share of every class held out.
        test: a folder or data set to test on, where ``data`` is only the training part.
        size: side in pixels, or (height, width): pictures are scaled to cover it and cut centrally. When not given:
            the pictures' own size if they share one up to 64, else 224.
        on_corrupt: ``"refuse"`` names the first picture that cannot be decoded, at once where the set fits in memory,
            otherwise when it is drawn; ``"skip"`` tries every picture first and lists what it leaves out.
        cache_bytes: sets of up to so many bytes, decoded, are kept in memory; larger ones are decoded on demand.
        root: folder of named sets, instead of $SCRIMP_DATA.
        seed: of the split.
        test_fraction: share of every class that is held out when there is a split to make.
        unlabelled: take every image of a folder, whatever folders it is in, as of one class; see `unlabelled_source`.
        progress: called with images done and images in all while a set is decoded.

    Raises:
        InputError: the data cannot be used; says why and what to do.
    """
    if isinstance(data, ImageData) and not unlabelled:
        return data
    if on_corrupt not in ("refuse", "skip"):
        raise InputError("on_corrupt 'refuse' or 'skip'", repr(on_corrupt), "choose one of them")
    skip = on_corrupt == "skip"
    form = None if size is None else pair_of(size)
    if test is None and isinstance(data, tuple) and len(data) == 2:
        data, test = data
    options = _Options(form, skip, cache_bytes, seed, test_fraction, progress)
    if unlabelled:
        return _finish(_without_labels(data, test, form), options)
    if data is None or isinstance(data, (str, os.PathLike)):
        source = _by_name(data, test, root, options)
    else:
        source = dataset_source(data, test, size=form, cache_bytes=cache_bytes, skip=skip, progress=progress)
    return _finish(source, options)


@dataclass(frozen=True)
class _Options:
    form: tuple[int, int] | None
    skip: bool
    cache_bytes: float
    seed: int
    test_fraction: float
    progress: Progress | None


def _by_name(data: str | os.PathLike[str] | None, test: Any, root: Any, options: _Options) -> Source:
    if data is not None and data != BUILTIN and data not in NAMED:
        _check_name(data)
        if test is not None and not isinstance(test, (str, os.PathLike)):
            raise InputError("a folder to test on", type(test).__name__, "pass two folders, or two data sets")
        return folder_source(data, test, size=options.form)
    if test is not None:
        raise InputError("no test data beside a named set", "some", "leave test out: the set has its own")
    source = builtin_source() if data is None or data == BUILTIN else named_source(str(data), root, options.progress)
    if options.form is None or source.train.shape[1:] == options.form:
        return source
    return replace(
        dataset_source(
            source.train, source.test, size=options.form, cache_bytes=options.cache_bytes, progress=options.progress
        ),
        name=source.name,
        classes=source.classes,
    )


def _without_labels(data: Any, test: Any, form: tuple[int, int] | None) -> Source:
    for part in (data,) if test is None else (data, test):
        if not isinstance(part, (str, os.PathLike)) or part in (BUILTIN, *NAMED):
            got = repr(part) if part is None or isinstance(part, str) else type(part).__name__
            raise InputError(
                "a folder of unlabelled images", got, "leave unlabelled out: sets that have labels come with them"
            )
        _check_name(part)
    return unlabelled_source(data, test, size=form)


def _check_name(data: str | os.PathLike[str]) -> None:
    """A misspelt name looks like a folder that is not there; say so."""
    text = os.fspath(data)
    if os.sep in text or Path(text).expanduser().exists():
        return
    near = difflib.get_close_matches(text.lower(), [BUILTIN, *NAMED], n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "check the spelling or the path"
    raise InputError(f"a folder, or one of {', '.join([BUILTIN, *NAMED])}", repr(text), remedy)


def _finish(source: Source, options: _Options) -> ImageData:
    """Split where there is one part, bring it into memory where it fits, and measure it."""
    train, test = source.train, source.test
    if test is None:
        generator = torch.Generator().manual_seed(options.seed)
        rows, held = stratified_split(train.labels, fraction=options.test_fraction, generator=generator)
        train, test = train.take(rows), train.take(held)
    keep = _size(train) + _size(test) <= options.cache_bytes
    train, lost = _settled(train, keep, source, options)
    test, lost_too = _settled(test, keep, source, options)
    skipped = source.skipped + lost + lost_too
    if source.test is None and lost + lost_too:
        # Split again without them, lest a small class is left with nothing to be tested on.
        return _finish(replace(_without(source, lost + lost_too), skipped=skipped), replace(options, skip=False))
    _check_parts(train, test, source.classes, skipped)
    mean, std = channel_statistics(train)
    return ImageData(train, test, source.classes, source.name, mean, std, skipped)


def _settled(images: Images, keep: bool, source: Source, options: _Options) -> tuple[Images, tuple[str, ...]]:
    """The images in memory, or tried, or left to be decoded on demand; and the names of those lost on the way."""
    if not isinstance(images, OnDemandImages) or source.checked or not (keep or options.skip):
        return images, ()
    pixels, broken = read_all(images, keep=keep, skip=options.skip, progress=options.progress)
    ready: Images = images if pixels is None else TensorImages(pixels, images.labels)
    if broken:
        sound = torch.ones(len(images), dtype=torch.bool)
        sound[broken] = False
        ready = ready.take(sound.nonzero().flatten())
    return ready, tuple(images.name_of(row) for row in broken)


def _without(source: Source, names: tuple[str, ...]) -> Source:
    assert isinstance(source.train, OnDemandImages)
    lost = set(names)
    rows = [row for row in range(len(source.train)) if source.train.name_of(row) not in lost]
    return replace(source, train=source.train.take(torch.tensor(rows, dtype=torch.int64)))


def _check_parts(train: Images, test: Images, classes: tuple[str, ...], skipped: tuple[str, ...]) -> None:
    if skipped and len(train) == 0:
        raise InputError("a readable image", f"none; {len(skipped)} were skipped", "check the files")
    bare = sorted(set(range(len(classes))) - set(train.labels.tolist()))
    if skipped and bare:
        names = listed(classes[label] for label in bare)
        raise InputError("a readable training image in every class", f"none in {names}", "replace the damaged files")
    if len(train) == 0 or len(test) == 0:
        part = "train" if len(train) == 0 else "test"
        raise InputError(f"images to {part} on", "none", "add images: a split takes at least two of a class")


def _size(images: Images) -> int:
    channels, height, width = images.shape
    return len(images) * channels * height * width


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in 0 to 1, rounded to four places.

    From up to 10,000 images in memory, or 1,000 that are to be decoded, spread evenly over the set. A channel that
    never varies gets 1 for its deviation, so that dividing by it is harmless.
    """
    most = _MEASURED_FILES if isinstance(images, OnDemandImages) else _MEASURED
    count = min(len(images), most)
    sample: Images = images.take(torch.arange(count) * len(images) // count)
    if isinstance(sample, OnDemandImages):
        pixels, _ = read_all(sample)
        assert pixels is not None
        sample = TensorImages(pixels, sample.labels)
    sums = torch.zeros(2, images.shape[0], dtype=torch.float64)
    for start in range(0, count, 256):
        pixels = sample.batch(torch.arange(start, min(start + 256, count))).double() / 255
        sums += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
    mean, square = sums / (count * images.shape[1] * images.shape[2])
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std < 1e-4, 1.0, std)
    return _rounded(mean), _rounded(std)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values.tolist())
