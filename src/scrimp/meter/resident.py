"""Resident memory of a process as the system counts it: code, libraries and allocator slack included. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from scrimp.meter.cost import Reading
from scrimp.primitives.errors import InputError


class ResidentPeak:
    """Peak resident set of this process during a ``with`` block (Linux).

    The system keeps one high-water mark a process; it is reset at the start, so blocks neither nest nor overlap, and
    a process that follows its own mark will find it reset. ``reading`` is the result after the block.

    Args:
        proc: where the process's files are.
    """

    def __init__(self, proc: str | os.PathLike[str] = "/proc/self") -> None:
        self._proc = Path(proc)
        self._start: int | None = None
        self.reading = Reading()

    def __enter__(self) -> ResidentPeak:
        try:
            (self._proc / "clear_refs").write_text("5")
            self._start = _status_bytes(self._proc, "VmHWM")
        except OSError:
            self._start = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = _status_bytes(self._proc, "VmHWM") if self._start is not None else None
        if peak is None:
            self.reading = Reading(None, "not measured: this system does not let a process reset its peak resident set")
        else:
            self.reading = Reading(peak, "peak resident set of the process (VmHWM, reset at the start)")


def peak_resident(module_function: str, *args: Any, timeout: float | None = None) -> Reading:
    """Run a function in a fresh interpreter and give the peak resident set of that process, imports included.

    On Linux it is read from ``VmHWM``, for ``ru_maxrss`` begins at the resident set of the process that started it.

    Args:
        module_function: ``"package.module:function"``, importable where this process imports from.
        args: passed on as JSON.
        timeout: seconds after which the process is stopped.

    Raises:
        InputError: the name has no colon, or an argument is no JSON.
        RuntimeError: the function could not be imported, raised, was killed or ran out of time.
    """
    order = _order(module_function, args)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "order").write_text(order)
        command = [sys.executable, "-c", _CHILD, folder]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{module_function} did not end within {timeout} s in a fresh process") from error
        answer = Path(folder) / "peak"
        if done.returncode != 0 or not answer.exists():
            raise RuntimeError(f"{module_function} failed in a fresh process: {_failure(done)}")
        return Reading(
            int(answer.read_text()), "peak resident set of a fresh process, interpreter and imports included"
        )


# Runs apart from this package, so that nothing but the function's own imports is resident.
_CHILD = """
import importlib, json, sys
folder = sys.argv[1]
module, function, args = json.load(open(folder + "/order"))
value = importlib.import_module(module)
for name in function.split("."):
    value = getattr(value, name)
value(*args)
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
except (OSError, StopIteration):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(folder + "/peak", "w") as file:
    file.write(str(peak))
"""


def _order(module_function: str, args: tuple[Any, ...]) -> str:
    module, colon, function = module_function.partition(":")
    if not (module and colon and function):
        raise InputError("'package.module:function'", repr(module_function), "name the function after a colon")
    try:
        return json.dumps([module, function, args])
    except (TypeError, ValueError) as error:
        raise InputError(
            "arguments that JSON can hold", f"{args!r} ({error})", "pass numbers, strings, lists and mappings of these"
        ) from error


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode} before it returned"


def _status_bytes(proc: Path, field: str) -> int | None:
    for line in (proc / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
