"""Going around a module's call: what may leave a module out cannot be a torch hook, which only runs before or after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from scrimp.primitives.errors import InputError

Through = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Call:
    """A module's own forward, gone through by another; known by its type."""

    def __init__(self, through: Through, own: Callable[..., Any], owner: str) -> None:
        self._through, self._own, self.owner = through, own, owner

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self._through(self._own, args, kwargs)


class Around:
    """Functions put around the calls of modules, several owners' one around the other.

    Args:
        owner: what puts them there, for messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._put: list[tuple[nn.Module, Any, Any]] = []

    def put(self, module: nn.Module, through: Through) -> None:
        """Has calls of a module go to ``through(own, args, kwargs)``, ``own`` being its call up to now."""
        call = _Call(through, module.forward, self._owner).run
        self._put.append((module, module.__dict__.get("forward"), call))
        module.forward = call  # type: ignore[method-assign]

    def remove(self) -> None:
        """Gives every module its own call back. Further removals do nothing.

        Raises:
            InputError: someone else's function is around one put here; nothing is removed.
        """
        for module, _, call in self._put:
            # Bound methods are made anew at each look-up, and equal all the same.
            if module.__dict__.get("forward") != call:
                raise InputError(
                    f"{self._owner} to be the last thing attached to the model",
                    f"{', '.join(owners(module)) or 'another function'} around it",
                    "remove in the reverse order of attaching",
                )
        for module, before, _ in reversed(self._put):
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._put.clear()


def owners(module: nn.Module) -> list[str]:
    """Who is around a module's call: at most the outermost one is told."""
    call = getattr(module.__dict__.get("forward"), "__self__", None)
    return [call.owner] if isinstance(call, _Call) else []
