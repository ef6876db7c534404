"""A query's rows, their rope columns rotated, by the kernel of `append`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _mla, launch
from .append_inputs import COLUMNS
from .checks import DTYPES
from .device import facts
from .rope import rotate


def rotated(q: Tensor, cos_sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, n + r], cos_sin float32 [tokens, r], dense -> (first n columns, rotated
    others).

    Both are views of rows (rope, rest): so lie the keys of un-absorbed attention, which takes such
    a query as it is.
    """
    r, n = cos_sin.shape[1], q.shape[2] - cos_sin.shape[1]
    rows = torch.empty_like(q, memory_format=torch.contiguous_format)
    rope, rest = rows.split_with_sizes((r, n), -1)
    if facts(q.device).type == "cuda" and q.dtype in DTYPES and n % COLUMNS == 0:
        if q.numel():
            _launch(q, rows, cos_sin, n, r, interleaved)
    else:
        rest.copy_(q[..., :n])
        rope.copy_(rotate(q[..., n:], cos_sin[:, None], interleaved=interleaved))
    return rest, rope


def _launch(q: Tensor, rows: Tensor, cos_sin: Tensor, n: int, r: int, interleaved: bool) -> None:
    """To the kernel a head is a request that has one page, with a slot for each token."""
    tokens, heads, width = q.shape
    order = torch.arange(max(tokens, heads), dtype=torch.int32, device=q.device)
    numbers, size = order.data_ptr(), q.element_size()
    of_token, of_head = q.stride(0), q.stride(1)
    _mla.launch_append(  # names: src/append.h
        DTYPES[q.dtype],
        [
            q.data_ptr(),
            q.data_ptr() + n * size,
            rows.data_ptr() + r * size,
            rows.data_ptr(),
            numbers,  # pages
            numbers,  # positions
            0,
            cos_sin.data_ptr(),
        ],
        [
            *(of_head, of_token, of_head, of_token),
            *(0, 1),
            *(width, heads * width, width, heads * width),
            *(1, r),
        ],
        [heads * tokens, heads, tokens, 1, heads, tokens, tokens, n, r],
        interleaved,
        launch.ordinal(q.device),
        launch.stream_of(q.device),
    )
