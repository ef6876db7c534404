"""Un-absorbed attention over a paged latent cache, in chunks under a cap of memory.

Keys and values of every head are made of a chunk's latents, attended to and dropped; results of
chunks are merged by their log-sum-exps (`merge_states`). A token's row of a head is (rope, nope,
v), key and value side by side: one product by head writes nope and v where the attention reads
them, and rope columns are written once for each head. Nothing is copied again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fused
from .checks import wrong
from .chunks import (
    LEAST_EXACT_KV,
    LEAST_EXACT_QUERIES,
    Chunk,
    Limits,
    Part,
    chunks,
    exact_queries,
    seen_requests,
)
from .fused import Ragged, State
from .layer_config import Dims
from .merge import merge_states
from .prefill_inputs import NewTokens
from .slots import gather, slots_of, wider

LEAST_TOKENS = 16  # of query and KV in one step
UNFUSED_QUERIES = 128  # query tokens of a step whose logits are in memory


@dataclass(frozen=True)
class Step:
    """A chunk, where its KV tokens lie, and for each of its attentions what the kernel is told
    beside tensors; one attention has all parts of a batched chunk."""

    chunk: Chunk
    slots: Tensor
    ragged: list[Ragged | None]


@dataclass(frozen=True)
class Steps:
    """All that some requests go through."""

    steps: list[Step]
    whole: bool  # each query token of theirs sees something
    alone: bool  # one attention gives the results of all query tokens of the call
    attention: str  # what computes it


def is_fused(device: torch.device) -> bool:
    """Whether a kernel of torch's does it; else matrix products and a softmax."""
    return device.type == "cuda"


