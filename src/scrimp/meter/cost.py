"""What a call cost, each figure with how it was obtained. Unknown is ``None``, never 0."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Reading:
    """One measured figure: its value in SI units, how it was obtained, and what it missed."""

    value: float | None = None
    how: str = "not measured"
    missed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "how": self.how, "missed": list(self.missed)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Reading:
        """Read back what `to_dict` gave.

        Raises:
            KeyError, TypeError: a part is missing, or is no number or text.
        """
        if not (isinstance(record["value"], (int, float, type(None))) and isinstance(record["how"], str)):
            raise TypeError(f"{record} is no reading")
        return cls(record["value"], record["how"], tuple(record.get("missed", ())))


@dataclass(frozen=True)
class Cost:
    """The cost of a call or a job. 1 multiply-add = 2 FLOPs; seconds, bytes and joules are SI.

    ``energy_modelled`` is the only field that may hold an estimate; it is never mixed with ``joules``.
    """

    seconds: Reading = field(default_factory=Reading)
    cpu_seconds: Reading = field(default_factory=Reading)
    flops: Reading = field(default_factory=Reading)
    peak_bytes: Reading = field(default_factory=Reading)
    saved_bytes: Reading = field(default_factory=Reading)  # activations kept for the backward pass
    joules: Reading = field(default_factory=lambda: Reading(how="not measured: no meter"))
    energy_modelled: Reading = field(default_factory=Reading)
    stored_bytes: Reading = field(default_factory=Reading)  # on disk, all that is needed to decode included
    samples: Reading = field(default_factory=Reading)  # training samples gone through forward and backward
    labels: Reading = field(default_factory=Reading)  # distinct labels the method was allowed to see

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name).to_dict() for item in fields(self)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Cost:
        return cls(**{item.name: Reading.from_dict(record[item.name]) for item in fields(cls) if item.name in record})
