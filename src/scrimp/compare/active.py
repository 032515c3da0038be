"""Which images to label: all sets, partitions and chances of a few points as reference, random labels as baseline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from scrimp.compare.comparison import Finding, Sides, at_most
from scrimp.compare.exact import spread_in_errors
from scrimp.primitives.draw import generator_for
from scrimp.select import (
    Strategy,
    badge,
    coefficient_determinants,
    coverage,
    herding,
    k_centre,
    margin,
    nearest_to_centres,
    predictive_entropy,
    random_labels,
    typicality,
)

STRATEGIES: dict[str, Strategy] = {
    "random": random_labels,
    "centres": nearest_to_centres,
    "k-centre": k_centre,
    "typicality": typicality,
    "coverage": coverage,
    "herding": herding,
    "margin": margin,
    "entropy": predictive_entropy,
    "badge": badge,
    "determinants": coefficient_determinants,
}
_POINTS, _BUDGET, _GROUPS, _CLASSES = 10, 3, 3, 3
_PROBLEMS, _DRAWS = 3, 200
COUNT, DIM, LABELS = 2_000, 64, 20


def check(*, seed: int = 0, **others: Strategy) -> list[Finding]:
    """Hold each strategy's choice among 10 points, one of them labelled, against brute force in float64.

    Args:
        seed: of the points.
        others: strategies in the place of those of `STRATEGIES`, by name (``k_centre`` for ``k-centre``).
    """
    ways = {**STRATEGIES, **{name.replace("_", "-"): way for name, way in others.items()}}
    found = []
    for name, brute in _BRUTE.items():
        wrong = sum(_wrong(ways[name], brute, seed, problem) for problem in range(_PROBLEMS))
        found.append(at_most(f"{name}: choices other than brute force", wrong, 0))
    return [
        *found,
        _radius(ways["k-centre"], seed),
        *(_drawn(name, ways[name], seed) for name in ("random", "badge")),
        _unfit(ways, seed),
    ]


def sides(*, seed: int = 0, device: str = "cpu", repeats: int = 10) -> Sides:
    """A first round of 20 labels among 2,000 images of 20 classes, 64 numbers each: by typicality, or at random."""
    features, labels = _clustered(seed)
    features, nothing = features.to(device), torch.zeros(0, dtype=torch.int64)

    def ask(strategy: Strategy) -> Tensor:
        return strategy(features, None, nothing, LABELS, generator=generator_for(seed, 2)).indices

    seen = [float(len(labels[ask(way).cpu()].unique())) for way in (typicality, random_labels)]
    return Sides(
        lambda: ask(typicality),
        lambda: ask(random_labels),
        quality={"classes_seen": (seen[0], seen[1])},
        repeats=repeats,
    )


def _clustered(seed: int) -> tuple[Tensor, Tensor]:
    """Features [2000, 64] of unit length around 20 directions, the largest class six times the smallest, and classes.

    Noise as long as the directions themselves.
    """
    generator = generator_for(seed, 1)
    share = torch.linspace(1, 6, LABELS)
    labels = torch.multinomial(share, COUNT, replacement=True, generator=generator)
    values = torch.randn(LABELS, DIM, generator=generator)[labels] + torch.randn(COUNT, DIM, generator=generator)
    return torch.nn.functional.normalize(values, dim=1), labels


def _problem(seed: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [10, 3] in groups of 5, 4 and 1 far apart, in any order; probabilities; the one alone has its label.

    So the best partition is far better than any other, and k-means finds it. In a group of 3, where one neighbour
    counts, two points would always be equally typical.
    """
    generator = generator_for(seed, number)
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])[torch.randperm(_POINTS, generator=generator)]
    points = torch.randn(_POINTS, 3, generator=generator, dtype=torch.float64) + 40 * torch.eye(3)[groups]
    chances = torch.randn(_POINTS, _CLASSES, generator=generator, dtype=torch.float64).softmax(1)
    return points, chances, (groups == 2).nonzero()[0]


