"""Where a request's KV tokens lie in a paged cache, and copies of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import Chunk


def slots_of(
    chunks: Sequence[Chunk], block_table: Tensor, page_size: int, num_pages: int
) -> list[Tensor]:
    """int64 [tokens] of each chunk: page id * page_size + place in the page.

    Page ids are clamped as by `decode`. Tokens that a chunk is filled up by repeat its last one.
    """
    spans = [span for chunk in chunks for span in chunk.spans]
    counts = [span.end - span.begin for span in spans]
    ends: list[int] = []  # of each chunk's spans, counted through
    for chunk in chunks:
        ends.append((ends[-1] if ends else 0) + len(chunk.spans))
        counts[ends[-1] - 1] += chunk.tokens - sum(s.end - s.begin for s in chunk.spans)
    before = [0]
    for count in counts:
        before.append(before[-1] + count)
    facts = [
        (span.request, span.begin - at, span.end - 1, count)
        for span, at, count in zip(spans, before, counts, strict=False)
    ]
    device = block_table.device
    requests, shifts, lasts, repeats = torch.tensor(facts, device=device).T
    owners = torch.repeat_interleave(repeats, output_size=before[-1])
    places = torch.arange(before[-1], device=device) + shifts[owners]
    places = torch.minimum(places, lasts[owners])
    pages = block_table[requests[owners], places // page_size].long().clamp_(0, num_pages - 1)
    slots = pages * page_size + places % page_size
    return list(torch.split(slots, [chunk.tokens for chunk in chunks]))


def gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Rows [n, columns] of a cache [pages, page_size, columns], or with a 1 before the last."""
    if cache.dim() == 4:
        cache = cache[:, :, 0]
    page_size = cache.shape[1]
    (wide,) = _wider(cache)
    if cache.shape[0] == 1 or cache.stride(0) == page_size * cache.stride(1):
        steps = (wide.stride(1), wide.stride(2))
        flat = wide.as_strided((wide.shape[0] * page_size, wide.shape[2]), steps)
        rows = flat.index_select(0, slots)
    else:
        rows = wide[slots // page_size, slots % page_size]
    return rows.view(cache.dtype)


def copy(to: Tensor, rows: Tensor) -> None:
    """Broadcasts rows of the same dtype."""
    wide_to, wide_rows = _wider(to, rows)
    wide_to.copy_(wide_rows)


def _wider(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views in elements of eight bytes, where all tensors have such: torch copies strided tensors
    element by element."""
    try:
        return tuple(x.view(torch.int64) for x in tensors)
    except RuntimeError:  # torch says which size, stride or offset is none of eight bytes
        return tensors
