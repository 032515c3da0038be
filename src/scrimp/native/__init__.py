"""Compiled kernels for the CPU, and what to say where they could not be built.

Each kernel has a torch twin of the same signature in its family. A family asks `load` and runs the twin on ``None``.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any


def load() -> ModuleType | None:
    """The compiled module, or ``None`` where there is none; then the first call says so, once a process.

    Imports torch. The kernels share its OpenMP threads: ``torch.set_num_threads`` governs both.

    Warns:
        RuntimeWarning: on the first call without a compiled module; says why and what to do.
    """
    module, reason = _load()
    if module is None:
        _warn_once(reason)
    return module


def available() -> bool:
    """Whether the compiled module is here and loads. Never warns."""
    return _load()[0] is not None


def capabilities() -> dict[str, Any] | None:
    """What the compiled module runs with, or ``None`` where there is none. Never warns.

    Returns:
        ``simd`` ("generic", "avx2", "avx512" or "neon": chosen on this machine), ``openmp`` (bool), ``threads`` (int,
        as the calling thread would use them now) and ``compiler`` (name and version).
    """
    module, _ = _load()
    return None if module is None else dict(module.capabilities())


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        _share_openmp()
        return importlib.import_module("scrimp.native._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "scrimp.native._native":
            raise
        return None, "it was not built, for want of a C++ compiler"
    except (ImportError, OSError) as error:
        return None, f"it does not load ({error})"


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"scrimp runs without its native library: {reason}. Results are the same, some kernels are slower. "
        "To build it, install g++ (or another C++17 compiler) and repeat: pip install --force-reinstall --no-deps .",
        RuntimeWarning,
        stacklevel=3,
    )


def _share_openmp() -> None:
    """Let the kernels find the OpenMP runtime torch brought; they are linked to none of their own.

    Torch's may be a renamed copy beside its libraries. Linking by name would then load a second one, with a second
    pool of threads.
    """
    import torch  # noqa: F401  # loads its runtime

    if sys.platform == "linux":
        runtimes = [*_mapped_libraries("libgomp"), "libgomp.so.1"]
        torchs_first = min(runtimes, key=lambda path: "/torch" not in path)
        ctypes.CDLL(torchs_first, mode=ctypes.RTLD_GLOBAL)


def _mapped_libraries(stem: str) -> list[str]:
    """Paths of this process's shared libraries whose file name begins with ``stem``."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(stem))
