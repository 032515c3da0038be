"""Text to adapt a language model to: blocks of tokens to be continued, or labelled rows to be classified."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scrimp.data.variants import stratified_split
from scrimp.jobs.adapt_config import AdaptConfig
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError, require

LABELLED = (".jsonl", ".csv")
"""Endings of files with a text and a label a row."""
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm")
_HELD_OUT = 0.1
_SPLIT = 6  # key of the draw of the rows held out


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Rows of tokens, map-style, handed over as whole batches like `scrimp.data.images.Images`.

    Attributes:
        tokens: int64 [N, length + 1], each row's last token only to be predicted; or of labelled rows [N, 2, length],
            tokens and which of them count.
        labels: int64 [N]; 0 without labels.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, labels, and the indices themselves."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return self.tokens[rows], self.labels[rows], rows

    def take(self, indices: Tensor) -> TokenSet:
        """Only these rows, in this order."""
        return TokenSet(self.tokens[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class TextData:
    """Text to train and to test on.

    Attributes:
        classes: name of each class number; none where text is to be continued.
        name: what receipts call the data.
    """

    train: TokenSet
    test: TokenSet
    classes: tuple[str, ...]
    name: str
    skipped: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Tokens the model is given at a time."""
        return self.train.tokens.shape[-1] - (0 if self.classes else 1)


def is_text(model: str, data: Any) -> bool:
    """Whether the job is about text: by the data's file name, or by a transformers folder as its model."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() and not (folder / "weights.safetensors").is_file():
        return True
    if not isinstance(data, (str, Path)):
        return False
    path = Path(data).expanduser()
    return path.suffix in (".txt", *LABELLED) or any(path.glob("*.txt"))


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a transformers folder, or of a hub name; with a padding token.

    Raises:
        InputError: there is none.
        MissingExtraError: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    local = Path(source).expanduser().is_dir()
    where = str(Path(source).expanduser()) if local else source
    # Some classes make an empty tokenizer of a folder that has none.
    if local and not any(next(Path(where).glob(name), None) for name in _TOKENIZER_FILES):
        raise InputError("a model folder with a tokenizer", f"{source} without", "save the tokenizer there too")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, local_files_only=local)
    except Exception as error:  # each tokenizer class has its own way of missing its files
        got = f"{source} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        raise InputError("a model folder with a tokenizer", got, "save the tokenizer there too") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError("a tokenizer with a padding or an end token", f"{source} with neither", "give it one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_text(config: AdaptConfig, tokenizer: Any) -> TextData:
    """The text that ``config.data`` names, tokenised.

    Raises:
        InputError: no such file, a row without its columns, or too little text.
    """
    path = Path(config.data).expanduser()
    if path.suffix in LABELLED and path.is_file():
        return _labelled(path, config, tokenizer)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.suffix == ".txt" else []
    if not files or not files[0].is_file():
        got = f"{config.data}, which is absent" if not path.exists() else f"{config.data}"
        wanted = f"a .txt file, a folder of them, or a {' or '.join(LABELLED)} file"
        raise InputError(wanted, got, "check DATA; images need a timm model or its weights")
    return _blocks(path, files, config, tokenizer)


def _blocks(path: Path, files: list[Path], config: AdaptConfig, tokenizer: Any) -> TextData:
    """The first nine tenths of every file to train on, the last to test on, cut in blocks without overlap."""
    parts: tuple[list[int], list[int]] = ([], [])
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for file in files:
        # Not all at once: a warning about texts longer than the model's positions is of no use here.
        tokens = [token for line in _read(file).splitlines(keepends=True) for token in _tokens(tokenizer, line)]
        cut = len(tokens) - round(len(tokens) * _HELD_OUT)
        for part, piece in zip(parts, (tokens[:cut], tokens[cut:]), strict=True):
            part.extend((between if part else []) + piece)
    train, test = (_cut(part, config.length) for part in parts)
    if not len(train) or not len(test):
        got = f"{len(parts[0])} and {len(parts[1])}"
        wanted = f"at least {config.length + 1} tokens to train and to test on"
        raise InputError(wanted, got, "pass more text, or a shorter --length")
    return TextData(train=train, test=test, classes=(), name=path.name)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _cut(tokens: list[int], length: int) -> TokenSet:
    """Blocks of ``length`` tokens and the one after them, so that every token but the first is predicted once."""
    count = max(0, (len(tokens) - 1) // length)
    whole = torch.tensor(tokens, dtype=torch.int64)
    blocks = whole[: count * length + 1].unfold(0, length + 1, length) if count else whole.new_zeros(0, length + 1)
    return TokenSet(blocks.contiguous(), torch.zeros(count, dtype=torch.int64))


def _labelled(path: Path, config: AdaptConfig, tokenizer: Any) -> TextData:
    texts, names = _columns(path, config)
    classes = tuple(sorted(set(names)))
    if len(classes) < 2:
        raise InputError("rows of at least two classes", f"{len(classes)} in {path}", "check --label-column")
    if config.test is None:
        data = _encoded(texts, names, classes, config.length, tokenizer)
        rows = stratified_split(data.labels, fraction=_HELD_OUT, generator=generator_for(0, _SPLIT))
        train, test = (data.take(part) for part in rows)
    else:
        others, shown = _columns(config.test.expanduser(), config)
        strangers = sorted(set(shown) - set(classes))
        if strangers:
            raise InputError(f"classes of {path}", f"'{strangers[0]}' in {config.test}", "correct the labels")
        train = _encoded(texts, names, classes, config.length, tokenizer)
        test = _encoded(others, shown, classes, config.length, tokenizer)
    if not len(test):
        raise InputError("a class of two rows or more, to hold one out", f"none in {path}", "pass --test FILE")
    return TextData(train=train, test=test, classes=classes, name=path.name)


def _encoded(texts: list[str], names: list[str], classes: tuple[str, ...], length: int, tokenizer: Any) -> TokenSet:
    """All rows at one length, the longest one's or ``length``: a step then costs what was counted."""
    found = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    widest = max(1, max(map(len, found), default=1))
    tokens = torch.full((len(found), 2, widest), tokenizer.pad_token_id, dtype=torch.int64)
    tokens[:, 1] = 0
    for row, ids in zip(tokens, found, strict=True):
        row[0, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        row[1, : max(1, len(ids))] = 1
    number = {name: place for place, name in enumerate(classes)}
    return TokenSet(tokens, torch.tensor([number[name] for name in names], dtype=torch.int64))


def _columns(path: Path, config: AdaptConfig) -> tuple[list[str], list[str]]:
    """Texts and labels of all rows, in their order."""
    texts: list[str] = []
    names: list[str] = []
    for number, row in enumerate(_rows(path), 1):
        for column, into in ((config.text_column, texts), (config.label_column, names)):
            if not isinstance(row, dict) or row.get(column) is None:
                got = f"row {number} of {path} without"
                raise InputError(f"a column '{column}'", got, "name it: --text-column, --label-column")
            into.append(str(row[column]))
    return texts, names


def _rows(path: Path) -> Iterator[Any]:
    lines = _read(path).splitlines()
    if path.suffix == ".csv":
        yield from csv.DictReader(lines)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parsed(line, lambda number=number: f"line {number} of {path}")  # type: ignore[misc]


def _parsed(line: str, place: Callable[[], str]) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError("a JSON object a line", f"{place()} ({error})", "correct it") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            "a readable text file in UTF-8", f"{path} ({reason})", "check the path and the file"
        ) from error
