"""What an un-absorbed attention goes through: every query token sees its KV once, in order."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla import chunks
from mla.chunks import Chunk, Limits, exact_queries


def seen(found: list[Chunk]) -> dict[int, list[tuple[int, int]]]:
    """By query token, the ranges of its request's KV that it sees, in order of the attentions."""
    ranges = defaultdict(list)
    for chunk in found:
        for part in chunk.parts:
            base = part.keys.start - part.begin
            for behind, row in enumerate(range(part.queries.stop - 1, part.queries.start - 1, -1)):
                end = part.keys.stop - (behind if part.causal else 0)
                ranges[row].append((part.request, part.keys.start - base, end - base))
    return ranges


@settings(deadline=None, max_examples=300)
@given(
    lens=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    data=st.data(),
    causal=st.booleans(),
    exact=st.booleans(),
    queries=st.integers(16, 2000),
    kv=st.integers(16, 3000),
)
def test_every_token_sees_its_kv_once(
    lens: list[int], data: st.DataObject, causal: bool, exact: bool, queries: int, kv: int
) -> None:
    new = [data.draw(st.integers(0, n + 20)) for n in lens]
    which = [i for i in range(len(lens)) if data.draw(st.booleans())]
    exact = exact and min(queries, kv) >= chunks.LEAST_EXACT_KV
    cuts = [0, *accumulate(new)]
    found = chunks.chunks(
        chunks.seen_requests(lens, cuts, which, causal), Limits(queries, kv), exact
    )
    ranges = seen(found)
    for i in which:
        for j, row in enumerate(range(cuts[i], cuts[i + 1])):
            end = lens[i] - (new[i] - 1 - j) if causal else lens[i]
            got = ranges.pop(row, [])
            if end <= 0:
                assert not got
                continue
            assert [request for request, _, _ in got] == [i] * len(got)
            assert [begin for _, begin, _ in got] == [0, *(e for _, _, e in got[:-1])]
            assert got[-1][2] == end
    assert not ranges
    for chunk in found:
        check_chunk(chunk, Limits(queries, kv))


def check_chunk(chunk: Chunk, limits: Limits) -> None:
    assert sum(span.end - span.begin for span in chunk.spans) <= chunk.tokens <= limits.kv
    assert chunk.batched == (len({part.request for part in chunk.parts}) > 1)
    for before, part in zip(chunk.parts, chunk.parts[1:], strict=False):
        if chunk.batched:
            assert part.queries.start == before.queries.stop
            assert part.keys.start == before.keys.stop
            assert part.causal == before.causal
    if chunk.batched:
        assert chunk.parts[-1].queries.stop - chunk.parts[0].queries.start <= limits.queries
        assert all(part.begin == 0 for part in chunk.parts)
    for part in chunk.parts:
        tokens, keys = part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
        assert keys > 0
        assert 0 < (exact_queries(tokens) if part.exact else tokens) <= limits.queries
        assert not part.causal or tokens <= keys
        if part.exact and part.causal:
            assert tokens == keys
            assert part.keys.start + exact_queries(keys) <= chunk.tokens
        elif part.exact:
            assert keys & (keys - 1) == 0
            assert keys >= chunks.LEAST_EXACT_KV


def test_sizes_that_kernels_are_prepared_for_are_few() -> None:
    sizes = {exact_queries(tokens) for tokens in range(1, 8193)}
    assert len(sizes) < 30
    for tokens in range(129, 8193):
        assert tokens <= exact_queries(tokens) < tokens * 1.25 + 1
    for tokens in (128, 512, 2048, 4096):
        assert exact_queries(tokens) == tokens


@pytest.mark.parametrize(
    ("past", "sizes"), [(0, [2048]), (4096, [4096, 2048]), (14336, [8192, 4096, 2048, 2048])]
)
def test_prompt_in_steps_of_2048(past: int, sizes: list[int]) -> None:
    """One chunk, and an attention for each power of two."""
    requests = chunks.seen_requests([past + 2048], [0, 2048], [0], True)
    (chunk,) = chunks.chunks(requests, Limits(4096, 32768), exact=True)
    assert [part.keys.stop - part.keys.start for part in chunk.parts] == sizes
    assert all(part.exact for part in chunk.parts)


def test_small_requests_share_a_chunk() -> None:
    requests = chunks.seen_requests([70, 90, 40], [0, 7, 97, 99], [0, 1, 2], True)
    (chunk,) = chunks.chunks(requests, Limits(100, 200), exact=True)
    assert chunk.batched
    assert len(chunk.parts) == 3
    assert len(chunks.chunks(requests, Limits(98, 200), exact=True)) == 2
    assert len(chunks.chunks(requests, Limits(100, 180), exact=True)) == 2
    assert len(chunks.chunks([requests[0], requests[2]], Limits(100, 180), exact=True)) == 2
