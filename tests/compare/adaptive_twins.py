"""Ways in which a network that spends less might be wrong, and the finding that must say so."""

from __future__ import annotations

from dataclasses import replace

import torch

from scrimp.adaptive import attach_, gating_, token_halting_
from scrimp.adaptive.calls import attend, received
from scrimp.adaptive.gating import Gating
from scrimp.adaptive.keep_tokens import Keeping
from scrimp.adaptive.token_halting import Halting
from scrimp.adaptive.token_merging import Merging
from scrimp.adaptive.token_sampling import Sampling


class ForgettingSizes(Merging):
    """A merged token counts as one in attention."""

    def attend(self, run, call):
        return attend(call, replace(run.stream, sizes=None), run.plan)


class OneMore(Merging):
    def pairs(self, block, patches, cap):
        return super().pairs(block, patches, cap) + 1


class FreeMatching(Merging):
    """Does not count the products of keys."""

    def merge(self, run, x):
        out = super().merge(run, x)
        run.own = 0
        return out


class Careless(Merging):
    """Believes that more is merged than is."""

    def pairs(self, block, patches, cap):
        return super().pairs(block, patches, None)

    def schedule(self, host, patches, cap):
        return [count._replace(entering=1, queries=1, leaving=1) for count in super().schedule(host, patches, cap)]


class Inattentive(Keeping):
    """Keeps what the class token hardly looks at."""

    def look(self, run, call):
        super().look(run, call)
        run.evidence[:] = [-weights for weights in run.evidence]


class WithoutGradient(Keeping):
    """Takes the weights in the fused token for constants."""

    def look(self, run, call):
        super().look(run, call)
        run.evidence[:] = [weights.detach() for weights in run.evidence]


class ByAttentionAlone(Sampling):
    """Leaves out the lengths of the values."""

    def look(self, run, call):
        if self._acts(run.block):
            run.evidence.append(received(call, run.stream, by_class=run.host.by_class))


class SeeingTheDead(Sampling):
    """Attends to tokens that are gone, where their rows are still there."""

    def attend(self, run, call):
        return attend(call, replace(run.stream, alive=None), run.plan)


class WithoutRemainder(Halting):
    def leave(self, run, x):
        if run.block:
            run.memory["halting"].rest = torch.zeros_like(run.memory["halting"].rest)
        return super().leave(run, x)


class ConstantScores(Halting):
    def _score(self, run, x):
        return super()._score(run, x).detach()


def hasty(model, *, eps=0.01, **options):
    return token_halting_(model, eps=0.4, **options)


class AllHeads(Gating):
    def attend(self, run, call):
        return attend(call, run.stream, None)


class PayingForAllHeads(Gating):
    def _count(self, run, decision):
        super()._count(run, decision)
        run.own = self.gates.flops(run.block - self.full, run.stream.tokens)


def hard_gates(model, **options):
    """Gates of tokens without a gradient."""
    control = gating_(model, **options)
    decide = control.method.gates.decide

    def without_slope(*args, **more):
        found = decide(*args, **more)
        return replace(found, token_gates=found.token_gates.detach())

    control.method.gates.decide = without_slope
    return control


def merging(method):
    return lambda model, *, r, **options: attach_(model, method(r), **options)


def keeping(method):
    return lambda model, *, ratio, blocks, fuse, **options: attach_(model, method(ratio, blocks, fuse), **options)


def sampling(method):
    return lambda model, *, samples, blocks, least, **options: attach_(model, method(samples, blocks, least), **options)


def halting(method):
    return lambda model, *, gate_scale, gate_center, eps, **options: attach_(
        model, method(gate_scale, gate_center, eps), **options
    )


def gating(method):
    return lambda model, *, tau, thresholds, **options: attach_(model, method(1, tau, thresholds, 0), **options)


BROKEN_ADAPTIVE = [
    (row, {"attach": attach}, finding)
    for row, attach, finding in (
        ("token-merging", merging(ForgettingSizes), "logits"),
        ("token-merging", merging(OneMore), "places"),
        ("token-merging", merging(FreeMatching), "ledger"),
        ("token-merging", merging(Careless), "a budget's"),
        ("keep-tokens", keeping(Inattentive), "fused: places"),
        ("keep-tokens", keeping(WithoutGradient), "fused: gradients"),
        ("token-sampling", sampling(ByAttentionAlone), "places"),
        ("token-sampling", sampling(SeeingTheDead), "ragged form, output"),
        ("token-halting", halting(WithoutRemainder), "logits"),
        ("token-halting", halting(ConstantScores), "gradients"),
        ("token-halting", hasty, "places"),
        ("gating", gating(AllHeads), "logits"),
        ("gating", gating(PayingForAllHeads), "ledger"),
        ("gating", hard_gates, "gradients"),
    )
]
