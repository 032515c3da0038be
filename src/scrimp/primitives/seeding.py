"""Points far from one another, chosen one by one: k-means++ draws and farthest-first, without a table of all pairs.

Both look at each point's distance to the nearest chosen one. Here that distance is brought up to date for every point
only once in `BLOCK` choices; in between it is an upper bound, and the few points that matter are looked at exactly. The
outcome is that of the plain algorithms, at one pass over the points in `BLOCK`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scrimp.primitives.draw import draw_with_replacement
from scrimp.primitives.errors import InputError

CHUNK = 8192
"""Rows handled at a time."""
BLOCK = 16  # choices between two passes over all points
_MANY = 256  # given centres taken in at a time
_TRIES = 32  # draws looked at together
_WIDTH = 512  # candidates looked at together


class Points:
    """Points given by factors: point i is the outer product of row i of each factor (with one factor, that row).

    ``<x_i, x_j> = prod_f <row_i of f, row_j of f>``, so that points of C x D numbers cost C + D each. One factor is
    taken about its mean: distances stay, squared lengths shrink, and fewer digits are lost.

    Args:
        factors: each [n, d_f], floating, of one device; calculated with in float32 or wider.
        centred: the one factor is about its mean as it is, which saves a copy at every look.
    """

    def __init__(self, *factors: Tensor, centred: bool = False) -> None:
        if not factors or any(item.ndim != 2 or len(item) != len(factors[0]) for item in factors):
            got = ", ".join(str(list(item.shape)) for item in factors) or "none"
            raise InputError("factors [n, d], as many rows each", got, "pass one row a point in every factor")
        self._factors = factors
        self.dtype = torch.float32
        for item in factors:
            self.dtype = torch.promote_types(self.dtype, item.dtype)
        alone = len(factors) == 1 and len(factors[0]) > 0 and not centred
        self._middle = _mean(factors[0], self.dtype) if alone else None
        self.device = factors[0].device

    def __len__(self) -> int:
        return len(self._factors[0])

    def take(self, where: slice | Tensor) -> tuple[Tensor, ...]:
        """Those rows of each factor."""
        pieces = tuple(item[where].to(self.dtype) for item in self._factors)
        return pieces if self._middle is None else (pieces[0] - self._middle,)

    def squares(self) -> Tensor:
        """Squared lengths, [n]: of points about their mean where there is one factor."""
        found = torch.empty(len(self), dtype=self.dtype, device=self.device)
        for start in range(0, len(self), CHUNK):
            here = slice(start, start + CHUNK)
            found[here] = _product([piece.square().sum(1) for piece in self.take(here)])
        return found


def _mean(values: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(values.shape[1], dtype=dtype, device=values.device)
    for piece in values.split(CHUNK):
        total += piece.to(dtype).sum(0)
    return total / len(values)


def _product(items: list[Tensor]) -> Tensor:
    result = items[0]
    for item in items[1:]:
        result = result * item
    return result


class Gaps:
    """Squared distance from every point to the nearest chosen one.

    ``bounds`` [n] holds upper bounds, exact once `settle` was called and infinite before anything is chosen. ``places``
    [n] tells which of the points taken in was the nearest, counted in their order, of equals the first. Distances
    within rounding of 0 are 0, so that a copy of a chosen point is known as one.
    """

    def __init__(self, points: Points) -> None:
        self.points = points
        self.squares = points.squares()
        self.bounds = torch.full_like(self.squares, torch.inf)
        self.places = torch.zeros_like(self.squares, dtype=torch.int64)
        self._count = 0
        self.pending: list[int] = []

    def include(self, chosen: Tensor) -> None:
        """Take in many chosen points at once, indices [m]."""
        for part in chosen.split(_MANY):
            self._lower_(part)

    def add(self, index: int) -> None:
        """Choose one more."""
        self.pending.append(index)
        if len(self.pending) == BLOCK:
            self.settle()

    def settle(self) -> None:
        """Make every bound exact."""
        if self.pending:
            self._lower_(torch.tensor(self.pending, device=self.points.device))
            self.pending = []

    def at(self, indices: Tensor) -> Tensor:
        """Exact squared distances of some points, [m]."""
        found = self.bounds[indices]
        if not self.pending:
            return found
        chosen = torch.tensor(self.pending, device=self.points.device)
        return torch.minimum(found, self._nearest(indices, self.points.take(chosen), self.squares[chosen])[0])

    def _lower_(self, chosen: Tensor) -> None:
        centres, squares = self.points.take(chosen), self.squares[chosen]
        for start in range(0, len(self.points), CHUNK):
            here = slice(start, start + CHUNK)
            found, places = self._nearest(here, centres, squares)
            nearer = found < self.bounds[here]
            self.places[here] = torch.where(nearer, places + self._count, self.places[here])
            self.bounds[here] = torch.where(nearer, found, self.bounds[here])
        self._count += len(chosen)

    def _nearest(self, where: slice | Tensor, centres: tuple[Tensor, ...], squares: Tensor) -> tuple[Tensor, Tensor]:
        pieces = self.points.take(where)
        inner = _product([piece @ centre.T for piece, centre in zip(pieces, centres, strict=True)])
        return nearest_of(self.squares[where], squares, inner)


def nearest_of(left: Tensor, right: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """The least of `squared_distances` in each row, [n], and where it is, of equals the first; changes ``inner``.

    The table of distances is not made: it would be read and written several times over, which costs as much time as
    the inner products of a few hundred numbers.
    """
    keys, places = torch.sub(right, inner, alpha=2, out=inner).min(1)
    sums = left + right[places]
    found = left + keys
    noise = 8 * torch.finfo(found.dtype).eps
    near = (found <= 4 * noise * sums).nonzero().flatten()  # also those that another point might be rounded to 0 for
    if len(near):
        rows = (right - inner[near]) / 2
        found[near], places[near] = squared_distances(left[near], right, rows).min(1)
    return found, places


def squared_distances(left: Tensor, right: Tensor, inner: Tensor) -> Tensor:
    """``|x|^2 + |y|^2 - 2 <x, y>``, [n, m], with 0 for what rounding alone could have left.

    Args:
        left: squared lengths [n].
        right: squared lengths [m].
        inner: inner products [n, m].
    """
    sums = left[:, None] + right
    found = sums - 2 * inner
    return torch.where(found <= 8 * torch.finfo(found.dtype).eps * sums, 0.0, found)


def plus_plus(gaps: Gaps, budget: int, *, mass: Tensor, generator: torch.Generator) -> list[int]:
    """k-means++ seeding (Arthur, Vassilvitskii 2007): each next point drawn by mass times its squared gap.

    Exact by rejection: a point drawn by its bound is kept with probability gap / bound. Where every gap is 0, as among
    copies, further points are drawn by mass alone.

    Args:
        gaps: with what was chosen before; changed in place. With nothing chosen, the first is drawn by mass alone.
        budget: how many to choose, at most as many as have mass.
        mass: [n], >= 0; points without are never chosen.
        generator: CPU generator.

    Returns:
        The chosen indices, in order; none twice.
    """
    mass = mass.to("cpu", torch.float64, copy=True)
    chosen: list[int] = []
    for _ in range(min(budget, int((mass > 0).sum()))):
        index = _drawn(gaps, mass, generator)
        if index is None:
            index = int(draw_with_replacement(mass, 1, generator=generator))
        chosen.append(index)
        mass[index] = 0
        gaps.add(index)
    return chosen


def _drawn(gaps: Gaps, mass: Tensor, generator: torch.Generator) -> int | None:
    """One draw by mass times gap, or None where that is 0 or unknown everywhere."""
    for _ in range(2):
        share = mass * gaps.bounds.to("cpu", torch.float64).nan_to_num(posinf=0.0)
        if not float(share.sum()) > 0:
            if not gaps.pending:
                return None
            gaps.settle()
            continue
        tried = draw_with_replacement(share, _TRIES, generator=generator).to(gaps.points.device)
        exact = gaps.at(tried).to("cpu", torch.float64)
        bound = gaps.bounds[tried].to("cpu", torch.float64)
        kept = torch.rand(_TRIES, generator=generator, dtype=torch.float64) * bound < exact
        if bool(kept.any()):
            return int(tried[int(kept.to(torch.uint8).argmax())])
        gaps.settle()
    return None


def farthest(gaps: Gaps, budget: int, *, allowed: Tensor) -> list[int]:
    """Farthest-first traversal (Gonzalez 1985): each next point the one of largest gap.

    Args:
        gaps: with at least one point chosen before; changed in place.
        budget: how many to choose, at most as many as are allowed.
        allowed: bool [n], those that may be chosen.

    Returns:
        The chosen indices, in order; none twice. Of equal gaps the lowest index, among 512 points or fewer; else any.
    """
    allowed, chosen = allowed.clone(), []
    for _ in range(min(budget, int(allowed.sum()))):
        index = _widest(gaps, allowed)
        chosen.append(index)
        allowed[index] = False
        gaps.add(index)
    return chosen


def _widest(gaps: Gaps, allowed: Tensor) -> int:
    for _ in range(4):
        if not gaps.pending:
            break
        bounds = torch.where(allowed, gaps.bounds, -torch.inf)
        values, indices = bounds.topk(min(_WIDTH + 1, len(bounds)))
        rest = -torch.inf if len(bounds) <= _WIDTH else float(values[-1])
        exact = torch.where(allowed[indices], gaps.at(indices), -torch.inf)
        if float(exact.max()) >= rest:
            return int(indices[exact == exact.max()].min())
        usable = allowed[indices]
        gaps.bounds[indices[usable]] = exact[usable]  # as good a bound, and a tighter one
    gaps.settle()
    bounds = torch.where(allowed, gaps.bounds, -torch.inf)
    return int((bounds == bounds.max()).nonzero()[0])
