"""What a reader of some kind of data hands over, before it is split, decoded and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scrimp.data.images import Images
from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class Source:
    """Training images, test images where they come apart, the classes by number, and a name for receipts.

    ``checked``: every image has been decoded once already. ``skipped``: what was left out meanwhile.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images | None = None
    checked: bool = False
    skipped: tuple[str, ...] = ()


def same_classes(train: Iterable[str], test: Iterable[str]) -> None:
    """Refuse two splits whose classes differ.

    Raises:
        InputError: names the classes that only one of them has.
    """
    first, second = set(train), set(test)
    if first == second:
        return
    parts = [("train", first - second), ("test", second - first)]
    got = ", ".join(f"only in {split}: {listed(names)}" for split, names in parts if names)
    raise InputError("the same classes in train and test", got, "rename, move or remove those classes")


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names in quotes, in order, the first few of many."""
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(repr(name) for name in found[:most]) + more
