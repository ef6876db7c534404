"""How long a variant should take: a roofline, to rank variants rather than to promise times."""

from __future__ import annotations

from typing import NamedTuple

from . import _mla
from .device import Device
from .problem import Problem
from .variants import Variant

# Two dependent kernels, decode and combine, on the H200: 4.0 us until the first has streamed
# nothing, and 1.5 us for the second on a stream (0.6 us in a graph).
LAUNCH_US = 5.5
# The H200 streams KV into shared memory at 4.55 TB/s of its 4.8.
BANDWIDTH_SHARE = 0.95
# Its L2 serves 9.0 to 9.4 TB/s: what row blocks re-read costs half of what the first read costs.
L2_PER_BANDWIDTH = 2.0
# mma.sync reaches this share of its own peak by packed rows of a tile: ldmatrix feeds warp tiles of
# 16, 32 and 64 rows every 2.5, 2.05 and 1.6 cycles where the H200 could take one every 1.5; less an
# estimated fifth to third for softmax.
MMA_SHARE = {16: 0.40, 32: 0.55, 64: 0.75}
# The peak of data-center GPUs since Hopper is wgmma's; mma.sync has 0.66 of it on the H200.
WGMMA_GPUS = (90, 100, 103, 110)
MMA_PER_WGMMA = 0.66


class Estimate(NamedTuple):
    us: float
    bound: str  # "memory", "compute" or "launch": what the time goes to


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def estimate(variant: Variant, problem: Problem, device: Device) -> Estimate | None:
    """Predicted time if every request has all KV tokens that its row of the block table reaches.

    A ragged query counts as if all requests had the average of its rows. None for the host variant:
    nothing is known of the CPU.
    """
    if variant.on_host:
        return None
    if problem.rows == 0:
        return Estimate(LAUNCH_US, "launch")
    row_blocks = ceil_div(problem.rows, variant.block_rows)
    padded_rows = row_blocks * variant.block_rows
    # Row blocks add up: each has its overhead, and all but the first read KV from L2.
    kv_tokens = problem.b * (problem.max_len + row_blocks * _mla.ITEM_OVERHEAD_TOKENS)
    # No worker gets less than MIN_GROUP_TOKENS; with too few tokens for all, part of the GPU idles.
    splits = max(problem.b, problem.b * problem.max_len // _mla.MIN_GROUP_TOKENS, 1)
    busy = min(1.0, splits / device.sm_count)

    row_bytes = problem.d_qk * problem.dtype.itemsize
    kv_bytes = kv_tokens * row_bytes * (1 + (row_blocks - 1) / L2_PER_BANDWIDTH)
    query_bytes = problem.b * padded_rows * 2 * row_bytes
    memory_us = (kv_bytes + query_bytes) / (device.bandwidth * 1e3 * BANDWIDTH_SHARE * busy)

    flop = 2 * kv_tokens * padded_rows * (problem.d_qk + problem.d_v)
    peak = device.tflops * (MMA_PER_WGMMA if device.sm in WGMMA_GPUS else 1.0)
    compute_us = flop / (peak * 1e6 * MMA_SHARE[variant.block_rows] * busy)

    work_us = max(memory_us, compute_us)
    bound = "launch" if work_us < LAUNCH_US else "memory" if memory_us >= compute_us else "compute"
    return Estimate(LAUNCH_US + work_us, bound)
