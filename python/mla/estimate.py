"""How long a variant should take: a roofline, to rank variants rather than to promise times."""

from __future__ import annotations

from typing import NamedTuple

from ._mla import ITEM_OVERHEAD_TOKENS, MIN_BOX_ROWS, MIN_GROUP_TOKENS
from .device import Device
from .problem import Kind, Problem
from .variants import Variant


class Costs(NamedTuple):
    """What limits a pipeline: of the GPU's peaks, and where its own chain of steps is slower."""

    start_us: float  # a call without work: launches, the first KV, one tile's chain, merging
    bandwidth_share: float
    wgmma: bool  # its products are wgmma's, else mma.sync's
    mma_share: dict[int, float]  # of the peak of its products, by packed rows of a tile
    chain_tflops_per_sm: dict[int, float]  # where the tensor cores are faster than all other steps
    copy_gbs_per_sm: float = 0.0  # into shared memory, of pages that TMA has no boxes for


# Fitted to the runs of equal lengths in benchmarks/h200, 112 for each pipeline: the estimate is
# 0.75 to 1.45 of the measured time, and the choice between pipelines costs 0.1 % in the geometric
# mean, 2.4 % at worst. The least that a call takes there is 19 us for sm80 and 17 us for the
# others. mma_share: ldmatrix feeds warp tiles of 16, 32 and 64 rows every 2.5, 2.05 and 1.6 cycles
# where the H200 could take one every 1.5; less an estimated fifth to third for softmax. cuBLAS
# reaches 0.80 of wgmma's peak. copy_gbs_per_sm: 128 requests of 8,192 tokens in pages of one take
# 380 and 347 us.
SM80 = Costs(20.3, 0.82, False, {16: 0.40, 32: 0.55, 64: 0.75}, {16: 1.26, 32: 1.58, 64: 2.40})
SM90_2WG = Costs(17.1, 0.86, True, {64: 0.80}, {64: 4.8}, copy_gbs_per_sm=24.5)
SM90_3WG = Costs(16.7, 0.89, True, {64: 0.80}, {64: 5.3}, copy_gbs_per_sm=26.5)
COSTS = {"sm80": SM80, "sm90_2wg": SM90_2WG, "sm90_3wg": SM90_3WG}  # by pipeline

# The L2 of the H200 serves 9.0 to 9.4 TB/s: what row blocks re-read costs half of the first read.
L2_PER_BANDWIDTH = 2.0
# The peak of data-center GPUs since Hopper is wgmma's; mma.sync has 0.66 of it on the H200.
WGMMA_GPUS = (90, 100, 103, 110)
MMA_PER_WGMMA = 0.66


class Estimate(NamedTuple):
    us: float
    bound: str  # "memory", "compute" or "latency": what the time goes to


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Model(NamedTuple):
    """A variant on one GPU for one kind of problem: microseconds of the whole GPU at work."""

    start_us: float
    block_rows: int
    num_workers: int
    read_us: float  # a KV row from memory
    copy_us: float  # a KV row into shared memory for one row block, where boxes do not bring it
    query_us: float  # a query row, in and out
    product_us: float  # a KV row with one row block

    def beats(self, other: Model) -> bool:
        """Whether it takes less, whatever the sizes are."""
        same = (self.block_rows, self.num_workers) == (other.block_rows, other.num_workers)
        costs = zip(self[3:], other[3:], strict=True)
        return same and self.start_us < other.start_us and all(a <= b for a, b in costs)

    def work_us(self, b: int, rows: int, max_len: int) -> tuple[float, float]:
        """For memory and for products; b requests of `rows` query rows and `max_len` KV tokens."""
        _, block_rows, num_workers, read_us, copy_us, query_us, product_us = self
        row_blocks = -(-rows // block_rows)
        if row_blocks == 0:
            return 0.0, 0.0
        # Row blocks add up: each has its overhead, and all but the first read KV from L2.
        kv_tokens = b * (max_len + row_blocks * ITEM_OVERHEAD_TOKENS)
        # No worker gets less than MIN_GROUP_TOKENS; with too few tokens for all, part of the GPU
        # idles.
        splits = b if max_len < MIN_GROUP_TOKENS else b * max_len // MIN_GROUP_TOKENS
        busy = (splits or 1) * row_blocks / num_workers
        memory_us = kv_tokens * (1 + (row_blocks - 1) / L2_PER_BANDWIDTH) * read_us
        memory_us += b * rows * query_us
        product_us *= kv_tokens * row_blocks
        if copy_us:
            memory_us = max(memory_us, kv_tokens * row_blocks * copy_us)
        # Without min and max, which take a fifth of the time that a choice takes.
        return (memory_us, product_us) if busy >= 1 else (memory_us / busy, product_us / busy)


def model(variant: Variant, kind: Kind, device: Device) -> Model | None:
    """None for the host variant: nothing is known of the CPU."""
    if variant.on_host:
        return None
    costs = COSTS[variant.pipeline]
    row_bytes = kind.d_qk * kind.dtype.itemsize
    read_us = row_bytes / (device.bandwidth * 1e3 * costs.bandwidth_share)
    copies = costs.copy_gbs_per_sm > 0 and kind.page_size % MIN_BOX_ROWS > 0
    peak = device.tflops
    if device.sm in WGMMA_GPUS and not costs.wgmma:
        peak *= MMA_PER_WGMMA
    rate = min(
        peak * costs.mma_share[variant.block_rows],
        costs.chain_tflops_per_sm[variant.block_rows] * device.sm_count,
    )
    return Model(
        start_us=costs.start_us,
        block_rows=variant.block_rows,
        num_workers=device.sm_count,
        read_us=read_us,
        copy_us=row_bytes / (costs.copy_gbs_per_sm * 1e3 * device.sm_count) if copies else 0.0,
        query_us=2 * read_us,
        product_us=2 * variant.block_rows * (kind.d_qk + kind.d_v) / (rate * 1e6),
    )


def estimate(variant: Variant, problem: Problem, device: Device) -> Estimate | None:
    """Predicted time if every request has all KV tokens that its row of the block table reaches.

    A ragged query counts as if all requests had the average of its rows. None for the host variant.
    """
    found = model(variant, problem.kind, device)
    if found is None:
        return None
    memory_us, compute_us = found.work_us(problem.b, problem.rows, problem.max_len)
    work_us = max(memory_us, compute_us)
    bound = (
        "latency"
        if work_us < found.start_us
        else "memory"
        if memory_us >= compute_us
        else "compute"
    )
    return Estimate(found.start_us + work_us, bound)
