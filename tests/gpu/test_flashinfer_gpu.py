"""mla.compat.flashinfer on a GPU: numerics, graphs planned again between replays, no waiting."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_problem
from flashinfer_calls import (
    FORMS,
    buffers,
    check_base_2,
    csr,
    offsets,
    plan,
    run,
    sizes,
    wrapper_on,
)
from mla.compat.flashinfer import MLAPlanMetadata
from running import MOST, NAN, STEPS

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

CASES = [
    Case((4096, 20, 140), (1, 1, 1)),
    Case((4096, 20, 140), (1, 1, 1), page_size=1, split_cache=True, strided=True),
    Case((4096, 20, 140), (2, 2, 2), h_q=128),
    Case((1000, 0, 65, 1), (4, 1, 0, 3), h_q=12, causal=False, page_size=1),
    Case((1000, 0, 65, 1), (4, 1, 0, 3), h_q=64, dtype="float16", page_size=16),
    Case((0, 0), (1, 1)),
    Case((900, 170), (1, 1), cache_rank=4, split_q=True, split_cache=True),
    Case((900, 170), (1, 1), d_qk=512),
    Case((900, 170), (1, 3), d_qk=320, page_size=1),
    Case(tuple(range(0, 6400, 50)), (1,) * 128, page_size=1),
]


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "reserved"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(
    case: Case, form: str, graph: bool, device: torch.device, launches: list[str]
) -> None:
    inputs = make_problem(case, device)
    options = {"use_cuda_graph": True, **buffers(case, 1 << 20, device)} if graph else {}
    wrapper = wrapper_on(device, **options)
    plan(wrapper, inputs, form)
    check_base_2(inputs, run(wrapper, inputs, form))
    # Without KV there is nothing to launch, but a graph may be replayed when there is.
    assert len(launches) == (1 if any(case.seq_lens) or graph else 0)


QUERIES = (
    (2, 2, 2, 2, 2),
    (10, 0, 0, 0, 0),
    (2, 1, 3, 0, 4),
    (1, 1, 1, 1, 1),
    (0, 0, 0, 0, 0),
    (0, 5, 0, 5, 0),
)


@pytest.mark.parametrize("control", ["cpu", "cuda"])
@pytest.mark.parametrize("page_size", [1, 64])
def test_replay_follows_the_plan(page_size: int, control: str, device: torch.device) -> None:
    """Two layers, captured at the shortest lengths; queries move from request to request."""
    inputs = make_problem(Case(MOST, QUERIES[0], page_size=page_size), device)
    wrapper = wrapper_on(device, use_cuda_graph=True, **buffers(inputs.case, 1 << 16, device))
    plan(wrapper, inputs.with_lengths(STEPS[0]), "flat")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run(wrapper, inputs, "flat") for _ in range(2)]
    for lengths in (*STEPS, *reversed(STEPS)):
        for q_lens in QUERIES:
            step = inputs.with_lengths(lengths, q_lens)
            wrapper.update_cuda_graph_plan(
                metadata=MLAPlanMetadata.csr(**csr(step, control=control))
            )
            for tensor in (t for result in results for t in result):
                tensor.fill_(NAN)
            graph.replay()
            for result in results:
                check_base_2(step, result)


def test_plans_from_the_host_do_not_wait(device: torch.device) -> None:
    """And each of many replays that are queued has its own, whatever is done to its tensors."""
    inputs = make_problem(Case(MOST, (1,) * 5, page_size=1), device)
    wrapper = wrapper_on(device, use_cuda_graph=True, **buffers(inputs.case, 1 << 16, device))
    steps = [inputs.with_lengths(lengths) for lengths in STEPS]
    flats = [csr(step, control="cpu") for step in steps]
    for step, flat in zip(steps, flats, strict=True):
        flat["kv_len_arr"] = torch.tensor(step.case.seq_lens, dtype=torch.int32)
    wrapper.plan(*flats[1].values(), *sizes(inputs.case).values())
    run(wrapper, inputs, "flat")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(wrapper, inputs, "flat")
    control = {n: t.clone().pin_memory() for n, t in flats[0].items() if n != "kv_indices"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    seen = []
    try:
        torch.cuda._sleep(100_000_000)
        for flat in flats * 2:
            for name, tensor in control.items():
                tensor.copy_(flat[name])
            wrapper.update_cuda_graph_plan(metadata=MLAPlanMetadata.csr(**flat | control))
            graph.replay()
            seen.append(tuple(t.clone() for t in result))
            for tensor in control.values():
                tensor.fill_(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, (out, lse) in zip(steps * 2, seen, strict=True):
        check_base_2(step, (out, lse))


def test_many_pages(device: torch.device) -> None:
    """The block table has each page of the flat list where it belongs."""
    generator = torch.Generator().manual_seed(0)
    lens = tuple(torch.randint(0, 20_000, (300,), generator=generator).tolist())
    total = sum(lens)
    ids = torch.randint(0, 2**31 - 1, (total,), generator=generator, dtype=torch.int32).to(device)
    wrapper = wrapper_on(device)
    case = Case(lens, (1,) * 300, page_size=1)
    wrapper.plan(
        offsets(case.query_lens),
        offsets(lens),
        ids,
        torch.tensor(lens, dtype=torch.int32),
        *sizes(case).values(),
    )
    table = wrapper._planned.step.block_table
    assert table.shape == (300, max(lens))
    got = torch.cat([row[:n] for row, n in zip(table, lens, strict=True)])
    assert torch.equal(got, ids)
