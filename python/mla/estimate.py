"""How long a variant should take: a model of the schedule and of what limits it."""

from __future__ import annotations

from typing import NamedTuple

from . import _mla, costs
from ._mla import (
    FEW_TOKENS,
    ITEM_OVERHEAD_TOKENS,
    MIN_GROUP_TOKENS,
    MIN_GROUP_TOKENS_OF_MANY,
)
from .costs_file import Costs
from .device import Device
from .problem import Kind, Problem
from .variants import Variant

# Memory and arithmetic overlap, but not where both take about as long: sums of this power.
OVERLAP_POWER = 6.0
_ROOT = 1 / OVERLAP_POWER
# Of a tile's chain of steps, what does not go with its dims, relative to (576, 512). From 16 heads
# with 99 KB: 0.84 of the floor there, 0.64 with (288, 256).
FIXED_SHARE, MEASURED_DIMS = 0.3, 576 + 512
# L2 serves 9.0 to 9.4 TB/s on the H200, and every row block of a group reads all of its KV there.
L2_PER_BANDWIDTH = 2.0
EMPTY_LAUNCH_US = 2.7  # of the H200: the least that any call takes
PAGE_OF_FULL_RATE = 64  # tokens; smaller pages are read more slowly, down to 16


class Estimate(NamedTuple):
    """Microseconds, predicted."""

    us: float
    bound: str  # "memory", "compute" or "latency": what the time goes to
    memory_us: float
    compute_us: float  # tiles, padding included
    latency_us: float  # the rest: what a call without work takes, and merging parts


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Cut(NamedTuple):
    """What the schedule makes of a problem with tiles of some rows (kernels/common/schedule.h)."""

    kv_rows: float  # read from memory, as L2 slows it
    query_rows: int
    longest: float  # of the ranges, in tokens
    further_parts: float  # of the item that has most
    partial_rows: float


