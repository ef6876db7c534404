"""The two functions, under the name of FlashMLA's own module."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from ...api import decode
from ...checks import D_V, check_dims, check_index, check_tensor, dtype_name, shape_of, wrong
from .schedule import FlashMLASchedMeta, Sizes, schedule_of
from .unsupported import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    refuse,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]


@overload
def get_mla_metadata() -> tuple[FlashMLASchedMeta, None]: ...


@overload
def get_mla_metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    num_heads_per_head_k: int | None = None,
) -> tuple[FlashMLASchedMeta, None] | tuple[Tensor, Tensor]:
    """What to pass to `flash_mla_with_kvcache` as `tile_scheduler_metadata` and `num_splits`.

    Without arguments, a new FlashMLASchedMeta and None: one schedule for all calls of a step.

    With cache_seqlens, int32 [b], two int32 tensors on its device, [1, 8] and [b + 1]. They hold
    nothing, and each call with them makes its own schedule, since callers copy such tensors into
    buffers of other batches and replay graphs with them. The other arguments change nothing.

    UnsupportedError for `is_fp8_kvcache` and `topk`.
    """
    refuse(is_fp8_kvcache=True if is_fp8_kvcache else None, topk=topk)
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    check_tensor("cache_seqlens", cache_seqlens)
    check_index("cache_seqlens", cache_seqlens, (None,), cache_seqlens.device, "[b]")
    zeros = cache_seqlens.new_zeros
    return zeros(1, 8), zeros(cache_seqlens.shape[0] + 1)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decodes with `mla.decode`: on the current stream, without synchronisation, capturable.

    q: bf16 or fp16 [b, s_q, h_q, d_qk].
    k_cache: of the same dtype, [pages, page_size, h_kv, d_qk]; h_kv divides h_q. Each KV head is a
        launch of its own.
    block_table: int32 [b, max_pages]. cache_seqlens: int32 [b].
    head_dim_v: the d_v of d_qk, 512 of 576.
    tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned.
    softmax_scale: d_qk ** -0.5 if None, which is not the scale of a model whose d_qk is absorbed.
    causal: the last query token sees all KV tokens, each one before it one fewer.

    Returns out [b, s_q, h_q, d_v] in q's dtype and natural lse, float32 [b, h_q, s_q]. Rows that
    see no token give 0 and +inf.

    TypeError, ValueError and UnsupportedError as `mla.decode`, whose names of the arguments some
    messages use; UnsupportedError for every other argument that is given.
    """
    refuse(
        is_fp8_kvcache=True if is_fp8_kvcache else None,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
        descale_q=descale_q,
        descale_k=descale_k,
    )
    sizes = _check(q, k_cache, block_table, cache_seqlens, head_dim_v)
    b, s_q, h_q, d_qk = q.shape
    heads = h_q // sizes.h_kv  # of one KV head
    schedule = None
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise wrong("num_splits", "a tensor", "None, as get_mla_metadata() returned it")
        schedule = schedule_of(tile_scheduler_metadata, sizes, cache_seqlens, block_table.shape[1])
    else:
        check_index(
            "tile_scheduler_metadata", tile_scheduler_metadata, (None, None), q.device, "[parts, 8]"
        )
        if num_splits is not None:
            check_index("num_splits", num_splits, (b + 1,), q.device, "[{}], b + 1")

    out = torch.empty(b, s_q, h_q, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h_q, s_q, dtype=torch.float32, device=q.device)
    for i in range(sizes.h_kv):
        of_head = slice(i * heads, (i + 1) * heads)
        decode(
            q[:, :, of_head],
            k_cache[:, :, i],
            block_table,
            cache_seqlens,
            scale=d_qk**-0.5 if softmax_scale is None else softmax_scale,
            causal=causal,
            out=out[:, :, of_head],
            lse=lse[:, of_head].transpose(1, 2),
            plan=schedule,
        )
    return out, lse.nan_to_num_(math.nan, math.inf, math.inf)  # decode's -inf is FlashMLA's +inf


def _check(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int
) -> Sizes:
    """What must hold before the tensors are cut by KV heads; `decode` checks the rest."""
    for name, tensor, layout in (
        ("q", q, "[b, s_q, h_q, d_qk]"),
        ("k_cache", k_cache, "[pages, page_size, h_kv, d_qk]"),
    ):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise wrong(name, shape_of(tensor), layout)
    dtype_name(q.dtype, of="q")
    (b, s_q, h_q, d_qk), (_, page_size, h_kv, _) = q.shape, k_cache.shape
    check_dims("q", d_qk, None)
    if head_dim_v != D_V[d_qk]:
        raise wrong("head_dim_v", head_dim_v, f"{D_V[d_qk]} with d_qk = {d_qk}")
    if h_kv < 1 or h_q % h_kv:
        raise wrong("k_cache", f"{h_kv} KV heads", f"a number that divides the {h_q} heads of q")
    check_index("cache_seqlens", cache_seqlens, (b,), q.device, "[{}]")
    check_index("block_table", block_table, (b, None), q.device, "[{}, max_pages]")
    return Sizes(b, s_q, h_q, d_qk, page_size, h_kv, q.dtype, q.device)
