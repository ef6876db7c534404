"""prefill on a GPU: both methods against float64, the cap of memory, capture, steps."""

from __future__ import annotations

import re
from dataclasses import replace

import mla
import pytest
import torch
from mla import fused
from mla.layer_config import Dims as LayerDims
from mla.models import MODELS
from mla.prefill_times import Method
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
    if method == "absorbed":
        assert result.attention == "mla.decode"
    elif max(case.counts) < 128 or smallest:
        assert result.attention in (fused.FLASH, fused.EFFICIENT)
    else:
        assert (fused.CUDNN in result.attention) == works(problem)
    problem.check(result)


def works(problem: Problem) -> bool:
    d = problem.case.dims
    weights = problem.kwargs["w_kv_b"]
    return fused.cudnn_works(weights.device, weights.dtype, d.nope + d.rope, d.v)


def flash_works(problem: Problem) -> bool:
    d = problem.case.dims
    weights = problem.kwargs["w_kv_b"]
    return fused.flash_works(weights.device, weights.dtype, d.nope + d.rope, d.v)


def test_flash_works(device: torch.device) -> None:
    assert fused.flash_works(device, torch.bfloat16, 192, 128)


def test_cudnn_works_on_hopper(device: torch.device) -> None:
    """For the heads of every model; elsewhere nothing is asked."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("needs a GPU of compute capability 9.0")
    found = {
        name: fused.cudnn_works(device, torch.bfloat16, model.head_dim, model.v)
        for name, model in MODELS.items()
    }
    assert found["DeepSeek-V3"], found


@pytest.mark.parametrize(
    ("past", "new"),
    [(0, 2048), (0, 700), (1024, 512), (300, 129), (5000, 1100), (4096, 128), (100, 3)],
)
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("kernel", [fused.CUDNN, fused.FLASH, fused.EFFICIENT])
def test_expanded_by_each_kernel(
    past: int, new: int, heads: int, kernel: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Sizes that cuDNN is prepared for, and others that are cut or filled up."""
    if heads == 128 and past + new > 2000:
        heads = 32  # the reference has float64 logits
    problem = make_prefill(Case((past + new,), new, dims=replace(BIG, heads=heads)), device)
    if kernel != fused.CUDNN:
        monkeypatch.setattr(fused, "cudnn_works", lambda *_: False)
    if kernel == fused.EFFICIENT:
        monkeypatch.setattr(fused, "flash_works", lambda *_: False)
    result = mla.prefill(**problem.kwargs, method="expanded")
    if kernel == fused.CUDNN:
        assert (kernel in result.attention) == (new >= 128 and works(problem))
    elif kernel == fused.FLASH and flash_works(problem):
        assert result.attention == kernel
    else:
        assert result.attention == fused.EFFICIENT
    problem.check(result)


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_shares_its_chunks(causal: bool, device: torch.device) -> None:
    """Ragged, by one attention for many requests; then a long one, and short ones again."""
    lens = (70, 90, 400, 33, 16, 1500, 64, 17)
    new = (7, 90, 100, 1, 16, 600, 64, 9)
    problem = make_prefill(Case(lens, new, dims=replace(BIG, heads=16), causal=causal), device)
    problem.check(mla.prefill(**problem.kwargs, method="expanded"))


@pytest.mark.parametrize("megabytes", [24, 100])
def test_in_chunks(megabytes: int, device: torch.device) -> None:
    """Several chunks before the new tokens and among them, merged."""
    case = Case((3000, 900), (1000, 900), dims=replace(BIG, heads=16), page_size=64)
    problem = make_prefill(case, device)
    problem.check(mla.prefill(**problem.kwargs, method="expanded", workspace_bytes=megabytes << 20))


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


@pytest.mark.parametrize("method", [*METHODS, None])
def test_a_plan_does_not_wait_and_replays(method: Method | None, device: torch.device) -> None:
    """Replayed with weights of zeros, heads give zeros."""
    case = Case((1500, 900, 70), (1100, 2, 70), dims=replace(BIG, heads=16), page_size=64)
    problem = make_prefill(case, device)
    given = problem.kwargs
    plan = mla.plan_prefill(
        given["block_table"], given["seq_lens"], cu_seqlens_q=given["cu_seqlens_q"],
        tokens=len(given["q"][0]), dims=LayerDims(heads=16, kv_lora=512, nope=128, rope=64, v=128),
        dtype=case.dtype, num_pages=len(given["kv_cache"]), page_size=64, method=method,
    )  # fmt: skip
    mla.prefill(**given, plan=plan)  # prepares kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = mla.prefill(**given, plan=plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    problem.check(result)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = mla.prefill(**given, plan=plan)
    given["w_kv_b"].zero_()
    graph.replay()
    assert result.method == plan.method == (method or result.method)
    assert not result.out.any()


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
