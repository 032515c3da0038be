"""The range coder of `scrimp.splats.entropy` in Python: the same bytes, some hundred times slower.

It reads like the specification, and the native one is tested against it.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any

from torch import Tensor

_FRESH = 1 << 31
_MOST_SEEN = 255
_FEW = 15
_MASK = 0xFFFFFFFF


class Encoder:
    """A range coder after Martin (1979) with Subbotin's and Pavlov's way of carrying."""

    writes = True

    def __init__(self) -> None:
        self.low, self.range, self.out = 0, _MASK, 0
        self.bytes = 0

    def code(self, bit: int, one: int) -> int:
        """A bit; ``one`` / 2**16 is the probability that it is set."""
        bound = (self.range >> 16) * one
        self.low, self.range = (self.low, bound) if bit else (self.low + bound, self.range - bound)
        self._settle()
        return bit

    def interval(self, first: int, end: int) -> None:
        """The part [first, end) of 2**15."""
        self.range >>= 15
        self.low += first * self.range
        self.range *= end - first
        self._settle()

    def plain(self, value: int, bits: int) -> int:
        """Up to 16 bits, all values equally likely."""
        self.range >>= bits
        self.low += value * self.range
        self._settle()
        return value

    def _settle(self) -> None:
        # Kept as one whole number, a carry takes care of itself.
        while self.range < 1 << 24:
            self.low, self.range, self.bytes = self.low << 8, self.range << 8 & _MASK, self.bytes + 1

    def finish(self) -> bytes:
        return self.low.to_bytes(self.bytes + 4, "big")


class Decoder:
    writes = False

    def __init__(self, data: bytes) -> None:
        self.data, self.read, self.range = data, 4, _MASK
        self.held = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def code(self, bit: int, one: int) -> int:
        bound = (self.range >> 16) * one
        bit = int(self.held < bound)
        if bit:
            self.range = bound
        else:
            self.held, self.range = self.held - bound, self.range - bound
        self._settle()
        return bit

    def aim(self) -> int:
        """Where in 2**15 the next interval lies."""
        self.range >>= 15
        return min(self.held // self.range, (1 << 15) - 1)

    def interval(self, first: int, end: int) -> None:
        self.held -= first * self.range
        self.range *= end - first
        self._settle()

    def plain(self, value: int, bits: int) -> int:
        self.range >>= bits
        value = min(self.held // self.range, (1 << bits) - 1)
        self.held -= value * self.range
        self._settle()
        return value

    def _settle(self) -> None:
        while self.range < 1 << 24:
            byte = self.data[self.read] if self.read < len(self.data) else 0
            self.held, self.range, self.read = self.held << 8 & _MASK | byte, self.range << 8 & _MASK, self.read + 1


@functools.cache
def tables() -> tuple[list[int], list[int], list[int]]:
    """Stretched probabilities, squashed logits, rates of learning."""
    stretch = [math.floor(256 * math.log((p + 0.5) / (4095.5 - p)) + 0.5) for p in range(4096)]
    squash = [math.floor(65536 / (1 + math.exp(-logit / 256)) + 0.5) for logit in range(-2047, 2048)]
    return stretch, squash, [131072 // (2 * seen + 3) for seen in range(_MOST_SEEN + 1)]


class Model:
    """Probabilities of bits, each mixed from three contexts; what is not in the tables yet is 1/2."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder
        self.cells: dict[Any, int] = defaultdict(lambda: _FRESH)
        self.weights: dict[Any, list[int]] = defaultdict(lambda: [22000] * 3)
        self.contexts: tuple[Any, Any, Any] = (0, 1, 2)
        self.mixer: Any = 0

    def bit(self, bit: int, node: int) -> int:
        stretch, squash, rates = tables()
        keys = [(place, context, node) for place, context in enumerate(self.contexts)]
        weights = self.weights[self.mixer, node]
        logits = [stretch[self.cells[key] >> 20] for key in keys]
        total = sum(weight * logit for weight, logit in zip(weights, logits, strict=True)) >> 16
        one = squash[max(-2047, min(2047, total)) + 2047]
        bit = self.coder.code(bit, one)
        wrong = ((bit << 12) - (one >> 4)) * 6
        for place, key in enumerate(keys):
            moved = weights[place] + (logits[place] * wrong + 0x8000 >> 16)
            weights[place] = max(-1048576, min(1048576, moved))
            p, seen = self.cells[key] >> 10, self.cells[key] & 1023
            p += (((1 << 22) - 1 if bit else 0) - p) * rates[seen] >> 16
            self.cells[key] = p << 10 | min(seen + 1, _MOST_SEEN)
        return bit


