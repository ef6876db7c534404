"""Un-absorbed attention over a paged latent cache, in chunks under a cap of memory.

Keys and values of every head are made of a chunk's latents, attended to and dropped; results of
chunks are merged by their log-sum-exps (`merge_states`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import wrong
from .merge import merge_states
from .prefill_inputs import NewTokens

LEAST_TOKENS = 16  # of query and KV in one step
UNFUSED_QUERIES = 128  # query tokens of a step whose logits are in memory


class Step(NamedTuple):
    """Tokens of one step, at most."""

    queries: int
    kv: int


def is_fused(new: NewTokens) -> bool:
    """Whether torch's memory-efficient attention does it; else matrix products and a softmax."""
    return new.q_nope.is_cuda


def step_size(new: NewTokens, workspace_bytes: int) -> Step:
    """Of the tokens whose queries, keys, values and results fit. ValueError if hardly any do."""
    size, heads, rows = new.q_nope.element_size(), new.heads, new.nope + new.rope
    # The fused attention adds up wide values in float32.
    per_query = heads * (size * (rows + new.v) + 4 * new.v + 4)
    per_kv = size * (new.kv_lora + new.rope + heads * (new.nope + new.v) + heads * rows)
    per_pair = 0
    if not is_fused(new):  # operands in float32; logits, probabilities and one more of the size
        per_query += 4 * heads * (rows + new.v)
        per_kv += 4 * heads * (rows + new.v)
        per_pair = 12 * heads
    least = LEAST_TOKENS * (per_query + per_kv + LEAST_TOKENS * per_pair)
    if workspace_bytes < least:
        raise wrong("workspace_bytes", workspace_bytes, f"at least {least}")
    queries = max(LEAST_TOKENS, workspace_bytes // 4 // per_query)
    if per_pair:
        queries = min(queries, UNFUSED_QUERIES)
    while queries > LEAST_TOKENS:
        kv = (workspace_bytes - queries * per_query) // (per_kv + queries * per_pair)
        if kv >= queries:
            return Step(queries, kv)
        queries = max(LEAST_TOKENS, queries // 2)
    kv = (workspace_bytes - queries * per_query) // (per_kv + queries * per_pair)
    return Step(queries, max(kv, LEAST_TOKENS))


def attend(
    new: NewTokens, out: Tensor, lse: Tensor, *, scale: float, causal: bool, workspace_bytes: int
) -> None:
    """Writes out [tokens, h, v] and lse [tokens, h]. Reads lengths on the host: it waits for the
    device once. Lengths, page ids and cu_seqlens_q are clamped as by `decode`."""
    step = step_size(new, workspace_bytes)
    out.zero_()
    lse.fill_(-math.inf)
    reach = new.block_table.shape[1] * new.cache.shape[1] if new.cache.shape[0] else 0
    lens = new.seq_lens.clamp(0, reach).tolist()
    cuts = new.cu_seqlens_q.clamp(0, new.q_nope.shape[0]).tolist()
    for request, length in enumerate(lens):
        rows = slice(cuts[request], max(cuts[request : request + 2]))
        _attend_request(new, request, length, rows, step, out[rows], lse[rows], scale, causal)


def _attend_request(
    new: NewTokens,
    request: int,
    length: int,
    rows: slice,
    step: Step,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> None:
    """Chunks before the new tokens are seen by all of these, a chunk among them by its own in a
    triangle and by all later ones. Query token t sees KV up to t + past."""
    tokens = rows.stop - rows.start
    past = length - tokens if causal else length
    begin = 0
    while begin < length and tokens:
        among_new = begin >= past
        size = min(step) if among_new else min(step.kv, past - begin)
        end = min(begin + size, length)
        keys, values = _expand(new, request, begin, end)
        first = 0
        if among_new:
            own = slice(begin - past, end - past)
            _attend_rows(new, rows, own, keys, values, out, lse, scale, causal=True)
            first = own.stop
        for at in range(first, tokens, step.queries):
            seen_by = slice(at, min(at + step.queries, tokens))
            _attend_rows(new, rows, seen_by, keys, values, out, lse, scale, causal=False)
        del keys, values  # before there are others
        begin = end


def _expand(new: NewTokens, request: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys [n, h, nope + r] and values [n, h, v] of a request's KV tokens."""
    num_pages, page_size = new.cache.shape[:2]
    places = torch.arange(begin, end, device=new.cache.device)
    pages = new.block_table[request, places // page_size].long().clamp(0, num_pages - 1)
    latent = new.cache[pages, places % page_size].flatten(1)
    if new.rope_cache is not None:
        rope = new.rope_cache[pages, places % page_size].flatten(1)
    else:
        latent, rope = latent[:, : new.kv_lora], latent[:, new.kv_lora :]
    by_head = (latent @ new.w_kv_b.T).view(len(latent), new.heads, new.nope + new.v)
    if not new.rope:
        return by_head[..., : new.nope], by_head[..., new.nope :]
    keys = by_head.new_empty(len(latent), new.heads, new.nope + new.rope)
    keys[..., : new.nope] = by_head[..., : new.nope]
    keys[..., new.nope :] = rope[:, None]
    return keys, by_head[..., new.nope :]


def _attend_rows(
    new: NewTokens,
    rows: slice,
    own: slice,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool,
) -> None:
    """Merges the attention of query tokens `own` of `rows` into out and lse."""
    q = new.q_nope[rows][own]
    if new.q_rope is not None:
        q = torch.cat((q, new.q_rope[rows][own]), -1)
    attention = _fused if is_fused(new) else _unfused
    o, o_lse = attention(q, keys, values, scale, causal)
    merge_states(out[own], lse[own], o, o_lse, out=out[own], lse=lse[own])


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """[n, h, d] each -> o [n, h, v] and natural lse [n, h]. Causal: as many queries as keys.

    torch's scaled_dot_product_attention without its choice of backend, which does not return the
    log-sum-exp.
    """
    o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), None, True, 0.0, causal, scale=scale
    )
    return o[0].transpose(0, 1), lse[0, :, : q.shape[0]].transpose(0, 1)


def _unfused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """As _fused, in float32."""
    logits = (q.float().transpose(0, 1) * scale) @ k.float().permute(1, 2, 0)
    if causal:
        seen = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).tril()
        logits.masked_fill_(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    o = (logits - lse[..., None]).exp_() @ v.float().transpose(0, 1)
    return o.transpose(0, 1).to(q.dtype), lse.transpose(0, 1)
