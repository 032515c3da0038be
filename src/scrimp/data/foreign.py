"""Data sets of other libraries: torch's map-style ones and Hugging Face's, known by their shape, never imported."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scrimp.data.decode import ImageError, Peek, common_form
from scrimp.data.folders import TEST_NAMES, TRAIN_NAME
from scrimp.data.images import Images, OnDemandImages, Progress, TensorImages
from scrimp.data.source import Source, listed, same_classes
from scrimp.data.values import peek_value, to_pixels
from scrimp.primitives.errors import InputError

_PEEKED = 256  # images of a torch data set, evenly spread, that settle size and colour: it has no heads to read


class DatasetImages(OnDemandImages):
    """Images of a map-style data set, decoded each time they are asked for.

    Args:
        dataset: ``dataset[row][key]`` is what `to_pixels` takes.
        labels: int64 [N], for the rows asked for.
        size: height and width in pixels.
        mode: ``"RGB"`` or ``"L"``.
        key: place of the image in a sample: a column name or a number.
        rows: int64 [N], rows of the data set; all of them when not given.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor,
        *,
        size: tuple[int, int],
        mode: str,
        key: str | int = 0,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(labels, (1 if mode == "L" else 3, *size))
        self.dataset, self.key = dataset, key
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def read(self, row: int) -> Tensor:
        value = _fetch(self.dataset, int(self.rows[row]))[self.key]
        return to_pixels(value, size=self.shape[1:], mode=self.mode, name=self.name_of(row))

    def name_of(self, row: int) -> str:
        return f"row {int(self.rows[row])}"

    def take(self, indices: Tensor) -> DatasetImages:
        taken = DatasetImages(
            self.dataset,
            self.labels[indices],
            size=self.shape[1:],
            mode=self.mode,
            key=self.key,
            rows=self.rows[indices],
        )
        taken.threads = self.threads
        return taken


def is_dataset(data: Any) -> bool:
    """Whether ``data`` is map-style: it has a length and can be indexed, and is no text."""
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, bytes))


