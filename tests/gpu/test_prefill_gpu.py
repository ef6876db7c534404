"""prefill on a GPU: both methods against float64, the cap of memory, capture, steps."""

from __future__ import annotations

import re
from dataclasses import replace

import mla
import pytest
import torch
from prefilling import CASES, Case, Dims, Problem, make_prefill

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

METHODS = ("absorbed", "expanded")
BIG = Dims(heads=128, nope=128, v=128)
each_method = pytest.mark.parametrize("method", METHODS)


def least_bytes(problem: Problem, method: str) -> int:
    with pytest.raises(ValueError, match=r"^workspace_bytes: got 1, expected at least") as error:
        mla.prefill(**problem.kwargs, method=method, workspace_bytes=1)
    return int(re.findall(r"\d+", str(error.value))[-1])


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(
    case: Case, smallest: bool, dtype: torch.dtype, method: str, device: torch.device
) -> None:
    problem = make_prefill(replace(case, dtype=dtype), device)
    options = {"workspace_bytes": least_bytes(problem, method)} if smallest else {}
    result = mla.prefill(**problem.kwargs, method=method, **options)
    assert result.method == method
    wanted = "mla.decode" if method == "absorbed" else "torch's memory-efficient attention"
    assert result.attention == wanted
    problem.check(result)


@each_method
def test_sizes_of_deepseek_v3(method: str, device: torch.device) -> None:
    """A long prefix, a prompt without one, and a few tokens."""
    case = Case((2100, 700, 1500), (300, 700, 3), dims=BIG, page_size=64)
    problem = make_prefill(case, device)
    problem.check(mla.prefill(**problem.kwargs, method=method))


@each_method
@pytest.mark.parametrize("megabytes", [64, 256])
def test_memory_stays_under_the_cap(method: str, megabytes: int, device: torch.device) -> None:
    case = Case((6000,), (2000,), dims=replace(BIG, heads=32), page_size=64)
    problem = make_prefill(case, device)
    problem.want.clear()
    mla.prefill(**problem.kwargs, method=method, workspace_bytes=megabytes << 20)  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = mla.prefill(**problem.kwargs, method=method, workspace_bytes=megabytes << 20)
    peak = torch.cuda.max_memory_allocated(device) - before
    outputs = sum(t.numel() * t.element_size() for t in (result.out, result.lse))
    # Rounding of the allocator; indices; a plan and its workspace, bounded by the GPU.
    assert peak - outputs < (megabytes << 20) + (48 << 20)


def test_absorbed_does_not_wait_and_replays(device: torch.device) -> None:
    case = Case((200, 130), (20, 9))
    problem = make_prefill(case, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla.prefill(**problem.kwargs, method="absorbed")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = mla.prefill(**problem.kwargs)
    assert result.method == "absorbed"
    other = make_prefill(case, device, seed=1)
    for name in ("kv_cache", "block_table", "w_kv_b"):
        problem.kwargs[name].copy_(other.kwargs[name])
    for mine, new in zip(problem.kwargs["q"], other.kwargs["q"], strict=True):
        mine.copy_(new)
    graph.replay()
    other.check(result)


@each_method
def test_wrong_values_are_clamped(method: str, device: torch.device) -> None:
    case = Case((40, 97, 16), (40, 33, 1))
    for name, index, value in (
        ("block_table", (1, 2), 2**31 - 1),
        ("block_table", (1, 0), -(2**31)),
        ("seq_lens", (1,), -5),
        ("seq_lens", (1,), 2**31 - 1),
    ):
        problem = make_prefill(case, device)
        problem.kwargs[name][index] = value
        out = mla.prefill(**problem.kwargs, method=method).out
        for rows, want in ((out[:40], problem.want[0][0]), (out[73:], problem.want[2][0])):
            torch.testing.assert_close(rows.double(), want, atol=2e-2, rtol=2e-2)
