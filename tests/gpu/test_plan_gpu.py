"""The schedule that the device writes is that of schedule.h on the host, piece for piece."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from mla import _mla
from torch import Tensor

GUARD = 0x5A5A5A5A
Shape = tuple[int, int]  # block_rows, block_n
SHAPES = {
    (row["block_rows"], row["block_n"]): row["name"]
    for row in _mla.variants()
    if row["targets"] != "host"
}


@dataclass(frozen=True)
class Batch:
    seq_lens: list[int]
    q_lens: int | list[int] = 1
    h_q: int = 16
    max_len: int = 2**31 - 1

    @property
    def cu_seqlens_q(self) -> list[int] | None:
        return None if isinstance(self.q_lens, int) else [0, *accumulate(self.q_lens)]

    @property
    def total_q(self) -> int:
        return sum(self.query_lens)

    @property
    def query_lens(self) -> list[int]:
        return [self.q_lens] * len(self.seq_lens) if isinstance(self.q_lens, int) else self.q_lens


def batches() -> list[Batch]:
    rng = random.Random(0)
    found = [
        Batch([0]),
        Batch([1]),
        Batch([0] * 40),
        Batch([129] * 3),
        Batch([100_000]),
        Batch([2**31 - 100]),
        Batch([8192] * 128, h_q=128),
        Batch([-5, 3, 10**6], max_len=4096),
        Batch([700, 50, 9000], q_lens=[0, 0, 3]),
        Batch([700, 50, 9000], q_lens=[2, 0, 0]),
        Batch([500, 600], q_lens=[0, 0]),
        Batch([64] * 1025),  # more requests than the planner has threads
        Batch([rng.randint(0, 300) for _ in range(5000)], q_lens=2),
        Batch([3000], q_lens=8192, h_q=128),
    ]
    for _ in range(60):
        b = rng.choice((1, 2, 5, 33, 300))
        longest = rng.choice((70, 1000, 20_000))
        lens = [rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(b)]
        q_lens = rng.choice((rng.randint(1, 9), [rng.choice((0, 1, 2, 5, 40)) for _ in range(b)]))
        found.append(
            Batch(
                lens,
                q_lens,
                h_q=rng.choice((1, 5, 16, 40, 128)),
                max_len=rng.choice((2**31 - 1, 777)),
            )
        )
    return found


def device_plan(name: str, shape: Shape, batch: Batch, workers: int) -> tuple[Tensor, ...]:
    """What the device writes: header, workers, splits and pieces, as int32; and a guard behind."""
    block_rows, _ = shape
    b = len(batch.seq_lens)
    if isinstance(batch.q_lens, int):
        max_items = b * -(-batch.q_lens * batch.h_q // block_rows)
    else:
        max_items = -(-batch.total_q * batch.h_q // block_rows) + b
    planners_own = 3 * (b + 1)  # an int64 and an int32 for each request
    sizes = [8, 4 * workers, 8 * workers, 8 * (max_items + workers), planners_own, 64]

    seq_lens = torch.tensor(batch.seq_lens, dtype=torch.int32, device="cuda")
    cuts = batch.cu_seqlens_q
    cu_seqlens_q = None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device="cuda")
    plan = torch.full((sum(sizes),), GUARD, dtype=torch.int32, device="cuda")
    params = _mla.DecodeParams()
    params.seq_lens = seq_lens.data_ptr()
    params.cu_seqlens_q = 0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr()
    params.num_requests, params.total_q, params.h_q = b, batch.total_q, batch.h_q
    params.s_q = batch.q_lens if isinstance(batch.q_lens, int) else 0
    params.max_len, params.num_workers, params.plan = batch.max_len, workers, plan.data_ptr()
    assert _mla.plan_bytes(name, params) == 4 * sum(sizes[:-1])
    stream = torch.cuda.current_stream()
    _mla.launch_plan(name, params, stream.device.index, stream.cuda_stream)
    header, by_worker, splits, pieces, _, guard = plan.cpu().split(sizes)
    return header, by_worker.view(-1, 4), splits.view(-1, 8), pieces.view(-1, 8), guard


def walk(batch: Batch, shape: Shape, plan: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    """What each worker computes, as the kernels read it and as `_mla.schedule` lists it."""
    block_rows, block_n = shape
    _, workers, _, pieces, _ = plan
    starts = [0, *accumulate(batch.query_lens)]
    rows = pieces.tolist()
    found: list[tuple[object, ...]] = []
    for worker, (first, end, member, _) in enumerate(workers.tolist()):
        for request, token, tokens, length, row, tile, end_tile, slot in rows[first:end]:
            row_block = row // block_rows + member
            if tile == end_tile or row_block * block_rows >= tokens * batch.h_q:
                continue
            assert tokens == batch.query_lens[request]
            assert token == (0 if batch.cu_seqlens_q is None else starts[request])
            assert length == min(max(batch.seq_lens[request], 0), batch.max_len, _mla.MAX_LEN)
            tiles = max(1, -(-length // block_n))
            found.append(
                (
                    worker,
                    request,
                    row_block,
                    tile * block_n,
                    min(end_tile * block_n, length),
                    tile == 0,
                    end_tile == tiles,
                    -1 if slot < 0 else slot + member,
                )
            )
    return found


@pytest.mark.parametrize("workers", [1, 7, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"r{shape[0]}_n{shape[1]}")
def test_device_plan_is_the_host_schedule(shape: Shape, workers: int) -> None:
    for batch in batches():
        host = _mla.schedule(
            batch.seq_lens,
            batch.cu_seqlens_q,
            batch.q_lens if isinstance(batch.q_lens, int) else 0,
            batch.total_q,
            batch.h_q,
            batch.max_len,
            *shape,
            workers,
        )
        plan = device_plan(SHAPES[shape], shape, batch, workers)
        header, _, splits, _, guard = plan
        assert (guard == GUARD).all(), "the planner wrote past its plan"

        units_per_group = int(header[:2].view(torch.int64))
        num_groups, group_size, num_splits = header[4:7].tolist()
        assert units_per_group == host["units_per_group"], batch
        assert (num_groups, group_size) == (host["num_groups"], host["group_size"]), batch
        bundle_rows = group_size * shape[0]
        items = [
            (request, row // bundle_rows, first, last)
            for request, _, _, row, first, last, *_ in splits[:num_splits].tolist()
        ]
        assert sorted(items) == sorted(host["splits"]), batch  # their order is free
        assert walk(batch, shape, plan) == host["pieces"], batch
