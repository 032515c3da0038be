"""Which operators do no multiply-add work worth a formula. Whatever is not known here is reported as missed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

# Tags settle most operators; these are the ones torch leaves untagged, by stem (see `_stem`), grouped by
# why a FLOP count may pass over them. Ordering compares numbers, which is no floating-point arithmetic.
_FREE = {
    "reduction": """all amax amin aminmax any argmax argmin count_nonzero cummax cummin cumprod cumsum dist
        linalg_vector_norm logcumsumexp logsumexp max mean min nanmedian nansum norm prod segment_reduce std std_mean
        sum trace unique unique2 var var_mean bincount histc binary_cross_entropy binary_cross_entropy_with_logits
        huber_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d smooth_l1_loss
        soft_margin_loss embedding_bag embedding_bag_dense embedding_bag_forward_only
        embedding_bag_per_sample_weights""",
    "pointwise": """add_relu addr amp_foreach_non_finite_check_and_unscale complex
        fake_quantize_learnable_per_tensor_affine fused_adagrad fused_adam fused_adamw fused_dropout
        fused_moving_avg_obs_fq_helper fused_sgd glu linalg_cross
        log_sigmoid masked_scale native_dropout polar prelu_kernel quantize_per_tensor rrelu_with_noise rsub where
        floor_divide hardswish irshift leaky_relu xlogy dequantize""",
    "normalisation": """batch_norm batch_norm_no_update batch_norm_with_update cudnn_batch_norm fused_rms_norm
        log_softmax miopen_batch_norm native_batch_norm native_batch_norm_legit native_batch_norm_legit_no_training
        native_group_norm native_layer_norm renorm safe_softmax softmax weight_norm_interface""",
    "pooling": """adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d avg_pool3d
        fractional_max_pool2d grid_sampler_2d grid_sampler_2d_cpu_fallback grid_sampler_3d max_pool2d_with_indices
        max_pool3d_with_indices max_unpool2d max_unpool3d upsample_bicubic2d upsample_bicubic2d_aa upsample_bilinear2d
        upsample_bilinear2d_aa upsample_lanczos2d_aa upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_nearest_exact1d upsample_nearest_exact2d upsample_nearest_exact3d
        upsample_trilinear3d""",
    "ordering": """bucketize isin kthvalue median mode multinomial nonzero nonzero_static searchsorted sort topk
        unique_consecutive unique_dim""",
    "indexing": """embedding embedding_dense gather index index_add index_copy index_fill index_put index_reduce
        index_select masked_fill masked_scatter masked_select put scatter scatter_add scatter_reduce take unsafe_index
        unsafe_index_put unsafe_masked_index unsafe_masked_index_put_accumulate""",
    "copy": """alias as_strided as_strided_scatter block_diag cat channel_shuffle chunk_cat clone col2im constant_pad_nd
        copy diag_embed diagonal diagonal_scatter expand flip im2col
        jagged_to_padded_dense lift lift_fresh local_scalar_dense narrow nested_tensor_from_tensor_list
        pack_padded_sequence padded_dense_to_jagged permute pin_memory pixel_shuffle pixel_unshuffle reflection_pad1d
        reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
        replication_pad3d reshape resize resize_as resize_output roll rot90 select select_scatter set shallow_copy
        slice slice_scatter split_with_sizes squeeze stack t to to_dense to_mkldnn transpose tril triu unbind unfold
        unsafe_split
        unsafe_split_with_sizes unsafe_view unsqueeze view view_as_complex view_as_real""",
    "factory": """arange bernoulli cauchy empty empty_like empty_permuted empty_strided exponential eye fill full
        full_like
        geometric hann_window linspace log_normal logspace new_empty new_empty_strided new_full new_ones new_zeros
        normal ones ones_like poisson rand rand_like randint randint_like randn randn_like randperm scalar_tensor
        standard_gamma tril_indices triu_indices uniform zero zeros zeros_like""",
    "bookkeeping": """assert_async assert_scalar assert_tensor_metadata dense_dim equal is_coalesced is_pinned
        is_same_size
        functional_assert_async functional_sym_constrain_range functional_sym_constrain_range_for_size
        sparse_dim sym_constrain_range sym_constrain_range_for_size""",
}
_FREE_STEMS = frozenset(stem for row in _FREE.values() for stem in row.split())
_FREE_NAMESPACES = frozenset({"prim", "profiler", "c10d", "_c10d_functional", "_c10d_functional_autograd"})
_SUFFIXES = ("_", "_backward", "_forward", "_copy", "_data", "_functional", "_out")
_FREE_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pointwise", "reduction", "view_copy") if hasattr(torch.Tag, name)
)

_METADATA = """sym_is_contiguous is_contiguous is_strides_like_format is_non_overlapping_and_dense size sym_size stride
    sym_stride storage_offset sym_storage_offset numel sym_numel dim layout"""
_METADATA_NAMES = frozenset(_METADATA.split())


@cache
def is_free(op: Any) -> bool:
    """Whether an operator is known to do no work that a FLOP count should hold.

    True for views and for pointwise, reduction, normalisation, pooling, ordering, indexing, copy and factory
    operators, and for bookkeeping such as profiler marks. False for everything else, higher-order operators included.
    """
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if op.namespace in _FREE_NAMESPACES or op.is_view or _has_free_tag(op):
        return True
    if op.namespace != "aten":
        return False
    stem = _stem(op._schema.name.partition("::")[2])
    return stem in _FREE_STEMS or _aten_packet_is_free(stem)


@cache
def is_metadata(op: Any) -> bool:
    """Whether an operator only asks a tensor for its sizes or layout, which a tensor subclass must answer itself."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.name.partition("::")[2] in _METADATA_NAMES


def op_name(op: Any) -> str:
    """The operator's name as receipts give it, such as ``aten::_cdist_forward``."""
    if isinstance(op, torch._ops.OpOverload):
        return str(op._schema.name)
    return f"higher_order::{op.name()}"


def _has_free_tag(op: torch._ops.OpOverload) -> bool:
    return any(tag in op.tags for tag in _FREE_TAGS)


def _aten_packet_is_free(stem: str) -> bool:
    # In-place, backward and _foreach_ forms often lack the tag that the plain operator carries.
    packet = getattr(torch.ops.aten, stem, None)
    if packet is None:
        return False
    return any(_has_free_tag(getattr(packet, overload)) for overload in packet.overloads())


def _stem(name: str) -> str:
    """``_foreach_add_`` -> ``add``; ``_softmax_backward_data`` -> ``softmax``."""
    name = name.lstrip("_").removeprefix("foreach_")
    while suffix := next((each for each in _SUFFIXES if name.endswith(each)), None):
        name = name.removesuffix(suffix)
    return name
