"""How long a variant should take: a roofline, to rank variants rather than to promise times."""

from __future__ import annotations

from typing import NamedTuple

from . import _mla
from .device import Device
from .problem import Problem
from .variants import Variant

# The least that a call takes on the H200, 22 us with 16 rows and 1,024 tokens (benchmarks/h200),
# less the work: two launches, the first KV, one tile's chain of steps, merging.
START_US = 20.0
# The H200 feeds the 16-row tiles 3.86 TB/s of its 4.8: 128 requests of 16,384 tokens,
# benchmarks/h200. It could stream 4.55.
BANDWIDTH_SHARE = 0.80
# Its L2 serves 9.0 to 9.4 TB/s: what row blocks re-read costs half of what the first read costs.
L2_PER_BANDWIDTH = 2.0
# mma.sync reaches this share of its own peak by packed rows of a tile: ldmatrix feeds warp tiles of
# 16, 32 and 64 rows every 2.5, 2.05 and 1.6 cycles where the H200 could take one every 1.5; less an
# estimated fifth to third for softmax.
MMA_SHARE = {16: 0.40, 32: 0.55, 64: 0.75}
# Where the tensor cores are faster than the chain of a tile's steps, the chain is the limit:
# TFLOP/s of one SM of the H200 by rows of a tile (116, 154 and 243 on all 132, benchmarks/h200).
CHAIN_TFLOPS_PER_SM = {16: 0.88, 32: 1.16, 64: 1.84}
# The peak of data-center GPUs since Hopper is wgmma's; mma.sync has 0.66 of it on the H200.
WGMMA_GPUS = (90, 100, 103, 110)
MMA_PER_WGMMA = 0.66


class Estimate(NamedTuple):
    us: float
    bound: str  # "memory", "compute" or "latency": what the time goes to


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
        return Estimate(START_US, "latency")
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
    rate = min(
        peak * MMA_SHARE[variant.block_rows],
        CHAIN_TFLOPS_PER_SM[variant.block_rows] * device.sm_count,
    )
    compute_us = flop / (rate * 1e6 * busy)

    work_us = max(memory_us, compute_us)
    bound = "latency" if work_us < START_US else "memory" if memory_us >= compute_us else "compute"
    return Estimate(START_US + work_us, bound)
