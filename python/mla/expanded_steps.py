"""What un-absorbed requests go through, with all that kernels are told beside tensors."""

from __future__ import annotations

from collections.abc import Sequence
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
    seen_requests,
)
from .fused import Ragged
from .layer_config import Dims
from .slots import slots_of

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
    cudnn = fused.cudnn_works(device, dtype, dims.head_dim, dims.v)
    most, exact = cut_limits(limits(dims, dtype, is_fused(device), workspace_bytes), cudnn)
    requests = seen_requests(lens, cuts, which, causal)
    made = chunks(requests, most, exact)
    slots = slots_of(made, block_table, pages[1], pages[0]) if made else []
    steps = [Step(c, s, _ragged(c, device)) for c, s in zip(made, slots, strict=True)]
    seen = sum(request.tokens for request in requests)
    kernel = fused.PRODUCTS
    if is_fused(device):
        flash = fused.flash_works(device, dtype, dims.head_dim, dims.v)
        kernel = fused.FLASH if flash else fused.EFFICIENT
    names = [fused.CUDNN if p.exact else kernel for chunk in made for p in chunk.parts]
    return Steps(
        steps,
        seen == sum(max(cuts[i + 1] - cuts[i], 0) for i in which),
        len(steps) == 1 and len(steps[0].ragged) == 1 and seen == tokens,
        kernel,
        " and ".join(dict.fromkeys(names)),
    )


def _ragged(chunk: Chunk, device: torch.device) -> list[Ragged | None]:
    """Of each attention, where the kernel asks for it."""
    if not is_fused(device):
        return [None] * len(chunk.parts)
    if chunk.batched:
        return [_ragged_of(chunk.parts, device)]
    return [None if part.exact else _ragged_of([part], device) for part in chunk.parts]


def _ragged_of(parts: Sequence[Part], device: torch.device) -> Ragged:
    queries, keys = zip(*map(_sizes, parts), strict=True)
    return fused.ragged(queries, keys, device)


def _sizes(part: Part) -> tuple[int, int]:
    return part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
