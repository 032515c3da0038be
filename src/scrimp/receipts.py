"""Receipts: what a run cost and gave, one JSON file each, written once and never edited."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from scrimp.meter.cost import Cost
from scrimp.meter.device import cuda_in_use
from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_json

SCHEMA = 1
"""Version of the file layout; raised whenever a reader of the old layout would misread the new one."""


@dataclass(frozen=True)
class Receipt:
    """One run of one way.

    Attributes:
        kind: ``"run"`` (a job), ``"compare"`` (a method beside its baseline) or ``"benchmark"``.
        name: the study, comparison or benchmark this belongs to; receipts of one name are drawn together.
        way: what was done, such as ``"uniform"`` or ``"history"``.
        baseline: whether this is the conventional way the others are judged against.
        seed: the run's seed; runs of several ways with one seed are a pair.
        quality: final figures by name, such as ``test_accuracy`` (0 to 1) and ``train_loss`` (nats).
        cost: see `scrimp.meter.Cost`.
        curve: points along the run, each a mapping with ``flops``, ``seconds``, ``cpu_seconds``, ``samples``
            and whatever was followed (``train_loss``, ``test_accuracy``, ``learning_rate``, ``tau``).
        config: the resolved configuration.
        notes: further facts of the run, such as ``{"data": "...", "images": 12000}``.
        versions, machine: what it ran with and on (see `environment`).
        created: UTC, ISO 8601.
    """

    kind: str
    name: str
    way: str
    seed: int | None = None
    baseline: bool = False
    quality: dict[str, float | None] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=lambda: versions())
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record["cost"] = self.cost.to_dict()
        finite: dict[str, Any] = _finite(record)
        return finite


def save_receipt(receipt: Receipt, path: str | os.PathLike[str]) -> Path:
    """Write a receipt atomically. Non-finite numbers are written as null: they are unknown, not values."""
    return write_json(path, receipt.to_dict())


def load_receipt(path: str | os.PathLike[str]) -> Receipt:
    """Read a receipt.

    Raises:
        InputError: the file is damaged, is no receipt, or has another schema version.
    """
    try:
        record = json.loads(Path(path).read_bytes(), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not whole JSON"
        raise InputError(
            "a receipt (JSON)", f"{path}: {reason}", "restore it from a copy or run the job again"
        ) from error
    if not isinstance(record, dict) or "schema" not in record:
        raise InputError("a receipt with a schema version", f"{path} without one", "pass a file a scrimp job wrote")
    if record["schema"] != SCHEMA:
        raise InputError(
            f"receipt schema {SCHEMA}", f"schema {record['schema']} in {path}", "use the scrimp version that wrote it"
        )
    try:
        _check_shape(record)
        known = {item.name for item in fields(Receipt)}
        record["cost"] = Cost.from_dict(record["cost"])
        return Receipt(**{key: value for key, value in record.items() if key in known})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "a whole receipt", f"{path} with a missing or misshapen field ({error})", "run the job again"
        ) from error


# What a receipt of this schema holds. The first row must be there: a default would be the reader's own machine and day.
_REQUIRED = {"kind": str, "name": str, "way": str, "created": str, "cost": dict, "versions": dict, "machine": dict}
_OPTIONAL = {"baseline": bool, "quality": dict, "curve": list, "config": dict, "notes": dict}


def _check_shape(record: dict[str, Any]) -> None:
    shapes = _REQUIRED | {name: kind for name, kind in _OPTIONAL.items() if name in record}
    for name, kind in shapes.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    if not isinstance(record.get("seed"), (int, type(None))):
        raise TypeError("seed is no int")
    for figures in [record.get("quality", {}), *record.get("curve", [])]:
        if not all(isinstance(figure, (int, float, type(None))) for figure in figures.values()):
            raise TypeError("quality or curve holds what is no number")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def versions() -> dict[str, str | None]:
    """Versions of what the figures depend on; ``None`` for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("scrimp", "torch", "torchvision", "timm", "accelerate", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """The machine in the words a reader can compare: system, processor, cores, GPU if one is in use."""
    record: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": None,
    }
    import torch  # late: reading a receipt must not load torch

    record["threads"] = torch.get_num_threads()
    cuda = cuda_in_use()
    if cuda is not None:
        record["gpu"] = cuda.get_device_name()
    return record


def _processor() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or torch is a number, not its printed form
        return _finite(value.item())
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)
