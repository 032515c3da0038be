"""Token merging: in every block the most alike pairs of tokens become one (ToMe, Bolya et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from scrimp.adaptive.attach import attach_
from scrimp.adaptive.calls import Call
from scrimp.adaptive.control import Controller
from scrimp.adaptive.host import Host
from scrimp.adaptive.ledger import Count
from scrimp.adaptive.method import Method, Run
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
            run.evidence.append(call.key.mean(1))

    def merge(self, run: Run, x: Tensor) -> Tensor:
        stream, prefix = run.stream, run.stream.prefix
        r = self.pairs(run.block, stream.width - prefix, run.cap)
        if not r:
            return x
        metric = run.evidence[0] if len(run.evidence) == 1 else torch.stack(run.evidence).mean(0)
        source, target, rest = match(metric[:, prefix:], r)
        run.own = 2 * metric.shape[-1] * ((stream.width - prefix) // 2) * ((stream.width - prefix + 1) // 2)
        joined = _Join(source + prefix, target, rest + prefix, stream.width, prefix)
        sizes = x.new_ones(x.shape[:2]) if stream.sizes is None else stream.sizes
        merged, after = joined.mean(x, sizes)
        plan = stream.choose(joined.order)
        origin = joined.moved if stream.source is None else joined.moved.gather(1, stream.source)
        run.stream = replace(plan.stream, sizes=after, source=origin)
        return merged


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching, Bolya et al. 2023, section 3.

    Args:
        metric: what is compared, [images, patches, dim]; odd places (counted from 0) look for a partner at even ones.
        r: pairs to find, at most half of the patches.

    Returns:
        Which patches are merged [images, r], into which of the even ones (0, 1, ... for places 0, 2, ...), and the odd
        patches that stay, in order, [images, patches // 2 - r].
    """
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    scores = unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    taken, left = order[:, :r], order[:, r:].sort(-1).values
    return 2 * taken + 1, partner.gather(1, taken), 2 * left + 1


class _Join:
    """Rows after a merge: prefix, odd patches that stay, even patches with what they took in."""

    def __init__(self, source: Tensor, target: Tensor, rest: Tensor, width: int, prefix: int) -> None:
        images, device = source.shape[0], source.device
        even = torch.arange(prefix, width, 2, device=device).expand(images, -1)
        head = torch.arange(prefix, device=device).expand(images, -1)
        self.order = torch.cat([head, rest, even], 1)
        self.source, self.into = source, target + (prefix + rest.shape[1])
        new = torch.arange(self.order.shape[1], device=device).expand(images, -1)
        moved = torch.zeros(images, width, dtype=torch.int64, device=device).scatter(1, self.order, new)
        self.moved = moved.scatter(1, source, self.into)

    def mean(self, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The new rows [images, n, dim], means weighted by size, and their sizes."""
        images, width, dim = x.shape
        start = torch.arange(images, device=x.device)[:, None]
        flat = x.flatten(0, 1)
        from_rows = (self.source + start * width).flatten()
        to_rows = (self.into + start * self.order.shape[1]).flatten()
        weight = sizes.gather(1, self.source).flatten()
        total = sizes.gather(1, self.order).flatten()
        out = flat.index_select(0, (self.order + start * width).flatten()) * total[:, None]
        out = out.index_add(0, to_rows, flat.index_select(0, from_rows) * weight[:, None])
        total = total.index_add(0, to_rows, weight)
        return (out / total[:, None]).view(images, -1, dim), total.view(images, -1)


def _possible(r: Amount) -> bool:
    if isinstance(r, bool):
        return False
    return r >= 0 if isinstance(r, int) else 0 <= r < 1
