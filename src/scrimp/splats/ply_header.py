"""The .ply container (G. Turk, The PLY Polygon File Format, 1994): a text header, then tables called elements."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from scrimp.primitives.errors import InputError
from scrimp.splats.reading import Cursor, damaged

_MOST_HEADER = 1 << 20
_BLOCK = 4096  # rows of text taken at a time
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
NAMES = {kind: name for name, kind in reversed(_TYPES.items())}
"""What a header calls each of numpy's types."""


@dataclass(frozen=True)
class Element:
    """A table: so many rows of these properties, whose type is ``None`` where each row holds a list."""

    name: str
    count: int
    properties: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> list[str]:
        """Of the properties."""
        return [name for name, _ in self.properties]


@dataclass(frozen=True)
class Header:
    """``order``: "<" or ">" of bytes, "" of text. ``start``: offset of the first row."""

    order: str
    elements: tuple[Element, ...]
    start: int

    def find(self, name: str) -> Element | None:
        """The element of this name."""
        return next((element for element in self.elements if element.name == name), None)


def parse_header(data: bytes | memoryview, name: str) -> Header:
    """Read a .ply's header.

    Raises:
        InputError: it is not one, ends too soon, or names types or formats that there are not.
    """
    head = bytes(data[:_MOST_HEADER])
    newline = b"\r\n" if head.startswith(b"ply\r\n") else b"\n"
    found = re.search(rb"\nend_header[ \t]*" + newline, head)
    if not head.startswith(b"ply" + newline) or found is None:
        raise damaged(".ply", name, "no header from 'ply' to 'end_header'")
    lines = head[: found.start()].decode("latin-1").split("\n")[1:]
    order, counts, tables = None, [], []
    for words in (line.split() for line in lines):
        match words:
            case [] | ["comment" | "obj_info", *_]:
                continue
            case ["format", kind, _] if kind in _ORDERS and order is None:
                order = _ORDERS[kind]
            case ["element", title, count] if re.fullmatch(r"\d{1,15}", count):
                counts.append((title, int(count)))
                tables.append(list[tuple[str, str | None]]())
            case ["property", kind, title] if kind in _TYPES and tables:
                tables[-1].append((title, _TYPES[kind]))
            case ["property", "list", _, _, title] if tables:
                tables[-1].append((title, None))
            case _:
                raise damaged(".ply", name, f"a header line {' '.join(words)[:80]!r}")
    if order is None or len(dict(counts)) < len(counts) or any(len(dict(table)) < len(table) for table in tables):
        raise damaged(".ply", name, "a header without a format, or with a name declared twice")
    elements = (Element(*count, tuple(table)) for count, table in zip(counts, tables, strict=True))
    return Header(order, tuple(elements), found.end())


def read_elements(data: bytes | memoryview, header: Header, wanted: Sequence[str], name: str) -> dict[str, np.ndarray]:
    """Rows of these elements, as structured arrays in the file's own types; those between are skipped.

    Bytes after the last of them are left alone: other elements, or a line end that some writers add.

    Raises:
        InputError: an element is absent, or there are fewer rows than the header says, or a list among what must be
            read or skipped.
    """
    for title in wanted:
        element = header.find(title)
        if element is None or not element.properties:
            raise damaged(".ply", name, f"no element {title!r} with properties in its header")
    cursor = Cursor(data, format=".ply", name=name)
    cursor.take(header.start)
    text = io.BytesIO(cursor.take(cursor.left)) if header.order == "" else None
    found: dict[str, np.ndarray] = {}
    for element in header.elements:
        if len(found) == len(wanted):
            break
        kind = _row(element, header.order, name)
        if not kind.itemsize:
            continue
        rows = cursor.array(kind, element.count) if text is None else _parse(text, element, kind, name)
        if element.name in wanted:
            found[element.name] = rows
    return found


def _row(element: Element, order: str, name: str) -> np.dtype:
    lists = [title for title, kind in element.properties if kind is None]
    if lists:
        raise InputError(
            "elements of plain numbers up to the Gaussians",
            f"{name}: {element.name} with the list {lists[0]!r}",
            "export it without",
        )
    return np.dtype([(title, f"{order or '='}{kind}") for title, kind in element.properties])


def _parse(text: io.BytesIO, element: Element, kind: np.dtype, name: str) -> np.ndarray:
    """Rows written as text, one a line."""
    width, left = len(element.properties), len(text.getbuffer()) - text.tell()
    if element.count * 2 * width > left + 1:  # a digit and a space each, no line end needed after the last
        raise damaged(".ply", name, f"{left} bytes of text, where {element.count} rows of {element.name} are needed")
    rows = np.empty(element.count, kind)
    for start in range(0, element.count, _BLOCK):
        block = rows[start : start + _BLOCK]
        words = b" ".join(islice(text, len(block))).split()
        if len(words) != len(block) * width:
            raise damaged(".ply", name, f"rows of {element.name} from {start} on that are not {width} numbers each")
        _fill(block, words, element, name)
    return rows


def _fill(rows: np.ndarray, words: list[bytes], element: Element, name: str) -> None:
    try:
        values = np.fromiter(map(float, words), np.float64, len(words)).reshape(len(rows), -1)
    except ValueError as error:
        raise damaged(".ply", name, f"{element.name} with a word that is no number") from error
    with np.errstate(invalid="ignore", over="ignore"):
        for column, title in enumerate(element.names):
            rows[title] = values[:, column]
            if rows.dtype[title].kind != "f" and not np.array_equal(rows[title], values[:, column]):
                raise damaged(".ply", name, f"{title} with numbers that its type cannot hold")


def header_bytes(elements: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """A header for these structured arrays, written after it one by one in little-endian bytes."""
    lines = ["ply", "format binary_little_endian 1.0"]
    for name, rows in elements:
        lines.append(f"element {name} {len(rows)}")
        lines += [f"property {NAMES[rows.dtype[title].str[1:]]} {title}" for title in rows.dtype.names or ()]
    return ("\n".join([*lines, "end_header"]) + "\n").encode("latin-1")
