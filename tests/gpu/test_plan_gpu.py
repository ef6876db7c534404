"""The schedule that the device writes is that of schedule.h on the host, piece for piece."""

from __future__ import annotations

import pytest
import torch
from device_plan import (
    OVERLAPPING,
    SHAPES,
    Batch,
    DevicePlan,
    Shape,
    batches,
    host_schedule,
    part_sizes,
)
from mla import _mla

GUARD = 0x5A5A5A5A


def device_plan(batch: Batch, shape: Shape, workers: int) -> DevicePlan:
    """What the device writes, and not a word more."""
    name, size = SHAPES[shape], sum(part_sizes(batch, shape, workers))
    seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32, device="cuda")
    cuts = batch.cu_seqlens_q
    cu_seqlens_q = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device="cuda")
    plan = torch.full((size + 64,), GUARD, dtype=torch.int32, device="cuda")
    params = _mla.DecodeParams()
    params.seq_lens = seq_lens.data_ptr()
    params.cu_seqlens_q = 0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr()
    params.num_requests, params.s_q = len(batch.seq_lens), batch.s_q
    params.total_q, params.h_q = batch.total_q, batch.h_q
    params.max_len, params.num_workers, params.plan = batch.max_len, workers, plan.data_ptr()
    assert _mla.plan_bytes(name, params) == 4 * size
    stream = torch.cuda.current_stream()
    _mla.launch_plan(name, params, stream.device.index, stream.cuda_stream)
    words, guard = plan.cpu().split([size, 64])
    assert (guard == GUARD).all(), "the planner wrote past its plan"
    return DevicePlan(words.tolist(), batch, shape, workers)


@pytest.mark.parametrize("workers", [1, 7, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"r{shape[0]}_n{shape[1]}")
def test_device_plan_is_the_host_schedule(shape: Shape, workers: int) -> None:
    for batch in batches():
        plan = device_plan(batch, shape, workers)
        plan.check_inside()
        plan.check_is(host_schedule(batch, shape, workers))


@pytest.mark.parametrize("workers", [1, 7, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"r{shape[0]}_n{shape[1]}")
@pytest.mark.parametrize("name", OVERLAPPING)
def test_plans_of_overlapping_requests_stay_inside(name: str, shape: Shape, workers: int) -> None:
    device_plan(OVERLAPPING[name], shape, workers).check_inside()
