"""Keep the attentive tokens: a fixed schedule of dropping what the class token hardly looks at (EViT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.calls import Call, received
from scrimp.adaptive.control import Controller
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import Plan, falling
from scrimp.primitives.errors import InputError


def keep_tokens_(
    model: nn.Module,
    ratio: float,
    *,
    blocks: Sequence[int] = (3, 6, 9),
    fuse: bool = True,
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Keep, in some blocks, the fraction ``ratio`` of the patch tokens that get most of the class token's attention.

    Liang et al. 2022 (EViT, arXiv 2202.07800); works without training. Attention is averaged over heads; models without
    a class token go by the attention a token gets from all on average. As many tokens for every image: one form.

    Args:
        model: of timm's vision transformers, or of their build; see `scrimp.adaptive.attach.attach_`.
        ratio: fraction that stays at each of the blocks, above 0, at most 1; rounded up.
        blocks: indices of the blocks that drop, counted from 0.
        fuse: whether the dropped go on as one token, their mean weighted by attention, at the place of the foremost.
        max_flops: most FLOPs that any image may cost; where ``ratio`` costs more, less is kept.
        max_tokens: most tokens, prefix included, that may leave the last block.
        example: images to probe with, for models that do not tell their size.

    Raises:
        InputError: a ratio out of range, blocks that are not there, or what `attach_` refuses.
    """
    method = Keeping(ratio, blocks, fuse)
    return attach_(model, method, max_flops=max_flops, max_tokens=max_tokens, example=example)


class Keeping(Method):
    """The method of `keep_tokens_`."""

    adaptive = False

    def __init__(self, ratio: float, blocks: Sequence[int], fuse: bool) -> None:
        if not 0 < ratio <= 1:
            raise InputError("a ratio above 0, at most 1", str(ratio), "correct it")
        self.ratio, self.blocks, self.fuse = ratio, frozenset(blocks), fuse

    def check(self, host: Host) -> None:
        check_blocks(self.blocks, host)

    def stay(self, block: int, patches: int, cap: int | None) -> tuple[int, int]:
        """Patch tokens that stay in a block, and tokens (0 or 1) that the dropped become."""
        if block not in self.blocks:
            return patches, 0
        stay, most = math.ceil(self.ratio * patches), patches if cap is None else min(patches, cap)
        fused = int(self.fuse and most > 1)
        if most < patches:
            stay = min(stay, most - fused)
        return (patches, 0) if stay + fused >= patches else (stay, fused)

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        counts = []
        for index, block in enumerate(host.blocks):
            stay, fused = self.stay(index, patches, cap)
            entering, leaving = patches + host.prefix, stay + fused + host.prefix
            own = block.score * entering * (1 if host.by_class else entering) if stay < patches else 0
            counts.append(Count(entering, entering if fused else leaving, leaving, own))
            patches = stay + fused
        return counts

    def _now(self, run: Run) -> tuple[int, int]:
        return self.stay(run.block, run.stream.width - run.stream.prefix, run.cap)

    def look(self, run: Run, call: Call) -> None:
        host, width = run.host, run.stream.width
        if self._now(run)[0] < width - run.stream.prefix:
            run.own = host.blocks[run.block].score * width * (1 if host.by_class else width)
            run.evidence.append(received(call, run.stream, by_class=host.by_class))

    def plan(self, run: Run) -> Plan | None:
        if not run.evidence or self._now(run)[1]:
            return None
        return run.stream.choose(self._ranked(run)[0])

    def merge(self, run: Run, x: Tensor) -> Tensor:
        if not run.evidence or not self._now(run)[1]:
            return x
        stay, gone = self._ranked(run)
        weights = reduce(torch.add, run.evidence).nan_to_num().gather(1, gone)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        rows = x.gather(1, gone[..., None].expand(-1, -1, x.shape[2]))
        fused = (weights.to(x.dtype)[..., None] * rows).sum(1, keepdim=True)
        plan = run.stream.choose(torch.cat([stay, gone[:, :1]], 1))
        run.stream = plan.stream
        return torch.cat([plan.take(x)[:, :-1], fused], 1)

    def _ranked(self, run: Run) -> tuple[Tensor, Tensor]:
        """Rows that stay, prefix first, and those that go, foremost first."""
        prefix = run.stream.prefix
        scores = reduce(torch.add, run.evidence)[:, prefix:].nan_to_num(nan=-1.0)
        order = falling(scores) + prefix
        stay = self._now(run)[0]
        head = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)
        return torch.cat([head, order[:, :stay].sort(-1).values], 1), order[:, stay:]


def check_blocks(blocks: frozenset[int], host: Host) -> None:
    """Raise InputError for blocks that the model does not have."""
    wrong = sorted(block for block in blocks if not 0 <= block < len(host.blocks))
    if wrong:
        raise InputError(f"blocks from 0 to {len(host.blocks) - 1}", str(wrong), "correct blocks=")
