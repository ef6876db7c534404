"""What every schedule must be: work is done once and evenly, and each partial result is read.

A schedule is what `_mla.schedule` returns, made by the host or read from a device's plan.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any, NamedTuple

from device_plan import (
    LEAVES_LAST,
    MAX_GROUP_SIZE,
    MERGES_FIRST,
    Batch,
    Shape,
    max_items,
    max_partials,
)
from mla import _mla

ITEM_OVERHEAD_TOKENS, MIN_GROUP_TOKENS = _mla.ITEM_OVERHEAD_TOKENS, _mla.MIN_GROUP_TOKENS
ALIGNMENT_SHARE = 64  # of schedule.h
PART_OVERHEAD_TOKENS, SIZE_CLASSES = 128, 8  # of parts.h


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
    slots: list[int]


class Schedule:
    """A schedule and what it was made for."""

    def __init__(
        self,
        made: dict[str, Any],
        batch: Batch,
        shape: Shape,
        num_workers: int,
        batch_invariant: bool = False,
    ) -> None:
        self.batch, self.num_workers, self.batch_invariant = batch, num_workers, batch_invariant
        self.shape = shape
        self.block_rows, self.block_n, self.merges_pairs = shape
        self.units_per_group: int = made["units_per_group"]
        self.num_groups: int = made["num_groups"]
        self.group_size: int = made["group_size"]
        self.pieces = [Piece(*piece) for piece in made["pieces"]]
        self.splits = [Split(*split) for split in made["splits"]]
        self.pairs: list[int] = made["pairs"]

    def row_blocks(self, request: int) -> int:
        return -(-self.batch.tokens(request)[1] * self.batch.h_q // self.block_rows)

    def tiles(self, tokens: int) -> int:
        return -(-tokens // self.block_n)

    def group(self, piece: Piece) -> int:
        return piece.worker // self.group_size

    def check(self) -> None:
        self.check_coverage()
        self.check_groups()
        if self.batch_invariant:
            self.check_parts()
            self.check_level()
        else:
            self.check_balance()
        self.check_splits()

    def check_coverage(self) -> None:
        """Every token of every row block of every request once; nothing else."""
        pieces_of: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            pieces_of[piece.request, piece.row_block].append(piece)
        requests = range(len(self.batch.seq_lens))
        wanted = {(i, block) for i in requests for block in range(self.row_blocks(i))}
        assert set(pieces_of) == wanted
        for (request, _), pieces in pieces_of.items():
            length = self.batch.length(request)
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
            assert all(piece.first_token % self.block_n == 0 for piece in pieces)

    def check_groups(self) -> None:
        """Workers of a group read the same KV."""
        size = self.group_size
        assert 1 <= size <= MAX_GROUP_SIZE
        assert self.num_groups * size <= self.num_workers
        ranges: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        for piece in self.pieces:
            assert 0 <= piece.worker < self.num_groups * size
            assert piece.row_block % size == piece.worker % size
            part = piece.first_token if self.batch_invariant else 0
            key = (self.group(piece), piece.request, piece.row_block // size, part)
            tokens = (piece.first_token, piece.last_token)
            assert ranges.setdefault(key, tokens) == tokens

    def total_units(self, group_size: int) -> int:
        """The cost of the batch in bundles of `group_size` row blocks, by schedule.h's rule."""
        overhead = self.tiles(ITEM_OVERHEAD_TOKENS)
        return sum(
            -(-self.row_blocks(i) // group_size)
            * (overhead + max(self.tiles(self.batch.length(i)), 1))
            for i in range(len(self.batch.seq_lens))
        )

    def check_balance(self) -> None:
        """No group has much more than an even share, and no other group size would lessen that.

        Items of one length may be cut where they end, if that costs little: no group then has the
        end of one item and the beginning of another.
        """
        load: dict[int, int] = defaultdict(int)
        for piece in self.pieces:
            load[piece.worker] += max(self.tiles(piece.last_token - piece.first_token), 1)
        assert all(units <= self.units_per_group for units in load.values())

        overhead = self.tiles(ITEM_OVERHEAD_TOKENS)
        requests = range(len(self.batch.seq_lens))
        rows = [i for i in requests if self.row_blocks(i)]
        longest = max((max(self.tiles(self.batch.length(i)), 1) for i in rows), default=0)
        if longest > self.tiles(_mla.MEDIUM_TOKENS):
            tokens = _mla.MIN_GROUP_TOKENS_OF_LONG
        elif (
            self.tiles(MIN_GROUP_TOKENS) < longest <= self.tiles(_mla.SHORT_TOKENS)
            and self.block_rows <= _mla.LOW_ROWS
        ):
            tokens = _mla.MIN_GROUP_TOKENS_OF_SHORT
        else:
            tokens = MIN_GROUP_TOKENS
        least = max(self.tiles(tokens), overhead + 1)
        longest += overhead

        def share(size: int) -> int:
            return -(-self.total_units(size) // (self.num_workers // size))

        blocks = max(map(self.row_blocks, requests), default=0)
        sizes = range(1, max(1, min(MAX_GROUP_SIZE, blocks, self.num_workers)) + 1)
        assert share(self.group_size) == min(map(share, sizes))
        even = max(share(self.group_size), least)
        units = self.total_units(self.group_size)
        items = sum(-(-self.row_blocks(i) // self.group_size) for i in requests)
        if 0 < items <= self.num_workers // self.group_size and longest <= least:
            # Nothing is cut: a group has one item.
            assert (self.units_per_group, self.num_groups) == (longest, items)
            assert all(piece.starts and piece.ends for piece in self.pieces)
        elif len({max(self.tiles(self.batch.length(i)), 1) for i in rows}) != 1:
            assert self.units_per_group == even
            assert self.num_groups == -(-units // even)
        elif self.units_per_group != even:
            assert self.units_per_group <= even + even // ALIGNMENT_SHARE + overhead
            assert self.num_groups <= self.num_workers // self.group_size
            kinds: dict[int, set[tuple[int, int, bool]]] = defaultdict(set)
            for piece in self.pieces:
                bundle = piece.row_block // self.group_size
                kinds[self.group(piece)].add((piece.request, bundle, piece.slot >= 0))
            for of_group in kinds.values():
                assert len(of_group) == 1 or not any(partial for *_, partial in of_group)

    def cuts(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """By request and row block, the token ranges that are added up each by itself, in order."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for piece in self.pieces:
            found[piece.request, piece.row_block].append((piece.first_token, piece.last_token))
        return {key: sorted(ranges) for key, ranges in found.items()}

    def check_parts(self) -> None:
        """Pieces follow from length and row blocks of the request alone, and are pairs of tiles."""
        by_size: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (request, _), ranges in self.cuts().items():
            size = (self.batch.length(request), self.row_blocks(request))
            assert by_size.setdefault(size, ranges) == ranges
            assert all(first % (2 * self.block_n) == 0 for first, _ in ranges)

    def check_level(self) -> None:
        """No group has more than an even share and the largest part of the batch, but for what the
        parts of a class, and those at the end of a request, differ by.
        """
        overhead = self.tiles(PART_OVERHEAD_TOKENS)
        parts: dict[int, list[int]] = defaultdict(list)
        for piece in self.pieces:
            if piece.row_block % self.group_size == 0:
                tokens = piece.last_token - piece.first_token
                parts[self.group(piece)].append(2 * max(1, -(-tokens // (2 * self.block_n))))
        groups = self.num_workers // self.group_size
        assert self.num_groups == groups
        largest = max(map(max, parts.values()), default=0)
        load = {g: sum(found) + overhead * len(found) for g, found in parts.items()}
        even = -(-sum(load.values()) // groups)
        for g, found in parts.items():
            unequal = sum(tiles < largest for tiles in found)
            off = unequal * (largest / (SIZE_CLASSES - 1) + 2)
            assert load[g] <= even + largest + overhead + off
        counts = [len(parts[g]) for g in range(groups)]
        assert max(counts) - min(counts) <= 1

    def check_splits(self) -> None:
        """What combine reads is what workers leave, in order, each piece in a slot of its own."""
        partial = [piece for piece in self.pieces if not (piece.starts and piece.ends)]
        assert all((piece.slot == -1) == (piece.starts and piece.ends) for piece in self.pieces)
        slots = [piece.slot for piece in partial]
        assert len(set(slots)) == len(slots)
        bound = 2 * self.num_workers
        if self.batch_invariant:
            bound = max_partials(self.batch, self.shape)
        assert all(0 <= slot < bound for slot in slots)

        most = max_items(self.batch, self.shape) if self.batch_invariant else self.num_workers
        assert len(self.splits) <= most
        left: dict[tuple[int, int], list[int]] = defaultdict(list)
        for piece in sorted(partial, key=lambda piece: piece.first_token):
            left[piece.request, piece.row_block].append(piece.slot)
        read: dict[tuple[int, int], list[int]] = {}
        for split in self.splits:
            assert len(split.slots) > 1
            for member in range(self.group_size):
                row_block = split.bundle * self.group_size + member
                if row_block >= self.row_blocks(split.request):
                    continue
                assert (split.request, row_block) not in read
                read[split.request, row_block] = [slot + member for slot in split.slots]
        pairs = self.pairs_of(partial)
        assert not set(read) & set(pairs)
        assert read | pairs == dict(left)

    def pairs_of(self, partial: list[Piece]) -> dict[tuple[int, int], list[int]]:
        """The slots of row blocks whose later worker merges both partial results."""
        found: dict[tuple[int, int], list[int]] = {}
        last = {piece.worker: piece for piece in self.pieces}
        first = {piece.worker: piece for piece in reversed(self.pieces)}
        expected = [0] * self.num_workers
        for earlier in partial:
            later = first.get(earlier.worker + self.group_size)
            if not self.merges_pairs or self.batch_invariant or not later:
                continue
            same = (later.request, later.row_block) == (earlier.request, earlier.row_block)
            if earlier.starts and later.ends and same:
                assert last[earlier.worker] == earlier
                assert later.slot == earlier.slot + self.group_size  # as the kernel derives it
                found[earlier.request, earlier.row_block] = [earlier.slot, later.slot]
                expected[earlier.worker] |= LEAVES_LAST
                expected[later.worker] |= MERGES_FIRST
        # A member without a row block of the item is told so too, and passes it over.
        for worker, pairs in enumerate(self.pairs):
            of_group = expected[worker // self.group_size * self.group_size]
            assert pairs == of_group, worker
        return found
