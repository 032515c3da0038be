"""Which noise levels a batch is trained at: uniform, centred, or by what each level's gradients weigh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scrimp.primitives.errors import InputError


@dataclass(frozen=True, eq=False)
class Draw:
    """Noise levels and the factors of their losses.

    Attributes:
        index: levels [n], int64, 0 to T - 1, on the CPU.
        weight: [n], float32, on the CPU; the mean over the batch of weight * loss estimates the mean over all levels,
            unless the sampler is biased on purpose.
    """

    index: Tensor
    weight: Tensor


class LevelSampler(Protocol):
    """What every sampler of noise levels does."""

    levels: int

    def draw(self, count: int, *, generator: torch.Generator) -> Draw: ...

    def update_(self, index: Tensor, norms: Tensor) -> None: ...

    def variance_ratio(self) -> float | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def gradient_bound(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a sample's gradient norm is proportional to, up to the network: weight * sqrt(mean squared error).

    The gradient of weight * mean((output - target)^2) by the output has the norm 2 weight sqrt(loss / numbers).

    Args:
        loss: mean squared errors [batch] before any weight.
        weight: of the objective [batch], without the sampler's factors.

    Returns:
        Norms [batch], float32, detached.
    """
    norms = loss.detach().float().sqrt()
    return norms if weight is None else norms * weight.detach().float().to(norms.device)


class UniformLevels:
    """Every level as likely as every other: the baseline.

    Args:
        levels: number of noise levels.
        even: spread each batch evenly over the levels (one draw in each n-th part of them) instead of independently.
    """

    def __init__(self, levels: int, *, even: bool = False) -> None:
        self.levels, self.even = _at_least_one(levels, "noise levels"), even

    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        """Levels for ``count`` images; all weights are 1."""
        _at_least_one(count, "draws")
        if self.even:
            p = torch.full((self.levels,), 1 / self.levels, dtype=torch.float64)
            index = _spread(p, count, generator)
        else:
            index = torch.randint(self.levels, (count,), generator=generator)
        return Draw(index, torch.ones(count))

    def update_(self, index: Tensor, norms: Tensor) -> None:
        """Nothing to learn."""

    def variance_ratio(self) -> float | None:
        """Not known: nothing is measured."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self.levels}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, levels=self.levels)


class LogitNormalLevels:
    """Levels whose place between no noise and pure noise has a normal logit (Esser et al. 2024).

    Biased on purpose: the weights stay 1, so this is another objective, with the middle levels counting more.

    Args:
        levels: number of noise levels.
        mean, std: of the logit; a higher mean gives more noise.
    """

    def __init__(self, levels: int, *, mean: float = 0.0, std: float = 1.0) -> None:
        if not std > 0:
            raise InputError("a standard deviation above 0", f"{std}", "use 1, as the paper does")
        self.levels, self.mean, self.std = _at_least_one(levels, "noise levels"), mean, std

    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        """Levels for ``count`` images; all weights are 1."""
        normal = torch.randn(_at_least_one(count, "draws"), generator=generator, dtype=torch.float64)
        place = (self.mean + self.std * normal).sigmoid() * self.levels
        return Draw(place.long().clamp_max(self.levels - 1), torch.ones(count))

    def update_(self, index: Tensor, norms: Tensor) -> None:
        """Nothing to learn."""

    def variance_ratio(self) -> float | None:
        """Not known: nothing is measured."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"levels": self.levels, "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_state(state, levels=self.levels, mean=self.mean, std=self.std)


