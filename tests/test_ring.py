"""Rings of KV as mbarriers see them: who waits by parity must not take an earlier round for its
own, whatever order copies land in.

Models of how sm90_swap and sm90_3wg hand tiles over, with the sizes of each row of the table. Each
warp, or warpgroup, is a generator of what it waits for; which one goes on is drawn, and some copies
are late: they land when nothing else can happen.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import pytest
from mla.variants import VARIANTS, Variant

SWAP = [row for row in VARIANTS if row.pipeline == "sm90_swap"]
TWO_HALVES = [row for row in VARIANTS if row.pipeline == "sm90_3wg"]
SEEDS = range(100)
TILES, LATE = 24, 6

Wait = Callable[[], bool]
Agent = Iterator[Wait]


class Ring:
    """Phases that mbarriers have completed, of which a wait sees the parity, and what landed."""

    def __init__(self, row: Variant, seed: int) -> None:
        assert row.d_qk is not None
        assert row.d_v is not None
        self.stages = row.stages
        self.v_chunks = row.d_v // 64
        self.has_rope = row.d_qk > row.d_v
        self.chunks = self.v_chunks + self.has_rope
        self.rng = random.Random(seed)
        self.phases: Counter[Hashable] = Counter()
        self.arrivals: Counter[Hashable] = Counter()  # at barriers that are no mbarriers
        self.holds: dict[Hashable, int] = {}
        self.on_its_way: list[tuple[Hashable, int]] = []
        self.late = set(self.rng.sample(range(TILES * self.chunks), LATE))

    def passes(self, mbarrier: Hashable, round_: int) -> Wait:
        """What a wait for the end of phase `round_` is let through by."""
        return lambda: self.phases[mbarrier] % 2 != round_ % 2

    def there(self, barrier: Hashable, arrivals: int = 1) -> Wait:
        return lambda: self.arrivals[barrier] >= arrivals

    def load(self, place: Hashable, chunk: int) -> None:
        self.on_its_way.append((place, chunk))

    def read(self, place: Hashable, chunk: int) -> None:
        assert self.holds.get(place) == chunk, "it has not landed"

    def land(self, late: bool) -> bool:
        able = [copy for copy in self.on_its_way if (copy[1] in self.late) == late]
        if not able:
            return False
        place, chunk = copy = self.rng.choice(able)
        self.on_its_way.remove(copy)
        self.holds[place] = chunk
        self.phases["full", place] += 1
        return True

    def run(self, agents: list[Agent]) -> None:
        waiting = {agent: next(agent) for agent in agents}
        while waiting:
            able: list[Agent | None] = [agent for agent, passes in waiting.items() if passes()]
            agent = self.rng.choice([*able, None])
            if agent is None:  # a copy lands instead
                if not self.land(late=False) and not able:
                    assert self.land(late=True), "nothing can happen any more"
                continue
            try:
                waiting[agent] = next(agent)
            except StopIteration:
                del waiting[agent]


def swap_producer(ring: Ring) -> Agent:
    for chunk in range(TILES * ring.chunks):
        round_, slot = divmod(chunk, ring.stages)
        yield ring.passes(("free", slot), round_ - 1)
        ring.load(slot, chunk)


def swap_consumer(ring: Ring, warpgroup: int, waits_for_room: bool) -> Agent:
    for tile in range(warpgroup, TILES, 2):
        first = tile * ring.chunks
        if waits_for_room:
            round_, slot = divmod(first + 1, ring.stages)
            yield ring.passes(("free", slot), round_ - 1)
        for chunk in range(first, first + ring.chunks):
            round_, slot = divmod(chunk, ring.stages)
            yield ring.passes(("full", slot), round_)
            ring.read(slot, chunk)
        if ring.has_rope:
            ring.phases["free", (first + ring.v_chunks) % ring.stages] += 1
        yield lambda: True  # softmax
        for chunk in range(first, first + ring.v_chunks):
            ring.read(chunk % ring.stages, chunk)
            ring.phases["free", chunk % ring.stages] += 1


def run_swap(row: Variant, seed: int, waits_for_room: bool) -> None:
    ring = Ring(row, seed)
    consumers = [swap_consumer(ring, w, waits_for_room) for w in range(2)]
    ring.run([swap_producer(ring), *consumers])


@pytest.mark.parametrize("row", SWAP, ids=lambda row: row.name)
def test_every_chunk_is_there_when_it_is_read(row: Variant) -> None:
    for seed in SEEDS:
        run_swap(row, seed, waits_for_room=True)


@pytest.mark.parametrize("row", SWAP, ids=lambda row: row.name)
def test_without_waiting_for_room_it_is_not(row: Variant) -> None:
    """The model sees it."""

    def runs() -> None:
        for seed in SEEDS:
            run_swap(row, seed, waits_for_room=False)

    with pytest.raises(AssertionError, match="not landed"):
        runs()


class Halves(Ring):
    """Of sm90_3wg: half of each tile's columns are a warpgroup's to release. `pieces`: how many
    tiles each has."""

    def __init__(self, row: Variant, seed: int) -> None:
        super().__init__(row, seed)
        self.pieces: list[int] = []
        while sum(self.pieces) < TILES:
            self.pieces.append(self.rng.randint(1, min(5, TILES - sum(self.pieces))))
        self.values_first = seed % 2 == 0

    def half(self, half: int) -> range:
        return range(half * self.v_chunks // 2, (half + 1) * self.v_chunks // 2)

    def rope(self) -> range:
        return range(self.v_chunks, self.chunks)

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """Of each piece: its number, its first tile in the ring, and how many it has."""
        first = 0
        for number, tiles in enumerate(self.pieces):
            yield number, first, tiles
            first += tiles

    def waits(self, number: int, chunks: range) -> Agent:
        """For chunks of a tile, which are read once they are taken to be there."""
        round_, stage = divmod(number, self.stages)
        for chunk in chunks:
            yield self.passes(("full", (stage, chunk)), round_)
            self.read((stage, chunk), number * self.chunks + chunk)

    def add_values(self, number: int, half: int) -> None:
        stage = number % self.stages
        for chunk in self.half(half):
            self.read((stage, chunk), number * self.chunks + chunk)
        self.phases["free", stage, half] += 1


def half_producer(ring: Halves, half: int) -> Agent:
    for _, first, tiles in ring.tiles():
        for tile in range(tiles):
            round_, stage = divmod(first + tile, ring.stages)
            chunks = list(ring.half(half))
            if tile % 2 == half and ring.has_rope:
                yield ring.passes(("free rope", stage), round_ - 1)
                ring.load((stage, ring.v_chunks), (first + tile) * ring.chunks + ring.v_chunks)
            yield ring.passes(("free", stage, half), round_ - 1)
            for chunk in chunks:
                ring.load((stage, chunk), (first + tile) * ring.chunks + chunk)


def half_consumer(ring: Halves, warpgroup: int) -> Agent:
    other = warpgroup ^ 1
    for piece, first, tiles in ring.tiles():
        for tile in range(warpgroup, tiles + 1, 2):
            number = first + tile
            if tile < tiles:
                yield from ring.waits(number, ring.rope())
                yield from ring.waits(number, ring.half(warpgroup))
            if tile > 0:
                yield ring.there(("P", number - 1))
                if ring.values_first:
                    ring.add_values(number - 1, warpgroup)
            if tile < tiles:
                yield from ring.waits(number, ring.half(other))
                ring.phases["free rope", number % ring.stages] += 1
            if tile > 0 and not ring.values_first:
                yield lambda: True
                ring.add_values(number - 1, warpgroup)
            if tile < tiles:
                ring.arrivals["P", number] += 1
                yield lambda: True
                ring.add_values(number, warpgroup)
        ring.arrivals["sums", piece] += 1
        yield ring.there(("sums", piece), 2)


@pytest.mark.parametrize("row", TWO_HALVES, ids=lambda row: row.name)
def test_every_half_is_there_when_it_is_read(row: Variant) -> None:
    for seed in SEEDS:
        ring = Halves(row, seed)
        agents = [half_producer(ring, half) for half in range(2)]
        ring.run([*agents, *(half_consumer(ring, w) for w in range(2))])
        assert sum(ring.phases[key] for key in list(ring.phases) if key[0] == "free") == 2 * TILES
