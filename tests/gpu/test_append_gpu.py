"""append on a GPU: the same bits as on a CPU, nothing else written, graphs, large offsets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from appending import (
    CASES,
    MISTAKES,
    POISON,
    Append,
    Mistake,
    make_append,
    make_beyond_the_table,
    make_mistake,
)
from cases import gaps_hold

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)


@both_dtypes
@pytest.mark.parametrize("page_size", [None, 1, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_where_decode_looks(
    case: Append, page_size: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    call = make_append(replace(case, dtype=dtype, page_size=page_size or case.page_size), device)
    mla.append(**call.kwargs)
    call.check()


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_tokens_without_a_place_are_left_out(mistake: Mistake, device: torch.device) -> None:
    call = make_mistake(mistake, device)
    mla.append(**call.kwargs)
    call.check()


def test_positions_beyond_the_table_are_left_out(device: torch.device) -> None:
    call = make_beyond_the_table(device)
    mla.append(**call.kwargs)
    call.check()


def test_positions_beyond_the_angles_are_left_out(device: torch.device) -> None:
    call = make_append(Append((5, 70)), device)
    call.kwargs["cos_sin"] = call.kwargs["cos_sin"][:70]
    page = call.kwargs["block_table"][1, 1]
    call.want[0][page, 6] = POISON
    mla.append(**call.kwargs)
    call.check()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("split", [False, True])
def test_garbage_writes_nothing_outside(split: bool, seed: int, device: torch.device) -> None:
    """Random 32-bit numbers, and small ones, wherever the device looks: what is in the cache is of
    the input, in its column, or untouched, and what lies around the cache stays. Several tokens may
    have one place."""
    case = Append((5, 70, 0, 9), counts=(2, 3, 1, 5), rotated=False, split=split, strided=True)
    call = make_append(case, device)
    generator = torch.Generator().manual_seed(seed)
    for name in ("block_table", "positions", "cu_seqlens_q"):
        tensor: torch.Tensor = call.kwargs[name]
        wild = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator)
        near = torch.randint(-2, 12, tensor.shape, generator=generator)
        some = torch.rand(tensor.shape, generator=generator) < 0.3
        tensor.copy_(torch.where(some, wild, near))
    mla.append(**call.kwargs)
    torch.cuda.synchronize()
    new = [call.kwargs["latent"], call.kwargs["rope"]]
    parts = call.caches if split else [call.caches[0][..., : case.c], call.caches[0][..., case.c :]]
    for cache, rows in zip(parts, new, strict=True):
        known = torch.cat((rows, torch.full_like(rows[:1], POISON)))
        found = (cache.flatten(0, 1)[:, None] == known).any(1)
        assert found.all()
    for cache in call.caches:
        assert gaps_hold(cache, POISON)


def test_does_not_wait_and_replays(device: torch.device) -> None:
    """One graph, other tokens, positions, cuts and pages."""
    case = Append((5, 70, 0, 9), counts=(2, 3, 0, 5), page_size=16)
    call = make_append(case, device)
    mla.append(**call.kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla.append(**call.kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla.append(**call.kwargs)
    for seed, counts in ((1, (2, 3, 0, 5)), (2, (1, 1, 7, 1)), (3, (0, 0, 10, 0))):
        other = make_append(replace(case, counts=counts), device, seed=seed)
        table = call.kwargs["block_table"].fill_(-1)
        columns = min(table.shape[1], other.kwargs["block_table"].shape[1])
        table[:, :columns] = other.kwargs["block_table"][:, :columns]
        for name in ("latent", "rope", "positions", "cu_seqlens_q"):
            call.kwargs[name].copy_(other.kwargs[name])
        (cache,), (want,) = call.caches, other.want
        pages = min(len(cache), len(want))
        cache.fill_(POISON)
        graph.replay()
        assert torch.equal(cache[:pages], want[:pages])
        assert (cache[pages:] == POISON).all()


def test_follows_a_side_stream(device: torch.device) -> None:
    call = make_append(Append((5, 70), counts=3), device)
    late = call.kwargs["positions"].clone()
    call.kwargs["positions"].fill_(-1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        call.kwargs["positions"].copy_(late)
        mla.append(**call.kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    call.check()


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """A cache of more than 2^32 elements; a row near its end."""
    pages, page_size, d = 120_000, 64, 576
    if torch.cuda.mem_get_info(device)[0] < 2 * pages * page_size * d + (2 << 30):
        pytest.skip("needs 11 GB of free GPU memory")
    cache = torch.zeros(pages, page_size, d, dtype=torch.bfloat16, device=device)
    latent = torch.randn(1, 1, 512, device=device).bfloat16()
    rope = torch.randn(1, 1, 64, device=device).bfloat16()

    def int32(*values: int) -> Any:
        return torch.tensor([values], dtype=torch.int32, device=device)

    mla.append(latent, rope, cache, int32(3, pages - 1), int32(page_size + 62))
    assert torch.equal(cache[-1, 62], torch.cat((latent, rope), -1).flatten())
    cache[-1, 62] = 0
    assert not cache.view(-1).view(torch.int32).any()


def test_decode_reads_what_was_appended(device: torch.device) -> None:
    """Token by token and all at once give the same cache, and decode the same bits."""
    case = Append((0, 0), counts=37, page_size=16, split=True)
    at_once = make_append(case, device)
    mla.append(**at_once.kwargs)
    at_once.check()
    one_by_one = make_append(case, device)
    for i in range(37):
        new = {name: one_by_one.kwargs[name][:, i : i + 1] for name in ("latent", "rope")}
        positions = one_by_one.kwargs["positions"][:, i : i + 1]
        mla.append(**one_by_one.kwargs | new | {"positions": positions})
    one_by_one.check()
    lens = torch.full((2,), 37, dtype=torch.int32, device=device)
    q = torch.randn(2, 1, 16, 576, device=device).bfloat16()
    outs = [
        mla.decode(q, tuple(call.caches), call.kwargs["block_table"], lens, scale=0.1)
        for call in (at_once, one_by_one)
    ]
    assert torch.equal(*outs)
