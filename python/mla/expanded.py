"""Un-absorbed attention over a paged latent cache, in chunks under a cap of memory.

Keys and values of every head are made of a chunk's latents, attended to and dropped; results of
chunks are merged by their log-sum-exps (`merge_states`). A token's row of a head is (rope, nope,
v), key and value side by side: one product by head writes nope and v where the attention reads
them, and rope columns are written once for each head. Nothing is copied again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import fused
from .expanded_steps import Attention, Step, Steps
from .fused import State
from .merge import merge_checked
from .prefill_inputs import NewTokens
from .slots import copy, gather


def attend(new: NewTokens, steps: Steps, scale: float) -> State:
    """Of all query tokens [tokens, h, v] and [tokens, h]; rows of other requests than those that
    `steps` are of are 0 and -inf, or undefined where `steps` are whole. So are rows of theirs that
    see nothing."""
    results = None if steps.together else _empty(new, steps.whole)
    for step in steps.steps:
        results = _attend(new, step, results, steps.kernel, scale)
    assert results is not None
    return State(results.o.contiguous(), results.lse)


def _attend(
    new: NewTokens, step: Step, results: State | None, kernel: str, scale: float
) -> State | None:
    """Of a chunk. Results go to those of all query tokens; the first, where it is of all of them,
    becomes these."""
    by_head = _expand(new, step.slots)
    q, held = None, None
    for each in step.attentions:
        if q is None or held != (each.queries, each.rows):
            q = None  # before there is another
            q, held = _queries(new, each), (each.queries, each.rows)
        found = _attention(q, by_head, each, kernel, scale)
        if results is None:
            results = found
            continue
        out, lse = results if each.queries is None else (x[each.queries] for x in results)
        if each.first:
            out[:], lse[:] = found
        else:
            merge_checked(out, lse, *found, out, lse)
    return results


def _empty(new: NewTokens, whole: bool) -> State:
    out = new.q_nope.new_empty(*new.q_nope.shape[:2], new.dims.v)
    lse = out.new_empty(out.shape[:2], dtype=torch.float32)
    if not whole:
        out.zero_()
        lse.fill_(-math.inf)
    return State(out, lse)


def _attention(q: Tensor, by_head: Tensor, each: Attention, kernel: str, scale: float) -> State:
    rows = by_head if each.keys is None else by_head[each.keys]
    if each.exact:
        found = fused.cudnn(q, rows, scale, each.causal)
        if each.rows == each.tokens:
            return found
        return State(found.o[: each.tokens], found.lse[: each.tokens])
    if each.ragged is None:
        return fused.products(q, rows, scale, each.causal)
    attention = fused.flash if kernel == fused.FLASH else fused.efficient
    return attention(q, rows, each.ragged, scale, each.causal)


def _queries(new: NewTokens, each: Attention) -> Tensor:
    """[n, h, r + nope]; n rounded up for a kernel that is prepared for sizes. Of rows that lie like
    this in memory, a view."""
    q_nope, q_rope = new.q_nope, new.q_rope
    if each.queries is not None:
        q_nope = q_nope[each.queries]
        q_rope = None if q_rope is None else q_rope[each.queries]
    if each.rows == each.tokens:
        if q_rope is None:
            return q_nope
        if is_behind(q_nope, q_rope):
            return q_rope.as_strided((*q_rope.shape[:2], new.dims.head_dim), q_rope.stride())
    q = q_nope.new_empty(each.rows, new.dims.heads, new.dims.head_dim)
    r = new.dims.rope
    copy(q[: each.tokens, :, r:], q_nope)
    if q_rope is not None:
        copy(q[: each.tokens, :, :r], q_rope)
    return q


def is_behind(q_nope: Tensor, q_rope: Tensor) -> bool:
    """Whether rows of one tensor begin where those of the other end."""
    return (
        q_rope.data_ptr() + q_rope.shape[-1] * q_rope.element_size() == q_nope.data_ptr()
        and q_rope.stride() == q_nope.stride()
        and q_rope.untyped_storage().data_ptr() == q_nope.untyped_storage().data_ptr()
    )


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
