"""Gating: which tokens, heads and layers of each block an image needs is learnt (AdaViT, Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.calls import Call, attend, bias_of, piece
from scrimp.adaptive.control import Controller, Form
from scrimp.adaptive.gates import Decision, Gates, through
from scrimp.adaptive.host import Block, Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import Plan, Stream
from scrimp.adaptive.token_halting import width_of
from scrimp.primitives.errors import InputError


def gating_(
    model: nn.Module,
    *,
    full: int = 1,
    tau: float = 5.0,
    thresholds: tuple[float, float] = (0.5, 0.6),
    seed: int = 0,
    form: Form = "auto",
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Have gates that open and close the attention, the MLP, each head and each patch token of a block for an image.

    Meng et al. 2022 (AdaViT, arXiv 2111.15668). The gates of a block are linear in its input: those of layers and heads
    in the class token (or the mean of all tokens of models without), those of tokens in each token. A gate is open
    where sigmoid((logit + noise) / tau) exceeds its threshold; the noise is logistic, the difference of two Gumbel
    numbers, while the model trains, and 0 else. Gradients are those of the sigmoid (straight through).

    A token that is gated off goes around the block, and nobody attends to it there; prefix tokens never are. A head
    that is off gives 0. A block without a midpoint (parallel attention and MLP) has one gate for both. New gates are
    open, so the model gives what it gave until they are trained, with `usage_loss`. They are no part of the model:
    ``controller.parameters()`` are to be given to the optimizer, ``controller.method.gates.state_dict()`` to be saved.

    Args:
        model: of timm's vision transformers, or of their build; see `scrimp.adaptive.attach.attach_`.
        full: the first blocks, which have no gates.
        tau: temperature of the sigmoid.
        thresholds: of layers and heads, and of tokens.
        seed: of the noise; each forward in training draws its own.
        form: ``masked``, ``ragged`` or ``auto``, see `attach_`. May be changed on the controller.
        max_flops: most FLOPs that any image may cost; patch tokens with the lowest logits are gated off.
        max_tokens: most tokens of any image, prefix included, that may go through the last block.
        example: images to probe with, for models that do not tell their size.

    Raises:
        InputError: numbers out of range, or what `attach_` refuses.
    """
    method = Gating(full, tau, thresholds, seed)
    return attach_(model, method, form=form, max_flops=max_flops, max_tokens=max_tokens, example=example)


class Gating(Method):
    """The method of `gating_`.

    Attributes:
        gates: what there is to train.
    """

    gates: Gates

    def __init__(self, full: int, tau: float, thresholds: tuple[float, float], seed: int) -> None:
        if full < 0 or not tau > 0 or not all(0 < threshold < 1 for threshold in thresholds):
            saw = f"full={full}, tau={tau}, thresholds={thresholds}"
            raise InputError("full from 0, tau above 0, thresholds above 0 and below 1", saw, "correct them")
        self.full, self.tau, self.thresholds, self.seed = full, tau, thresholds, seed

    def check(self, host: Host) -> None:
        if self.full >= len(host.blocks):
            raise InputError(f"full from 0 to {len(host.blocks) - 1}", str(self.full), "leave a block to gate")
        weight = next(parameter for parameter in host.model.parameters() if parameter.is_floating_point())
        layers = [2 if block.middle else 1 for block in host.blocks[self.full :]]
        heads = [heads_of(block) for block in host.blocks[self.full :]]
        self.gates = Gates(width_of(host.model), layers, heads, self.tau, self.thresholds).to(weight)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.gates.parameters()

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        most = patches if cap is None else min(patches, cap)
        counts = []
        for index in range(len(host.blocks)):
            tokens = (patches if index < self.full else most) + host.prefix
            own = 0 if index < self.full else self.gates.flops(index - self.full, patches + host.prefix)
            counts.append(Count(tokens, tokens, tokens, own))
        return counts

    def enter(self, run: Run, x: Tensor) -> Tensor:
        if run.block == 0:
            run.memory["decisions"] = []
            run.memory["draw"] = self.gates.draw(self.seed) if run.host.model.training else None
        if run.block < self.full:
            return x
        decision = self.gates.decide(
            run.block - self.full,
            x,
            prefix=run.stream.prefix,
            by_class=run.host.by_class,
            cap=run.cap,
            draw=run.memory["draw"],
        )
        run.memory["decisions"].append(decision)
        run.memory["whole"] = run.stream, x
        first = self._plan(run.stream, decision.attention())
        run.memory["plans"] = first, first
        run.stream = first.stream
        if run.stream.layout == "masked":
            run.stream = replace(run.stream, alive=decision.tokens)
        return first.take(x)

    @staticmethod
    def _plan(stream: Stream, mask: Tensor) -> Plan:
        """The rows of ``mask`` [images, tokens] out of all."""
        if stream.layout == "masked" or bool(mask.all()):
            return Plan(stream, None)
        return stream.only(mask.flatten(), mask)

    def attend(self, run: Run, call: Call) -> Tensor:
        if run.block < self.full:
            return attend(call, run.stream, run.plan)
        decision: Decision = run.memory["decisions"][-1]
        if run.stream.layout == "masked":
            out = attend(call, run.stream, None)
            return through(decision.heads[:, :, None, None], decision.head_gates[:, :, None, None], out, None)
        if bool(decision.heads.all()):
            return attend(call, run.stream, None)
        return _by_heads(call, run.stream, decision.heads)

    def merge(self, run: Run, x: Tensor) -> Tensor:
        """Between attention and MLP: from the tokens of the one to those of the other."""
        if run.block < self.full or not run.host.blocks[run.block].middle:
            return x
        decision: Decision = run.memory["decisions"][-1]
        stream, whole = run.memory["whole"]
        if stream.layout == "masked":
            x = through(decision.attention()[..., None], decision.attention_gates()[..., None], x, whole)
            run.memory["whole"] = stream, x
            return x
        first, _ = run.memory["plans"]
        if torch.equal(decision.attention(), decision.mlp()):
            return x
        whole = _put(first, whole, x)
        second = self._plan(stream, decision.mlp())
        run.memory["whole"], run.memory["plans"] = (stream, whole), (first, second)
        run.stream = second.stream
        return second.take(whole)

    def leave(self, run: Run, x: Tensor) -> Tensor:
        if run.block < self.full:
            return x
        decision: Decision = run.memory["decisions"][-1]
        stream, whole = run.memory.pop("whole")
        _, last = run.memory.pop("plans")
        run.stream = stream
        self._count(run, decision)
        if stream.layout == "masked":
            return through(decision.mlp()[..., None], decision.mlp_gates()[..., None], x, whole)
        return _put(last, whole, x)

    def _count(self, run: Run, decision: Decision) -> None:
        """The bill: tokens of the two layers; heads that are off save their part of attention."""
        block, stream = run.host.blocks[run.block], run.stream
        first, last = decision.attention().sum(1), decision.mlp().sum(1)
        run.counts[-1] = Count(first, first, last)
        off = (~decision.heads).sum(1)
        saved = block.pair // decision.heads.shape[1] * off * first * first
        run.own = self.gates.flops(run.block - self.full, stream.tokens) - saved
        run.streams[-1] = replace(stream, layout="masked", alive=decision.attention() | decision.mlp())


