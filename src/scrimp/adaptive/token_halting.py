"""Token halting: every token adds up a score from block to block, and goes when it is full (A-ViT, Yin et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.control import Controller, Form
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import Stream
from scrimp.primitives.draw import generator_for
from scrimp.primitives.errors import InputError


def token_halting_(
    model: nn.Module,
    *,
    gate_scale: float = 10.0,
    gate_center: float | None = None,
    eps: float = 0.01,
    form: Form = "auto",
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Let each token halt when its scores have added up to 1; needs training, with `ponder_loss`.

    Yin et al. 2022 (A-ViT, arXiv 2112.07658). The score of token k after block l is h = sigmoid(gate_scale * x[k, 0] -
    gate_center), of the first number of its embedding, so there is nothing to add to the model. The token runs until
    the sum of its scores reaches 1 - eps, at most to the last block. The model goes on with the mean of each token's
    states, weighted by h, and in its last block by the remainder 1 - (sum of h before). An image is over as soon as all
    tokens that its head reads have halted: for a class token's head, with that. Where the head reads patch tokens their
    means are taken as the paper takes the class token's. Prefix tokens stay to attend to as long as their image runs,
    and those that the head does not read (registers) have no score. A score that is not a number halts.

    A model that is not trained for it hardly halts, or all at once: its numbers were not made to be scores.

    Args:
        model: of timm's vision transformers, or of their build; see `scrimp.adaptive.attach.attach_`.
        gate_scale: the factor of the score.
        gate_center: its offset; None: as published, 30 for models of width up to 192 and 75 for wider ones.
        eps: what may lack to 1, above 0 and below 1.
        form: ``masked``, ``ragged`` or ``auto``, see `attach_`. May be changed on the controller.
        max_flops: most FLOPs that any image may cost; the patch tokens that have most of their score halt early.
        max_tokens: most tokens of any image, prefix included, that may run in the last block.
        example: images to probe with, for models that do not tell their size.

    Raises:
        InputError: numbers out of range, or what `attach_` refuses.
    """
    method = Halting(gate_scale, gate_center, eps)
    return attach_(model, method, form=form, max_flops=max_flops, max_tokens=max_tokens, example=example)


@dataclass
class Halted:
    """The scores of one forward; rows are [images, tokens] at the tokens' old places.

    Attributes:
        running: which have not halted.
        spent: sum of the scores so far.
        rest: the remainder, 1 - the scores of all blocks before the one where the token halts.
        layers: blocks that the token ran in until it halted.
        scores: h of each block, 0 for tokens that do not run.
        mean: the weighted states so far, [images, tokens, dim]; None before the first block and after the last.
    """

    running: Tensor
    spent: Tensor
    rest: Tensor
    layers: Tensor
    scores: list[Tensor] = field(default_factory=list)
    mean: Tensor | None = None


