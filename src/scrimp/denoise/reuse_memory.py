"""What refreshes leave for the steps that reuse it: the features of the last one, or the line through the last two.

With small networks the line came nearer to the full sampler at the same cost in nearly all settings. Log-SNR or the
noise-to-signal ratio in place of the timestep, or no line before the third refresh, were worse. Followed without limit,
lines reach too far where refreshes are rare.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

REACH = 0.5
"""How far past its second point a line is followed, in the distance of the two; under ``every(2)`` it is all needed."""


@dataclass
class Refresh:
    """Features of one call that computed all: the shallow ones [batch, ...], and the deep ones once they are known."""

    timestep: float | None
    shallow: Tensor
    deep: Tensor | None = None


class Memory:
    """Of one trajectory.

    Args:
        order: 0 answers with the features of the last refresh; 1 with those on the line through the last two, by
            timestep, from the second refresh on, and keeps those of both.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.last: Refresh | None = None
        self._before: Refresh | None = None

    def forget(self) -> None:
        """Before another trajectory."""
        self.last = self._before = None

    def refresh(self, timestep: float | None, shallow: Tensor) -> None:
        """Begin one; `keep` ends it."""
        # Two refreshes at one timestep, as within a step of Heun's method, make no line.
        if self.order and self.last is not None and self.last.timestep != timestep:
            self._before = self.last
        self.last = Refresh(timestep, shallow)

    def keep(self, deep: Tensor) -> None:
        """Deep features of the refresh under way."""
        if self.last is not None:
            self.last.deep = deep

    def shallow(self, timestep: float | None) -> Tensor:
        """Shallow features as they would be if the deep ones, reused now, were right."""
        last, before, ahead = self._line(timestep)
        return last.shallow if before is None else last.shallow + ahead * (last.shallow - before.shallow)

    def deep(self, timestep: float | None) -> Tensor | None:
        """Deep features for a call that does not compute them."""
        last, before, ahead = self._line(timestep)
        if last.deep is None or before is None or before.deep is None:
            return last.deep
        return last.deep + ahead * (last.deep - before.deep)

    def _line(self, timestep: float | None) -> tuple[Refresh, Refresh | None, float]:
        last, before = self.last, self._before
        if last is None:
            raise RuntimeError("nothing was refreshed yet")
        if before is None or timestep is None or last.timestep is None or before.timestep is None:
            return last, None, 0.0
        return last, before, min((timestep - last.timestep) / (last.timestep - before.timestep), REACH)
