"""Victims for `scrimp.attack` out of models that `scrimp.adaptive` is attached to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from scrimp.adaptive import Controller, Method, Run, controller_of, cost_bounds
from scrimp.adaptive.calls import Call, bias_of
from scrimp.adaptive.gates import Decision
from scrimp.adaptive.gating import Gating
from scrimp.adaptive.ledger import flops
from scrimp.adaptive.token_halting import Halted, Halting
from scrimp.adaptive.token_sampling import Sampling
from scrimp.attack.pixels import Normalised
from scrimp.attack.surrogates import (
    attention_surrogate,
    ponder_surrogate,
    prior_surrogate,
    running_surrogate,
    samples_surrogate,
    scores_surrogate,
    significance_surrogate,
    usage_surrogate,
)
from scrimp.attack.victim import Victim, frozen
from scrimp.primitives.errors import InputError


@dataclass
class Seen:
    """What one forward in the masked form has shown, differentiable.

    Attributes:
        run: the forward; its ``memory`` has what the method put there.
        method: that ran.
        attention: of each call that token sampling looked at, [n, heads, tokens]: the class token's row, or the mean of
            all rows of models without.
        significance: of these calls, [n, tokens].
        alive: the tokens that were there, [n, tokens], bool.
    """

    run: Run
    method: Method
    attention: list[Tensor] = field(default_factory=list)
    significance: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)


Surrogate = Callable[[Seen], Tensor]
"""A loss by image, [n], that falls where the cost rises."""


def ponder(seen: Seen) -> Tensor:
    """For halting: `scrimp.attack.ponder_surrogate`, as SlowFormer; without the prior."""
    state, scored = _halted(seen)
    return ponder_surrogate(state.layers[:, scored], state.rest[:, scored])


def ponder_and_prior(seen: Seen) -> Tensor:
    """For halting: with 2 times `scrimp.attack.prior_surrogate`, the published ratio of 1e-3 to 5e-4."""
    state, scored = _halted(seen)
    scores = [score[:, scored] for score in state.scores]
    return ponder(seen) + 2 * prior_surrogate(scores, depth=len(scores) * 2 / 3)


def scores(seen: Seen) -> Tensor:
    """For halting: `scrimp.attack.scores_surrogate`; sees tokens that halt in their first block."""
    state, scored = _halted(seen)
    return scores_surrogate([score[:, scored] for score in state.scores], state.layers[:, scored])


def running(seen: Seen) -> Tensor:
    """For halting: `scrimp.attack.running_surrogate`."""
    state, scored = _halted(seen)
    assert isinstance(seen.method, Halting)
    return running_surrogate([score[:, scored] for score in state.scores], full=1 - seen.method.eps)


def attention(seen: Seen) -> Tensor:
    """For token sampling: `scrimp.attack.attention_surrogate`, as SlowFormer."""
    return attention_surrogate(seen.attention, seen.alive, prefix=seen.run.host.prefix)


def significance(seen: Seen) -> Tensor:
    """For token sampling: `scrimp.attack.significance_surrogate`, the form by Kullback-Leibler divergence."""
    prefix = seen.run.host.prefix
    return significance_surrogate([one[:, prefix:] for one in seen.significance], [a[:, prefix:] for a in seen.alive])


def samples(seen: Seen) -> Tensor:
    """For token sampling: `scrimp.attack.samples_surrogate`, of its grid."""
    if not isinstance(seen.method, Sampling):
        raise InputError("a model with token_sampling_", type(seen.method).__name__, "pass another surrogate")
    prefix = seen.run.host.prefix
    patches = [one[:, prefix:] for one in seen.significance], [one[:, prefix:] for one in seen.alive]
    return samples_surrogate(*patches, samples=seen.method.samples)


def usage(seen: Seen) -> Tensor:
    """For gating: `scrimp.attack.usage_surrogate`, as SlowFormer."""
    decisions: list[Decision] = seen.run.memory["decisions"]
    prefix = seen.run.host.prefix
    tokens = torch.cat([one.token_gates[:, prefix:] for one in decisions], 1)
    heads = torch.cat([one.head_gates for one in decisions], 1)
    return usage_surrogate(tokens, heads, torch.cat([one.layer_gates for one in decisions], 1))


def victim_of(
    model: nn.Module,
    *,
    surrogate: Surrogate | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> AdaptiveVictim:
    """A victim (`scrimp.attack.Victim`) of a model that a method of `scrimp.adaptive` is attached to.

    Args:
        model: as attached to; what is changed on its controller holds for the victim.
        surrogate: the policy loss; None: `running` for halting, `samples` for token sampling, `usage` for gating, and 0
            for methods that treat all images alike. As published: `ponder_and_prior`, `attention`, `usage`.
        mean: of each channel, for a model of normalised images; None: it takes images from 0 to 1.
        std: likewise.

    Raises:
        InputError: nothing is attached, or another adaptive method without a surrogate.
    """
    controller = controller_of(model)
    if surrogate is None and controller.method.adaptive:
        usual = {Halting: running, Sampling: samples, Gating: usage}
        surrogate = next((loss for kind, loss in usual.items() if isinstance(controller.method, kind)), None)
        if surrogate is None:
            raise InputError("a surrogate for this method", type(controller.method).__name__, "pass surrogate=")
    if (mean is None) != (std is None):
        raise InputError("both mean and std, or neither", "one of them", "pass the other too")
    ready = model if mean is None or std is None else Normalised(model, mean, std)
    return AdaptiveVictim(model, controller, ready, surrogate)


@dataclass(frozen=True, eq=False)
class AdaptiveVictim:
    """See `victim_of`; costs are counted in the form that the controller is in, losses are of the masked one."""

    model: nn.Module
    controller: Controller
    ready: nn.Module
    surrogate: Surrogate | None

    @property
    def full(self) -> int:
        """See `scrimp.attack.Victim`; for images of the size last run, or else of the size attached with."""
        return cost_bounds(self.model, self._tokens())[0]

    @property
    def ceiling(self) -> int | None:
        """See `scrimp.attack.Victim`: by the method's schedule and its budgets."""
        return cost_bounds(self.model, self._tokens())[1]

    def cost(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        costs = self._run(images).costs
        assert costs is not None
        return costs

    def parts(self, images: Tensor) -> Tensor:
        """FLOPs outside the blocks and of each, [n, blocks + 1], int64: for `scrimp.attack.batch_poisoning`."""
        controller = self._run(images)
        run, costs = controller.run, controller.costs
        assert run is not None
        assert costs is not None
        counts = zip(controller.host.blocks, run.counts, strict=True)
        inside = torch.stack([flops([block], [count], len(images)) for block, count in counts], 1)
        return torch.cat([costs[:, None] - inside.sum(1, keepdim=True), inside], 1)

    def statistics(self, images: Tensor) -> Tensor:
        """Tokens after each block, [n, blocks], float64: for `scrimp.attack.fit_detector`."""
        tokens = self._run(images).tokens
        assert tokens is not None
        return tokens.double()

    def logits(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`; of the masked form, which is differentiable."""
        with _masked(self.controller):
            return self.ready(images)

    def policy_loss(self, images: Tensor) -> Tensor:
        """See `scrimp.attack.Victim`."""
        return self.policy_and_logits(images)[0]

    def policy_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one forward."""
        if self.surrogate is None:
            logits = self.logits(images)
            return logits.new_zeros(len(images)), logits
        with _masked(self.controller), _watched(self.controller) as notes:
            logits = self.ready(images)
        run = self.controller.run
        assert run is not None
        return self.surrogate(Seen(run, self.controller.method, *notes)), logits

    def _run(self, images: Tensor) -> Controller:
        with frozen(self.model), torch.no_grad():
            self.ready(images)
        return self.controller

    def _tokens(self) -> int | None:
        run = self.controller.run
        return None if run is None else run.stream.tokens


Victims = Victim | nn.Module | Sequence[Victim | nn.Module]
"""A victim, or a model of images from 0 to 1 that `scrimp.adaptive` is attached to; or several to be attacked at once:
their losses are averaged."""


def as_list(victims: Victims) -> list[Victim]:
    """The victims as a list, models by `victim_of`.

    Raises:
        InputError: none, or a model that nothing is attached to.
    """
    found = list(victims) if isinstance(victims, Sequence) else [victims]
    if not found:
        raise InputError("one victim or more", "none", "pass a model's victim")
    return [
        victim_of(one) if isinstance(one, nn.Module) and not hasattr(one, "cost") else cast(Victim, one)
        for one in found
    ]


def _halted(seen: Seen) -> tuple[Halted, Tensor]:
    if not isinstance(seen.method, Halting):
        raise InputError("a model with token_halting_", type(seen.method).__name__, "pass another surrogate")
    state: Halted = seen.run.memory["halting"]
    return state, seen.method.scored(seen.run.stream, state.running.device)


@contextmanager
def _masked(controller: Controller) -> Iterator[None]:
    before, controller.form = controller.form, "masked"
    try:
        yield
    finally:
        controller.form = before


@contextmanager
def _watched(controller: Controller) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Note the attention of each head where token sampling looks; it keeps no more than their sum itself."""
    method, notes = controller.method, (list[Tensor](), list[Tensor](), list[Tensor]())
    if not isinstance(method, Sampling):
        yield notes
        return
    look = method.look

    def noting(run: Run, call: Call) -> None:
        before = len(run.evidence)
        look(run, call)
        if len(run.evidence) > before:
            rows, alive = _rows(run, call)
            for kind, new in zip(notes, (rows, run.evidence[-1], alive), strict=True):
                kind.append(new)

    vars(method)["look"] = noting
    try:
        yield notes
    finally:
        del vars(method)["look"]


def _rows(run: Run, call: Call) -> tuple[Tensor, Tensor]:
    stream, query, key = run.stream, call.query, call.key
    bias, by_class = bias_of(call, stream), run.host.by_class
    scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = (query[:, :, :1] if by_class else query) @ key.transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + (bias[:, :, :1] if by_class else bias)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    shape = stream.images, stream.tokens
    alive = stream.alive
    alive = torch.ones(shape, dtype=torch.bool, device=query.device) if alive is None else alive
    if by_class:
        return weights[:, :, 0], alive
    asking = alive[:, None, :, None]
    return (weights * asking).sum(2) / asking.sum(2), alive
