"""The split-KV schedule (kernels/common/schedule.h) on the host: work is done once, and evenly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mla import _mla

MAX_LEN = 1 << 20
ITEM_OVERHEAD_TOKENS, MIN_GROUP_TOKENS = _mla.ITEM_OVERHEAD_TOKENS, _mla.MIN_GROUP_TOKENS
ALIGNMENT_SHARE, MAX_GROUP_SIZE = 64, 8  # of schedule.h

cheap = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


class Piece(NamedTuple):
    worker: int
    request: int
    row_block: int
    first_token: int
    last_token: int
    starts: bool
    ends: bool
    slot: int


class Split(NamedTuple):
    request: int
    bundle: int
    first_group: int
    last_group: int


@dataclass
class Batch:
    """What a schedule is made for. Request i has tokens[i] query tokens, or `s_q` of them."""

    seq_lens: Sequence[int]
    s_q: int = 1
    h_q: int = 16
    block_rows: int = 16
    block_n: int = 32
    num_workers: int = 132
    tokens: Sequence[int] | None = None

    def cu_seqlens_q(self) -> list[int] | None:
        if self.tokens is None:
            return None
        return [sum(self.tokens[:i]) for i in range(len(self.tokens) + 1)]

    def length(self, request: int) -> int:
        return min(max(self.seq_lens[request], 0), MAX_LEN)

    def row_blocks(self, request: int) -> int:
        tokens = self.s_q if self.tokens is None else self.tokens[request]
        return -(-tokens * self.h_q // self.block_rows)

    def tiles(self, tokens: int) -> int:
        return -(-tokens // self.block_n)


class Schedule:
    """The schedule of a batch, as the kernels would walk it."""

    def __init__(self, batch: Batch) -> None:
        total_q = sum(batch.tokens) if batch.tokens is not None else len(batch.seq_lens) * batch.s_q
        made = _mla.schedule(
            seq_lens=list(batch.seq_lens),
            cu_seqlens_q=batch.cu_seqlens_q(),
            s_q=batch.s_q,
            total_q=total_q,
            h_q=batch.h_q,
            max_len=MAX_LEN,
            block_rows=batch.block_rows,
            block_n=batch.block_n,
            num_workers=batch.num_workers,
        )
        self.units_per_group: int = made["units_per_group"]
        self.num_groups: int = made["num_groups"]
        self.group_size: int = made["group_size"]
        self.pieces = [Piece(*piece) for piece in made["pieces"]]
        self.splits = [Split(*split) for split in made["splits"]]

    def group(self, piece: Piece) -> int:
        return piece.worker // self.group_size

    def member(self, piece: Piece) -> int:
        return piece.worker % self.group_size


def check_coverage(batch: Batch, schedule: Schedule) -> None:
    """Every token of every row block of every request once; nothing else."""
    pieces_of: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in schedule.pieces:
        pieces_of[piece.request, piece.row_block].append(piece)
    requests = range(len(batch.seq_lens))
    wanted = {(i, block) for i in requests for block in range(batch.row_blocks(i))}
    assert set(pieces_of) == wanted
    for (request, _), pieces in pieces_of.items():
        length = batch.length(request)
        pieces.sort(key=lambda piece: piece.first_token)
        assert pieces[0].first_token == 0
        assert pieces[-1].last_token == length
        assert all(a.last_token == b.first_token for a, b in pairwise(pieces))
        assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        if length == 0:
            assert len(pieces) == 1
        else:
            assert all(piece.first_token < piece.last_token for piece in pieces)
        assert all(piece.first_token % batch.block_n == 0 for piece in pieces)


def check_groups(batch: Batch, schedule: Schedule) -> None:
    """Workers of a group read the same KV, and no group has more than its share."""
    size = schedule.group_size
    assert 1 <= size <= MAX_GROUP_SIZE
    assert schedule.num_groups * size <= batch.num_workers
    load: dict[int, int] = defaultdict(int)
    ranges: dict[tuple[int, int, int], tuple[int, int]] = {}
    for piece in schedule.pieces:
        assert 0 <= piece.worker < schedule.num_groups * size
        assert piece.row_block % size == schedule.member(piece)
        load[piece.worker] += max(batch.tiles(piece.last_token - piece.first_token), 1)
        key = (schedule.group(piece), piece.request, piece.row_block // size)
        tokens = (piece.first_token, piece.last_token)
        assert ranges.setdefault(key, tokens) == tokens
    assert all(units <= schedule.units_per_group for units in load.values())


def total_units(batch: Batch, group_size: int) -> int:
    """The cost of a batch in bundles of `group_size` row blocks, by schedule.h's rule."""
    overhead = batch.tiles(ITEM_OVERHEAD_TOKENS)
    return sum(
        -(-batch.row_blocks(i) // group_size) * (overhead + max(batch.tiles(batch.length(i)), 1))
        for i in range(len(batch.seq_lens))
    )


def check_balance(batch: Batch, schedule: Schedule) -> None:
    """No group has much more than an even share, and no other group size would make that smaller.

    Items of one length may be cut where they end, if that costs little: no group then has the end
    of one item and the beginning of another.
    """
    overhead = batch.tiles(ITEM_OVERHEAD_TOKENS)
    least = batch.tiles(ITEM_OVERHEAD_TOKENS) + batch.tiles(MIN_GROUP_TOKENS)

    def share(size: int) -> int:
        return -(-total_units(batch, size) // (batch.num_workers // size))

    blocks = max([batch.row_blocks(i) for i in range(len(batch.seq_lens))], default=0)
    sizes = range(1, max(1, min(MAX_GROUP_SIZE, blocks, batch.num_workers)) + 1)
    assert share(schedule.group_size) == min(share(size) for size in sizes)
    even = max(share(schedule.group_size), least)
    units = total_units(batch, schedule.group_size)
    rows = [i for i in range(len(batch.seq_lens)) if batch.row_blocks(i)]
    if len({max(batch.tiles(batch.length(i)), 1) for i in rows}) != 1:
        assert schedule.units_per_group == even
        assert schedule.num_groups == -(-units // even)
    elif schedule.units_per_group != even:
        assert schedule.units_per_group <= even + even // ALIGNMENT_SHARE + overhead
        assert schedule.num_groups <= batch.num_workers // schedule.group_size
        for group in {schedule.group(piece) for piece in schedule.pieces}:
            pieces = {
                (piece.request, piece.row_block // schedule.group_size, piece.slot >= 0)
                for piece in schedule.pieces
                if schedule.group(piece) == group
            }
            assert len(pieces) == 1 or not any(partial for *_, partial in pieces)


def check_splits(batch: Batch, schedule: Schedule) -> None:
    """What combine reads by the splits is what workers leave, each piece in a slot of its own."""
    partial = [piece for piece in schedule.pieces if not (piece.starts and piece.ends)]
    assert all((piece.slot == -1) == (piece.starts and piece.ends) for piece in schedule.pieces)
    slots = [piece.slot for piece in partial]
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < 2 * batch.num_workers for slot in slots)

    size = schedule.group_size
    assert len(schedule.splits) <= batch.num_workers
    left: dict[tuple[int, int], dict[int, int]] = defaultdict(
        dict
    )  # (request, row block): {group: slot}
    for piece in partial:
        left[piece.request, piece.row_block][schedule.group(piece)] = piece.slot
    read: dict[tuple[int, int], dict[int, int]] = {}
    for split in schedule.splits:
        assert split.first_group < split.last_group
        for member in range(size):
            row_block = split.bundle * size + member
            if row_block >= batch.row_blocks(split.request):
                continue
            assert (split.request, row_block) not in read
            read[split.request, row_block] = {
                group: (2 * group + (group == split.first_group)) * size + member
                for group in range(split.first_group, split.last_group + 1)
            }
    assert read == dict(left)


def check(batch: Batch) -> Schedule:
    schedule = Schedule(batch)
    check_coverage(batch, schedule)
    check_groups(batch, schedule)
    check_balance(batch, schedule)
    check_splits(batch, schedule)
    return schedule


# Lengths that fall on and beside the edges of tiles, and very long and very short ones.
lengths = st.one_of(
    st.integers(0, 3),
    st.integers(0, 300),
    st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]),
    st.integers(0, 20_000),
    st.integers(500_000, 1_000_000),
)
tiles = st.fixed_dictionaries(
    {
        "h_q": st.sampled_from([1, 6, 12, 16, 20, 40, 64, 96, 128]),
        "block_rows": st.sampled_from([16, 32, 64]),
        "block_n": st.sampled_from([16, 32, 64]),
        "num_workers": st.sampled_from([1, 2, 3, 7, 8, 82, 108, 132]),
    }
)


@cheap
@given(st.lists(lengths, max_size=40), st.integers(0, 9), tiles)
@example([0], 1, {"num_workers": 1})
@example([], 1, {})
@example([1_000_000], 1, {"h_q": 128})
@example([0] * 300, 2, {"h_q": 40})
@example([1_000_000] + [1] * 255, 1, {"h_q": 16})
@example([1] * 255 + [1_000_000], 1, {"h_q": 128, "block_rows": 64})
@example([-5, 2_000_000_000, 7], 1, {})
def test_uniform_queries(seq_lens: list[int], s_q: int, tile: dict[str, int]) -> None:
    check(Batch(seq_lens, s_q=s_q, **tile))


@cheap
@given(st.lists(st.tuples(lengths, st.integers(0, 20)), max_size=30), tiles)
@example([(100, 0), (5000, 3), (0, 0), (77, 0)], {})
@example([(100, 0)] * 5, {})
@example([(0, 0), (0, 1), (1_000_000, 0), (0, 300)], {"h_q": 128})
@example([(64, 1)] * 40 + [(1_000_000, 200)], {"h_q": 20})
def test_ragged_queries(requests: list[tuple[int, int]], tile: dict[str, int]) -> None:
    seq_lens = [length for length, _ in requests]
    check(Batch(seq_lens, tokens=[tokens for _, tokens in requests], **tile))


@pytest.mark.parametrize("h_q", [16, 128])
def test_many_tiny_requests(h_q: int) -> None:
    schedule = check(Batch([1] * 4096, h_q=h_q))
    assert len(schedule.splits) < schedule.num_groups


def test_a_request_of_a_million_tokens_uses_every_worker() -> None:
    schedule = check(Batch([1_000_000]))
    assert {piece.worker for piece in schedule.pieces} == set(range(132))


def test_a_short_request_is_not_split() -> None:
    schedule = check(Batch([MIN_GROUP_TOKENS]))
    assert len(schedule.pieces) == 1
    assert schedule.splits == []


def test_row_blocks_of_a_request_read_its_kv_together() -> None:
    schedule = check(Batch([100_000], h_q=128, block_rows=16, num_workers=128))
    assert schedule.group_size == 8


@cheap
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=12), st.integers(0, 50))
def test_nonsense_in_cu_seqlens_q_stays_inside_the_query(
    cu_seqlens_q: list[int], total_q: int
) -> None:
    seq_lens = [1000] * (len(cu_seqlens_q) - 1)
    try:
        made = _mla.schedule(seq_lens, cu_seqlens_q, 1, total_q, 16, MAX_LEN, 16, 32, 132)
    except ValueError:  # makes more pieces than a plan has room for
        return
    for piece in map(Piece._make, made["pieces"]):
        assert 0 <= piece.request < len(seq_lens)
        assert 0 <= piece.row_block < total_q


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="one element more"):
        _mla.schedule([1, 2], [0, 1], 1, 1, 16, MAX_LEN, 16, 32, 132)
    with pytest.raises(ValueError, match="must be positive"):
        _mla.schedule([1], None, 1, 1, 16, MAX_LEN, 16, 32, 0)
