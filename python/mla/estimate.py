"""How long a variant should take: a roofline, to rank variants rather than to promise times."""

from __future__ import annotations

from typing import NamedTuple

from . import _mla
from .device import Device
from .problem import Problem
from .variants import Variant


class Costs(NamedTuple):
    """What limits a pipeline: of the GPU's peaks, and where its own chain of steps is slower."""

    start_us: float  # a call without work: launches, the first KV, one tile's chain, merging
    bandwidth_share: float
    wgmma: bool  # its products are wgmma's, else mma.sync's
    mma_share: dict[int, float]  # of the peak of its products, by packed rows of a tile
    chain_tflops_per_sm: dict[int, float]  # where the tensor cores are faster than all other steps


# The least that a call takes on the H200 is 22 us with 16 rows and 1,024 tokens (benchmarks/h200).
# It feeds the 16-row tiles 3.86 TB/s of its 4.8: 128 requests of 16,384 tokens, benchmarks/h200; it
# could stream 4.55. ldmatrix feeds warp tiles of 16, 32 and 64 rows every 2.5, 2.05 and 1.6 cycles
# where the H200 could take one every 1.5; less an estimated fifth to third for softmax. The chain:
# 116, 154 and 243 TFLOP/s on all 132 SMs, benchmarks/h200.
SM80 = Costs(20.0, 0.80, False, {16: 0.40, 32: 0.55, 64: 0.75}, {16: 0.88, 32: 1.16, 64: 1.84})
# Predicted, to be fitted to recorded runs: the start from that of sm80; the rest from bare loops of
# the same schedules on the H200, without page table and splits. Of 604 MB they stream 4.0 and 3.86
# TB/s; from L2 they reach 720 and 750 TFLOP/s on 132 SMs. cuBLAS reaches 0.80 of wgmma's peak.
SM90_2WG = Costs(18.0, 0.83, True, {64: 0.80}, {64: 5.45})
SM90_3WG = Costs(18.0, 0.80, True, {64: 0.80}, {64: 5.68})
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


def estimate(variant: Variant, problem: Problem, device: Device) -> Estimate | None:
    """Predicted time if every request has all KV tokens that its row of the block table reaches.

    A ragged query counts as if all requests had the average of its rows. None for the host variant:
    nothing is known of the CPU.
    """
    if variant.on_host:
        return None
    costs = COSTS[variant.pipeline]
    if problem.rows == 0:
        return Estimate(costs.start_us, "latency")
    row_blocks = ceil_div(problem.rows, variant.block_rows)
    padded_rows = row_blocks * variant.block_rows
    # Row blocks add up: each has its overhead, and all but the first read KV from L2.
    kv_tokens = problem.b * (problem.max_len + row_blocks * _mla.ITEM_OVERHEAD_TOKENS)
    # No worker gets less than MIN_GROUP_TOKENS; with too few tokens for all, part of the GPU idles.
    splits = max(problem.b, problem.b * problem.max_len // _mla.MIN_GROUP_TOKENS, 1)
    busy = min(1.0, splits / device.sm_count)

    row_bytes = problem.d_qk * problem.dtype.itemsize
    kv_bytes = kv_tokens * row_bytes * (1 + (row_blocks - 1) / L2_PER_BANDWIDTH)
    query_bytes = problem.b * problem.rows * 2 * row_bytes
    memory_us = (kv_bytes + query_bytes) / (device.bandwidth * 1e3 * costs.bandwidth_share * busy)

    flop = 2 * kv_tokens * padded_rows * (problem.d_qk + problem.d_v)
    peak = device.tflops
    if device.sm in WGMMA_GPUS and not costs.wgmma:
        peak *= MMA_PER_WGMMA
    rate = min(
        peak * costs.mma_share[variant.block_rows],
        costs.chain_tflops_per_sm[variant.block_rows] * device.sm_count,
    )
    compute_us = flop / (rate * 1e6 * busy)

    work_us = max(memory_us, compute_us)
    bound = (
        "latency"
        if work_us < costs.start_us
        else "memory"
        if memory_us >= compute_us
        else "compute"
    )
    return Estimate(costs.start_us + work_us, bound)
