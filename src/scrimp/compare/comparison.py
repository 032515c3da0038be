"""What a comparison is: a method, the reference it must agree with, and the baseline it is measured beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One figure held against its bound.

    Attributes:
        what: what is checked.
        figure: as found.
        bound: the most it may be, or, where ``least``, the least.
        passed: whether it keeps the bound; a figure that is no number does not.
    """

    what: str
    figure: float
    bound: float
    passed: bool
    least: bool = False

    def __str__(self) -> str:
        limit = f"{'at least' if self.least else 'at most'} {self.bound:.3g}"
        return f"{self.what}: {self.figure:.3g} ({limit})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a figure that is no finite number is ``None``."""
        figure = self.figure if math.isfinite(self.figure) else None
        bound = {"at least" if self.least else "at most": self.bound}
        return {"what": self.what, "figure": figure, **bound, "passed": self.passed}


def at_most(what: str, figure: float, bound: float) -> Finding:
    return Finding(what, float(figure), float(bound), bool(figure <= bound))


def at_least(what: str, figure: float, bound: float) -> Finding:
    return Finding(what, float(figure), float(bound), bool(figure >= bound), least=True)


@dataclass(frozen=True)
class Sides:
    """A method and its baseline, ready to be measured.

    Attributes:
        method, baseline: calls without arguments that do comparable work.
        quality: figures by name, each as (method, baseline).
        repeats: alternating pairs of calls that give a steady ratio on a quiet machine.
        threads: how many of torch's threads to measure on. A second one spins while it waits for work, and its
            spinning is CPU time: small differences need 1.
    """

    method: Callable[[], Any]
    baseline: Callable[[], Any]
    quality: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    repeats: int = 20
    threads: int = 1


@dataclass(frozen=True)
class Comparison:
    """One method beside its reference (the same result, computed slowly) and its baseline (what one would use instead).

    Attributes:
        name: what the shell calls it.
        method, reference, baseline: a short phrase each.
        check: ``check(seed=0) -> list[Finding]``: the method against its reference, on the CPU. Further keywords put
            another implementation in the method's place, so that a test can see the check fail.
        sides: ``sides(seed=0, device="cpu") -> Sides``, built anew by each call.
    """

    name: str
    method: str
    reference: str
    baseline: str
    check: Callable[..., list[Finding]]
    sides: Callable[..., Sides]
