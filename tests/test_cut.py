"""The closed form that dispatch reckons with is what the scheduler does with equal lengths."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
from device_plan import Batch, host_schedule
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mla import _mla
from mla.variants import VARIANTS
from schedule_checks import Schedule

WORKERS = 132


class Cut(NamedTuple):
    """EqualCut of src/cut.h."""

    group_size: int
    kv_rows: int
    query_rows: int
    filled_rows: int
    longest: float
    further_items: float
    long_items: bool
    further_parts: float
    partial_rows: float
    busy: float


def cut(*sizes: int) -> Cut:
    return Cut(*_mla.cut(*sizes, WORKERS))


TILES = sorted({(v.block_rows, v.block_n) for v in VARIANTS if not v.on_host})


@settings(deadline=None, max_examples=300)
@given(
    b=st.integers(1, 300),
    h_q=st.sampled_from((1, 5, 16, 40, 64, 96, 128)),
    s_q=st.integers(1, 8),
    length=st.integers(1, 300) | st.integers(1, 20_000),
    tile=st.sampled_from(TILES),
)
@example(b=1, h_q=16, s_q=1, length=1024, tile=(64, 64))  # parts of one item
@example(b=256, h_q=16, s_q=1, length=1024, tile=(64, 64))  # whole items
@example(b=90, h_q=20, s_q=1, length=3, tile=(16, 64))  # nothing is cut
@example(b=10, h_q=128, s_q=7, length=3340, tile=(64, 64))  # groups of seven
@example(b=165, h_q=8, s_q=4, length=107, tile=(64, 64))  # most cuts before an item's tokens
def test_equal_lengths(b: int, h_q: int, s_q: int, length: int, tile: tuple[int, int]) -> None:
    block_rows, block_n = tile
    shape = (block_rows, block_n, False)
    batch = Batch([length] * b, s_q, h_q)
    schedule = Schedule(host_schedule(batch, shape, WORKERS), batch, shape, WORKERS)
    found = cut(b, s_q * h_q, length, block_rows, block_n)
    assert found.group_size == schedule.group_size
    assert found.long_items == (length > block_n)
    assert found.filled_rows == min(s_q * h_q, block_rows)

    tiles, pieces = Counter[int](), Counter[int]()
    for piece in schedule.pieces:
        tiles[piece.worker] += schedule.tiles(piece.last_token - piece.first_token)
        pieces[piece.worker] += 1
    split = {piece.request for piece in schedule.pieces if not (piece.starts and piece.ends)}
    assert bool(found.partial_rows) == bool(split)
    most_tiles, most_pieces = max(tiles.values()), max(pieces.values())
    if not split or most_pieces == 1:  # cuts fall on the ends of items or of parts
        assert found.longest == most_tiles * block_n
        assert found.further_items == most_pieces - 1
    else:  # of the mean group; the last one has less
        first = [worker for worker in tiles if worker % schedule.group_size == 0]
        mean_tiles = sum(tiles[worker] for worker in first) / len(first)
        mean_pieces = sum(pieces[worker] for worker in first) / len(first)
        assert 0.99 * mean_tiles <= found.longest / block_n <= 1.1 * mean_tiles
        assert abs(found.further_items - (mean_pieces - 1)) < 0.5
        partials = sum(
            not (piece.starts and piece.ends)
            for piece in schedule.pieces
            if piece.worker % schedule.group_size == 0
        )
        of_bundle = min(s_q * h_q, schedule.group_size * block_rows)
        assert found.partial_rows / of_bundle == pytest.approx(partials, rel=0.4, abs=4)
    bundles = -(-schedule.row_blocks(0) // schedule.group_size)
    assert found.kv_rows == b * bundles * length
    assert found.query_rows == b * s_q * h_q
    # The last row blocks of a request may leave workers of their group without work.
    assert (
        len(tiles) <= found.busy * WORKERS <= len(tiles) + schedule.group_size * schedule.num_groups
    )


def test_nothing_to_do() -> None:
    nothing = (1, 0, 0, 0, 0, 0, False, 0, 0, 0)
    assert cut(0, 16, 100, 16, 64) == cut(3, 0, 100, 16, 64) == nothing
    assert cut(3, 16, 0, 16, 64).longest == 64  # a request without KV has one tile
