"""The ring of sm90_swap as mbarriers see it: who waits by parity must not take an earlier round for
its own, whatever order copies land in.

A model of the protocol, with the sizes of each row of the table: the producer fills chunk behind
chunk, two consumers have every other tile each, and a copy lands whenever it likes.
"""

from __future__ import annotations

import random

import pytest
from mla.variants import VARIANTS, Variant

ROWS = [row for row in VARIANTS if row.pipeline == "sm90_swap"]
TILES = 24


class Ring:
    """`full` and `free` count the completed phases of each slot; hardware tells their parity."""

    def __init__(self, row: Variant, waits_for_room: bool) -> None:
        self.stages, self.waits_for_room = row.stages, waits_for_room
        self.v_chunks = (row.d_v or 0) // 64
        self.chunks = self.v_chunks + ((row.d_qk or 0) > (row.d_v or 0))
        self.full, self.free = [0] * self.stages, [0] * self.stages
        self.holds = [-1] * self.stages  # the number of the chunk that landed last
        self.issued = 0
        self.on_its_way: list[int] = []
        self.at = [(0, -1), (1, -1)]  # of each consumer: its tile, and its next chunk of it

    def passed(self, phases: int, round_: int) -> bool:
        """Whether a wait for the end of phase `round_` is let through."""
        return phases % 2 != round_ % 2

    def place(self, chunk: int) -> tuple[int, int]:
        return chunk % self.stages, chunk // self.stages

    def steps(self) -> list[tuple[str, int]]:
        slot, round_ = self.place(self.issued)
        able = [("land", chunk) for chunk in self.on_its_way]
        if self.issued < TILES * self.chunks and self.passed(self.free[slot], round_ - 1):
            able.append(("issue", self.issued))
        for consumer, (tile, seen) in enumerate(self.at):
            first = tile * self.chunks
            if tile >= TILES:
                continue
            if seen < 0:
                slot, round_ = self.place(first + 1)
                if not self.waits_for_room or self.passed(self.free[slot], round_ - 1):
                    able.append(("begin", consumer))
            elif seen == self.chunks:
                able.append(("release", consumer))
            else:
                slot, round_ = self.place(first + seen)
                if self.passed(self.full[slot], round_):
                    able.append(("read", consumer))
        return able

    def take(self, step: str, which: int) -> None:
        if step == "issue":
            self.on_its_way.append(self.issued)
            self.issued += 1
        elif step == "land":
            self.on_its_way.remove(which)
            slot, _ = self.place(which)
            self.holds[slot] = which
            self.full[slot] += 1
        else:
            tile, seen = self.at[which]
            first = tile * self.chunks
            if step == "release":
                for chunk in range(self.v_chunks):
                    self.free[self.place(first + chunk)[0]] += 1
                self.at[which] = (tile + 2, -1)
                return
            if step == "read":
                slot, _ = self.place(first + seen)
                assert self.holds[slot] == first + seen, "it has not landed"
                if seen == self.v_chunks:  # RoPE is released once the logits are there
                    self.free[slot] += 1
            self.at[which] = (tile, seen + 1)


def walk(row: Variant, waits_for_room: bool, seed: int) -> None:
    """Some chunks are late: they land when nothing else can happen."""
    rng = random.Random(seed)
    ring = Ring(row, waits_for_room)
    late = set(rng.sample(range(TILES * ring.chunks), 6))
    while ring.at != [(TILES, -1), (TILES + 1, -1)]:
        able = ring.steps()
        assert able, "nothing can happen any more"
        soon = [step for step in able if not (step[0] == "land" and step[1] in late)]
        ring.take(*rng.choice(soon or able))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_chunk_is_there_when_it_is_read(row: Variant) -> None:
    for seed in range(100):
        walk(row, waits_for_room=True, seed=seed)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_without_waiting_for_room_it_is_not(row: Variant) -> None:
    """The model sees it."""

    def walks() -> None:
        for seed in range(100):
            walk(row, waits_for_room=False, seed=seed)

    with pytest.raises(AssertionError, match="not landed"):
        walks()
