"""Padded execution: each block runs on rows gathered up to the longest image of the batch; to be timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from scrimp.adaptive import Controller, Method, Run
from scrimp.adaptive.calls import Call
from scrimp.adaptive.gating import Gating
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.stream import Plan, Stream, falling, flat


@contextmanager
def padded(controller: Controller) -> Iterator[None]:
    """Forwards of this model in the padded form: the answers of the ragged one, in rectangular batches.

    What deciding costs is in it, and that is done by the method itself. Read-outs other than the answers are not to be
    used meanwhile. In evaluation mode and without gradients only.
    """
    method, form = controller.method, controller.form
    controller.method, controller.form = Padded(method), "masked"
    try:
        yield
    finally:
        controller.method, controller.form = method, form


class Padded(Method):
    """A method whose masked form goes on with no more rows than the longest image of the batch has.

    From `enter` to `look` the stream calls itself dense: only so are rotary embeddings found for rows that moved.
    """

    def __init__(self, inner: Method) -> None:
        self.inner = inner
        self.wide = type(inner).leave is not Method.leave
        """Whether the method looks at all rows between blocks; else they stay narrow."""

    def enter(self, run: Run, x: Tensor) -> Tensor:
        if run.block and not self.wide:
            run.stream = replace(run.stream, layout="dense")
            return x
        x = self.inner.enter(run, x)
        gated = isinstance(self.inner, Gating) and run.block >= self.inner.full
        alive = run.memory["decisions"][-1].attention() if gated else run.stream.alive
        return _narrow(run, x, alive, layout="dense")

    def look(self, run: Run, call: Call) -> None:
        run.stream = replace(run.stream, layout="masked")
        self.inner.look(run, call)

    def plan(self, run: Run) -> Plan | None:
        found = self.inner.plan(run)
        return None if found is None else _longest(found.stream)

    def attend(self, run: Run, call: Call) -> Tensor:
        return self.inner.attend(run, call)

    def merge(self, run: Run, x: Tensor) -> Tensor:
        gated = isinstance(self.inner, Gating) and run.block >= self.inner.full and run.host.blocks[run.block].middle
        if not gated:
            return x
        x = self.inner.merge(run, _widen(run, x))
        return _narrow(run, x, run.memory["decisions"][-1].mlp())

    def leave(self, run: Run, x: Tensor) -> Tensor:
        last = run.block == len(run.host.blocks) - 1
        return self.inner.leave(run, _widen(run, x)) if self.wide or last else x

    def finish(self, run: Run, x: Tensor) -> Tensor:
        return self.inner.finish(run, x)

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        return self.inner.schedule(host, patches, cap)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.inner.parameters()


def _narrow(run: Run, x: Tensor, alive: Tensor | None, *, layout: str = "masked") -> Tensor:
    stream = run.stream if alive is None else replace(run.stream, alive=alive)
    plan = _longest(stream)
    run.stream = replace(plan.stream, layout=layout)  # type: ignore[arg-type]
    return plan.take(x)


def _longest(stream: Stream) -> Plan:
    """Go on with the rows that count, and as many others as the longest image has more."""
    alive = stream.alive
    if alive is None:
        return Plan(stream, None)
    lengths = alive.sum(1)
    longest = max(1, int(lengths.max()))
    index = falling(alive.to(torch.uint8))[:, :longest]
    there = None if bool((lengths == longest).all()) else alive.gather(1, index)
    positions = index if stream.positions is None else stream.positions.gather(1, index)
    after = replace(stream, alive=there, positions=positions, width=longest)
    return Plan(after, flat(index, stream.width))


def _widen(run: Run, x: Tensor) -> Tensor:
    """All rows in their old places, those that do not count 0; the stream is that of the masked form again."""
    stream, places = run.stream, run.stream.positions
    if places is None:
        run.stream = replace(stream, layout="masked")
        return x
    if stream.alive is not None:
        x = x.masked_fill(~stream.alive[..., None], 0)
    full = x.new_zeros(stream.images, stream.tokens, x.shape[-1])
    full = full.scatter(1, places[..., None].expand_as(x), x)
    there = torch.ones_like(places, dtype=torch.bool) if stream.alive is None else stream.alive
    alive = torch.zeros(stream.images, stream.tokens, dtype=torch.bool, device=x.device).scatter(1, places, there)
    run.stream = replace(stream, layout="masked", positions=None, alive=alive, width=stream.tokens)
    return full
