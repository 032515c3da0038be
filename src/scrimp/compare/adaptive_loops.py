"""Vision transformers that spend less, written out: one image, token by token, rows really taken away.

Each function gives the logits of one image [3, height, width] and the places of the tokens that each block computed for
at its end, ascending. For models with a class token and blocks x + attention, x + MLP, in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outcome = tuple[Tensor, list[list[int]]]


class Looked(NamedTuple):
    """One image after attention: tokens [n, dim], weights [heads, n, n], keys and values [heads, n, head dim]."""

    x: Tensor
    weights: Tensor
    keys: Tensor
    values: Tensor


def merging(model: Any, image: Tensor, r: Sequence[int]) -> Outcome:
    """Bolya et al. 2023 (arXiv 2210.09461), section 3: bipartite soft matching and proportional attention."""
    x = _embedded(model, image)
    places, sizes, kept = list(range(len(x))), [1] * len(x), []
    for block, pairs in zip(model.blocks, r, strict=True):
        looked = _attend(block, x, sizes)
        groups = _groups(looked.keys.mean(0), pairs)
        totals = [sum(sizes[i] for i in group) for group in groups]
        means = [torch.stack([sizes[i] * looked.x[i] for i in group]).sum(0) for group in groups]
        x = torch.stack([mean / total for mean, total in zip(means, totals, strict=True)])
        places, sizes = [places[group[0]] for group in groups], totals
        x = _mlp(block, x)
        kept.append(sorted(places))
    return _head(model, x[0]), kept


def _groups(keys: Tensor, pairs: int) -> list[list[int]]:
    """Rows that become one, that which takes the others in first: class token, odd patches that stay, even patches."""
    if not pairs:  # nobody is dealt out
        return [[i] for i in range(len(keys))]
    odd, even = range(2, len(keys), 2), range(1, len(keys), 2)
    edges = []
    for a in odd:
        cosines = [float(torch.cosine_similarity(keys[a].detach(), keys[b].detach(), dim=0)) for b in even]
        edges.append((max(cosines), a, even[cosines.index(max(cosines))]))
    gone = {a: b for _, a, b in sorted(edges, reverse=True)[:pairs]}
    stay = [[a] for a in odd if a not in gone]
    return [[0], *stay, *([b, *(a for a, into in gone.items() if into == b)] for b in even)]


def keeping(model: Any, image: Tensor, ratio: float, blocks: Sequence[int], *, fuse: bool) -> Outcome:
    """Liang et al. 2022 (arXiv 2202.07800): the patches the class token attends to most; the others as one."""
    x = _embedded(model, image)
    places, kept = list(range(len(x))), []
    for index, block in enumerate(model.blocks):
        x, weights, *_ = _attend(block, x)
        if index in blocks:
            seen = weights[:, 0].sum(0)
            order = [i + 1 for i in _descending(seen[1:].tolist())]
            stay = math.ceil(ratio * len(order))
            rows, gone = [0, *sorted(order[:stay])], order[stay:]
            fused = (seen[gone] / seen[gone].sum()) @ x[gone]
            x = torch.cat([x[rows], fused[None]]) if fuse else x[rows]
            places = [places[i] for i in (rows + gone[:1] if fuse else rows)]
        x = _mlp(block, x)
        kept.append(sorted(places))
    return _head(model, x[0]), kept


def _descending(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


def sampling(model: Any, image: Tensor, samples: int, blocks: Sequence[int], *, least: int) -> Outcome:
    """Fayyaz et al. 2022 (arXiv 2111.15667), section 3: attention of the class token times the length of the value."""
    x = _embedded(model, image)
    places, kept = list(range(len(x))), []
    for index, block in enumerate(model.blocks):
        x, weights, _, values = _attend(block, x)
        if index in blocks:
            significance = weights[:, 0].sum(0) * values.transpose(0, 1).flatten(1).norm(dim=1)
            rows = [0, *sorted(i + 1 for i in _drawn(significance[1:].tolist(), samples, least))]
            x, places = x[rows], [places[i] for i in rows]
        x = _mlp(block, x)
        kept.append(places)
    return _head(model, x[0]), kept


def _drawn(significance: list[float], samples: int, least: int) -> set[int]:
    """What is nearest to each point from the smallest positive value of the cumulative distribution to 1."""
    order = _descending(significance)[::-1]
    sums = [math.fsum(significance[i] for i in order[: n + 1]) for n in range(len(order))]
    cumulative = [(value - sums[0]) / (sums[-1] - sums[0]) for value in sums]
    low = min(value for value in cumulative if value > 0)
    points = [1 - (1 - low) * step / (samples - 1) for step in range(samples)]
    gaps = ([abs(value - point) for value in cumulative] for point in points)
    found = {order[gap.index(min(gap))] for gap in gaps}
    best = [i for i in reversed(order) if i not in found]
    return found | set(best[: max(0, least - len(found))])


def halting(model: Any, image: Tensor, scale: float, center: float, *, eps: float) -> Outcome:
    """Yin et al. 2022 (arXiv 2112.07658), algorithm 1, for a head that reads the class token alone."""
    x = _embedded(model, image)
    rows, last, kept = list(range(len(x))), len(model.blocks) - 1, []
    spent, mean = [x.new_zeros(()) for _ in x], torch.zeros_like(x[0])
    for index, block in enumerate(model.blocks):
        kept.append(rows)
        if not rows:
            continue
        x = _mlp(block, _attend(block, x).x)
        score = (scale * x[:, 0] - center).sigmoid()
        full = [bool(spent[k] + h >= 1 - eps) for k, h in zip(rows, score, strict=True)]
        going = [k for k, done in zip(rows, full, strict=True) if index < last and not done]
        over = 0 not in going  # the class token halts, and with it the image
        mean = mean + (1 - spent[0] if over else score[0]) * x[0]
        for k, h in zip(rows, score, strict=True):
            spent[k] = spent[k] + h
        going = [] if over else going
        x, rows = x[[rows.index(k) for k in going]], going
    return _head(model, mean), kept


def gating(model: Any, image: Tensor, gates: Any, *, tau: float, thresholds: tuple[float, float]) -> Outcome:
    """Meng et al. 2022 (arXiv 2111.15668), section 3, without noise; the first block has no gates. Straight through."""
    x, kept = _embedded(model, image), []
    for index, block in enumerate(model.blocks):
        heads, tokens, layers = x.new_ones(block.attn.num_heads), x.new_ones(len(x)), x.new_ones(2)
        if index:
            of_image, of_token = gates.image[index - 1], gates.token[index - 1]
            logits = of_image.weight @ x[0] + of_image.bias
            layers, heads = (_gate(part / tau, thresholds[0]) for part in (logits[:2], logits[2:]))
            patches = x[1:] @ of_token.weight[0] + of_token.bias
            tokens = torch.cat([tokens[:1], _gate(patches / tau, thresholds[1])])
        on = [i for i in range(len(x)) if tokens[i] > 0.5]
        whole = _attend(block, x, heads=heads, among=on).x
        x = x + (tokens * layers[0])[:, None] * (whole - x)
        x = x + (tokens * layers[1])[:, None] * (_mlp(block, x) - x)
        kept.append(on if layers.max() > 0.5 else [])
    return _head(model, x[0]), kept


def _gate(logits: Tensor, threshold: float) -> Tensor:
    soft = logits.sigmoid()
    return (soft > threshold).to(soft) + soft - soft.detach()


def _embedded(model: Any, image: Tensor) -> Tensor:
    x: Tensor = torch.cat([model.cls_token[0], model.patch_embed(image[None])[0]]) + model.pos_embed[0]
    return x


def _attend(
    block: Any,
    x: Tensor,
    sizes: Sequence[int] | None = None,
    *,
    heads: Tensor | None = None,
    among: Sequence[int] | None = None,
) -> Looked:
    """Softmax written out: keys count as often as ``sizes`` says, only rows ``among`` are keys, heads are scaled."""
    part, outs, all_weights = block.attn, [], []
    query, key, value = part.qkv(block.norm1(x)).view(len(x), 3, part.num_heads, -1).permute(1, 2, 0, 3)
    rows = list(range(len(x)) if among is None else among)
    counts = x.new_tensor([1 if sizes is None else sizes[i] for i in rows])
    for head in range(part.num_heads):
        weights = (query[head] @ key[head][rows].T / key.shape[-1] ** 0.5).exp() * counts
        weights = weights / weights.sum(1, keepdim=True)
        out = weights @ value[head][rows]
        outs.append(out if heads is None else heads[head] * out)
        all_weights.append(weights)
    return Looked(x + part.proj(torch.cat(outs, 1)), torch.stack(all_weights), key, value)


def _mlp(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def _head(model: Any, row: Tensor) -> Tensor:
    logits: Tensor = model.head(model.norm(row))
    return logits