def limits(dims: Dims, dtype: torch.dtype, fuses: bool, workspace_bytes: int) -> Limits:
    """The tokens whose queries, keys, values and results fit. ValueError if hardly any do."""
    size, heads, v = dtype.itemsize, dims.heads, dims.v
    # The memory-efficient attention adds up wide values in float32.
    per_query = heads * (size * (dims.head_dim + v) + 4 * v + 4)
    per_kv = size * (dims.d_qk + heads * (dims.head_dim + v))
    per_pair = 0
    if not fuses:  # operands in float32; logits, probabilities and one more of the size
        per_query += 4 * heads * (dims.head_dim + v)
        per_kv += 4 * heads * (dims.head_dim + v)
        per_pair = 12 * heads
    least = LEAST_TOKENS * (per_query + per_kv + LEAST_TOKENS * per_pair)
    if workspace_bytes < least:
        raise wrong("workspace_bytes", workspace_bytes, f"at least {least}")
    queries = max(LEAST_TOKENS, workspace_bytes // 3 // per_query)
    if per_pair:
        queries = min(queries, UNFUSED_QUERIES)
    while True:
        kv = (workspace_bytes - queries * per_query) // (per_kv + queries * per_pair)
        if kv >= queries or queries == LEAST_TOKENS:
            return Limits(queries, max(kv, LEAST_TOKENS))
        queries = max(LEAST_TOKENS, queries // 2)


def cut_limits(most: Limits, cudnn: bool) -> tuple[Limits, bool]:
    """And whether cuDNN, where it works, computes what it can."""
    if not cudnn or most.queries < LEAST_EXACT_QUERIES or most.kv < LEAST_EXACT_KV:
        return most, False
    unit = 1 << most.kv.bit_length() - 2  # few pieces, whose sizes are powers of two
    return Limits(1 << most.queries.bit_length() - 1, most.kv // unit * unit), True


def prepare(
    dims: Dims,
    dtype: torch.dtype,
    block_table: Tensor,
    pages: tuple[int, int],
    lens: Sequence[int],
    cuts: Sequence[int],
    which: Sequence[int],
    *,
    tokens: int,
    causal: bool,
    workspace_bytes: int,
) -> Steps:
    """Of requests `which`, with KV tokens `lens` and query tokens by `cuts`, of `tokens` in all.

    pages: how many the cache has, and their size.
    """
    device = block_table.device
    cudnn = fused.cudnn_works(device, dtype, dims.head_dim, dims.v)
    most, exact = cut_limits(limits(dims, dtype, is_fused(device), workspace_bytes), cudnn)
    requests = seen_requests(lens, cuts, which, causal)
    made = chunks(requests, most, exact)
    slots = slots_of(made, block_table, pages[1], pages[0]) if made else []
    steps = [Step(c, s, _ragged(c, device)) for c, s in zip(made, slots, strict=True)]
    seen = sum(request.tokens for request in requests)
    names = [_name(part, device) for chunk in made for part in chunk.parts]
    return Steps(
        steps,
        seen == sum(max(cuts[i + 1] - cuts[i], 0) for i in which),
        len(steps) == 1 and len(steps[0].ragged) == 1 and seen == tokens,
        " and ".join(dict.fromkeys(names)),
    )


def _name(part: Part, device: torch.device) -> str:
    if part.exact:
        return fused.CUDNN
    return fused.EFFICIENT if is_fused(device) else fused.PRODUCTS


def _ragged(chunk: Chunk, device: torch.device) -> list[Ragged | None]:
    """Of each attention, where the kernel asks for it."""
    if not is_fused(device):
        return [None] * len(chunk.parts)
    if chunk.batched:
        return [fused.ragged(*zip(*map(_sizes, chunk.parts), strict=True), device)]
    return [
        None if part.exact else fused.ragged(*([size] for size in _sizes(part)), device)
        for part in chunk.parts
    ]


def _sizes(part: Part) -> tuple[int, int]:
    return part.queries.stop - part.queries.start, part.keys.stop - part.keys.start


def attend(new: NewTokens, steps: Steps, scale: float) -> State:
    """Of all query tokens [tokens, h, v] and [tokens, h]; rows of other requests than those that
    `steps` are of are 0 and -inf, or undefined where `steps` are whole. So are rows of theirs that
    see nothing."""
    if steps.alone:
        ((_, state),) = _attentions(new, steps.steps[0], scale)
        return state
    out = new.q_nope.new_empty(*new.q_nope.shape[:2], new.v)
    lse = out.new_empty(out.shape[:2], dtype=torch.float32)
    if not steps.whole:
        out.zero_()
        lse.fill_(-math.inf)
    for step in steps.steps:
        for part, (o, o_lse) in _attentions(new, step, scale):
            rows = part.queries
            if part.begin == 0:
                out[rows], lse[rows] = o, o_lse
            else:
                merge_states(out[rows], lse[rows], o, o_lse, out=out[rows], lse=lse[rows])
    return State(out, lse)


def _attentions(new: NewTokens, step: Step, scale: float) -> Iterator[tuple[Part, State]]:
    """Of a chunk, each of its parts, or one for all."""
    keys, values = _expand(new, step.slots)
    parts = step.chunk.parts
    if step.chunk.batched and is_fused(keys.device):
        queries = slice(parts[0].queries.start, parts[-1].queries.stop)
        parts = [Part(parts[0].request, queries, slice(0, len(keys)), 0, parts[0].causal, False)]
    q, held = None, None
    for part, ragged in zip(parts, step.ragged, strict=True):
        if held != (part.queries, part.exact):
            q = None  # before there is another
            q, held = _queries(new, part), (part.queries, part.exact)
        assert q is not None
        tokens = part.queries.stop - part.queries.start
        many = exact_queries(tokens) if part.exact and part.causal else 0
        own = slice(part.keys.start, max(part.keys.stop, part.keys.start + many))
        o, lse = _attention(q, keys[own], values[own], part, ragged, scale)
        yield part, State(o[:tokens], lse[:tokens])


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, part: Part, ragged: Ragged | None, scale: float
) -> State:
    if part.exact:
        return fused.cudnn(q, keys, values, scale, part.causal)
    if ragged is not None:
        return fused.efficient(q, keys, values, ragged, scale, part.causal)
    return fused.products(q, keys, values, scale, part.causal)


def _queries(new: NewTokens, part: Part) -> Tensor:
    """[n, h, r + nope]; n rounded up for a kernel that is prepared for sizes."""
    q_nope = new.q_nope[part.queries]
    tokens = len(q_nope)
    rows = exact_queries(tokens) if part.exact else tokens
    if new.q_rope is None and rows == tokens:
        return q_nope
    q = q_nope.new_empty(rows, new.heads, new.rope + new.nope)
    q[:tokens, :, new.rope :] = q_nope
    if new.q_rope is not None:
        q[:tokens, :, : new.rope] = new.q_rope[part.queries]
    return q


def _expand(new: NewTokens, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n, h, r + nope] and values [n, h, v] of KV tokens."""
    n, d = len(slots), new.dims
    rows = gather(new.cache, slots)
    rope = rows[:, d.kv_lora :] if new.rope_cache is None else gather(new.rope_cache, slots)
    by_head = rows.new_empty(n, d.heads, d.rope + d.nope + d.v)
    latent = rows[:, : d.kv_lora].expand(d.heads, n, d.kv_lora)
    weights = new.w_kv_b.view(d.heads, d.nope + d.v, d.kv_lora).transpose(1, 2)
    torch.bmm(latent, weights, out=by_head[..., d.rope :].transpose(0, 1))
    if d.rope:
        to, per_token = wider(by_head[..., : d.rope], rope[:, None])
        to.copy_(per_token)
    return by_head[..., : d.head_dim], by_head[..., d.head_dim :]