def _wrong(strategy: Strategy, brute: Callable[[Tensor, Tensor, list[int], int], list[int]], seed: int, n: int) -> int:
    """Places of the order of choice in which the two differ; all, where one gives fewer."""
    points, chances, labelled = _problem(seed, n)
    budget = _GROUPS - 1  # one a group, with that which is labelled
    ours = strategy(points, chances, labelled, budget, generator=generator_for(seed, n, 1)).indices.tolist()
    theirs = brute(points, chances, labelled.tolist(), budget)
    return budget if len(ours) != len(theirs) else sum(a != b for a, b in zip(ours, theirs, strict=True))


def _gaps(points: Tensor) -> list[list[float]]:
    """All distances, each by its own difference."""
    return [[float((a - b).norm()) for b in points] for a in points]


def _partition(points: Tensor) -> list[list[int]]:
    """The three groups of least squared distance from their means, of all ways; the largest first."""
    ways = torch.tensor(list(itertools.product([0], *[range(_GROUPS)] * (len(points) - 1))))
    member = torch.nn.functional.one_hot(ways, _GROUPS).to(points.dtype)
    sums = torch.einsum("wpg,pd->wgd", member, points)
    # Squares about the means are all squares less those of the means, however the points are dealt out.
    served = (sums.square().sum(2) / member.sum(1).clamp_min(1)).sum(1)
    best = ways[int(served.argmax())]
    groups = [(best == group).nonzero().flatten().tolist() for group in range(_GROUPS)]
    return sorted(groups, key=len, reverse=True)


