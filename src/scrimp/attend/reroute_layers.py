"""Which layer of a model an attention call comes from, and which function is to serve it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from scrimp.attend.reroute_calls import Attention, Target
from scrimp.primitives.errors import InputError

Where = str | re.Pattern[str] | Callable[[str], bool]


class Layers:
    """The names of the modules whose forward pass is under way, kept by hooks, for each thread its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def current(self) -> str | None:
        """The innermost one; ``None`` outside the model."""
        stack = self._stack()
        return stack[-1] if stack else None

    @contextmanager
    def following(self, model: nn.Module | None) -> Iterator[None]:
        """Follow the model's modules during the block."""
        handles: list[Any] = []
        try:
            for name, module in model.named_modules() if model is not None else ():
                handles += self._follow(name, module)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        def enter(*_: Any) -> None:
            self._stack().append(name)

        def leave(*_: Any) -> None:
            stack = self._stack()
            if name in stack:  # with those inside it that raised before their own hooks ran
                del stack[len(stack) - 1 - stack[::-1].index(name) :]

        # Ours first on the way in and called in any case on the way out.
        return (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave, always_call=True),
        )

    def _stack(self) -> list[str]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[str] = self._local.stack
        return stack


class Choice:
    """The function for each layer, by name; ``None`` leaves a layer to torch."""

    def __init__(self, fn: Attention | Mapping[str, Attention], where: Where | None, *, named: bool) -> None:
        by_name = isinstance(fn, Mapping)
        if (by_name or where is not None) and not named:
            raise InputError("model= beside a choice of layers", "none", "pass attention(fn, model=model, where=...)")
        self._named = named
        self._where = _predicate(where)
        self._rules = (
            [(_predicate(pattern), Target(each)) for pattern, each in fn.items()]
            if isinstance(fn, Mapping)
            else [(_everywhere, Target(fn))]
        )

    def __call__(self, name: str | None) -> Target | None:
        if self._named and name is None:  # not this model's call
            return None
        layer = name or ""
        if not self._where(layer):
            return None
        return next((target for fits, target in self._rules if fits(layer)), None)


def _everywhere(name: str) -> bool:
    return True


def _predicate(where: Where | None) -> Callable[[str], bool]:
    if where is None:
        return _everywhere
    if isinstance(where, (str, re.Pattern)):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise InputError("a regular expression for layers", f"{where!r} ({error})", "correct it") from error
        return lambda name: pattern.search(name) is not None
    if not callable(where):
        raise InputError("where= as a regular expression or a predicate", type(where).__name__, "pass one of them")
    return where
