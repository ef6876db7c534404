"""How long a variant should take: a model of the schedule and of what limits it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from . import _mla, costs
from .costs_file import Costs
from .device import Device
from .problem import Kind, Problem
from .variants import Variant

# Of a tile's chain of steps, what does not go with its dims, relative to (576, 512). From 16 heads
# with 99 KB: 0.84 of the floor there, 0.64 with (288, 256).
FIXED_SHARE, MEASURED_DIMS = 0.3, 576 + 512
EMPTY_LAUNCH_US = 2.7  # of the H200: the least that any call takes
PAGE_OF_FULL_RATE = 64  # tokens; smaller pages are read more slowly, down to 16


# What the schedule makes of requests of one length: the fields of EqualCut in src/cut.h.
Cut: TypeAlias = tuple[int, int, int, int, float, float, bool, float, float, float]


class Estimate(NamedTuple):
    """Microseconds, predicted."""

    us: float
    bound: str  # "memory", "compute" or "latency": what the time goes to
    memory_us: float
    compute_us: float  # tiles, padding included
    latency_us: float  # the rest: what a call without work takes, and merging parts


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Model(NamedTuple):
    """A variant on one GPU for one kind of problem: microseconds. src/model.cpp reckons with it."""

    block_rows: int
    block_n: int
    start_us: float
    busy_us: float  # where all workers have work, else less
    each_us: float  # an item, whatever it has
    row_us: float  # a query row of an item
    tiles_us: float  # an item of more than one tile
    item_us: float  # a further item of a worker
    split_us: float  # where items are split
    pair_us: float  # where items have two parts
    part_us: float  # a further part of an item
    merge_us: float  # a partial row
    read_us: float  # a KV row from memory
    query_us: float  # a query row, in and out
    tile_row_us: float  # a KV row in one worker, with one row block
    shared_row_us: float  # the same where row blocks share KV

    def beats(self, other: Model) -> bool:
        """Whether it takes less, whatever the sizes are."""
        costs = zip(self, other, strict=True)
        same = self[:2] == other[:2]
        return same and self.start_us < other.start_us and all(a <= b for a, b in costs)

    def parts_us(self, cut: Cut) -> tuple[float, float, float]:
        """For memory, for tiles, and for the rest."""
        return _mla.times(self, cut)

    def us(self, cut: Cut) -> float:
        memory_us, compute_us, latency_us = self.parts_us(cut)
        return latency_us + _mla.overlapped(memory_us, compute_us)


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
    shared_row_us, start_us = tile_row_us, found.start_us
    if found.copy_gbs_per_sm and not boxes:
        copy_us = kind.d_qk * size / (found.copy_gbs_per_sm * 1e3)
        tile_row_us = max(tile_row_us, copy_us)
        shared_row_us = max(shared_row_us, copy_us * (1 + found.shared_copy))
        start_us += found.copy_start_us
    columns = kind.d_qk + kind.d_v
    return Model(
        block_rows=variant.block_rows,
        block_n=variant.block_n,
        start_us=start_us,
        busy_us=found.busy_us,
        each_us=found.height_us * variant.block_rows + (found.box_us if boxes else 0.0),
        row_us=found.row_us * columns / MEASURED_DIMS,
        tiles_us=found.tiles_us,
        item_us=found.item_us,
        split_us=found.split_us,
        pair_us=found.pair_us,
        part_us=found.part_us,
        merge_us=(2 * kind.d_v + 36) / (found.merge_gbs * 1e3),  # partials.cuh
        read_us=kind.d_qk * size * slower / (found.bandwidth_gbs * 1e3),
        query_us=columns * size / (found.bandwidth_gbs * 1e3),
        tile_row_us=tile_row_us,
        shared_row_us=shared_row_us,
    )


def estimate(variant: Variant, problem: Problem, device: Device) -> Estimate | None:
    """Predicted time if every request has `likely_len` KV tokens.

    A ragged query counts as if all requests had the average of its rows. None for the host variant.
    """
    found = model(variant, problem.kind, device)
    if found is None:
        return None
    sizes = (problem.b, problem.rows, problem.likely_len, variant.block_rows, variant.block_n)
    made = _mla.cut(*sizes, device.sm_count)
    memory_us, compute_us, latency_us = found.parts_us(made)
    if max(memory_us, compute_us) < latency_us:
        bound = "latency"
    else:
        bound = "memory" if memory_us >= compute_us else "compute"
    return Estimate(found.us(made), bound, memory_us, compute_us, latency_us)


def floor_us(problem: Problem, device: Device) -> float | None:
    """What no kernel beats by the GPU's published figures; None on a CPU.

    KV, queries and outputs moved once, or the arithmetic at the peak of the tensor cores, and an
    empty launch. Every request counts with all tokens that its row of the block table reaches, or
    with as many as the caller says.
    """
    if device.type != "cuda" or not device.bandwidth or not device.tflops:
        return None
    length = problem.max_len if problem.max_seq_len is None else problem.likely_len
    tokens, columns = problem.b * length, problem.d_qk + problem.d_v
    query_rows = problem.total_q * problem.h_q
    moved = (tokens * problem.d_qk + query_rows * columns) * problem.dtype.itemsize
    flop = 2 * problem.rows * tokens * columns
    return EMPTY_LAUNCH_US + max(moved / (device.bandwidth * 1e3), flop / (device.tflops * 1e6))
