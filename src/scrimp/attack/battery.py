"""The standard battery: cases, each one's share of the budget, and what makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from scrimp.attack.controls import flat_colours, noise_images
from scrimp.attack.objective import Goal
from scrimp.attack.patch import Patch, random_patch, universal_patch
from scrimp.attack.perturbation import perturb
from scrimp.attack.query import query_patch, query_perturb
from scrimp.attack.trials import Bench, Case, Trial, look

Make = Callable[[Bench, Case, int, torch.Generator], Trial]
"""Bench, case, images through forward and backward that it may spend, and a generator, to the trial."""

QUERIES = 3
"""Images asked the cost of, forward only, that count as one through forward and backward."""
_MOST = 32  # images a step
_STEPS = 120  # of a patch's making, at the least where the budget has them: small batches rather than few steps
_OWN = 20  # steps for images by themselves
_ASKED = 16  # images that a query attack works on
_DRAWS = 3  # random patches


@dataclass(frozen=True)
class Entry:
    """A case, its weight in the budget, and what makes it."""

    case: Case
    weight: int
    make: Make


def untouched() -> list[Entry]:
    """What needs no making: the natural tail, flat colours, noise."""
    makes: dict[str, Make] = {"natural tail": _tail, "flat colours": _flat, "noise": _noise}
    return [Entry(Case(name, "T0", "attack"), 0, make) for name, make in makes.items()]


def standard(shape: torch.Size, sizes: Sequence[float], epsilons: Sequence[float]) -> list[Entry]:
    """Controls and attacks of one victim, the cheapest threats first; ``shape`` [channels, height, width]."""
    largest, weaker = max(sizes), min(epsilons)
    name = f"patch {_percent(largest)}"
    found = [
        Entry(patch_case("random patch", largest, shape, kind="control", goal=None), 0, _random),
        Entry(patch_case("accuracy-only patch", largest, shape, kind="control", goal="accuracy"), 5, make_patch),
    ]
    for size in sizes:
        weight = 8 if size == largest else 6
        found.append(Entry(patch_case(f"patch {_percent(size)}", size, shape), weight, make_patch))
    goals: tuple[Goal, ...] = ("preserve", "destroy")
    for goal in goals:
        found.append(Entry(patch_case(f"{name}, {goal}", largest, shape, goal=goal), 6, make_patch))
    side = side_of(largest, shape)
    centre = ((shape[1] - side) // 2, (shape[2] - side) // 2)
    whole = patch_case(name, largest, shape)
    found.append(Entry(replace(whole, name=f"{name}, centre", place=centre), 5, make_patch))
    found.append(Entry(replace(whole, name=f"{name}, anywhere", place=None), 6, make_patch))
    for epsilon in epsilons:
        case = Case(f"universal {_levels(epsilon)}", "T2", "attack", "ignore", epsilon=epsilon)
        found.append(Entry(case, 5, _universal))
    found += [Entry(own_case(f"per image {_levels(epsilon)}", epsilon), 6, make_own) for epsilon in epsilons]
    kept = replace(own_case(f"per image {_levels(weaker)}, preserve", weaker), goal="preserve")
    asked = patch_case(f"queried patch {_percent(largest)}", largest, shape)
    asking = replace(own_case(f"queried per image {_levels(max(epsilons))}", max(epsilons)), threat="black box")
    found.append(Entry(kept, 6, make_own))
    found.append(Entry(replace(asked, threat="black box"), 6, _query_patch))
    found.append(Entry(asking, 6, _query_own))
    return found


def patch_case(name: str, area: float, shape: torch.Size, **more: object) -> Case:
    """A square patch at the top left of about ``area`` of the pixels, as near as whole pixels come."""
    side = side_of(area, shape)
    usual = Case(name, "T1", "attack", "ignore", area=side * side / (shape[1] * shape[2]), place=(0, 0))
    return replace(usual, **more)  # type: ignore[arg-type]


def own_case(name: str, epsilon: float) -> Case:
    """A perturbation of each image by itself."""
    return Case(name, "T3", "attack", "ignore", epsilon=epsilon)


def side_of(area: float, shape: torch.Size) -> int:
    """Side in pixels of a square that covers about ``area`` of an image [channels, height, width]."""
    return max(1, min(shape[1], shape[2], round(math.sqrt(area * shape[1] * shape[2]))))


def make_patch(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    """`universal_patch` on the images to learn from, in batches that leave it steps enough."""
    assert case.area is not None
    assert case.goal is not None
    patch, spent = patch_for(bench, case, share, generator)
    return replace(bench.measure(case, patch), spent=spent)


def patch_for(bench: Bench, case: Case, share: int, generator: torch.Generator) -> tuple[Patch, int]:
    """The patch of a case, and what it took."""
    batch, steps, spent = _steps(len(bench.learn), share, exact=case.place is not None)
    side = side_of(case.area or 0.0, bench.images.shape[1:])
    goal = case.goal or "ignore"
    options = {"size": side, "steps": steps, "batch": batch, "place": case.place, "generator": generator}
    return universal_patch(bench.victim, bench.learn, goal=goal, **options), spent  # type: ignore[arg-type]


def make_own(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    """`perturb` each of as many audited images as the budget allows, the first ones."""
    assert case.epsilon is not None
    count = max(1, min(len(bench.images), share // (_OWN + 1)))
    steps = min(_OWN, max(0, share // count - 1))
    images, goal = bench.images[:count], case.goal or "ignore"
    found = perturb(
        bench.victim, images, epsilon=case.epsilon, generator=generator, steps=steps, batch=_MOST, goal=goal
    )
    return replace(bench.measure(case, found, count), spent=count * (steps + 1))


def _universal(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    assert case.epsilon is not None
    batch, steps, spent = _steps(len(bench.learn), share, exact=True)
    found = perturb(
        bench.victim,
        bench.learn,
        epsilon=case.epsilon,
        generator=generator,
        steps=steps,
        universal=True,
        batch=batch,
    )
    return replace(bench.measure(case, found), spent=spent)


def _random(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    side = side_of(case.area or 0.0, bench.images.shape[1:])
    patches = [random_patch(bench.images, size=side, generator=generator) for _ in range(_DRAWS)]
    found = [bench.measure(case, patch) for patch in patches]
    rights = [trial.right for trial in found if trial.right is not None]
    sames = [trial.same for trial in found if trial.same is not None]
    right, same = (torch.cat(parts) if parts else None for parts in (rights, sames))
    return replace(found[0], costs=torch.cat([trial.costs for trial in found]), right=right, same=same)


def _tail(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    count = math.ceil(len(bench.images) / 100)
    rows = bench.clean.costs.argsort(descending=True, stable=True)[:count]
    right = None if bench.clean.right is None else bench.clean.right[rows]
    return Trial(case, bench.clean.costs[rows], right)


def _flat(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    return Trial(case, look(bench.victim, flat_colours(bench.images), bench.batch)[0])


def _noise(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    coarse = max(2, bench.images.shape[2] // 16)
    images = [noise_images(bench.images, 16, generator=generator, smooth=side) for side in (1, coarse)]
    return Trial(case, look(bench.victim, torch.cat(images), bench.batch)[0])


def _query_patch(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    images = bench.learn[: max(1, min(_ASKED, QUERIES * share))]
    asked = max(1, QUERIES * share // len(images))
    side = side_of(case.area or 0.0, images.shape[1:])
    patch = query_patch(bench.victim.cost, images, size=side, generator=generator, queries=asked)
    return _queried(bench.measure(case, patch), asked * len(images))


def _query_own(bench: Bench, case: Case, share: int, generator: torch.Generator) -> Trial:
    assert case.epsilon is not None
    images = bench.images[: max(1, min(_ASKED, QUERIES * share))]
    asked = max(1, QUERIES * share // len(images))
    found = query_perturb(bench.victim.cost, images, epsilon=case.epsilon, generator=generator, queries=asked)
    return _queried(bench.measure(case, found, len(images)), asked * len(images))


def _queried(trial: Trial, queries: int) -> Trial:
    return replace(trial, queries=queries, spent=math.ceil(queries / QUERIES))


def _steps(count: int, share: int, *, exact: bool) -> tuple[int, int, int]:
    """Images a step, steps, and images that are spent; one more look where all images are in every step."""
    batch = min(count, _MOST, max(1, share // _STEPS))
    looks = max(1, share // batch)
    return batch, looks - (exact and batch >= count), looks * batch


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _levels(epsilon: float) -> str:
    return f"{255 * epsilon:g}/255"