class ImportanceLevels:
    """Levels drawn by the size of their gradients, with weights that keep the mean over all levels unbiased.

    The variance of a weighted mean is least where a level is drawn in proportion to the root mean square of its
    gradient norms (Katharopoulos and Fleuret 2018, applied to levels in the place of samples). Scores are kept for
    ranges of neighbouring levels; each batch is spread evenly over p (systematic draws), which keeps every level's
    expected count. Uniform until every range has been seen.

    Args:
        levels: number of noise levels T.
        bins: ranges of levels that share one score, at most ``levels``.
        floor: share of uniform draws mixed in, above 0 and at most 1; no weight exceeds 1 / floor.
        memory: how many samples of a range its score remembers.
    """

    def __init__(self, levels: int, *, bins: int = 64, floor: float = 0.2, memory: float = 100.0) -> None:
        self.levels = _at_least_one(levels, "noise levels")
        self.bins = min(_at_least_one(bins, "bins"), levels)
        if not 0 < floor <= 1:
            raise InputError("a floor above 0 and at most 1", f"{floor}", "use 0.2")
        if not memory >= 1:
            raise InputError("a memory of at least 1 sample", f"{memory}", "use 100")
        self.floor, self.memory = floor, memory
        self.squares = torch.zeros(self.bins, dtype=torch.float64)
        self.counts = torch.zeros(self.bins, dtype=torch.float64)
        self._bin_of = torch.arange(levels) * self.bins // levels

    def probabilities(self) -> Tensor:
        """The chance of each level, [T] float64, summing to 1."""
        scores = self._scores()
        uniform = torch.full((self.levels,), 1 / self.levels, dtype=torch.float64)
        if scores is None or float(scores.sum()) == 0:
            return uniform
        return self.floor * uniform + (1 - self.floor) * scores / scores.sum()

    def draw(self, count: int, *, generator: torch.Generator) -> Draw:
        """Levels for ``count`` images, and weights 1 / (T p)."""
        p = self.probabilities()
        index = _spread(p, _at_least_one(count, "draws"), generator)
        return Draw(index, (1 / (self.levels * p[index])).float())

    def update_(self, index: Tensor, norms: Tensor) -> None:
        """Learn from a batch.

        Args:
            index: its levels [n].
            norms: gradient norms of its samples up to a common factor [n], such as `gradient_bound`'s, without the
                weights of the draw.
        """
        if index.shape != norms.shape or index.ndim != 1:
            got = f"{list(index.shape)} and {list(norms.shape)}"
            raise InputError("levels and norms of one shape [n]", got, "pass one norm a sample")
        index, norms = index.detach().cpu(), norms.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(norms).all()) or bool((norms < 0).any()):
            raise InputError("finite norms >= 0", "a negative, infinite or NaN norm", "check the model's loss")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.levels:
            got = f"{int(index.min())} to {int(index.max())}"
            raise InputError(f"levels from 0 to {self.levels - 1}", got, "pass the levels that were drawn")
        places = self._bin_of[index]
        fresh = torch.bincount(places, minlength=self.bins).double()
        sums = torch.zeros_like(self.squares).index_add_(0, places, norms.square())
        # A plain mean while few were seen, one that forgets afterwards: the first sample does not linger.
        rate = torch.maximum(fresh / (self.counts + fresh).clamp_min(1), 1 - (1 - 1 / self.memory) ** fresh)
        self.squares += rate * (sums / fresh.clamp_min(1) - self.squares)
        self.counts += fresh

    def variance_ratio(self) -> float | None:
        """The second moment of the weighted gradient under uniform draws over the least that any draws can reach.

        mean(s^2) / mean(s)^2 with s a level's root mean square norm: 1 where there is nothing to gain. The steps that
        SGD needs go with the second moment in its convergence bounds, so this is the most by which they can fall, as
        far as single gradients are long beside their mean and ``norms`` go with the gradients' lengths. ``None`` until
        every range of levels has been seen, or where all gradients are 0.
        """
        scores = self._scores()
        if scores is None or float(scores.sum()) == 0:
            return None
        return float(scores.square().mean() / scores.mean().square())

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs, as tensors and numbers."""
        return {
            "levels": self.levels,
            "bins": self.bins,
            "squares": self.squares.clone(),
            "counts": self.counts.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            InputError: a state of other levels or bins.
        """
        _check_state(state, levels=self.levels, bins=self.bins)
        self.squares, self.counts = state["squares"].clone(), state["counts"].clone()

    def _scores(self) -> Tensor | None:
        """Root mean square norms [T], or ``None`` before every range has been seen."""
        return self.squares.sqrt()[self._bin_of] if bool((self.counts > 0).all()) else None


def systematic(probabilities: Tensor, count: int, offset: float) -> Tensor:
    """Systematic draws along the levels (Madow 1949), in order.

    With the offset uniform on [0, 1) each level comes floor or ceil of count * p times, count * p on average, and so
    does any run of levels. Not `draw_systematic`: its random order leaves to chance which parts of the range of noise
    a batch covers.

    Args:
        probabilities: [levels] float64, summing to 1.
        count: draws n.
        offset: the place of the first of n evenly spaced points within the first n-th of the cumulative sum.

    Returns:
        Levels [count], int64, ascending.
    """
    cumulative = probabilities.cumsum(0)
    points = (torch.arange(count, dtype=torch.float64) + offset) * (cumulative[-1] / count)
    # Rounding may put the last point on the sum itself, past the last level that has any chance.
    last = int(torch.searchsorted(cumulative, cumulative[-1:])[0])
    return torch.searchsorted(cumulative, points, right=True).clamp_max_(last)


def _spread(probabilities: Tensor, count: int, generator: torch.Generator) -> Tensor:
    offset = float(torch.rand(1, generator=generator, dtype=torch.float64))
    return systematic(probabilities, count, offset)[torch.randperm(count, generator=generator)]


def _at_least_one(value: int, what: str) -> int:
    if value < 1:
        raise InputError(f"at least one of {what}", f"{value}", "ask for one or more")
    return value


def _check_state(state: dict[str, Any], **settings: float) -> None:
    for key, value in settings.items():
        if state.get(key) != value:
            raise InputError(
                f"a sampler state with {key} {value}", f"{state.get(key)}", "resume with the same settings"
            )
