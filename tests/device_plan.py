"""Batches, and the plans that the planners of kernels/common write for them, held to the host's.

A plan is read here as its int32 words, wherever it was made.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from mla import _mla

Shape = tuple[int, int, bool]  # block_rows, block_n, merges_pairs
SHAPES: dict[Shape, str] = {  # and a variant that has it
    (row["block_rows"], row["block_n"], row["merges_pairs"]): row["name"]
    for row in _mla.variants()
    if row["targets"] != "host"
}
MAX_GROUP_SIZE = 8  # of schedule.h
MERGES_FIRST, LEAVES_LAST = 1, 2  # of params.h
PART_TOKENS, PARTS_OF_SHORT, MAX_PARTS = 1024, 8, 64  # of parts.h


@dataclass(frozen=True)
class Batch:
    seq_lens: Sequence[int]
    q_lens: int | Sequence[int] = 1
    h_q: int = 16
    max_len: int = 2**31 - 1
    cuts: Sequence[int] | None = None  # what cu_seqlens_q holds, if not the sums of q_lens

    @cached_property
    def cu_seqlens_q(self) -> list[int] | None:
        if self.cuts is not None:
            return list(self.cuts)
        return None if isinstance(self.q_lens, int) else [0, *accumulate(self.q_lens)]

    @property
    def s_q(self) -> int:
        return self.q_lens if isinstance(self.q_lens, int) else 0

    @cached_property
    def total_q(self) -> int:
        if isinstance(self.q_lens, int):
            return self.q_lens * len(self.seq_lens)
        return sum(self.q_lens)

    def length(self, request: int) -> int:
        return min(max(self.seq_lens[request], 0), self.max_len, _mla.MAX_LEN)

    def tokens(self, request: int) -> tuple[int, int]:
        """A request's first query token and how many it has: what cu_seqlens_q says, clamped."""
        if isinstance(self.q_lens, int):
            return 0, self.q_lens
        cuts = self.cu_seqlens_q
        assert cuts is not None
        first = min(max(cuts[request], 0), self.total_q)
        return first, min(max(cuts[request + 1], first), self.total_q) - first


# Overlapping ranges, which can make more pieces than a plan has room for. The first batch does so
# where workers are not grouped, as 7 are not, the second with any number of workers.
OVERLAPPING = {
    "nonsense": Batch(
        [1072, 225, 8, 1470, 822, 2578, 875],
        q_lens=[5, 4, 4, 5, 4, 4, 4],
        h_q=128,
        cuts=[13, 12, 14, 5, 20, 5, 3, 29],
    ),
    "all or nothing": Batch(
        [300, 65, 0, 128] * 32,
        q_lens=[30] + [0] * 127,
        h_q=128,
        cuts=[0, 30] * 64 + [0],
    ),
}


# Too many for a batch-invariant plan: pieces, and partial results in tiles of 64 rows.
OVERLAPPING_PIECES = replace(OVERLAPPING["all or nothing"], max_len=1000)
OVERLAPPING_PARTIALS = Batch(
    [11_000] * 279,
    q_lens=[30] + [0] * 278,
    h_q=128,
    max_len=11_000,
    cuts=[0, 5, 10, 15, 20, 25, 30] * 40,
)


def batches() -> list[Batch]:
    rng = random.Random(0)
    found = [
        Batch([0]),
        Batch([1]),
        Batch([0] * 40),
        Batch([129] * 3),
        Batch([100_000]),
        Batch([2**31 - 100]),
        Batch([8192] * 128, h_q=128),
        Batch([-5, 3, 10**6], max_len=4096),
        Batch([700, 50, 9000], q_lens=[0, 0, 3]),
        Batch([700, 50, 9000], q_lens=[2, 0, 0]),
        Batch([500, 600], q_lens=[0, 0]),
        Batch([64] * 1025),  # more requests than the planner has threads
        Batch([rng.randint(0, 300) for _ in range(5000)], q_lens=2),
        Batch([3000], q_lens=8192, h_q=128),
        Batch([1_000_000]),
        Batch([3] * 2000 + [1_000_000] + [3] * 2095),
        Batch([1] * 4096, h_q=128),
    ]
    for _ in range(120):
        b = rng.choice((1, 2, 5, 17, 33, 100, 128, 300))
        longest = rng.choice((70, 1000, 20_000))
        lens = [rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(b)]
        q_lens = rng.choice((rng.randint(1, 9), [rng.choice((0, 1, 2, 5, 40)) for _ in range(b)]))
        found.append(
            Batch(
                lens,
                q_lens,
                h_q=rng.choice((1, 5, 16, 40, 128)),
                max_len=rng.choice((2**31 - 1, 2**17, 2**17, 777)),
            )
        )
    return found