def dataset_source(
    data: Any,
    test: Any = None,
    *,
    size: tuple[int, int] | None = None,
    cache_bytes: float = 2e9,
    skip: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Read one or two map-style data sets, or a Hugging Face ``DatasetDict``.

    A torch data set gives (image, class number). It is gone through once, here, and kept in memory if the whole takes
    no more than ``cache_bytes``; its own transforms are part of that, so augmentation does not belong in them. A
    Hugging Face one has one ``Image`` and one ``ClassLabel`` column; a format or transform set on it is left aside.
    Size and colour, where not given, are settled by a spread of 256 images.

    Raises:
        InputError: anything that does not fit the above, by row or column.
    """
    parts = [part for part in _pair(data, test) if part is not None]
    for part in parts:
        if not is_dataset(part) or len(part) == 0:
            raise InputError("a map-style data set with images in it", _described(part), "pass (train, test) of them")
    if len({_is_hub(part) for part in parts}) > 1:
        raise InputError("two data sets of one library", "one of Hugging Face's and another", "convert one of them")
    form = common_form((peek for part in parts for peek in _peeks(part)), size)
    total = sum(map(len, parts)) * (1 if form[1] == "L" else 3) * form[0][0] * form[0][1]
    if _is_hub(parts[0]):
        read = [_hub_part(part, form) for part in parts]
    else:
        read = [_torch_part(part, form, keep=total <= cache_bytes, skip=skip, progress=progress) for part in parts]
    return Source(
        name=_name(parts[0]),
        classes=_classes(read),
        train=read[0].images,
        test=read[1].images if len(read) == 2 else None,
        checked=not _is_hub(parts[0]),
        skipped=tuple(name for part in read for name in part.skipped),
    )


class _Part(NamedTuple):
    images: Images
    classes: tuple[str, ...]  # empty where the data set does not name them
    skipped: tuple[str, ...] = ()


def _pair(data: Any, test: Any) -> tuple[Any, Any]:
    if test is None and isinstance(data, Mapping):
        held = next((name for name in TEST_NAMES if name in data), None)
        if TRAIN_NAME not in data:
            raise InputError(f"a split '{TRAIN_NAME}'", f"only {listed(map(str, data))}", "pass (train, test) instead")
        return data[TRAIN_NAME], None if held is None else data[held]
    return data, test


def _is_hub(dataset: Any) -> bool:
    return hasattr(dataset, "features") and hasattr(dataset, "column_names")


def _described(value: Any) -> str:
    return f"{type(value).__name__} of length 0" if is_dataset(value) else type(value).__name__


def _name(dataset: Any) -> str:
    info = getattr(dataset, "info", None)
    return str(getattr(info, "dataset_name", None) or type(dataset).__name__)


def _hub_part(dataset: Any, form: tuple[tuple[int, int], str]) -> _Part:
    raw, column = _hub_images(dataset)
    name = _only_column(dataset, "ClassLabel")
    feature = dataset.features[name]
    values = raw.select_columns([name])[:][name]
    for row, label in enumerate(values):
        _label(label, row)
    images = DatasetImages(raw, torch.tensor(values), size=form[0], mode=form[1], key=column)
    return _Part(images, tuple(feature.names))


def _hub_images(dataset: Any) -> tuple[Any, str]:
    """The data set with its pictures left encoded, so that ours is the only decoder, and their column."""
    column = _only_column(dataset, "Image")
    kind = type(dataset.features[column])
    return dataset.with_format(None).cast_column(column, kind(decode=False)), column


def _only_column(dataset: Any, kind: str) -> str:
    found = [name for name, feature in dataset.features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        every = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items())
        remedy = "cast one with cast_column or class_encode_column" if not found else "drop the others: remove_columns"
        raise InputError(f"one column of type {kind}", f"{len(found)} among {every}", remedy)
    return str(found[0])


def _torch_part(
    dataset: Any, form: tuple[tuple[int, int], str], *, keep: bool, skip: bool, progress: Progress | None
) -> _Part:
    (height, width), mode = form
    count = len(dataset)
    shape = (count if keep else 0, 1 if mode == "L" else 3, height, width)
    pixels, labels = torch.empty(shape, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    broken: list[int] = []
    for row in range(count):
        try:
            value, label = _sample(dataset, row)
            labels[row] = _label(label, row)
            if keep or skip:
                image = to_pixels(value, size=(height, width), mode=mode, name=f"row {row}")
            if keep:
                pixels[row] = image
        except ImageError:
            if not skip:
                raise
            broken.append(row)
        if progress is not None:
            progress(row + 1, count)
    images: Images = TensorImages(pixels, labels) if keep else DatasetImages(dataset, labels, size=form[0], mode=mode)
    if broken:
        images = images.take(torch.tensor(sorted(set(range(count)) - set(broken)), dtype=torch.int64))
    return _Part(images, _named_classes(dataset), tuple(f"row {row}" for row in broken))


def _sample(dataset: Any, row: int) -> tuple[Any, Any]:
    sample = _fetch(dataset, row)
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        raise InputError("samples (image, class number)", f"{type(sample).__name__} at row {row}", "wrap the data set")
    return sample[0], sample[1]


def _fetch(dataset: Any, row: int) -> Any:
    try:
        return dataset[row]
    except (OSError, SyntaxError) as error:  # what PIL raises inside other people's data sets
        raise ImageError.of(f"row {row}", " ".join(str(error).split())) from error


def _label(value: Any, row: int) -> int:
    try:
        label = operator.index(value)
    except TypeError:
        label = -1
    if label < 0:
        raise InputError("a class number from 0 on", f"{value!r} at row {row}", "pass a split whose labels are known")
    return label


def _named_classes(dataset: Any) -> tuple[str, ...]:
    found = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    return tuple(map(str, found)) if isinstance(found, (list, tuple)) else ()


def _classes(parts: list[_Part]) -> tuple[str, ...]:
    """The classes' names, checked against the other split and against the labels."""
    named = [part.classes for part in parts if part.classes]
    if len(named) == 2:
        same_classes(named[0], named[1])
        if named[0] != named[1]:
            raise InputError("one order of classes in train and test", "two", "use align_labels_with_mapping")
    seen = [set(part.images.labels.tolist()) for part in parts]
    if not named:
        named = [tuple(str(label) for label in range(max(seen[0], default=0) + 1))]
        if len(seen) == 2 and not seen[1] <= seen[0]:
            same_classes(map(str, seen[0]), map(str, seen[0] | seen[1]))
    largest = max(max(labels, default=0) for labels in seen)
    if largest >= len(named[0]):
        raise InputError(f"class numbers up to {len(named[0]) - 1}", str(largest), "name every class, or none")
    return named[0]


def _peeks(dataset: Any) -> Iterator[Peek | None]:
    raw, key = _hub_images(dataset) if _is_hub(dataset) else (dataset, 0)
    count = len(dataset)
    for row in sorted({place * count // _PEEKED for place in range(_PEEKED)}):
        try:
            value = _fetch(raw, row)[key] if _is_hub(dataset) else _sample(dataset, row)[0]
            yield peek_value(value, f"row {row}")
        except ImageError:
            yield None