def _centres(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    groups = [group for group in _partition(points) if not set(group) & set(labelled)]
    return [group[int((points[group] - points[group].mean(0)).norm(dim=1).argmin())] for group in groups]


def _typical(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    """Of each group without a label, the largest first, the point of least mean distance to its half of the others."""
    gaps = _gaps(points)

    def spread(i: int, group: list[int]) -> float:
        near = sorted(gaps[i][j] for j in group if j != i)[: max(1, len(group) // 2)]
        return sum(near) / len(near)

    groups = [group for group in _partition(points) if not set(group) & set(labelled)]
    return [min((spread(i, group), i) for i in group)[1] for group in groups]


def _farthest(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    gaps, picks = _gaps(points), list(labelled)
    for _ in range(budget):
        picks.append(max(range(len(points)), key=lambda i: min(gaps[i][j] for j in picks)))
    return picks[len(labelled) :]


def _covering(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    """Balls of the widest radius of which 95 in a hundred hold one group only; with 10 points, all of them."""
    gaps, home = _gaps(points), {i: n for n, group in enumerate(_partition(points)) for i in group}
    edge = min(gaps[i][j] for i in home for j in home if home[i] != home[j])
    balls = [{j for j in home if gaps[i][j] < edge} for i in range(len(points))]
    covered, picks = set().union(*(balls[i] for i in labelled)), list[int]()
    for _ in range(budget):
        picks.append(max((i for i in home if i not in labelled), key=lambda i: (len(balls[i] - covered), -i)))
        covered |= balls[picks[-1]]
    return picks


def _herded(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    """What adds most to the sum over points of the largest kernel to what has or gets a label."""
    gaps, picks = _gaps(points), list(labelled)
    squares = [[gap * gap for gap in row] for row in gaps]
    width = 100 * sum(map(sum, squares)) / len(points) ** 2
    kernel = [[math.exp(-square / width) for square in row] for row in squares]

    def covered(chosen: list[int]) -> float:
        return math.fsum(max(row[j] for j in chosen) for row in kernel)

    for _ in range(budget):
        picks.append(max((i for i in range(len(points)) if i not in picks), key=lambda i: covered([*picks, i])))
    return picks[len(labelled) :]


def _doubtful(score: Callable[[list[float]], float]) -> Callable[[Tensor, Tensor, list[int], int], list[int]]:
    def brute(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
        left = [i for i in range(len(points)) if i not in labelled]
        return sorted(left, key=lambda i: score(chances[i].tolist()))[:budget]

    return brute


def _margin(chances: list[float]) -> float:
    best, second, *_ = sorted(chances, reverse=True)
    return best - second


def _certainty(chances: list[float]) -> float:
    return sum(p * float(torch.tensor(p, dtype=torch.float64).log()) for p in chances)


def _determined(points: Tensor, chances: Tensor, labelled: list[int], budget: int) -> list[int]:
    """Every candidate's determinant computed anew."""
    ridge = points.square().mean() * torch.eye(points.shape[1], dtype=points.dtype)
    picks = list(labelled)
    for _ in range(budget):
        left = [i for i in range(len(points)) if i not in picks]
        picks.append(max(left, key=lambda i: float((ridge + points[[*picks, i]].T @ points[[*picks, i]]).logdet())))
    return picks[len(labelled) :]


_BRUTE: dict[str, Callable[[Tensor, Tensor, list[int], int], list[int]]] = {
    "centres": _centres,
    "k-centre": _farthest,
    "typicality": _typical,
    "coverage": _covering,
    "herding": _herded,
    "margin": _doubtful(_margin),
    "entropy": _doubtful(_certainty),
    "determinants": _determined,
}


def _radius(strategy: Strategy, seed: int) -> Finding:
    """Distance from the farthest point to the nearest chosen one, over that of the best of all sets (Gonzalez 1985)."""
    worst = 0.0
    for number in range(_PROBLEMS):
        points = torch.randn(_POINTS, 2, generator=generator_for(seed, number, 2), dtype=torch.float64)
        gaps = torch.tensor(_gaps(points))
        nothing = torch.zeros(0, dtype=torch.int64)
        ours = strategy(points, None, nothing, _BUDGET, generator=generator_for(seed, number, 3)).indices.tolist()
        reach = [float(gaps[list(each)].amin(0).max()) for each in itertools.combinations(range(_POINTS), _BUDGET)]
        worst = max(worst, float(gaps[ours].amin(0).max()) / min(reach))
    return at_most("k-centre: radius over the best of all sets", worst, 2)


def _drawn(name: str, strategy: Strategy, seed: int) -> Finding:
    """Counts of the last of two choices: all alike, or by squared distances of gradients from the first.

    Five standard errors: so far off is no count by chance.
    """
    points, chances, labelled = _problem(seed, 5)
    points = points / points.norm(dim=1, keepdim=True) + 0.2
    p = _chances_of_second(points, chances, int(labelled)) if name == "badge" else _equal(int(labelled))
    counts = torch.zeros(_POINTS, dtype=torch.float64)
    generator = generator_for(seed, 6)
    for _ in range(_DRAWS):
        counts[strategy(points, chances, labelled, 2, generator=generator).indices[1]] += 1
    error = (_DRAWS * p * (1 - p)).sqrt()
    return at_most(f"{name}: counts of draws, in standard errors", spread_in_errors(counts, _DRAWS * p, error), 5)


def _equal(labelled: int) -> Tensor:
    p = torch.full((_POINTS,), 1 / (_POINTS - 1), dtype=torch.float64)
    p[labelled] = 0
    return p


def _chances_of_second(points: Tensor, chances: Tensor, labelled: int) -> Tensor:
    """Ash et al. 2020, algorithm 1, every gradient written out; the first is the longest."""
    residuals = torch.stack([p - torch.eye(_CLASSES, dtype=p.dtype)[int(p.argmax())] for p in chances])
    gradients = torch.stack([torch.outer(r, h).flatten() for r, h in zip(residuals, points, strict=True)])
    lengths = gradients.norm(dim=1)
    lengths[labelled] = 0
    squared = (gradients - gradients[int(lengths.argmax())]).square().sum(1)
    squared[labelled] = 0
    return squared / squared.sum()


def _unfit(ways: dict[str, Strategy], seed: int) -> Finding:
    """Choices that are labelled, come twice or are missing, asked for 0, some, and more than there are."""
    points, chances, labelled = _problem(seed, 7)
    unfit = 0
    for way, budget in itertools.product(ways.values(), (0, 5, _POINTS + 1)):
        chosen = way(points, chances, labelled, budget, generator=generator_for(seed, 8)).indices.tolist()
        fit = set(chosen) - set(labelled.tolist())
        unfit += len(chosen) - len(fit) + abs(len(fit) - min(budget, _POINTS - 1))
    return at_most("all: choices labelled before, made twice or missing", unfit, 0)