def _plain(coder: Any, value: int, bits: int) -> int:
    """Any number of equally likely bits, the upper sixteen first."""
    made = 0
    while bits > 0:
        here = min(bits, 16)
        bits -= here
        made = made << here | coder.plain(value >> bits & (1 << here) - 1, here)
    return made


def _bucket(value: int, most: int) -> int:
    length = min(abs(value).bit_length(), most)
    return -length if value < 0 else length


class Tokens:
    """Tokens 0 to 31, their probabilities the mean of three running distributions in cumulative form."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder
        self.upto: dict[Any, list[int]] = defaultdict(lambda: [min(32767, 1024 * (i + 1)) for i in range(32)])
        self.seen: dict[Any, int] = defaultdict(int)

    def token(self, wanted: int, contexts: tuple[Any, Any, Any]) -> int:
        rows = [self.upto[context] for context in contexts]
        means = [(a >> 1) + (b >> 2) + (c >> 2) for a, b, c in zip(*rows, strict=True)]
        upto = [mean - (mean >> 10) + i + 1 for i, mean in enumerate(means)]
        if not self.coder.writes:
            place = min(self.coder.aim(), 32765)
            wanted = min(sum(edge <= place for edge in upto), 31)
        self.coder.interval(upto[wanted - 1] if wanted else 0, upto[wanted])
        for row, context in zip(rows, contexts, strict=True):
            seen = self.seen[context]
            rate = 2 if seen < 2 else 3 if seen < 6 else 4 if seen < 16 else 5 if seen < 60 else 6
            row[:] = [edge + ((32767 if i >= wanted else 0) - edge >> rate) for i, edge in enumerate(row)]
            self.seen[context] = min(seen + 1, 255)
        return wanted


def _difference(model: Tokens, rest: int, contexts: tuple[Any, Any, Any]) -> int:
    size, negative, coder = abs(rest), int(rest < 0), model.coder
    top = size.bit_length() - 1
    kind = size if size < 4 else 2 * top + (size >> top - 1 & 1)
    token = model.token(0 if not kind else 2 * kind - 1 + negative if kind < 8 else min(kind + 7, 31), contexts)
    if token == 31:
        top = min(coder.plain(max(top, 0), 5), 24)
        negative = coder.plain(negative, 1)
        made = 1 << top | _plain(coder, size & (1 << top) - 1, top)
        return -made if negative else made
    kind = (token + 1) // 2 if token < 15 else token - 7
    if token < 15:
        negative = int(token > 0 and token % 2 == 0)
    digits = max(kind // 2 - 1, 0) if kind > 3 else 0
    made = (2 | kind & 1) << digits if kind > 3 else kind
    low = size & (1 << digits) - 1
    if token < 15:
        made |= coder.plain(low, digits) if digits else 0
    else:
        rest = coder.plain(low << 1 | negative, digits + 1)
        made, negative = made | rest >> 1, rest & 1
    return -made if negative else made


def _fields(coder: Any, values: list[list[int]], shifts: Any, kinds: Any, counts: Any) -> None:
    model = Tokens(coder)
    means, activities, lasts = ([0] * len(kinds) for _ in range(3))
    for row, line in enumerate(values):
        before = earlier = 0
        for column in range(counts[row] if counts else len(kinds)):
            shift = shifts[row][column]
            expected = means[column] + (1 << shift + 3) >> shift + 4 if kinds[column] else 0
            table = column if column < 16 else 16 + min((column - 16) // 8, 3)
            habit = _bucket(expected if kinds[column] else lasts[column], 11)
            contexts = (
                ("activity", table, shift, min(activities[column] >> 3, 15)),
                ("pair", table, shift, _bucket(before, 4), _bucket(earlier, 1)),
                ("habit", table, shift, habit),
            )
            rest = _difference(model, line[column] - expected if coder.writes else 0, contexts)
            line[column] = max(-(1 << 30), min(1 << 30, rest + expected))
            means[column] += (line[column] << shift + 4) - means[column] >> 2
            activities[column] += (abs(rest).bit_length() << 4) - activities[column] >> 2
            earlier, before, lasts[column] = before, rest, rest


def encode_fields(values: Tensor, shifts: Tensor, kinds: Tensor, counts: Tensor | None) -> bytes:
    coder = Encoder()
    _fields(coder, values.tolist(), shifts.tolist(), kinds.tolist(), None if counts is None else counts.tolist())
    return coder.finish()


def decode_fields(data: bytes, values: Tensor, shifts: Tensor, kinds: Tensor, counts: Tensor | None) -> bool:
    coder, lines = Decoder(data), values.tolist()
    _fields(coder, lines, shifts.tolist(), kinds.tolist(), None if counts is None else counts.tolist())
    values.copy_(values.new_tensor(lines).reshape(values.shape))
    return coder.read == len(data)


class _Points:
    def __init__(self, coder: Any, points: list[list[int]], drops: list[int], levels: int) -> None:
        self.model, self.points, self.drops, self.levels = Model(coder), points, drops, levels
        self.writes = coder.writes

    def visit(self, first: int, end: int, depth: int, history: int, corner: list[int]) -> bool:
        """Members [first, end) of a cell cut ``depth`` times."""
        while depth < 3 * self.levels and end - first > 1 and not self._settled(first, end, depth):
            axis, digit, count = depth % 3, self.levels - 1 - depth // 3, end - first
            members = self.points[first:end]
            wanted = sum(not point[axis] >> digit & 1 for point in members) if self.writes else 0
            found = (self._few if count <= _FEW else self._many)(wanted, count, depth, history)
            if found > count:
                return False
            history = history % 9 * 3 + (0 if found == count else 1 if found == 0 else 2)
            depth, middle = depth + 1, first + found
            if first < middle < end and not self.visit(first, middle, depth, history, list(corner)):
                return False
            if middle < end:
                corner[axis] |= 1 << digit
                first = middle
        for row in range(first, end):
            self._finish(row, depth, corner)
        return True

    def _settled(self, first: int, end: int, depth: int) -> bool:
        digit = self.levels - 1 - depth // 3
        return end - first <= 32 and all(drop > digit for drop in self.drops[first:end])

    def _finish(self, row: int, depth: int, corner: list[int]) -> None:
        drop = self.drops[row]
        for axis in range(3):
            left, made = self.levels - depth // 3 - (depth % 3 > axis), corner[axis]
            if left > drop:
                wanted = self.points[row][axis] >> drop & (1 << left - drop) - 1 if self.writes else 0
                made |= _plain(self.model.coder, wanted, left - drop) << drop
            if 0 < drop <= left:
                made |= 1 << drop - 1
            self.points[row][axis] = made

    def _aim(self, kind: int, depth: int, history: int) -> None:
        self.model.contexts, self.model.mixer = ((kind, depth % 3), (kind, history), (kind, depth)), kind

    def _few(self, wanted: int, count: int, depth: int, history: int) -> int:
        self._aim(count, depth, history)
        node, bits = 1, count.bit_length()
        for place in reversed(range(bits)):
            node = node << 1 | self.model.bit(wanted >> place & 1, node)
        return node - (1 << bits)

    def _many(self, wanted: int, count: int, depth: int, history: int) -> int:
        bits = (count - 2).bit_length()
        self._aim(_FEW + 1 + bits, depth, history)
        if self.model.bit(int(wanted in (0, count)), 1):
            return 0 if self.model.bit(int(wanted == 0), 2) else count
        self._aim(_FEW + 33 + bits, depth, history)
        node = 1
        for place in range(bits - 1, bits - 4, -1):
            node = node << 1 | self.model.bit(wanted - 1 >> place & 1, node)
        left = bits - 3
        return (node - 8 << left | _plain(self.model.coder, wanted - 1 & (1 << left) - 1, left)) + 1


def encode_points(points: Tensor, drops: Tensor, levels: int) -> bytes:
    coder = Encoder()
    _Points(coder, points.tolist(), drops.tolist(), levels).visit(0, len(points), 0, 0, [0, 0, 0])
    return coder.finish()


def decode_points(data: bytes, points: Tensor, drops: Tensor, levels: int) -> bool:
    coder, lines = Decoder(data), points.tolist()
    whole = _Points(coder, lines, drops.tolist(), levels).visit(0, len(points), 0, 0, [0, 0, 0])
    points.copy_(points.new_tensor(lines).reshape(points.shape))
    return whole and coder.read == len(data)
