"""Batches of images or text for `scrimp swap`, at every size asked for."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.data import ImageData, load_images, normalise
from scrimp.jobs.swap_config import SwapConfig
from scrimp.jobs.swap_subject import Batch, Subject
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError

_TEXT_SIZE = 512  # tokens, where neither the person nor the model says


def sizes_of(config: SwapConfig, subject: Subject) -> list[int]:
    """Sides or lengths to measure at, smallest first.

    Raises:
        InputError: a text longer than the model has places for.
    """
    if subject.tokenizer is None:
        return sorted(config.sizes) or [subject.native or 224]
    most = subject.native or max(config.sizes, default=_TEXT_SIZE)
    found = sorted(config.sizes) or [min(most, _TEXT_SIZE)]
    if found[-1] > most:
        raise InputError(f"texts of up to {most} tokens for this model", f"{found[-1]}", "correct --sizes")
    if found[0] < 2:
        raise InputError("texts of at least 2 tokens", f"{found[0]}", "correct --sizes")
    return found


def batch_size_of(config: SwapConfig, subject: Subject) -> int:
    return config.batch_size or (1 if subject.gives == "tokens" else 8)


class _Lazy(Sequence[Batch]):
    """Batches made when asked for: large images need not all be in memory at once."""

    def __init__(self, parts: Sequence[Tensor], make: Callable[[Tensor], Batch]) -> None:
        self._parts, self._make = parts, make

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: Any) -> Any:
        return self._make(self._parts[number])


def load_batches(config: SwapConfig, subject: Subject, size: int) -> Sequence[Batch]:
    """Up to ``config.samples`` images or texts at this size.

    Raises:
        InputError: the data cannot be used, or does not suit the model.
    """
    rows = batch_size_of(config, subject)
    is_text = Path(config.data).suffix in (".txt", ".csv")
    if is_text != (subject.tokenizer is not None):
        wanted = "a .txt or .csv file for a text model" if subject.tokenizer is not None else "images for this model"
        raise InputError(wanted, config.data, "pass data of the model's kind")
    if subject.tokenizer is None:
        return _image_batches(config, subject, size=size, rows=rows)
    return list(_text_batches(config, subject, size=size, rows=rows))


def _image_batches(config: SwapConfig, subject: Subject, *, size: int, rows: int) -> Sequence[Batch]:
    data = load_images(config.data, size=size, cache_bytes=0)  # a few hundred of them are asked for
    chosen = torch.randperm(len(data.test), generator=generator_for(config.seed))[: config.samples]
    mean, std = _statistics(config, subject, data)
    same_classes = subject.classes in (None, len(data.classes))

    def make(part: Tensor) -> Batch:
        images = normalise(_channels(data.test.batch(part), subject.channels), mean, std)
        inputs = (images,) if subject.main_input is None else {subject.main_input: images}
        return Batch(inputs, data.test.labels[part] if same_classes else None)

    return _Lazy(chosen.split(rows), make)


def _statistics(config: SwapConfig, subject: Subject, data: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = subject.channels or len(data.mean)
    if config.normalize == "model" and subject.mean is None:
        raise InputError("a model that says how its images were normalised", subject.name, "pass --normalize data")
    if config.normalize != "data" and subject.mean is not None and subject.std is not None:
        return _as_many(subject.mean, channels), _as_many(subject.std, channels)
    return _as_many(data.mean, channels), _as_many(data.std, channels)


def _as_many(figures: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return figures if len(figures) == channels else (sum(figures) / len(figures),) * channels


def _channels(images: Tensor, wanted: int | None) -> Tensor:
    """Grey images for a model of colours, as three equal channels; the reverse is refused."""
    if wanted is None or images.shape[1] == wanted:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, wanted, -1, -1)
    raise InputError(f"images of {wanted} channel(s) for this model", f"{images.shape[1]}", "convert the images")


def _text_batches(config: SwapConfig, subject: Subject, *, size: int, rows: int) -> Iterator[Batch]:
    texts, labels = _read_texts(Path(config.data))
    if labels is None or subject.gives == "tokens":
        windows = _windows(subject.tokenizer, "\n".join(texts), size=size, count=config.samples)
        if subject.gives == "tokens":
            for part in windows.split(rows):
                yield Batch({"input_ids": part, "attention_mask": torch.ones_like(part)})
            return
        texts, labels = [subject.tokenizer.decode(window) for window in windows], None
    chosen = torch.randperm(len(texts), generator=generator_for(config.seed))[: config.samples]
    for part in chosen.split(rows):
        batch = [texts[row] for row in part.tolist()]
        encoded = subject.tokenizer(batch, truncation=True, max_length=size, padding=True, return_tensors="pt")
        wanted = {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
        known = None if labels is None else torch.tensor([labels[row] for row in part.tolist()])
        yield Batch(wanted, known if subject.gives == "classes" else None)


def _windows(tokenizer: Any, text: str, *, size: int, count: int) -> Tensor:
    """[windows, size]: runs of tokens spread evenly over the text, up to ``count`` that do not overlap."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(encoded, dtype=torch.int64)
    if len(tokens) < size:
        raise InputError(f"a text of at least {size} tokens", f"{len(tokens)}", "pass a longer text, or --sizes")
    whole = len(tokens) // size
    chosen = torch.arange(min(count, whole)) * whole // min(count, whole)
    return tokens[: whole * size].view(whole, size)[chosen]


def _read_texts(path: Path) -> tuple[list[str], list[int] | None]:
    """Lines of a .txt file; the columns ``text`` and, where there is one, ``label`` of a .csv file."""
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")], None
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError("a text file in UTF-8", f"{path} ({error})", "check the path and the file") from error
    if not rows or "text" not in rows[0]:
        raise InputError("a .csv file with a column 'text'", f"{path} without one", "name the columns in line 1")
    texts = [row["text"] or "" for row in rows]
    if "label" not in rows[0]:
        return texts, None
    try:
        return texts, [int(row["label"]) for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(
            "labels as class numbers", f"{path} ({error})", "number the classes as the model does"
        ) from error
