"""Offsets that 32 bits cannot hold, in every tensor of a call; and no memory but torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from cases import Case, Inputs, make_problem
from compare import check, reference
from mla.variants import Variant
from running import NAN, run
from torch import Tensor

ELEMENTS = 2**32 + 2**27  # of 16 bits
NAN_BITS = 0x7FFF  # a nan in bfloat16 and in float16


def large(count: int, dtype: torch.dtype) -> Tensor:
    needed, free = count * dtype.itemsize, torch.cuda.mem_get_info()[0]
    if free < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of GPU memory: {free / 2**30:.1f} are free")
    return torch.empty(count, dtype=dtype, device="cuda")


@pytest.fixture(scope="module")
def buffer(needs_gpu: None) -> Iterator[Tensor]:
    """Over 2^32 elements of 16 bits."""
    torch.cuda.empty_cache()
    yield large(ELEMENTS, torch.int16)
    torch.cuda.empty_cache()


def case_for(row: Variant, **changes: Any) -> Case:
    options: dict[str, Any] = {"seq_lens": (3000, 65, 0, 500), "q_lens": 2, "d_qk": row.d_qk}
    return Case(**(options | changes))


def move_pages(inputs: Inputs, pool: Tensor) -> Inputs:
    """The same problem with its pages at both ends of a larger pool."""
    cache = inputs.kv_cache
    assert isinstance(cache, Tensor)
    few, many = cache.shape[0], pool.shape[0]
    places = torch.cat([torch.arange(few // 2), torch.arange(many - (few - few // 2), many)])
    places = places[torch.randperm(few, generator=torch.Generator().manual_seed(0))].to(
        cache.device
    )
    for page, place in zip(cache, places.tolist(), strict=True):
        pool[place] = page
    table = inputs.block_table
    valid = (table >= 0) & (table < few)
    table = torch.where(valid, places.int()[table.clamp(0, few - 1).long()], table)
    return replace(inputs, kv_cache=pool, block_table=table)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pool_of_more_than_2_to_32_elements(
    row: Variant, dtype: str, buffer: Tensor, device: torch.device
) -> None:
    inputs = make_problem(case_for(row, page_size=64, dtype=dtype), device)
    pages = ELEMENTS // (64 * row.d_qk)
    pool = (
        buffer.fill_(NAN_BITS)
        .view(inputs.rows.dtype)[: pages * 64 * row.d_qk]
        .view(pages, 64, row.d_qk)
    )
    moved = move_pages(inputs, pool)
    check(run(moved, variant=row.name), reference(inputs))


def test_millions_of_pages_of_one_token(row: Variant, buffer: Tensor, device: torch.device) -> None:
    inputs = make_problem(case_for(row, page_size=1, seq_lens=(300, 0, 65)), device)
    pages = ELEMENTS // row.d_qk
    pool = buffer.fill_(NAN_BITS).view(torch.bfloat16)[: pages * row.d_qk].view(pages, 1, row.d_qk)
    check(run(move_pages(inputs, pool), variant=row.name), reference(inputs))


def test_pages_far_apart(row: Variant, buffer: Tensor, device: torch.device) -> None:
    """33 pages, 2^27 elements from one to the next; also as a pair of views."""
    inputs = make_problem(case_for(row, page_size=16, seq_lens=(250, 0, 65)), device)
    pool = (
        buffer.fill_(NAN_BITS)
        .view(torch.bfloat16)
        .as_strided((33, 16, row.d_qk), (2**27, row.d_qk, 1))
    )
    moved, expected = move_pages(inputs, pool), reference(inputs)
    check(run(moved, variant=row.name), expected)
    if row.d_v < row.d_qk:
        pair = replace(moved, kv_cache=(pool[..., : row.d_v], pool[..., row.d_v :]))
        check(run(pair, variant=row.name), expected)


def test_queries_and_outputs_far_apart(row: Variant, buffer: Tensor, device: torch.device) -> None:
    inputs = make_problem(case_for(row, seq_lens=(3000, 65, 500), given=False), device)
    expected = reference(inputs)
    b, s_q, h_q, d_qk = 3, 2, 16, row.d_qk
    far = 2**31 + 64  # elements from request to request
    q = (
        buffer.fill_(NAN_BITS)
        .view(torch.bfloat16)
        .as_strided((b, s_q, h_q, d_qk), (far, h_q * d_qk, d_qk, 1))
    )
    q.copy_(inputs.rows.view(q.shape))
    outs = large(ELEMENTS, torch.bfloat16)
    out = outs.as_strided((b, s_q, h_q, row.d_v), (far, h_q * row.d_v, row.d_v, 1)).fill_(NAN)
    lses = large(2**32 + 2**16, torch.float32)
    lse = lses.as_strided((b, s_q, h_q), (2**31 + 1, h_q, 1)).fill_(NAN)
    kwargs = inputs.kwargs() | {"q": q}
    mla.decode(**kwargs, out=out, lse=lse, return_lse=True, variant=row.name)
    check((out, lse), expected)


def test_block_table_rows_far_apart(row: Variant, buffer: Tensor, device: torch.device) -> None:
    inputs = make_problem(case_for(row, seq_lens=(3000, 700)), device)
    table = buffer.view(torch.int32).as_strided(inputs.block_table.shape, (2**31, 1))
    table.copy_(inputs.block_table)
    check(run(replace(inputs, block_table=table), variant=row.name), reference(inputs))


def test_no_memory_but_torchs(device: torch.device) -> None:
    """After the first calls nothing grows, neither what torch holds nor what the device gave."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other processes of this run use the device's memory too")
    inputs = make_problem(Case((3000, 65, 500), q_lens=2, given=False), device)

    def calls(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            run(inputs)
        torch.cuda.synchronize()
        return (
            torch.cuda.memory_allocated(),
            torch.cuda.memory_reserved(),
            -torch.cuda.mem_get_info()[0],
        )

    before = calls(5)
    assert all(now <= then for now, then in zip(calls(200), before, strict=True))