class Halting(Method):
    """The method of `token_halting_`.

    Attributes:
        reads: of each prefix token, whether the model's head reads it.
        reads_patches: whether it reads patch tokens.
    """

    def __init__(self, gate_scale: float, gate_center: float | None, eps: float) -> None:
        if not 0 < eps < 1 or not math.isfinite(gate_scale) or not math.isfinite(gate_center or 0):
            saw = f"gate_scale={gate_scale}, gate_center={gate_center}, eps={eps}"
            raise InputError("a finite scale and center, and eps above 0 and below 1", saw, "correct them")
        self.gate_scale, self.gate_center, self.eps = gate_scale, gate_center, eps
        self.reads: tuple[bool, ...] = ()
        self.reads_patches = True

    def check(self, host: Host) -> None:
        width = width_of(host.model)
        if self.gate_center is None:
            self.gate_center = 30.0 if width <= 192 else 75.0
        read = _read(host, width)
        self.reads, self.reads_patches = tuple(read[: host.prefix]), any(read[host.prefix :])

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        most = patches if cap is None else min(patches, cap)
        first, rest = patches + host.prefix, most + host.prefix
        return [Count(first, first, first)] + [Count(rest, rest, rest)] * (len(host.blocks) - 1)

    def read(self, stream: Stream, device: torch.device) -> Tensor:
        """Which tokens the head reads, [tokens], bool."""
        patches = [self.reads_patches] * (stream.tokens - stream.prefix)
        return torch.tensor([*self.reads, *patches], dtype=torch.bool, device=device)

    def scored(self, stream: Stream, device: torch.device) -> Tensor:
        """Which tokens have a score, [tokens], bool."""
        patches = [True] * (stream.tokens - stream.prefix)
        return torch.tensor([*self.reads, *patches], dtype=torch.bool, device=device)

    def leave(self, run: Run, x: Tensor) -> Tensor:
        if run.block == 0:
            run.memory["halting"] = _start(x, run.stream)
            run.memory["masks"] = ~self.scored(run.stream, x.device), self.read(run.stream, x.device)
        state: Halted = run.memory["halting"]
        if x.shape[1]:
            self._halt(run, state, x)
        else:  # all tokens of all images have halted
            state.scores.append(torch.zeros_like(state.spent))
        if run.block < len(run.host.blocks) - 1:
            return _go_on(run, x, state.running) if x.shape[1] else x
        stream, mean, state.mean = run.stream, state.mean, None
        run.stream = Stream("dense", stream.images, stream.tokens, stream.prefix, stream.tokens)
        assert mean is not None
        return mean

    def _halt(self, run: Run, state: Halted, x: Tensor) -> None:
        score = self._score(run, x).masked_fill(~state.running, 0)
        spent = state.spent + score
        going = self._going(run, state.running & (spent < 1 - self.eps), spent)
        _add(state, run.stream, x, torch.where(state.running & ~going, state.rest, score))
        state.layers = state.layers + state.running
        state.rest = torch.where(going, state.rest - score, state.rest)
        state.running, state.spent = going, spent
        state.scores.append(score)

    def _score(self, run: Run, x: Tensor) -> Tensor:
        stream, first = run.stream, x[..., 0]
        assert self.gate_center is not None
        first = first.to(torch.promote_types(x.dtype, torch.float32))
        score = (self.gate_scale * first - self.gate_center).sigmoid()
        if stream.lengths is not None:
            where = stream.where(x.device)
            full = score.new_zeros(stream.images * stream.tokens)
            score = full.index_copy(0, where, score[0]).view(stream.images, stream.tokens)
        return score.masked_fill(run.memory["masks"][0], 0)

    def _going(self, run: Run, going: Tensor, spent: Tensor) -> Tensor:
        """Of those that could go on, the ones that do: none after the last block, nor of an image that is over."""
        if run.block == len(run.host.blocks) - 1:
            return torch.zeros_like(going)
        going = going & (going & run.memory["masks"][1]).any(1, keepdim=True)
        prefix, cap = run.stream.prefix, run.cap
        if cap is None or cap >= run.stream.tokens - prefix:
            return going
        order = spent.detach().masked_fill(~going, torch.inf)[:, prefix:].argsort(dim=1, stable=True)
        first = torch.zeros_like(going[:, prefix:]).scatter(1, order[:, :cap], True)
        return torch.cat([going[:, :prefix], going[:, prefix:] & first], 1)


def ponder_loss(controller: Controller) -> Tensor:
    """Mean over tokens of N + r, the blocks that a token ran in and its remainder (Yin et al. 2022, after Graves 2016).

    Its gradient is that of the remainders. Published weight: 5e-4, beside the loss of the task.

    Returns:
        [], of the last forward of this thread, differentiable if that was.

    Raises:
        InputError: no forward, or another method.
    """
    state, scored = _halted(controller)
    return (state.layers + state.rest)[:, scored].mean()


