"""Run folders: where they go, what configuration they hold, and when a job may go on in one."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import yaml

from scrimp.primitives.errors import InputError
from scrimp.primitives.files import write_atomic

CONFIG = "config.yaml"
RECEIPT = "receipt.json"
WEIGHTS = "weights.safetensors"
CHECKPOINT = "checkpoint.pt"
REPORT = "report.html"

_FREE_TO_CHANGE = {"out", "json", "resume", "trackers", "checkpoint_seconds", "workers"}


def choose_folder(out: Path | None, name: str, *, resume: bool, root: Path = Path("runs")) -> Path:
    """The run folder: ``out``, or under ``root`` the first free ``name``, ``name-2``, ...; the last one to resume.

    Raises:
        InputError: the folder holds something already, or there is nothing to resume.
    """
    if out is None:
        taken = _numbered(root, name)
        if not resume:
            return root / (name if not taken else f"{name}-{max(taken) + 1}")
        if not taken:
            raise InputError(f"a run to resume under {root}/{name}", "none", "start it without --resume")
        last = max(taken)
        return root / (name if last == 1 else f"{name}-{last}")
    if resume and not (out / CONFIG).is_file():
        raise InputError(f"a run to resume in {out}", "none", "start it without --resume")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("a new or empty folder for --out", f"{out}", "pass --resume to go on, or another --out")
    return out


def record_config(folder: Path, config: Any, resolved: dict[str, Any]) -> dict[str, Any]:
    """Write the configuration, or on ``--resume`` check it against the one there; returns what was resolved then.

    Raises:
        InputError: a setting differs from the interrupted run's.
    """
    settings = plain(config)
    if not config.resume:
        content = {
            "job": type(config).__name__.removesuffix("Config").lower(),
            "config": settings,
            "resolved": resolved,
        }
        write_atomic(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))
        return resolved
    before = read_yaml(folder / CONFIG)
    for key, value in settings.items():
        if key not in _FREE_TO_CHANGE and before.get("config", {}).get(key, value) != value:
            raise InputError(
                f"the interrupted run's {key}, {before['config'][key]}", f"{value}", "resume with the same command"
            )
    found: dict[str, Any] = before["resolved"]
    return found


def plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain YAML and JSON values."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: no such file, or no mapping in it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            "a YAML file", f"{path} ({str(error).splitlines()[0]})", "check the path and the file"
        ) from error
    if not isinstance(content, dict):
        raise InputError("a YAML mapping", f"{path} without one", "write one 'name: value' a line")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _numbered(root: Path, name: str) -> list[int]:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [pattern.fullmatch(item.name) for item in root.iterdir()] if root.is_dir() else []
    return [int(match.group(1) or 1) for match in found if match]
