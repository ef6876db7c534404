"""What an un-absorbed attention goes through: chunks of KV, and the attentions over each.

Host arithmetic alone. A chunk is what keys and values are made of at one time; an attention is of
some query tokens over a part of a chunk. Results of a query token are merged in the order of their
KV, so the first of them begins with token 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# cuDNN prepares once for each size, so it gets few: query tokens in steps of a fourth to an eighth,
# and powers of two of KV tokens. What is left of the KV goes to another kernel.
LEAST_EXACT_QUERIES = 128
LEAST_EXACT_KV = 256
# Products of 5 to 31 rows take longer than those of 32.
FILLED_TOKENS, UNFILLED_TOKENS = 32, 4


class Span(NamedTuple):
    """KV tokens begin to end of a request."""

    request: int
    begin: int
    end: int


class Part(NamedTuple):
    """An attention, of one request."""

    request: int
    queries: slice  # of the whole query
    keys: slice  # of the chunk
    begin: int  # of its KV tokens in the request
    causal: bool  # its last query sees all its keys, each one before it one fewer
    exact: bool  # for a kernel that is prepared for its sizes; causal: as many keys as queries


class Chunk(NamedTuple):
    spans: list[Span]
    parts: list[Part]
    tokens: int  # of all spans, and those that the last is filled up by

    @property
    def batched(self) -> bool:
        """Its parts are of requests of their own, whose queries follow one another."""
        return len(self.spans) > 1


class Request(NamedTuple):
    """Query tokens that see something, and their KV."""

    number: int
    rows: slice  # of the whole query
    past: int  # KV tokens that all of them see
    length: int  # of the KV; from `past` on, each sees one more

    @property
    def tokens(self) -> int:
        tokens: int = self.rows.stop - self.rows.start
        return tokens


class Limits(NamedTuple):
    """Of the tokens that a chunk, and an attention, may have."""

    queries: int
    kv: int


def seen_requests(
    lens: Sequence[int], cuts: Sequence[int], which: Sequence[int], causal: bool
) -> list[Request]:
    """Those that have query tokens and KV, without query tokens that stand before all KV."""
    found = []
    for i in which:
        begin, end = cuts[i], max(cuts[i], cuts[i + 1])
        if causal:
            begin = max(begin, end - lens[i])
        if lens[i] > 0 and begin < end:
            past = lens[i] - (end - begin) if causal else lens[i]
            found.append(Request(i, slice(begin, end), past, lens[i]))
    return found


def exact_queries(tokens: int) -> int:
    """`tokens`, rounded up to a size that kernels are prepared for."""
    step: int = max(1 << max(tokens - 1, 0).bit_length() >> 3, LEAST_EXACT_QUERIES >> 2)
    return max(-(-tokens // step) * step, LEAST_EXACT_QUERIES)


def chunks(requests: Sequence[Request], limits: Limits, exact: bool) -> list[Chunk]:
    """exact: whether there is a kernel that is prepared for sizes, for requests with enough query
    tokens; others share chunks where they fit."""
    found: list[Chunk] = []
    few: list[Request] = []
    for request in requests:
        alone = exact and request.tokens >= LEAST_EXACT_QUERIES
        if alone or request.tokens > limits.queries or request.length > limits.kv:
            found += [*_shared(few, limits), *_alone(request, limits, alone)]
            few = []
        elif few and not _fits(few, request, limits):
            found += _shared(few, limits)
            few = [request]
        else:
            few.append(request)
    return [*found, *_shared(few, limits)]


def _fits(few: Sequence[Request], request: Request, limits: Limits) -> bool:
    last = few[-1]
    return (
        last.rows.stop == request.rows.start
        and (last.past < last.length) == (request.past < request.length)
        and request.rows.stop - few[0].rows.start <= limits.queries
        and sum(r.length for r in few) + request.length <= limits.kv
    )


def _shared(few: Sequence[Request], limits: Limits) -> Iterator[Chunk]:
    """Nothing, or one chunk with all KV of some requests."""
    if not few:
        return
    spans, parts, at = [], [], 0
    for r in few:
        spans.append(Span(r.number, 0, r.length))
        keys = slice(at, at + r.length)
        parts.append(Part(r.number, r.rows, keys, 0, r.past < r.length, False))
        at += r.length
    if at > UNFILLED_TOKENS:
        at = max(at, min(FILLED_TOKENS, limits.kv))
    yield Chunk(spans, parts, at)


def _alone(r: Request, limits: Limits, exact: bool) -> Iterator[Chunk]:
    """Chunks end where the new tokens begin, unless all that is left fits. Among these, a chunk is
    a triangle for its own query tokens and whole for later ones."""
    most = limits.queries
    if exact:  # no more than fit when rounded up
        most = min(limits)
        while exact_queries(most) > min(limits):
            most -= LEAST_EXACT_QUERIES >> 2
    among_new = min(most, limits.kv)
    begin = 0
    while begin < r.length:
        left = exact_queries(r.tokens) - r.tokens if exact else 0
        if r.length - begin + left <= limits.kv and r.tokens <= among_new:
            end = r.length
        elif begin < r.past:
            end = min(begin + limits.kv, r.past)
        else:
            end = min(begin + among_new, r.length)
        parts = list(_parts(r, begin, end, most, exact))
        last = max(part.keys.start + _keys_read(part) for part in parts)
        yield Chunk([Span(r.number, begin, end)], parts, last)
        begin = end


def _keys_read(part: Part) -> int:
    size = part.keys.stop - part.keys.start
    return exact_queries(size) if part.exact and part.causal else size


def _parts(r: Request, begin: int, end: int, most: int, exact: bool) -> Iterator[Part]:
    """Of KV tokens begin to end: of those that all query tokens see, then of the triangle."""
    own = max(begin, r.past)  # where the triangle begins
    first, behind = own - r.past, max(end - r.past, 0)  # its query tokens
    if not exact and behind and r.tokens <= most and end == r.length and begin <= r.past:
        yield _part(r, 0, r.tokens, begin, begin, end, causal=True)
        return
    if begin < r.past:
        yield from _whole(r, 0, begin, begin, min(end, r.past), most, exact)
    if end > r.past:
        yield _part(r, first, behind, begin, own, end, causal=True, exact=exact)
        yield from _whole(r, behind, begin, own, end, most, exact)


def _whole(
    r: Request, first: int, base: int, begin: int, end: int, most: int, exact: bool
) -> Iterator[Part]:
    """KV tokens that query tokens from `first` on see without exception."""
    for at in range(first, r.tokens, most):
        to, here = min(at + most, r.tokens), begin
        while exact and end - here >= LEAST_EXACT_KV:
            size = 1 << (end - here).bit_length() - 1
            yield _part(r, at, to, base, here, here + size, exact=True)
            here += size
        if here < end:
            yield _part(r, at, to, base, here, end)


def _part(
    r: Request, first: int, last: int, base: int, begin: int, end: int, *, causal: bool = False,
    exact: bool = False,
) -> Part:  # fmt: skip
    rows = slice(r.rows.start + first, r.rows.start + last)
    return Part(r.number, rows, slice(begin - base, end - base), begin, causal, exact)
