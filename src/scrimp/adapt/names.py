"""Names and shapes of a model's weights as a short text: numbered layers fold into one item.

Grammar; a range repeats the entries behind it once a number, in order, and ranges do not nest::

    text  = "" | item ("," item)*
    item  = entry | name "{" first "-" last "}" name "(" entry ("," entry)* ")"
    entry = name ":" shape
    shape = "" | size ("x" size)*

``blocks.{0-11}.(attn.qkv:576x192,mlp.fc1:768x192)`` is ``blocks.0.attn.qkv``, ``blocks.0.mlp.fc1``,
``blocks.1.attn.qkv`` and so on. The characters ``%{}(),:`` of a name are written as ``%`` and two hexadecimal digits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scrimp.primitives.errors import InputError

Named = tuple[str, tuple[int, ...]]

_MOST_NAMES = 100_000
_MOST_CHARACTERS = 20_000_000  # of all names together: what a small hostile text may make us build
_LONGEST_PERIOD = 1024  # weights a layer
_LARGEST_NUMBER = 999_999_999
_LARGEST_SIZE = 10**18 - 1

_SPECIAL = re.compile(r"[%{}(),:]")
_ESCAPE = re.compile(r"%.{0,2}", re.DOTALL)
_ESCAPED = {f"%{ord(character):02X}": character for character in "%{}(),:"}
_DIGITS = r"(?:0|[1-9][0-9]{0,8})"
_NUMBER = re.compile(rf"(?<![0-9]){_DIGITS}(?![0-9])")
# Possessive, lest a long garbled name is tried again from each of its characters.
_NAME = r"[^{}(),:]*+"
_ENTRY = re.compile(rf"({_NAME}):((?:[0-9]{{1,18}}(?:x[0-9]{{1,18}})*+)?)")
_RANGE = re.compile(rf"({_NAME})\{{({_DIGITS})-({_DIGITS})\}}({_NAME})\(")


def fold(names_with_shapes: Sequence[Named]) -> str:
    """Names and shapes as a short text, from which `unfold` gives them back in their order.

    Args:
        names_with_shapes: any names, repeated or not, each with its shape.

    Returns:
        Text of the grammar above.

    Raises:
        InputError: more than 100,000 names or 20,000,000 characters, or a size below 0 or of 19 digits.
    """
    entries = [(_escaped(name), _shape_text(shape)) for name, shape in names_with_shapes]
    _check_amount(len(entries), sum(len(name) for name, _ in entries))
    places = {entry: place for place, entry in enumerate(entries)}
    items, place = [], 0
    while place < len(entries):
        item, covered = _item(entries, places, place)
        items.append(item)
        place += covered
    return ",".join(items)


def unfold(text: str) -> list[Named]:
    """Names and shapes that `fold` wrote.

    Raises:
        InputError: text of another grammar, or more names or characters than `fold` takes.
    """
    found: list[Named] = []
    characters = 0
    for item in _parsed(text):
        _check_amount(len(found) + item.repeats * len(item.entries), characters)
        digits = sum(len(number) for number in item.numbers())
        fixed = len(item.before) + len(item.after)
        characters += len(item.entries) * (digits + item.repeats * fixed)
        characters += item.repeats * sum(len(name) for name, _ in item.entries)
        _check_amount(len(found), characters)
        heads = [item.before + number + item.after for number in item.numbers()]
        found += [(_plain(head + name), shape) for head in heads for name, shape in item.entries]
    return found


class _Item(NamedTuple):
    """Entries whose names begin with ``before``, a number of ``range`` if there is one, and ``after``."""

    before: str
    range: range | None
    after: str
    entries: list[Named]

    @property
    def repeats(self) -> int:
        return 1 if self.range is None else len(self.range)

    def numbers(self) -> Iterator[str]:
        return iter([""]) if self.range is None else map(str, self.range)


def _item(entries: list[tuple[str, str]], places: dict[tuple[str, str], int], place: int) -> tuple[str, int]:
    """The text for the entries from ``place`` on, and how many it covers: of all numbers in the name, the one that
    repeats over most."""
    name, shape = entries[place]
    text, covered = f"{name}:{shape}", 1
    for match in _NUMBER.finditer(name):
        number = int(match[0])
        following = f"{name[: match.start()]}{number + 1}{name[match.end() :]}"
        period = places.get((following, shape), place) - place
        if not 0 < period <= _LONGEST_PERIOD:
            continue
        found, count = _ranged(entries, place, name[: match.start()], number=number, period=period)
        plain = sum(len(name) + len(shape) + 2 for name, shape in entries[place : place + count]) - 1
        if count > covered and len(found) < plain:
            text, covered = found, count
    return text, covered


def _ranged(entries: list[tuple[str, str]], place: int, before: str, *, number: int, period: int) -> tuple[str, int]:
    """A range over the ``period`` entries from ``place`` on, and how many it covers; 0 if they do not repeat."""
    head = f"{before}{number}"
    block = entries[place : place + period]
    if not all(name.startswith(head) for name, _ in block):
        return "", 0
    tails = [(name.removeprefix(head), shape) for name, shape in block]
    last = number
    while last < _LARGEST_NUMBER:
        start = place + (last + 1 - number) * period
        if entries[start : start + period] != [(f"{before}{last + 1}{tail}", shape) for tail, shape in tails]:
            break
        last += 1
    after = _common_start([tail for tail, _ in tails])
    inside = ",".join(f"{tail.removeprefix(after)}:{shape}" for tail, shape in tails)
    return f"{before}{{{number}-{last}}}{after}({inside})", (last + 1 - number) * period if last > number else 0


def _common_start(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    agreeing = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in agreeing)


def _parsed(text: str) -> Iterator[_Item]:
    """Items one by one, so that too large a range is met before the rest is read."""
    position = 0
    while text:
        ranged = _RANGE.match(text, position)
        if ranged is None:
            entry, position = _entry(text, position)
            yield _Item("", None, "", [entry])
        else:
            first, last = int(ranged[2]), int(ranged[3])
            _check_grammar(first <= last, text, ranged.start(2))
            entries, position = _entries(text, ranged.end())
            yield _Item(ranged[1], range(first, last + 1), ranged[4], entries)
        if position == len(text):
            return
        _check_grammar(text[position] == ",", text, position)
        position += 1


def _entries(text: str, position: int) -> tuple[list[Named], int]:
    """The entries up to a closing bracket, and the position behind it."""
    found = []
    while True:
        entry, position = _entry(text, position)
        found.append(entry)
        _check_grammar(text[position : position + 1] in (",", ")"), text, position)
        position += 1
        if text[position - 1] == ")":
            return found, position


def _entry(text: str, position: int) -> tuple[Named, int]:
    match = _ENTRY.match(text, position)
    if match is None:
        raise _garbled(text, position)
    return (match[1], tuple(int(size) for size in match[2].split("x") if size)), match.end()


def _escaped(name: str) -> str:
    return _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", name)


def _plain(name: str) -> str:
    try:
        return _ESCAPE.sub(lambda match: _ESCAPED[match[0]], name) if "%" in name else name
    except KeyError as error:
        raise InputError("'%' followed by the digits of a character", f"{error}", "the file is damaged") from error


def _shape_text(shape: tuple[int, ...]) -> str:
    if any(not 0 <= size <= _LARGEST_SIZE for size in shape):
        raise InputError("sizes from 0 to 10^18 - 1", f"shape {list(shape)}", "pass the shapes of tensors")
    return "x".join(str(int(size)) for size in shape)


def _check_amount(names: int, characters: int) -> None:
    if names > _MOST_NAMES or characters > _MOST_CHARACTERS:
        raise InputError(
            f"at most {_MOST_NAMES} names and {_MOST_CHARACTERS} characters",
            "more",
            "adapt fewer weights; a file that asks for more is damaged",
        )


def _check_grammar(holds: bool, text: str, position: int) -> None:
    if not holds:
        raise _garbled(text, position)


def _garbled(text: str, position: int) -> InputError:
    return InputError("folded names", f"{text[position : position + 20]!r} at {position}", "the file is damaged")