def depth_prior_loss(controller: Controller, *, depth: float | None = None, spread: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the distribution of scores over blocks from a Gaussian one around a target depth.

    Yin et al. 2022: KL(H || T), H[l] the sum over tokens and images of the scores of block l, as a share of all; T the
    Gaussian density at 1, 2, ..., blocks, scaled to sum to 1. The last block's scores count as they are, not as the 1
    that halts. Published weight: 1e-3.

    Args:
        controller: of `token_halting_`, after a forward.
        depth: its mean, blocks counted from 1; None: two thirds of the blocks (8 of 12, as published).
        spread: its standard deviation, in blocks.

    Returns:
        [], of the last forward of this thread, differentiable if that was; 0 where no token has any score.

    Raises:
        InputError: no forward, another method, or a spread that is not above 0.
    """
    state, scored = _halted(controller)
    if not spread > 0:
        raise InputError("a spread above 0", str(spread), "correct it")
    blocks = len(state.scores)
    mass = torch.stack([score[:, scored].sum() for score in state.scores])
    tiny = torch.finfo(mass.dtype).tiny
    share = mass / mass.sum().clamp_min(tiny)
    place = torch.arange(1, blocks + 1, dtype=mass.dtype, device=mass.device)
    target = (-0.5 * ((place - (blocks * 2 / 3 if depth is None else depth)) / spread) ** 2).log_softmax(0)
    return (share * (share.clamp_min(tiny).log() - target)).sum()


def _halted(controller: Controller) -> tuple[Halted, Tensor]:
    run, method = controller.run, controller.method
    if run is None or not isinstance(method, Halting):
        saw = type(method).__name__ + (" before a forward" if run is None else "")
        raise InputError("a controller of token_halting_ after a forward", saw, "run the model first")
    state: Halted = run.memory["halting"]
    return state, method.scored(run.stream, state.running.device)


def _start(x: Tensor, stream: Stream) -> Halted:
    shape = stream.images, stream.tokens
    zero = x.new_zeros(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    running = torch.ones(shape, dtype=torch.bool, device=x.device)
    return Halted(running, zero, zero + 1, torch.zeros(shape, dtype=torch.int64, device=x.device))


def _add(state: Halted, stream: Stream, x: Tensor, share: Tensor) -> None:
    """Add ``share`` [images, tokens] of the rows to the mean."""
    share = share.to(x.dtype)
    if stream.lengths is None:
        part = share[..., None] * x
        state.mean = part if state.mean is None else state.mean + part
        return
    assert state.mean is not None
    where = stream.where(x.device)
    part = share.flatten().index_select(0, where)[:, None] * x[0]
    state.mean = state.mean.flatten(0, 1).index_add_(0, where, part).view_as(state.mean)


def _go_on(run: Run, x: Tensor, going: Tensor) -> Tensor:
    """The rows of the next block: tokens that run, and prefix tokens while any does."""
    stream = run.stream
    head = going.any(1, keepdim=True).expand(-1, stream.prefix)
    there = torch.cat([head, going[:, stream.prefix :]], 1)
    if stream.layout == "masked":
        run.stream = replace(stream, alive=there)
        return x
    stay = there.flatten()
    if stream.lengths is not None:
        stay = stay.index_select(0, stream.where(x.device))
    rows = stay.nonzero().squeeze(1)
    if len(rows) == len(stay):
        return x
    plan = stream.pick(rows, (len(rows),) if stream.images == 1 else tuple(there.sum(1).tolist()))
    run.stream = plan.stream
    return plan.take(x)


def width_of(model: nn.Module) -> int:
    """Numbers a token has."""
    width = getattr(model, "embed_dim", None) or getattr(model, "num_features", None)
    if not isinstance(width, int):
        raise InputError("a model that tells its 'embed_dim'", type(model).__name__, "use a plain vision transformer")
    return width


def _read(host: Host, width: int) -> list[bool]:
    """Which tokens the model's pooling reads, found by gradients; all, for a model without a head of its own."""
    head = getattr(host.model, "forward_head", None)
    if head is None:
        return [True] * host.tokens
    weight = next(host.model.parameters())
    noise = torch.randn(1, host.tokens, width, generator=generator_for(2)).to(weight.device, weight.dtype)
    with torch.enable_grad():
        noise.requires_grad_()
        out = head(noise, pre_logits=True)
        (grad,) = torch.autograd.grad((out * torch.randn(out.shape, generator=generator_for(3)).to(out)).sum(), noise)
    read: list[bool] = (grad[0].abs().amax(-1) > 0).tolist()
    return read