def heads_of(block: Block) -> int:
    """Heads of one call of attention."""
    return block.score // (2 * block.dim * block.calls)


def _put(plan: Plan, whole: Tensor, part: Tensor) -> Tensor:
    """All rows, those of the plan replaced."""
    if plan.rows is None:
        return part
    return whole.flatten(0, 1).index_copy(0, plan.rows, part[0].to(whole.dtype)).view_as(whole)


def _by_heads(call: Call, stream: Stream, heads: Tensor) -> Tensor:
    """Attention of each image by those of its heads that are on, the others 0."""
    batch, count, rows, _ = call.query.shape
    full = call.value.new_zeros(batch, rows, count, call.value.shape[3])
    for image in range(stream.images):
        on = heads[image].nonzero().squeeze(1)
        query, key, value = (piece(tensor, stream, image).index_select(1, on) for tensor in call[:3])
        if not query.numel():
            continue
        bias = bias_of(call, stream, image)
        bias = bias if bias is None or bias.shape[1] == 1 else bias.index_select(1, on)
        out = call.run(query, key, value, bias)[0].transpose(0, 1)
        into = full[image] if stream.lengths is None else full[0].narrow(0, stream.starts[image], len(out))
        into.index_copy_(1, on, out)
    return full.transpose(1, 2)


def usage_loss(controller: Controller, targets: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> Tensor:
    """Squared differences of the share of open gates from ``targets``, summed over the three kinds of gates.

    Meng et al. 2022, L_usage: (mean of token gates - targets[0])^2 + (mean of head gates - targets[1])^2 + (mean of
    layer gates - targets[2])^2, means over the batch and all blocks that have gates. To be added to the task's loss.

    Args:
        controller: of `gating_`, after a forward.
        targets: wanted shares of patch tokens, of heads, and of attention and MLP layers, each from 0 to 1.

    Returns:
        [], of the last forward of this thread, differentiable if that was.

    Raises:
        InputError: no forward, another method, or targets out of range.
    """
    run = controller.run
    if run is None or not isinstance(controller.method, Gating):
        saw = type(controller.method).__name__ + (" before a forward" if run is None else "")
        raise InputError("a controller of gating_ after a forward", saw, "run the model first")
    if len(targets) != 3 or not all(0 <= target <= 1 for target in targets):
        raise InputError("three targets from 0 to 1", str(targets), "correct them")
    decisions: list[Decision] = run.memory["decisions"]
    prefix = run.stream.prefix
    tokens = torch.cat([decision.token_gates[:, prefix:] for decision in decisions], 1).mean()
    heads = torch.cat([decision.head_gates for decision in decisions], 1).mean()
    layers = torch.cat([decision.layer_gates for decision in decisions], 1).mean()
    kinds = zip((tokens, heads, layers), targets, strict=True)
    return torch.stack([(share - target) ** 2 for share, target in kinds]).sum()