def cut(b: int, rows: int, max_len: int, block_rows: int, workers: int) -> Cut:
    """Of b requests with `rows` query rows and `max_len` KV tokens, as if tiles had one token."""
    row_blocks = -(-rows // block_rows)
    if row_blocks == 0 or b == 0:
        return Cut(0.0, 0, 0.0, 0.0, 0.0)
    group_size = row_blocks if row_blocks < _GROUP_SIZES else min(_GROUP_SIZES, workers)
    groups = workers // group_size
    bundles = -(-row_blocks // group_size)
    items = b * bundles
    span = max_len + ITEM_OVERHEAD_TOKENS
    units = items * span
    least = MIN_GROUP_TOKENS if units <= FEW_TOKENS else MIN_GROUP_TOKENS_OF_MANY
    longest = units / groups if units > least * groups else least
    parts = min(groups // items, -(-max_len // least))
    split = parts > 1
    aligned = max_len / parts + ITEM_OVERHEAD_TOKENS if split else -(-items // groups) * span
    pieces: float
    further_parts: float
    if aligned <= longest * _ALIGNED + ITEM_OVERHEAD_TOKENS:
        longest = aligned
        pieces, further_parts = (items * parts, parts - 1) if split else (0, 0)
    else:
        busy = units / longest
        pieces = busy + (items if items < busy else busy)
        further_parts = busy / items if busy > items else 1
    held = group_size * block_rows
    return Cut(
        b * bundles * max_len * _L2_SLOWS[group_size],
        b * rows,
        longest,
        further_parts,
        pieces * (rows if rows < held else held),
    )


def overlapped(a: float, b: float) -> float:
    """The time of two that run side by side: the longer one, and more where they are alike."""
    least, most = (a, b) if a < b else (b, a)
    if least == 0:
        return most
    return float(most * (1 + (least / most) ** OVERLAP_POWER) ** _ROOT)


_GROUP_SIZES = _mla.MAX_GROUP_SIZE
_ALIGNED = 1 + 1 / _mla.ALIGNMENT_SHARE
# Reading from memory and through L2 beside each other, by row blocks in a group.
_L2_SLOWS = [overlapped(1, n / L2_PER_BANDWIDTH) for n in range(_GROUP_SIZES + 1)]


class Model(NamedTuple):
    """A variant on one GPU for one kind of problem: microseconds."""

    start_us: float
    part_us: float
    block_rows: int
    read_us: float  # a KV row from memory
    query_us: float  # a query row, in and out
    tile_row_us: float  # a KV row in one worker, with one row block
    merge_us: float  # a partial row

    def beats(self, other: Model) -> bool:
        """Whether it takes less, whatever the sizes are."""
        costs = zip(self, other, strict=True)
        same = self.block_rows == other.block_rows
        return same and self.start_us < other.start_us and all(a <= b for a, b in costs)

    def parts_us(self, cut: Cut) -> tuple[float, float, float]:
        """For memory, for tiles, and for the rest."""
        kv_rows, query_rows, longest, further_parts, partial_rows = cut
        start_us, part_us, _, read_us, query_us, tile_row_us, merge_us = self
        return (
            kv_rows * read_us + query_rows * query_us,
            longest * tile_row_us,
            start_us + further_parts * part_us + partial_rows * merge_us,
        )

    def us(self, cut: Cut) -> float:
        memory_us, compute_us, latency_us = self.parts_us(cut)
        return latency_us + overlapped(memory_us, compute_us)


def model(variant: Variant, kind: Kind, device: Device) -> Model | None:
    """None for the host variant: nothing is known of the CPU."""
    if variant.on_host:
        return None
    return model_of(variant, kind, costs.of(device).classes[costs.class_name(variant)])


def model_of(variant: Variant, kind: Kind, found: Costs) -> Model:
    """With constants of the caller's."""
    size = kind.dtype.itemsize
    boxes = kind.page_size % _mla.MIN_BOX_ROWS == 0
    # What of a page's rows are neighbours and fetched together.
    run = max(16, min(kind.page_size & -kind.page_size if boxes else kind.page_size, 64))
    slower = 1 + found.small_pages * (PAGE_OF_FULL_RATE / run - 1) / 3
    dims = (1 - FIXED_SHARE) * (kind.d_qk + kind.d_v) + FIXED_SHARE * MEASURED_DIMS
    tile_row_us = 2 * variant.block_rows * dims / (found.tflops_per_sm[variant.block_rows] * 1e6)
    if found.copy_gbs_per_sm and not boxes:
        tile_row_us = max(tile_row_us, kind.d_qk * size / (found.copy_gbs_per_sm * 1e3))
    return Model(
        start_us=found.start_us,
        part_us=found.part_us,
        block_rows=variant.block_rows,
        read_us=kind.d_qk * size * slower / (found.bandwidth_gbs * 1e3),
        query_us=(kind.d_qk + kind.d_v) * size / (found.bandwidth_gbs * 1e3),
        tile_row_us=tile_row_us,
        merge_us=(kind.d_v + 1) * 4 / (found.merge_gbs * 1e3),
    )


def estimate(variant: Variant, problem: Problem, device: Device) -> Estimate | None:
    """Predicted time if every request has all KV tokens that its row of the block table reaches.

    A ragged query counts as if all requests had the average of its rows. None for the host variant.
    """
    found = model(variant, problem.kind, device)
    if found is None:
        return None
    made = cut(problem.b, problem.rows, problem.max_len, variant.block_rows, device.sm_count)
    memory_us, compute_us, latency_us = found.parts_us(made)
    if max(memory_us, compute_us) < latency_us:
        bound = "latency"
    else:
        bound = "memory" if memory_us >= compute_us else "compute"
    return Estimate(found.us(made), bound, memory_us, compute_us, latency_us)


def floor_us(problem: Problem, device: Device) -> float | None:
    """What no kernel beats by the GPU's published figures; None on a CPU.

    KV, queries and outputs moved once, or the arithmetic at the peak of the tensor cores, and an
    empty launch. Every request counts with all tokens that its row of the block table reaches.
    """
    if device.type != "cuda" or not device.bandwidth or not device.tflops:
        return None
    tokens, columns = problem.b * problem.max_len, problem.d_qk + problem.d_v
    query_rows = problem.total_q * problem.h_q
    moved = (tokens * problem.d_qk + query_rows * columns) * problem.dtype.itemsize
    flop = 2 * problem.rows * tokens * columns
    return EMPTY_LAUNCH_US + max(moved / (device.bandwidth * 1e3), flop / (device.tflops * 1e6))
