"""Token sampling: as many tokens as the class token's attention is spread over (ATS, Fayyaz et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.calls import Call, received
from scrimp.adaptive.control import Controller, Form
from scrimp.adaptive.host import Host
from scrimp.adaptive.keep_tokens import check_blocks
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import Plan
from scrimp.primitives.errors import InputError


def token_sampling_(
    model: nn.Module,
    samples: int | None = None,
    *,
    blocks: Sequence[int] | None = None,
    least: int = 8,
    form: Form = "auto",
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Keep, in each block, the patch tokens that an even grid falls on in the distribution of their significance.

    Fayyaz et al. 2022 (ATS, arXiv 2111.15667); works without training. Images whose attention is gathered in a few
    tokens keep few. Models without a class token go by the attention a token gets from all on average.

    Args:
        model: of timm's vision transformers, or of their build; see `scrimp.adaptive.attach.attach_`.
        samples: points of the grid, so the most patch tokens that are kept; None: as many as an image has patches.
        blocks: indices of the blocks that drop, counted from 0; None: all from the fourth on.
        least: patch tokens that always stay: where fewer are hit, the most significant are added.
        form: ``masked``, ``ragged`` or ``auto``, see `attach_`. May be changed on the controller.
        max_flops: most FLOPs that any image may cost, whatever it shows.
        max_tokens: most tokens of any image, prefix included, that may leave the last block.
        example: images to probe with, for models that do not tell their size.

    Raises:
        InputError: numbers below 1, blocks that are not there, or what `attach_` refuses.
    """
    method = Sampling(samples, blocks, least)
    return attach_(model, method, form=form, max_flops=max_flops, max_tokens=max_tokens, example=example)


class Sampling(Method):
    """The method of `token_sampling_`."""

    def __init__(self, samples: int | None, blocks: Sequence[int] | None, least: int) -> None:
        if least < 1 or (samples is not None and samples < 1):
            raise InputError("at least 1 sample and token", f"samples={samples}, least={least}", "correct them")
        self.samples, self.least = samples, least
        self.blocks = None if blocks is None else frozenset(blocks)

    def check(self, host: Host) -> None:
        if self.blocks is None:
            self.blocks = frozenset(range(3, len(host.blocks)))
        check_blocks(self.blocks, host)

    def _acts(self, block: int) -> bool:
        return self.blocks is not None and block in self.blocks

    def _limits(self, patches: int, cap: int | None) -> tuple[int, int]:
        """Points of the grid, and tokens that always stay, for images that had ``patches`` patch tokens."""
        samples = patches if self.samples is None else min(self.samples, patches)
        samples = samples if cap is None else min(samples, cap)
        return samples, min(self.least, patches if cap is None else cap)

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        most, counts = max(self._limits(patches, cap)), []
        for index, block in enumerate(host.blocks):
            entering, own = patches + host.prefix, 0
            if self._acts(index):
                own = block.score * entering * (1 if host.by_class else entering)
                patches = min(patches, most)
            counts.append(Count(entering, patches + host.prefix, patches + host.prefix, own))
        return counts

    def look(self, run: Run, call: Call) -> None:
        if not self._acts(run.block):
            return
        stream, host = run.stream, run.host
        attention = received(call, stream, by_class=host.by_class)
        norms = torch.linalg.vector_norm(call.value, dim=(1, 3), dtype=attention.dtype)
        run.evidence.append(attention * stream.padded(norms))

    def plan(self, run: Run) -> Plan | None:
        if not run.evidence:
            return None
        stream, host = run.stream, run.host
        score, count = host.blocks[run.block].score, stream.count()
        if isinstance(count, tuple):
            run.own = tuple(score * n * (1 if host.by_class else n) for n in count)
        else:
            run.own = score * count * (1 if host.by_class else count)
        significance, prefix = reduce(torch.add, run.evidence)[:, stream.prefix :], stream.prefix
        valid = None if stream.valid is None else stream.valid[:, prefix:]
        samples, least = self._limits(stream.tokens - prefix, run.cap)
        patches = sample(significance, valid, samples, least=least)
        return stream.keep(functional.pad(patches, (prefix, 0), value=True))


def sample(significance: Tensor, valid: Tensor | None, samples: int, *, least: int) -> Tensor:
    """Inverse transform sampling at fixed points, Fayyaz et al. 2022, section 3.2.

    Args:
        significance: [images, patches], from 0 up; what is not finite counts as 0.
        valid: [images, patches], which of them are tokens; None: all.
        samples: points of the grid, from the smallest positive value of the cumulative distribution to 1.
        least: tokens that always stay; at most max(samples, least) do.

    Returns:
        Which stay, [images, patches], bool. All, where that is no more than ``least``.
    """
    mass = significance.double().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    if valid is not None:
        mass = mass.masked_fill(~valid, 0)
    mass = mass + (mass.sum(1, keepdim=True) <= 0)
    mass = mass if valid is None else mass.masked_fill(~valid, -1)
    ascending, order = mass.sort(dim=1, stable=True)
    cumulative = ascending.clamp_min(0).cumsum(1)
    low = ascending[:, :1] if valid is None else ascending.masked_fill(ascending < 0, torch.inf).amin(1, keepdim=True)
    cumulative = ((cumulative - low) / (cumulative[:, -1:] - low).clamp_min(1e-300)).clamp_min(0)
    hit = order.gather(1, _nearest(cumulative, samples))
    chosen = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, hit, True)
    chosen = chosen if valid is None else chosen & valid
    foremost = mass.masked_fill(chosen, torch.inf).topk(min(least, mass.shape[1])).indices
    chosen = chosen.scatter_(1, foremost, True)
    return chosen if valid is None else chosen & valid


def _nearest(cumulative: Tensor, samples: int) -> Tensor:
    """Index of the value nearest to each point of the grid, the lower of two; [images, samples].

    The grid is counted from 1 downwards, so that one point alone finds the most significant token.
    """
    low = cumulative.masked_fill(cumulative <= 0, torch.inf).amin(1, keepdim=True).clamp_max(1)
    steps = torch.linspace(0, 1, samples, dtype=low.dtype, device=low.device)
    middles = (cumulative[:, :-1] + cumulative[:, 1:]) / 2
    return torch.searchsorted(middles, torch.lerp(torch.ones_like(low), low, steps))
