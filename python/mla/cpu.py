"""The `cpu` variant: torch operations in float32, on any CPU.

It keeps a few MB besides its inputs and outputs: KV is gathered and converted CHUNK_TOKENS at a
time under an online softmax, for BLOCK_ROWS query rows at a time.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .inputs import Inputs
from .outputs import fill_empty
from .problem import Problem

CHUNK_TOKENS = 1024
BLOCK_ROWS = 2048


def decode(
    problem: Problem,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    causal: bool,
    max_len: int,
) -> None:
    """Writes `out` and `lse`. Lengths, page ids and `cu_seqlens_q` are clamped as by kernels."""
    fill_empty(out, lse)
    block = max(1, BLOCK_ROWS // problem.h_q)  # query tokens
    lens = inputs.seq_lens.clamp(0, max_len).tolist()
    for request, (where, length) in enumerate(
        zip(_query_tokens(inputs, problem), lens, strict=True)
    ):
        q, q_rope = inputs.q[where], None if inputs.q_rope is None else inputs.q_rope[where]
        o, row_lse = out[where], None if lse is None else lse[where]
        for first in range(0, q.shape[0] if length else 0, block):
            tokens = slice(first, first + block)
            rows = (
                q[tokens] if q_rope is None else torch.cat((q[tokens], q_rope[tokens]), -1)
            ).float() * scale
            # The last query token sees all `length` KV tokens, each one before it one fewer.
            visible = length - q.shape[0] + 1 + first + _count(rows.shape[0]) if causal else None
            block_o, block_lse = _attend(rows, inputs, request, length, problem.d_v, visible)
            o[tokens] = block_o.to(o.dtype)
            if row_lse is not None:
                row_lse[tokens] = block_lse


def _query_tokens(inputs: Inputs, problem: Problem) -> list[int | slice]:
    """What indexes each request's query tokens: its place in the batch, or a range of tokens."""
    if inputs.cu_seqlens_q is None:
        return list(range(problem.b))
    cuts = inputs.cu_seqlens_q.clamp(0, problem.total_q).tolist()
    return [slice(first, max(first, last)) for first, last in pairwise(cuts)]


def _attend(
    q: Tensor, inputs: Inputs, request: int, length: int, d_v: int, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scaled rows q [tokens, h_q, d_qk] against the KV of one request.

    `visible` [tokens] is how many KV tokens each query token sees, all if None. Returns
    o [tokens, h_q, d_v] and lse [tokens, h_q], float32.
    """
    row_max = q.new_full(q.shape[:-1], -math.inf)
    row_sum = q.new_zeros(q.shape[:-1])
    o = q.new_zeros(*q.shape[:-1], d_v)
    for start in range(0, length, CHUNK_TOKENS):
        kv = _read_cache(inputs, request, start + _count(min(CHUNK_TOKENS, length - start)))
        logits = q @ kv.T
        if visible is not None:
            hidden = start + _count(kv.shape[0]) >= visible[:, None]
            logits.masked_fill_(hidden[:, None], -math.inf)
        new_max = torch.maximum(row_max, logits.amax(-1))
        base = new_max.masked_fill(new_max == -math.inf, 0)  # rows that see nothing yet
        p = torch.exp(logits - base[..., None])
        rescale = torch.exp(row_max - base)
        row_sum = row_sum * rescale + p.sum(-1)
        o = o * rescale[..., None] + p @ kv[:, :d_v]
        row_max = new_max
    return o / row_sum.masked_fill(row_sum == 0, 1)[..., None], row_max + row_sum.log()


def _count(n: int) -> Tensor:
    """0 to n - 1, whatever torch's default device is."""
    return torch.arange(n, device="cpu")


def _read_cache(inputs: Inputs, request: int, positions: Tensor) -> Tensor:
    """float32 rows [positions, d_qk] of a request's KV tokens."""
    num_pages, page_size = inputs.kv.shape[:2]
    pages = inputs.block_table[request, positions // page_size].clamp(0, num_pages - 1)
    parts = (inputs.kv,) if inputs.kv_rope is None else (inputs.kv, inputs.kv_rope)
    return torch.cat([part[pages, positions % page_size].flatten(1) for part in parts], -1).float()
