"""Un-absorbed attention over a paged latent cache, in chunks under a cap of memory.

Keys and values of every head are made of a chunk's latents, attended to and dropped; results of
chunks are merged by their log-sum-exps (`merge_states`). A token's row of a head is (rope, nope,
v), key and value side by side: one product by head writes nope and v where the attention reads
them, and rope columns are written once for each head. Nothing is copied again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import fused
from .chunks import Part, exact_queries
from .expanded_steps import Step, Steps, is_fused
from .fused import Ragged, State
from .merge import merge_states
from .prefill_inputs import NewTokens
from .slots import copy, gather


def attend(new: NewTokens, steps: Steps, scale: float) -> State:
    """Of all query tokens [tokens, h, v] and [tokens, h]; rows of other requests than those that
    `steps` are of are 0 and -inf, or undefined where `steps` are whole. So are rows of theirs that
    see nothing."""
    if steps.alone:
        ((_, (o, lse)),) = _attentions(new, steps.steps[0], steps.kernel, scale)
        return State(o.contiguous(), lse)
    out = new.q_nope.new_empty(*new.q_nope.shape[:2], new.v)
    lse = out.new_empty(out.shape[:2], dtype=torch.float32)
    if not steps.whole:
        out.zero_()
        lse.fill_(-math.inf)
    for step in steps.steps:
        for part, (o, o_lse) in _attentions(new, step, steps.kernel, scale):
            rows = part.queries
            if part.begin == 0:
                out[rows], lse[rows] = o, o_lse
            else:
                merge_states(out[rows], lse[rows], o, o_lse, out=out[rows], lse=lse[rows])
    return State(out, lse)


def _attentions(
    new: NewTokens, step: Step, kernel: str, scale: float
) -> Iterator[tuple[Part, State]]:
    """Of a chunk, each of its parts, or one for all."""
    by_head = _expand(new, step.slots)
    parts = step.chunk.parts
    if step.chunk.batched and is_fused(by_head.device):
        queries = slice(parts[0].queries.start, parts[-1].queries.stop)
        parts = [Part(parts[0].request, queries, slice(0, len(by_head)), 0, parts[0].causal, False)]
    q, held = None, None
    for part, ragged in zip(parts, step.ragged, strict=True):
        if held != (part.queries, part.exact):
            q = None  # before there is another
            q, held = _queries(new, part), (part.queries, part.exact)
        assert q is not None
        tokens = part.queries.stop - part.queries.start
        many = exact_queries(tokens) if part.exact and part.causal else 0
        own = slice(part.keys.start, max(part.keys.stop, part.keys.start + many))
        o, lse = _attention(q, by_head[own], part, ragged, kernel, scale)
        yield part, State(o[:tokens], lse[:tokens])


def _attention(
    q: Tensor, by_head: Tensor, part: Part, ragged: Ragged | None, kernel: str, scale: float
) -> State:
    d = q.shape[-1]
    keys, values = by_head[..., :d], by_head[..., d:]
    if part.exact:
        return fused.cudnn(q, keys, values, scale, part.causal)
    if ragged is None:
        return fused.products(q, keys, values, scale, part.causal)
    if kernel == fused.FLASH:
        return fused.flash(q, by_head, values.shape[-1], ragged, scale, part.causal)
    return fused.efficient(q, keys, values, ragged, scale, part.causal)


def _queries(new: NewTokens, part: Part) -> Tensor:
    """[n, h, r + nope]; n rounded up for a kernel that is prepared for sizes."""
    q_nope = new.q_nope[part.queries]
    tokens = len(q_nope)
    rows = exact_queries(tokens) if part.exact else tokens
    if new.q_rope is None and rows == tokens:
        return q_nope
    q = q_nope.new_empty(rows, new.heads, new.rope + new.nope)
    copy(q[:tokens, :, new.rope :], q_nope)
    if new.q_rope is not None:
        copy(q[:tokens, :, : new.rope], new.q_rope[part.queries])
    return q


def _expand(new: NewTokens, slots: Tensor) -> Tensor:
    """Of KV tokens, keys and values [n, h, (r + nope) + v]."""
    n, d = len(slots), new.dims
    rows = gather(new.cache, slots)
    rope = rows[:, d.kv_lora :] if new.rope_cache is None else gather(new.rope_cache, slots)
    by_head = rows.new_empty(n, d.heads, d.rope + d.nope + d.v)
    latent = rows[:, : d.kv_lora].expand(d.heads, n, d.kv_lora)
    weights = new.w_kv_b.view(d.heads, d.nope + d.v, d.kv_lora).transpose(1, 2)
    torch.bmm(latent, weights, out=by_head[..., d.rope :].transpose(0, 1))
    if d.rope:
        copy(by_head[..., : d.rope], rope[:, None])
    return by_head
