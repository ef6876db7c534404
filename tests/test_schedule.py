"""The split-KV schedules (kernels/common/schedule.h, parts.h) on the host: once, and evenly."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from cases import single_tiles_beside_long_pieces
from device_plan import Batch, host_schedule
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mla import _mla
from schedule_checks import MIN_GROUP_TOKENS, Piece, Schedule

MAX_LEN = 1 << 20
MODES = [False, True]
both_modes = pytest.mark.parametrize("batch_invariant", MODES, ids=["free", "batch_invariant"])

cheap = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def check(
    seq_lens: list[int],
    q_lens: int | list[int] = 1,
    *,
    batch_invariant: bool = False,
    h_q: int = 16,
    block_rows: int = 16,
    block_n: int = 32,
    merges_pairs: bool = True,
    num_workers: int = 132,
) -> Schedule:
    batch, shape = Batch(seq_lens, q_lens, h_q, MAX_LEN), (block_rows, block_n, merges_pairs)
    made = host_schedule(batch, shape, num_workers, batch_invariant)
    schedule = Schedule(made, batch, shape, num_workers, batch_invariant)
    schedule.check()
    return schedule


# Lengths that fall on and beside the edges of tiles, and very long and very short ones.
lengths = st.one_of(
    st.integers(0, 3),
    st.integers(0, 300),
    st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]),
    st.sampled_from([1023, 1024, 1025, 1152, 1153, 2047, 2048, 2049, 4096, 16_384, 16_385]),
    st.integers(0, 20_000),
    st.integers(500_000, 1_000_000),
)
tiles = st.fixed_dictionaries(
    {
        "h_q": st.sampled_from([1, 6, 12, 16, 20, 40, 64, 96, 128]),
        "block_rows": st.sampled_from([16, 32, 64]),
        "block_n": st.sampled_from([16, 32, 64]),
        "merges_pairs": st.booleans(),
        "num_workers": st.sampled_from([1, 2, 3, 7, 8, 82, 108, 132]),
    }
)


@both_modes
@cheap
@given(st.lists(lengths, max_size=40), st.integers(0, 9), tiles)
@example([0], 1, {"num_workers": 1})
@example([], 1, {})
@example([1_000_000], 1, {"h_q": 128})
@example([0] * 300, 2, {"h_q": 40})
@example([1_000_000] + [1] * 255, 1, {"h_q": 16})
@example([1] * 255 + [1_000_000], 1, {"h_q": 128, "block_rows": 64})
@example([-5, 2_000_000_000, 7], 1, {})
def test_uniform_queries(
    batch_invariant: bool, seq_lens: list[int], s_q: int, tile: dict[str, int]
) -> None:
    check(seq_lens, s_q, batch_invariant=batch_invariant, **tile)


@both_modes
@cheap
@given(st.lists(st.tuples(lengths, st.integers(0, 20)), max_size=30), tiles)
@example([(100, 0), (5000, 3), (0, 0), (77, 0)], {})
@example([(100, 0)] * 5, {})
@example([(0, 0), (0, 1), (1_000_000, 0), (0, 300)], {"h_q": 128})
@example([(64, 1)] * 40 + [(1_000_000, 200)], {"h_q": 20})
def test_ragged_queries(
    batch_invariant: bool, requests: list[tuple[int, int]], tile: dict[str, int]
) -> None:
    seq_lens, tokens = [length for length, _ in requests], [tokens for _, tokens in requests]
    check(seq_lens, tokens, batch_invariant=batch_invariant, **tile)


@both_modes
@pytest.mark.parametrize("h_q", [16, 128])
def test_many_tiny_requests(h_q: int, batch_invariant: bool) -> None:
    schedule = check([1] * 4096, h_q=h_q, batch_invariant=batch_invariant)
    assert len(schedule.splits) < schedule.num_groups


@both_modes
@pytest.mark.parametrize("seq_lens", [[10**6] + [3] * 4095, [3] * 4095 + [10**6], [0] * 4096])
def test_up_to_4096_requests(seq_lens: list[int], batch_invariant: bool) -> None:
    check(seq_lens, h_q=128, block_rows=64, block_n=64, batch_invariant=batch_invariant)


def test_a_request_of_a_million_tokens_uses_every_worker() -> None:
    schedule = check([1_000_000])
    assert {piece.worker for piece in schedule.pieces} == set(range(132))


def test_a_short_request_is_not_split() -> None:
    schedule = check([MIN_GROUP_TOKENS])
    assert len(schedule.pieces) == 1
    assert schedule.splits == []


@pytest.mark.parametrize(("b", "length", "tiles"), [(1, 1024, 2), (8, 4096, 4), (16, 8192, 16)])
def test_parts_of_equal_requests_are_equal(b: int, length: int, tiles: int) -> None:
    schedule = check([length] * b, block_rows=64, block_n=64)
    assert {piece.last_token - piece.first_token for piece in schedule.pieces} == {tiles * 64}
    assert len({piece.worker for piece in schedule.pieces}) == len(schedule.pieces)


def test_row_blocks_of_a_request_read_its_kv_together() -> None:
    schedule = check([100_000], h_q=128, block_rows=16, num_workers=128)
    assert schedule.group_size == 8


class TestBatchInvariant:
    @cheap
    @given(
        lengths,
        st.integers(1, 9),
        st.lists(st.tuples(lengths, st.integers(0, 9)), max_size=20),
        st.integers(0, 20),
        tiles,
    )
    def test_a_request_is_cut_alike_in_every_batch(
        self,
        length: int,
        tokens: int,
        others: list[tuple[int, int]],
        position: int,
        tile: dict[str, int],
    ) -> None:
        """Alone, uniform or ragged, on any number of workers, and at any place among others."""
        requests = [*others[:position], (length, tokens), *others[position:]]
        at = min(position, len(others))
        alone = check([length], tokens, batch_invariant=True, **tile | {"num_workers": 132})
        ragged = check([length], [tokens], batch_invariant=True, **tile)
        among = check(*map(list, zip(*requests, strict=True)), batch_invariant=True, **tile)
        want = {block: cuts for (_, block), cuts in alone.cuts().items()}
        assert {block: cuts for (_, block), cuts in ragged.cuts().items()} == want
        assert {block: cuts for (i, block), cuts in among.cuts().items() if i == at} == want

    @pytest.mark.parametrize(("length", "parts"), [(1024, 1), (1025, 2), (4096, 4), (131072, 43)])
    def test_parts_of_one_row_block(self, length: int, parts: int) -> None:
        assert len(check([length], batch_invariant=True).pieces) == parts

    @pytest.mark.parametrize(
        ("length", "row_blocks", "longest"),
        [(1536, 2, 1536), (4096, 2, 1536), (8192, 2, 2048), (16384, 2, 2048), (8192, 4, 4096)],
    )
    def test_parts_of_several_row_blocks(self, length: int, row_blocks: int, longest: int) -> None:
        pieces = check([length], h_q=16 * row_blocks, batch_invariant=True).pieces
        assert max(piece.last_token - piece.first_token for piece in pieces) == longest

    def test_equal_parts_of_an_item_stay_together(self) -> None:
        """A worker that has several computes them one after the other: Q stays."""
        schedule = check([4096] * 128, block_rows=64, block_n=64, batch_invariant=True)
        found: dict[int, list[int]] = {}
        for piece in schedule.pieces:
            found.setdefault(piece.worker, []).append(piece.request)
        changes = sum(a != b for of in found.values() for a, b in pairwise(of))
        assert changes <= 8

    def test_unequal_requests_are_level(self) -> None:
        """Where lengths differ, no worker has much more than an even share of the tokens."""
        rng = random.Random(0)
        lens = [rng.randrange(512, 8192) for _ in range(128)]
        schedule = check(lens, block_rows=64, block_n=64, batch_invariant=True)
        load = [0] * 132
        for piece in schedule.pieces:
            load[piece.worker] += piece.last_token - piece.first_token
        assert max(load) * 132 / sum(lens) <= 1.05

    def test_a_long_request_has_many_parts_and_never_more_than_a_bound(self) -> None:
        for row_blocks in (1, 2, 4):
            h_q = 16 * row_blocks
            pieces = check([1_000_000], h_q=h_q, batch_invariant=True).pieces
            assert 48 <= len(pieces) <= 64 + row_blocks

    @pytest.mark.parametrize("b", [16, 17, 24, 33, 64, 100, 128, 150, 256])
    @pytest.mark.parametrize("length", [4096, 8192, 32768, 131072])
    def test_large_batches_are_level(self, b: int, length: int) -> None:
        """Of equal requests with one row block: what the busiest worker computes, against even."""
        schedule = check([length] * b, block_rows=64, block_n=64, batch_invariant=True)
        load = [0] * 132
        for piece in schedule.pieces:
            load[piece.worker] += piece.last_token - piece.first_token
        assert max(load) * 132 / (b * length) <= LEVEL[length]


# The most that test_large_batches_are_level finds.
LEVEL = {4096: 2.07, 8192: 1.95, 32768: 1.17, 131072: 1.17}


@both_modes
@cheap
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=12), st.integers(0, 50))
def test_nonsense_in_cu_seqlens_q_stays_inside_the_query(
    batch_invariant: bool, cu_seqlens_q: list[int], total_q: int
) -> None:
    seq_lens = [1000] * (len(cu_seqlens_q) - 1)
    sizes = (1, total_q, 16, MAX_LEN, 16, 32, True, 132)
    try:
        made = _mla.schedule(seq_lens, cu_seqlens_q, *sizes, batch_invariant)
    except ValueError:  # makes more pieces than a plan has room for
        return
    for piece in map(Piece._make, made["pieces"]):
        assert 0 <= piece.request < len(seq_lens)
        assert 0 <= piece.row_block < total_q


def test_bad_arguments() -> None:
    sizes: Any = (1, 1, 16, MAX_LEN, 16, 32, True)
    with pytest.raises(ValueError, match="one element more"):
        _mla.schedule([1, 2], [0, 1], *sizes, 132)
    with pytest.raises(ValueError, match="must be positive"):
        _mla.schedule([1], None, *sizes, 0)


@pytest.mark.parametrize("num_workers", [66, 78, 82, 108, 114, 132, 144])
def test_there_are_single_tiles_beside_long_pieces(num_workers: int) -> None:
    """So that the GPU's test of them tests something."""
    lens = list(single_tiles_beside_long_pieces(num_workers))
    schedule = check(lens, block_n=64, num_workers=num_workers)
    of_workers: dict[int, list[int]] = {}
    for piece in schedule.pieces:
        tiles = schedule.tiles(piece.last_token - piece.first_token)
        of_workers.setdefault(piece.worker, []).append(tiles)
    assert any(tiles[0] == 1 and tiles[-1] >= 12 for tiles in of_workers.values() if tiles[1:])
