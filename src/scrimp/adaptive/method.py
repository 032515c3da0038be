"""What a way of spending less is asked in the course of a forward: the protocol between it and `Controller`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scrimp.adaptive.calls import Call, attend
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count, Number
from scrimp.adaptive.stream import Plan, Stream
from scrimp.primitives.errors import InputError


@dataclass
class Run:
    """One forward on its way through the blocks.

    Attributes:
        host: what is known of the model.
        stream: the tokens as they are now; a method that changes them itself (`Method.merge`, `Method.enter`,
            `Method.leave`) puts the new one here.
        device: of the tokens.
        cap: most patch tokens that may leave a block that reduces; None: any.
        block: index of the block that runs.
        evidence: what `Method.look` saw in this block, one entry a call of attention.
        own: FLOPs by image that the method itself spent in this block.
        memory: anything a method carries from block to block.
        plan: rows that go on after this block's attention, until they do.
        counts: what each block that ran has cost.
        streams: the tokens after each of them.
    """

    host: Host
    stream: Stream
    device: torch.device
    cap: int | None = None
    block: int = -1
    plan: Plan | None = None
    evidence: list[Any] = field(default_factory=list)
    own: Number = 0
    memory: dict[str, Any] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)


class Method:
    """A way of spending less. What is not overridden changes nothing.

    A block with a midpoint (attention, first addition, MLP) runs: `enter`, `look`, `plan` (queries, projection and MLP
    are then computed for the rows of the plan only), `attend`, `merge` on the sum, `leave`. A block without one
    (parallel attention and MLP) runs: `enter`, `look` and `attend` at each call of attention, `plan` and `merge` on its
    output, `leave`. What a block has cost is read off ``run.stream`` before attention, after it, and before `leave`.

    Attributes:
        adaptive: whether images of a batch may keep different numbers of tokens. Then the masked and the ragged form
            are two layouts of the stream; otherwise all is dense and the forms are one.
    """

    adaptive: bool = True

    def enter(self, run: Run, x: Tensor) -> Tensor:
        """Before a block: ``x`` as the block is to get it, in the layout of ``run.stream``."""
        return x

    def look(self, run: Run, call: Call) -> None:
        """At a call of attention: append to ``run.evidence``; add to ``run.own`` the matrix products it took."""

    def plan(self, run: Run) -> Plan | None:
        """Which rows go on (see `Stream.keep`, `Stream.choose`); None: all."""
        return None

    def attend(self, run: Run, call: Call) -> Tensor:
        """What attention gives, in the rows of its query; those that do not go on by ``run.plan`` may be anything."""
        return attend(call, run.stream, run.plan)

    def merge(self, run: Run, x: Tensor) -> Tensor:
        """The tokens after attention, for a method that makes new ones of them; then it sets ``run.stream`` too."""
        return x

    def leave(self, run: Run, x: Tensor) -> Tensor:
        """After a block. Its entries, the last of ``run.counts`` and ``run.streams``, may be put right here."""
        return x

    def finish(self, run: Run, x: Tensor) -> Tensor:
        """After the last block: the tokens that the model goes on with, in the layout of ``run.stream``."""
        return x

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        """What an image of ``patches`` patch tokens may cost at most in each block, if ``cap`` holds; for budgets."""
        remedy = "override Method.schedule, or leave max_flops and max_tokens out"
        raise InputError("a method that knows its highest cost", type(self).__name__, remedy)

    def check(self, host: Host) -> None:
        """Raise InputError where the settings do not fit the model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Numbers to train that the method brings along."""
        return iter(())