def host_schedule(
    batch: Batch, shape: Shape, workers: int, batch_invariant: bool = False
) -> dict[str, Any]:
    """ValueError if cu_seqlens_q makes more pieces than a plan has room for."""
    return _mla.schedule(
        list(batch.seq_lens),
        batch.cu_seqlens_q,
        batch.s_q,
        batch.total_q,
        batch.h_q,
        batch.max_len,
        *shape,
        workers,
        batch_invariant,
    )


class Piece(NamedTuple):
    request: int
    first_token: int
    num_tokens: int
    len: int
    first_row: int
    first_tile: int
    end_tile: int
    partial_slot: int


class Worker(NamedTuple):
    first_piece: int
    end_piece: int
    member: int
    pairs: int
    group_size: int
    last: Piece


class Split(NamedTuple):
    request: int
    first_token: int
    num_tokens: int
    first_row: int
    num_pieces: int
    first_slot: int
    second_slot: int
    slot_step: int

    @property
    def slots(self) -> list[int]:
        later = range(self.num_pieces - 1)
        return [self.first_slot, *(self.second_slot + i * self.slot_step for i in later)]


class DevicePlan:
    """The structs of kernels/params.h, read from the words of a plan."""

    def __init__(
        self,
        words: Sequence[int],
        batch: Batch,
        shape: Shape,
        workers: int,
        batch_invariant: bool = False,
    ) -> None:
        sizes = part_sizes(batch, shape, workers, batch_invariant)
        assert len(words) == sum(sizes)
        ends = list(accumulate(sizes))
        header, by_worker, pieces, splits, _ = (
            words[end - size : end] for size, end in zip(sizes, ends, strict=True)
        )
        self.batch, self.shape, self.num_workers = batch, shape, workers
        self.units_per_group, _, splits_at = struct.unpack("3q", struct.pack("6i", *header[:6]))
        assert splits_at == 4 * ends[2]
        self.num_groups, self.group_size, self.num_splits = header[6:9]
        assert header[9] == batch_invariant
        self.batch_invariant = batch_invariant
        self.max_splits = sizes[3] // 8
        self.num_slots = max_partials(batch, shape) if batch_invariant else 2 * workers
        self.workers = [
            Worker(*by_worker[i : i + 5], Piece(*by_worker[i + 8 : i + 16]))
            for i in range(0, len(by_worker), 16)
        ]
        written = splits[: 8 * self.num_splits]
        self.splits = [Split(*written[i : i + 8]) for i in range(0, len(written), 8)]
        self.pieces = [Piece(*pieces[i : i + 8]) for i in range(0, len(pieces), 8)]

    def tiles(self, piece: Piece) -> int:
        """Of all pieces of its item; in a batch-invariant plan whole pairs."""
        multiple = 2 if self.batch_invariant else 1
        return max(1, -(-piece.len // (self.shape[1] * multiple))) * multiple

    def walk(self) -> list[tuple[object, ...]]:
        """What each worker computes, as the kernels read it and as `_mla.schedule` lists it."""
        block_rows, block_n, _ = self.shape
        found: list[tuple[object, ...]] = []
        for worker, (first, end, member, *_) in enumerate(self.workers):
            for piece in self.pieces[first:end]:
                row_block = piece.first_row // block_rows + member
                if piece.first_tile == piece.end_tile:
                    continue
                if row_block * block_rows >= piece.num_tokens * self.batch.h_q:
                    continue
                found.append(
                    (
                        worker,
                        piece.request,
                        row_block,
                        piece.first_tile * block_n,
                        min(piece.end_tile * block_n, piece.len),
                        piece.first_tile == 0,
                        piece.end_tile * block_n >= piece.len,
                        -1 if piece.partial_slot < 0 else piece.partial_slot + member,
                    )
                )
        return found

    def check_inside(self) -> None:
        """Whatever the lengths say, all that the kernels follow is in the caller's tensors, the
        plan and the partial results."""
        batch, size, block_rows = self.batch, self.group_size, self.shape[0]
        requests = range(len(batch.seq_lens))
        assert 1 <= size <= MAX_GROUP_SIZE
        assert 0 <= self.num_groups * size <= self.num_workers
        assert 0 <= self.num_splits <= self.max_splits
        merges = self.shape[2] and not self.batch_invariant
        assert merges or not any(worker.pairs for worker in self.workers)
        for number, worker in enumerate(self.workers):
            assert 0 <= worker.first_piece <= worker.end_piece <= len(self.pieces), worker
            assert worker.member in range(size), worker
            assert worker.group_size == size, worker
            if worker.first_piece < worker.end_piece:
                assert worker.last == self.pieces[worker.end_piece - 1], worker
            self.check_pairs(number, worker)
            for piece in self.pieces[worker.first_piece : worker.end_piece]:
                assert piece.request in requests, piece
                assert (piece.first_token, piece.num_tokens) == batch.tokens(piece.request), piece
                assert piece.len == batch.length(piece.request), piece
                assert piece.first_row >= 0, piece
                assert piece.first_row % (block_rows * size) == 0, piece
                assert 0 <= piece.first_tile <= piece.end_tile <= self.tiles(piece), piece
                rows_left = piece.num_tokens * batch.h_q - piece.first_row
                members = min(size, -(-rows_left // block_rows))
                slots = range(self.num_slots - members + 1)  # of member 0
                assert piece.partial_slot == -1 or piece.partial_slot in slots, piece
        for split in self.splits:
            assert split.request in requests, split
            assert (split.first_token, split.num_tokens) == batch.tokens(split.request), split
            assert split.first_row >= 0, split
            assert split.first_row % (block_rows * size) == 0, split
            assert split.num_pieces > 1, split
            rows_left = split.num_tokens * batch.h_q - split.first_row
            members = min(size, -(-rows_left // block_rows))
            assert all(0 <= slot <= self.num_slots - members for slot in split.slots), split

    def check_pairs(self, number: int, worker: Worker) -> None:
        """Who waits for a partial result waits for one that the group before leaves."""
        assert worker.pairs in range(4), worker
        if worker.pairs & MERGES_FIRST:
            assert worker.first_piece < worker.end_piece, worker
            piece = self.pieces[worker.first_piece]
            assert piece.first_tile > 0, (worker, piece)
            before = self.workers[number - self.group_size]
            assert number >= self.group_size
            assert before.pairs & LEAVES_LAST, (before, worker)
            assert before.first_piece < before.end_piece, before
            earlier = self.pieces[before.end_piece - 1]
            assert earlier.partial_slot == piece.partial_slot - self.group_size, (earlier, piece)
            assert (earlier.request, earlier.first_row) == (piece.request, piece.first_row)
            assert earlier.first_tile < earlier.end_tile == piece.first_tile, (earlier, piece)
        if worker.pairs & LEAVES_LAST:
            piece = self.pieces[worker.end_piece - 1]
            assert piece.partial_slot >= 0, (worker, piece)
            assert piece.first_tile == 0, (worker, piece)

    def as_made(self) -> dict[str, Any]:
        """As `_mla.schedule` returns it, with the splits in any order."""
        bundle_rows = self.group_size * self.shape[0]
        return {
            "units_per_group": self.units_per_group,
            "num_groups": self.num_groups,
            "group_size": self.group_size,
            "pieces": self.walk(),
            "pairs": [worker.pairs for worker in self.workers],
            "splits": sorted(
                (split.request, split.first_row // bundle_rows, split.slots)
                for split in self.splits
            ),
        }

    def check_is(self, host: dict[str, Any]) -> None:
        """The plan is this schedule, piece for piece."""
        assert self.as_made() == host | {"splits": sorted(host["splits"])}, self.batch


def max_items(batch: Batch, shape: Shape) -> int:
    block_rows = shape[0]
    if isinstance(batch.q_lens, int):
        return len(batch.seq_lens) * -(-batch.q_lens * batch.h_q // block_rows)
    return -(-batch.total_q * batch.h_q // block_rows) + len(batch.seq_lens)


def max_partials(batch: Batch, shape: Shape) -> int:
    """Of a batch-invariant plan: what python/mla/workspace.py documents."""
    b, row_blocks, max_len = len(batch.seq_lens), max_items(batch, shape), batch.max_len
    uniform = isinstance(batch.q_lens, int)
    of_each = row_blocks // b if uniform and row_blocks else 1
    half = PART_TOKENS // 2
    if max_len <= (half * (of_each + 1) if of_each < PARTS_OF_SHORT else PART_TOKENS * of_each):
        return 0
    parts = min(-(-max_len // PART_TOKENS), math.ceil(math.sqrt(max_len) / 8), MAX_PARTS)
    if of_each > 1 or not uniform:
        parts = max(parts, min(-(-max_len // half), PARTS_OF_SHORT))
    return b * parts + row_blocks


def part_sizes(
    batch: Batch, shape: Shape, workers: int, batch_invariant: bool = False
) -> list[int]:
    """Words of the header, the workers, the pieces, the splits, and what only the planner reads."""
    b, items = len(batch.seq_lens), max_items(batch, shape)
    fixed = [12, 16 * workers]
    if batch_invariant:
        pieces = max(max_partials(batch, shape), items)
        return [*fixed, 8 * pieces, 8 * items, 4 * b]  # four int32 for each request
    planners_own = 3 * (b + 1)  # an int64 and an int32 for each request
    return [*fixed, 8 * (items + workers), 8 * workers, planners_own]
