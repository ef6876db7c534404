"""A query's rows, their rope columns rotated, by the kernel of `append`."""

from __future__ import annotations

import torch
from torch import Tensor

from .append import write
from .append_inputs import NewRows


def rotated(q: Tensor, cos_sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q [tokens, heads, n + r], cos_sin float32 [tokens, r] -> (first n columns, rotated others).

    Both are views of rows (rope, rest): so lie the keys of un-absorbed attention, which takes such
    a query as it is. To the kernel a head is a request that has one page, with a slot for each
    token.
    """
    tokens, heads, r = *q.shape[:2], cos_sin.shape[1]
    rows = torch.empty_like(q, memory_format=torch.contiguous_format)
    rope, rest = rows.split_with_sizes((r, q.shape[2] - r), -1)
    q_rest, q_rope = q.transpose(0, 1).split_with_sizes((q.shape[2] - r, r), -1)
    order = torch.arange(max(tokens, heads), dtype=torch.int32, device=q.device)
    write(
        NewRows(
            q_rest,
            q_rope,
            rest.transpose(0, 1),
            rope.transpose(0, 1),
            order[:heads].unsqueeze(1),
            order[:tokens].expand(heads, tokens),
            None,
            cos_sin,
            interleaved,
        )
    )
    return rest, rope
