"""What un-absorbed requests go through, with all that kernels are told beside tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from .fused import Ragged
from .layer_config import Dims
from .slots import slots_of

LEAST_TOKENS = 16  # of query and KV in one step
UNFUSED_QUERIES = 128  # query tokens of a step whose logits are in memory


class Attention(NamedTuple):
    """Of some query tokens over a part of a chunk, with all that its kernel is told beside tensors;
    one has all parts of a batched chunk."""

    queries: slice | None  # of the whole query; None: all of it
    tokens: int
    rows: int  # tokens, filled up for a kernel that is prepared for sizes
    keys: slice | None  # of the chunk; None: all of it
    first: bool  # of its query tokens: their results are stored, those of others merged into them
    causal: bool
    exact: bool
    ragged: Ragged | None


@dataclass(frozen=True)
class Step:
    """A chunk: where its KV tokens lie, and what attends to them."""

    slots: Tensor
    attentions: list[Attention]


@dataclass(frozen=True)
class Steps:
    """All that some requests go through."""

    steps: list[Step]
    whole: bool  # each query token of theirs sees something
    together: bool  # the first attention is of all query tokens of the call
    kernel: str  # of attentions that are not exact
    attention: str  # what computes all of it


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
    fuses = is_fused(device)
    cudnn = fused.cudnn_works(device, dtype, dims.head_dim, dims.v)
    most, exact = cut_limits(limits(dims, dtype, fuses, workspace_bytes), cudnn)
    requests = seen_requests(lens, cuts, which, causal)
    made = chunks(requests, most, exact)
    slots = slots_of(made, block_table, pages[1], pages[0]) if made else []
    steps = [
        Step(s, [_attention(parts, c.tokens, tokens, device) for parts in _grouped(c, fuses)])
        for c, s in zip(made, slots, strict=True)
    ]
    seen = sum(request.tokens for request in requests)
    kernel = fused.PRODUCTS
    if fuses:
        flash = fused.flash_works(device, dtype, dims.head_dim, dims.v)
        kernel = fused.FLASH if flash else fused.EFFICIENT
    names = [fused.CUDNN if p.exact else kernel for chunk in made for p in chunk.parts]
    return Steps(
        steps,
        seen == sum(max(cuts[i + 1] - cuts[i], 0) for i in which),
        bool(steps) and steps[0].attentions[0].queries is None,
        kernel,
        " and ".join(dict.fromkeys(names)),
    )


def _grouped(chunk: Chunk, fuses: bool) -> list[list[Part]]:
    """Parts that one attention has."""
    return [chunk.parts] if chunk.batched and fuses else [[part] for part in chunk.parts]


def _attention(parts: Sequence[Part], chunk: int, tokens: int, device: torch.device) -> Attention:
    """Of neighbours in a chunk of so many KV tokens, and of a call of so many query tokens."""
    first, last = parts[0], parts[-1]
    begin, end = first.queries.start, last.queries.stop
    rows = exact_queries(end - begin) if first.exact else end - begin
    keys = slice(first.keys.start, last.keys.stop)
    if first.exact and first.causal:
        keys = slice(keys.start, max(keys.stop, keys.start + rows))
    elif len(parts) > 1:
        keys = slice(0, chunk)
    return Attention(
        None if end - begin == tokens else slice(begin, end),
        end - begin,
        rows,
        None if (keys.start, keys.stop) == (0, chunk) else keys,
        first.begin == 0,
        first.causal,
        first.exact,
        None if first.exact or not is_fused(device) else _ragged(parts, device),
    )


def _ragged(parts: Sequence[Part], device: torch.device) -> Ragged:
    queries = [part.queries.stop - part.queries.start for part in parts]
    keys = [part.keys.stop - part.keys.start for part in parts]
    return fused.ragged(queries, keys, device)
