"""Errors a user can act on: one line that says what was expected, what came, and the remedy."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(ValueError):
    """Something a person handed over cannot be used. The shell prints it as one line, exit code 2."""

    def __init__(self, expected: str, got: str, remedy: str) -> None:
        super().__init__(f"expected {expected}; got {got}; {remedy}")
        self.expected, self.got, self.remedy = expected, got, remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # Exceptions cross process borders (loader workers) by pickling their arguments.
        return type(self), (self.expected, self.got, self.remedy)


class MissingExtraError(ImportError):
    """A host library that belongs to an optional extra is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import a host library, or say which extra brings it.

    Args:
        module: dotted module name, such as ``"pynvml"``.
        extra: the extra of this package that installs it, such as ``"gpu"``.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        raise MissingExtraError(
            f"expected the package '{module.partition('.')[0]}'; got none; "
            f"install it with: pip install 'scrimp[{extra}]'"
        ) from error
