"""What an adapter method is to the rest of the family, and the methods that train existing tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Factors(Protocol):
    """The trained numbers behind one weight: a module whose parameters they are."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        """``a`` [r, in] and ``b`` [out, r], float32, the scale in ``b``: the delta is ``b @ a``."""
        ...

    def parameters(self) -> Any:
        """The numbers, in the order of the file."""
        ...


class Method(Protocol):
    """A way of adapting a model: a frozen record that can be written down and read back."""

    @property
    def name(self) -> str:
        """As in files and in the shell."""
        ...

    @property
    def also(self) -> str | None:
        """Parameters (a regular expression) trained in full by the method itself."""
        ...

    @property
    def bits(self) -> int | None:
        """Bits a number is trained at; ``None`` for floating point."""
        ...

    def factors(self, shapes: list[tuple[int, int]]) -> list[nn.Module]:
        """`Factors` for weights of these (out, in) shapes; none for a method that has no factors."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the file says of it, enough to make it again."""
        ...


@dataclass(frozen=True)
class Tuning:
    """Existing parameters and buffers trained as they are: `bias`, `linear`, `full`."""

    name: str
    also: str | None = None
    bits: None = None

    def factors(self, shapes: list[tuple[int, int]]) -> list[nn.Module]:
        """None: nothing is added to any weight."""
        return []

    def settings(self) -> dict[str, Any]:
        """The fields."""
        return {key: value for key, value in asdict(self).items() if key in ("name", "also")}


def bias() -> Tuning:
    """Every bias and nothing else (BitFit, Ben Zaken et al. 2022), beside what ``also`` names."""
    return Tuning("bias", r"(^|[._])bias$")


def linear() -> Tuning:
    """Nothing of the model itself: only what ``also`` names, such as a new classifier."""
    return Tuning("linear")


def full() -> Tuning:
    """Everything, buffers such as batch statistics included. Keeps a copy of the model to go back to."""
    return Tuning("full", ".")
