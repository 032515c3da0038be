"""Token merging: in every block the most alike pairs of tokens become one (ToMe, Bolya et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor, nn

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.calls import Call
from scrimp.adaptive.control import Controller
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
from scrimp.adaptive.stream import falling, flat
from scrimp.primitives.errors import InputError

Amount = int | float


def token_merging_(
    model: nn.Module,
    r: Amount | Sequence[Amount],
    *,
    max_flops: int | None = None,
    max_tokens: int | None = None,
    example: Tensor | None = None,
) -> Controller:
    """Merge ``r`` pairs of alike tokens in every block, between attention and MLP; works without training.

    Bolya et al. 2023 (arXiv 2210.09461): patch tokens are dealt in turn to two sets; each of the one has an edge to the
    token of the other whose key, the mean over heads, has the largest cosine with its own; the ``r`` best edges are
    merged by the mean weighted by what each token stands for, and attention adds the logarithm of that to the logits.
    Class and register tokens are left alone. A merged token takes the place (rotary, bias) of the one that took it in;
    after the last block every original token gets back what became of it. As many tokens for every image: one form.

    Args:
        model: of timm's vision transformers, or of their build; see `scrimp.adaptive.attach.attach_`.
        r: pairs, or the fraction of the patch tokens at hand if a float below 1; one for all blocks or one for each.
            At most half of the patch tokens can merge in a block.
        max_flops: most FLOPs that any image may cost; where ``r`` costs more, more is merged.
        max_tokens: most tokens, prefix included, that may leave the last block.
        example: images to probe with, for models that do not tell their size.

    Raises:
        InputError: a negative or fractional ``r``, not one a block, or what `attach_` refuses.
    """
    method = Merging(r)
    return attach_(model, method, max_flops=max_flops, max_tokens=max_tokens, example=example)


class Merging(Method):
    """The method of `token_merging_`."""

    adaptive = False

    def __init__(self, r: Amount | Sequence[Amount]) -> None:
        self.r = [r] if isinstance(r, int | float) else list(r)
        self._single = isinstance(r, int | float)
        if any(not _possible(amount) for amount in self.r):
            raise InputError("r as whole numbers from 0 up, or fractions below 1", str(r), "correct it")

    def check(self, host: Host) -> None:
        if not self._single and len(self.r) != len(host.blocks):
            saw = f"{len(self.r)} for {len(host.blocks)} blocks"
            raise InputError("one r for all blocks, or one for each", saw, "correct r")

    def pairs(self, block: int, patches: int, cap: int | None) -> int:
        """Pairs to merge in a block that ``patches`` patch tokens enter."""
        r = self.r[0 if self._single else block]
        wanted = int(r * patches) if isinstance(r, float) else r
        if cap is not None:
            wanted = max(wanted, patches - cap)
        return min(wanted, patches // 2)

    def schedule(self, host: Host, patches: int, cap: int | None) -> list[Count]:
        counts = []
        for index, block in enumerate(host.blocks):
            merged = self.pairs(index, patches, cap)
            entering = patches + host.prefix
            own = 2 * block.dim * (patches // 2) * ((patches + 1) // 2) if merged else 0
            patches -= merged
            counts.append(Count(entering, entering, patches + host.prefix, own))
        return counts

    def look(self, run: Run, call: Call) -> None:
        if self.pairs(run.block, run.stream.width - run.stream.prefix, run.cap):
            run.evidence.append(reduce(torch.add, call.key.unbind(1)))  # a cosine does not see the mean's divisor

    def merge(self, run: Run, x: Tensor) -> Tensor:
        stream, prefix = run.stream, run.stream.prefix
        r = self.pairs(run.block, stream.width - prefix, run.cap)
        if not r:
            return x
        metric = reduce(torch.add, run.evidence)
        run.own = 2 * metric.shape[-1] * ((stream.width - prefix) // 2) * ((stream.width - prefix + 1) // 2)
        source, target, rest = match(metric, r, prefix=prefix)
        into = target + (prefix + rest.shape[1])
        order = _order(rest, prefix, stream.width)
        plan = stream.choose(order)
        sizes = x.new_ones(x.shape[:2]) if stream.sizes is None else stream.sizes
        taken = sizes.gather(1, source)
        after = sizes.gather(1, order).scatter_add(1, into, taken)
        moved = _moved(order, source, into)
        origin = moved if stream.source is None else moved.gather(1, stream.source)
        run.stream = replace(plan.stream, sizes=after, source=origin)
        return _mean(x, plan.take(x), source, into, taken / after.gather(1, into))


def match(metric: Tensor, r: int, *, prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching, Bolya et al. 2023, section 3.

    Args:
        metric: what is compared, [images, tokens, dim]; odd patches (counted from 0) look for a partner at even ones.
        r: pairs to find, at most half of the patches.
        prefix: tokens before the patches, which are left alone.

    Returns:
        Which tokens are merged [images, r], into which of the even patches (0, 1, ... for patches 0, 2, ...), and the
        odd patches that stay, as tokens in order, [images, patches // 2 - r].
    """
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    unit = metric / norm.clamp_min(torch.finfo(metric.dtype).tiny)
    scores = torch.bmm(unit[:, prefix + 1 :: 2], unit[:, prefix::2].transpose(1, 2))
    best, partner = scores.max(-1)
    order = falling(best)
    places = 2 * order + (prefix + 1)
    return places[:, :r], partner.gather(1, order[:, :r]), places[:, r:].sort(-1).values


def _order(rest: Tensor, prefix: int, width: int) -> Tensor:
    """Rows after a merge: prefix, odd patches that stay, even patches with what they take in."""
    head = torch.arange(prefix, device=rest.device).expand(rest.shape[0], -1)
    even = torch.arange(prefix, width, 2, device=rest.device).expand(rest.shape[0], -1)
    return torch.cat([head, rest, even], 1)


def _moved(order: Tensor, source: Tensor, into: Tensor) -> Tensor:
    """The new row of every old one, [images, width]."""
    moved = order.new_empty(order.shape[0], order.shape[1] + source.shape[1])
    moved.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return moved.scatter_(1, source, into)


def _mean(x: Tensor, rows: Tensor, source: Tensor, into: Tensor, share: Tensor) -> Tensor:
    """``rows``, and those that take others in the mean of all: a row plus their differences from it, by their shares.

    So only the rows that merge are read and written, not all of them.
    """
    from_rows, to_rows = flat(source, x.shape[1]), flat(into, rows.shape[1])
    old, new = x.flatten(0, 1), rows.flatten(0, 1)
    apart = old.index_select(0, from_rows) - new.index_select(0, to_rows)
    return new.index_add_(0, to_rows, apart * share.flatten()[:, None]).view_as(rows)


def _possible(r: Amount) -> bool:
    if isinstance(r, bool):
        return False
    return r >= 0 if isinstance(r, int) else 0 <= r < 1
