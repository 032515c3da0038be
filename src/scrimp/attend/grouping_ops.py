"""The grouping of queries as an operator: compiled kernels on the CPU, their torch twins everywhere else."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from scrimp.attend.precision import compute_dtype, without_autocast
from scrimp.native import load
from scrimp.primitives.draw import generator_for

MOST_BITS = 64
_LANES = 16


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The compiled module where it takes this tensor: on the CPU, float32 or what is raised to it."""
    if tensor.device.type != "cpu" or compute_dtype(tensor.dtype) != torch.float32:
        return None
    native = load()
    return native if native is not None and hasattr(native, "clustered_forward") else None


def packed(tensor: Tensor) -> Tensor:
    """float32, packed, the last dimension filled with zeros to whole registers: what the kernels take."""
    missing = -tensor.shape[-1] % _LANES
    return (pad(tensor, (0, missing)) if missing else tensor).float().contiguous()


@torch.library.custom_op(
    "scrimp::group_queries",
    mutates_args=(),
    schema="(Tensor query, Tensor? query_lengths, int clusters, int bits, int iterations, int refine, int seed)"
    " -> (Tensor, Tensor)",
)
def group(
    query: Tensor, query_lengths: Tensor | None, clusters: int, bits: int, iterations: int, refine: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(assignment [batch, heads, queries], counts [batch, heads, clusters]); see `group_queries`."""
    batch, heads, tokens, dim = query.shape
    clusters = min(clusters, max(tokens, 1))
    lengths = torch.full((batch,), tokens) if query_lengths is None else query_lengths.clamp(0, tokens)
    lengths = lengths.to(query.device, torch.int64)
    rows = query.reshape(batch * heads, tokens, dim)
    row_lengths = lengths.repeat_interleave(heads)
    places = torch.arange(tokens, device=query.device)
    padding = places >= row_lengths[:, None]
    assignment = torch.where(padding, -1, places)
    if clusters < tokens:
        first = first_places(lengths, tokens, clusters, seed).repeat_interleave(heads, 0)
        with without_autocast(query):
            found = _cluster(rows, row_lengths, first, random_planes(bits, dim, seed), iterations, refine)
        assignment = torch.where((row_lengths <= clusters)[:, None], assignment, found)
    counts = assignment.new_zeros(batch * heads, clusters + 1)
    counts.scatter_add_(1, assignment.masked_fill(padding, clusters), torch.ones_like(assignment))
    return assignment.view(batch, heads, tokens), counts[:, :clusters].contiguous().view(batch, heads, clusters)


def random_planes(bits: int, dim: int, seed: int) -> Tensor:
    """Normals of random hyperplanes, [bits, dim], float64, the same on every device."""
    return torch.randn(bits, dim, generator=generator_for(seed, 0), dtype=torch.float64)


def first_places(lengths: Tensor, tokens: int, clusters: int, seed: int) -> Tensor:
    """Distinct random places of the first centroids, [batch, clusters]; only the first lengths[b] exist where fewer."""
    order = torch.randperm(tokens, generator=generator_for(seed, 1)).to(lengths.device)
    beyond = (order >= lengths[:, None]).to(torch.uint8)
    return order[beyond.argsort(dim=1, stable=True)[:, :clusters]]


def _cluster(rows: Tensor, lengths: Tensor, first: Tensor, planes: Tensor, iterations: int, refine: int) -> Tensor:
    """Assignment [rows, tokens] of rows [rows, tokens, dim]; first [rows, clusters] are the places of the centroids."""
    native = kernels_for(rows)
    rows = rows.to(compute_dtype(rows.dtype))
    planes = planes.to(rows.device, rows.dtype)
    offsets = _mean(rows, lengths) @ planes.T
    if native is None:
        codes = hash_twin(rows, planes, offsets)
        assignment = cluster_codes_twin(codes, lengths, codes.gather(1, first), iterations)
        return refine_twin(rows, lengths, assignment, first.shape[1], refine)
    rows = packed(rows)
    codes = hash_native(native, rows, lengths, planes, offsets)
    assignment = cluster_codes_native(native, codes, lengths, codes.gather(1, first), iterations)
    return refine_native(native, rows, lengths, assignment, first.shape[1], refine)


def _mean(rows: Tensor, lengths: Tensor) -> Tensor:
    if bool((lengths == rows.shape[1]).all()):
        return rows.mean(1)
    real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return rows.masked_fill(~real[..., None], 0.0).sum(1) / lengths.clamp_min(1)[:, None]


def hash_native(native: ModuleType, rows: Tensor, lengths: Tensor, planes: Tensor, offsets: Tensor) -> Tensor:
    """`hash_twin` for packed float32 rows; codes beyond a row's length are 0."""
    count, tokens, dim = rows.shape
    across = pad(planes, (0, dim - planes.shape[1], 0, MOST_BITS - planes.shape[0])).T.contiguous()
    limits = pad(offsets, (0, MOST_BITS - offsets.shape[1]), value=float("inf")).contiguous()
    codes = torch.zeros(count, tokens, dtype=torch.int64)
    addresses = [tensor.data_ptr() for tensor in (rows, across, limits, lengths)]
    native.hash_queries(*addresses, count, tokens, dim, codes.data_ptr())
    return codes


def cluster_codes_native(
    native: ModuleType, codes: Tensor, lengths: Tensor, centroids: Tensor, iterations: int
) -> Tensor:
    """`cluster_codes_twin`, int32."""
    count, tokens = codes.shape
    clusters = centroids.shape[1]
    centroids, used = centroids.clone(), lengths.clamp_max(clusters)
    assignment = torch.empty(count, tokens, dtype=torch.int32)
    addresses = [tensor.data_ptr() for tensor in (codes, lengths, used)]
    outputs = (centroids.data_ptr(), assignment.data_ptr())
    native.cluster_codes(*addresses, count, tokens, clusters, iterations, *outputs)
    return assignment


def refine_native(
    native: ModuleType, rows: Tensor, lengths: Tensor, assignment: Tensor, clusters: int, steps: int
) -> Tensor:
    """`refine_twin` for packed float32 rows and an int32 assignment, which is overwritten."""
    count, tokens, dim = rows.shape
    native.refine_groups(
        rows.data_ptr(), lengths.data_ptr(), count, tokens, dim, clusters, steps, assignment.data_ptr()
    )
    return assignment.long()


def hash_twin(rows: Tensor, planes: Tensor, offsets: Tensor) -> Tensor:
    """Codes [rows, tokens], int64; bit b says whether a query lies beyond plane b: x . plane_b > offset_b."""
    beyond = (rows @ planes.T > offsets[:, None]).long()
    return (beyond << torch.arange(planes.shape[0], device=rows.device)).sum(-1)


def cluster_codes_twin(codes: Tensor, lengths: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm on codes [rows, tokens] from centroids [rows, clusters]; int64, -1 beyond a row's length."""
    signs = _signs(codes)
    real = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]
    unused = torch.arange(centroids.shape[1], device=codes.device) >= lengths[:, None]
    means = _signs(centroids)
    assignment = torch.full_like(codes, -1)
    for step in range(iterations + 1):
        # The scalar product of signs is 64 - 2 distances, exact in float32; the first maximum is the lowest cluster.
        products = (signs @ means.mT).masked_fill(unused[:, None], -2.0 * MOST_BITS)
        found = products.argmax(-1)
        if step == iterations or torch.equal(found, assignment):
            break
        assignment = found
        votes = sum_by_cluster(signs * real[..., None], assignment, centroids.shape[1])
        filled = count_by_cluster(assignment, real, centroids.shape[1]) > 0
        means = torch.where(filled[..., None], torch.where(votes > 0, 1.0, -1.0), means)
    return found.masked_fill(~real, -1)


def refine_twin(rows: Tensor, lengths: Tensor, assignment: Tensor, clusters: int, steps: int) -> Tensor:
    """``steps`` of Lloyd's algorithm on rows [rows, tokens, dim]; empty clusters take no part."""
    real = assignment >= 0
    for _ in range(steps):
        places = assignment.clamp_min(0)
        counts = count_by_cluster(places, real, clusters)
        means = (
            sum_by_cluster(rows.masked_fill(~real[..., None], 0.0), places, clusters) / counts.clamp_min(1)[..., None]
        )
        half = means.square().sum(-1).div(2).masked_fill(counts == 0, float("inf"))
        assignment = (rows @ means.mT - half[:, None]).argmax(-1)
    return assignment.masked_fill(~real, -1)


def _signs(codes: Tensor) -> Tensor:
    """The 64 bits of codes [...] as +1 and -1, float32 [..., 64]."""
    bits = codes[..., None] >> torch.arange(MOST_BITS, device=codes.device) & 1
    return bits.float() * 2 - 1


def sum_by_cluster(rows: Tensor, places: Tensor, clusters: int) -> Tensor:
    """Sums [..., clusters, dim] of rows [..., tokens, dim] by places [..., tokens]."""
    sums = rows.new_zeros(*rows.shape[:-2], clusters, rows.shape[-1])
    return sums.scatter_add_(-2, places[..., None].expand_as(rows), rows)


def count_by_cluster(places: Tensor, real: Tensor, clusters: int) -> Tensor:
    """Members [..., clusters] by places [..., tokens], where real."""
    return places.new_zeros(*places.shape[:-1], clusters).scatter_add_(-1, places, real.long())


@group.register_fake
def _(
    query: Tensor, query_lengths: Tensor | None, clusters: int, bits: int, iterations: int, refine: int, seed: int
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    assignment = query.new_empty(batch, heads, tokens, dtype=torch.int64)
    return assignment, query.new_empty(batch, heads, min(clusters, max(tokens, 1)), dtype=torch.int64)


@register_flop_formula(torch.ops.scrimp.group_queries)
def _group_flops(
    query_shape: Any, lengths_shape: Any, clusters: int, bits: int, iterations: int, refine: int, *args: Any, **_: Any
) -> int:
    batch, heads, tokens, dim = query_shape
    clusters = min(clusters, tokens)
    return 0 if clusters == tokens else 2 * batch * heads * tokens * dim * (bits + refine * clusters)
