"""`append`: rows of new tokens into a paged cache, their rope columns rotated on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _mla, launch
from .append_inputs import NewRows
from .checks import DTYPES, INT32_MAX
from .device import facts
from .inputs import TensorOrPair, parts
from .rope import rotate

_NONE: tuple[int, ...] = (0, 0)  # strides of what there is not


def append(
    latent: Tensor,
    rope: Tensor | None,
    kv_cache: TensorOrPair,
    block_table: Tensor,
    positions: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cos_sin: Tensor | None = None,
    interleaved: bool = True,
) -> None:
    """Writes the cache rows of new tokens to their places in a paged cache.

    latent: bf16 or fp16 [b, s, c], the normed latents of s tokens of each request, or ragged
        [tokens, c] with `cu_seqlens_q`.
    rope: of the same dtype, [b, s, r] or [tokens, r]; None where a row has no rope columns. Both
        may be slices of one projection's output. c and r are multiples of 8.
    kv_cache: [pages, page_size, c + r] or [pages, page_size, 1, c + r], or the pair (latent, rope),
        as `decode` reads it. Overlapping no other argument.
    block_table: int32 [b, max_pages], the pages of each request in order.
    positions: int32 [b, s] or [tokens], the place of each token in its request, from 0. A token is
        left out if its position is negative (so -1 marks padding) or beyond the block table's
        reach or the last row of cos_sin, if its page is none of the cache's, or if cu_seqlens_q
        gives it to no request. Two tokens at one place leave one of the rows there, or a mixture.
    cu_seqlens_q: int32 [b + 1], where each request's tokens begin and end.
    cos_sin: float32 [positions, r], cos of each pair of columns, then sin (`Rotary.table` makes
        it): rope is rotated by row `position`. None: rope is written as it is. Rows start at
        multiples of 16 bytes.
    interleaved: pairs are neighbours; else column i and i + r/2, and r is a multiple of 16.

    Rows of latent, rope and cache have unit stride and start at multiples of 16 bytes; all other
    strides are free. One kernel on the current stream, without synchronisation or allocation, and
    capturable; it never writes elsewhere in the cache, whatever the tensors hold. CPU tensors, also
    of float32 and float64, take torch operations, with the same bits.

    Raises TypeError and ValueError for arguments that do not fit, UnsupportedError for devices
    other than CPUs and GPUs of compute capability 8.0 or later, CudaError if the driver refuses.
    """
    rows = NewRows(
        latent,
        rope,
        *parts("kv_cache", "latent, rope", kv_cache),
        block_table,
        positions,
        cu_seqlens_q,
        cos_sin,
        interleaved,
    )
    rows.check()
    device = facts(latent.device)
    if latent.dtype not in DTYPES and device.type == "cuda":
        raise TypeError(f"latent: got {latent.dtype}, expected torch.bfloat16 or torch.float16")
    if positions.numel() == 0 or rows.b == 0:
        return
    if device.type == "cpu":
        _append_on_cpu(rows)
    else:
        _launch(rows)


def _append_on_cpu(rows: NewRows) -> None:
    """As kernels/common/append.cu."""
    num_pages, page_size = rows.cache.shape[:2]
    max_pages = rows.block_table.shape[1]
    requests, positions = _requests_of(rows), rows.positions.long()
    here = (requests >= 0) & (positions >= 0) & (positions < max_pages * page_size)
    if rows.cos_sin is not None:
        here &= positions < rows.cos_sin.shape[0]
    if max_pages == 0:
        return
    pages = rows.block_table[requests, (positions // page_size).clamp(0, max_pages - 1)].long()
    here &= (pages >= 0) & (pages < num_pages)
    pages, positions = pages[here], positions[here]

    latent, rope = rows.latent[here], None if rows.rope is None else rows.rope[here]
    if rope is not None and rows.cos_sin is not None:
        rope = rotate(rope, rows.cos_sin[positions], interleaved=rows.interleaved)
    for cache, values in zip(rows.cache_parts(), (latent, rope), strict=True):
        if cache is not None and values is not None:
            cache[pages, positions % page_size] = values if cache.dim() == 3 else values[:, None]


def _requests_of(rows: NewRows) -> Tensor:
    """The request of each token, int64 in positions' shape; -1 if it has none."""
    positions, cuts = rows.positions, rows.cu_seqlens_q
    if cuts is None:
        return torch.arange(rows.b, device=positions.device)[:, None].expand(positions.shape)
    tokens = torch.arange(positions.shape[0], device=positions.device)
    own = (cuts[:-1, None] <= tokens) & (tokens < cuts[1:, None])
    numbers = torch.arange(rows.b, device=positions.device)[:, None]
    return torch.where(own, numbers, -1).amax(0)


def _launch(rows: NewRows) -> None:
    latent, rope, cache, rope_cache = rows.latent, rows.rope, rows.cache, rows.rope_cache
    table, positions = rows.block_table, rows.positions
    cuts, angles = rows.cu_seqlens_q, rows.cos_sin
    c, r = latent.shape[-1], 0 if rope is None else rope.shape[-1]
    if rope is None:
        to_rope, to_rope_strides = 0, _NONE
    elif rope_cache is None:  # a slice of it
        to_rope, to_rope_strides = cache.data_ptr() + c * cache.element_size(), cache.stride()
    else:
        to_rope, to_rope_strides = rope_cache.data_ptr(), rope_cache.stride()

    def of_tokens(tensor: Tensor | None) -> tuple[int, ...]:
        """Strides of requests and tokens; ragged tokens lack the first."""
        if tensor is None:
            return _NONE
        return tensor.stride()[:2] if cuts is None else (0, tensor.stride(0))

    # Names: src/append.h.
    _mla.launch_append(
        DTYPES[latent.dtype],
        [
            latent.data_ptr(),
            0 if rope is None else rope.data_ptr(),
            cache.data_ptr(),
            to_rope,
            table.data_ptr(),
            positions.data_ptr(),
            0 if cuts is None else cuts.data_ptr(),
            0 if angles is None else angles.data_ptr(),
        ],
        [
            *of_tokens(latent),
            *of_tokens(rope),
            *of_tokens(positions),
            *cache.stride()[:2],
            *to_rope_strides[:2],
            table.stride(0),
            0 if angles is None else angles.stride(0),
        ],
        [
            positions.numel(),
            rows.b,
            positions.shape[1] if cuts is None else 0,
            min(table.shape[1], INT32_MAX),
            *cache.shape[:2],
            0 if angles is None else min(angles.shape[0], INT32_MAX),
            c,
            r,
        ],
        rows.interleaved,
        launch.ordinal(table.device),
        launch.stream_of(table.device),
    )
