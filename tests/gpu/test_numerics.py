"""Every row of the table against the fp64 reference, on every case of its dimensions.

What is poisoned in the inputs: tests/cases.py; in the outputs: tests/running.py.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import mla
import pytest
import torch
from cases import (
    DIMS,
    DTYPES,
    Case,
    Inputs,
    make_problem,
    single_tiles_beside_long_pieces,
)
from compare import check, reference
from covering import CASES
from mla.variants import Variant
from running import GPU_ROWS, NAN, assert_same_bits, run
from torch import Tensor


def rows_for(case: Case) -> list[Variant]:
    return [
        row
        for row in GPU_ROWS
        if row.on_host or (row.d_qk == case.d_qk and case.dtype in row.dtypes)
    ]


def runs(cases: list[Case]) -> pytest.MarkDecorator:
    """Each case on each row that has its dimensions; case by case, as rows share its reference."""
    params = [
        pytest.param(row, case, id=f"{row.name}-{case}") for case in cases for row in rows_for(case)
    ]
    return pytest.mark.parametrize(("row", "case"), params)


@functools.lru_cache(maxsize=1)
def solved(case: Case, device: torch.device) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    inputs = make_problem(case, device)
    return inputs, reference(inputs)


def special_cases() -> list[Case]:
    """What pairs of ordinary values do not reach, for all dimensions."""
    cases = [
        Case((), q_lens=2, label="no requests"),
        Case((), q_lens=(), label="no requests"),
        Case((100, 200), q_lens=0, label="no query tokens"),
        Case((100, 200, 0), q_lens=(0, 0, 0), label="no query tokens"),
        Case((0, 0), q_lens=5, label="no KV"),
        Case((3, 1, 6), q_lens=7, causal=True, h_q=24, label="rows that see nothing"),
        Case((70, 0, 300), q_lens=3, cache_rank=4, split_cache=True, label="rank 4 cache"),
        Case((700, 50), q_lens=2, h_q=8, scale=1e4, values="ternary", label="exact ties"),
        Case((700, 50), q_lens=2, h_q=8, scale=-1e4, values="ternary", label="exact ties"),
        Case((20000,), h_q=128, label="one long request"),
        Case((4000,) * 9, q_lens=4, h_q=128, label="more row blocks than a group"),
        Case((1000,), q_lens=(1000,), h_q=6, label="prefill"),
    ]
    cases += [
        Case((3000, 2999), q_lens=2, page_size=n, label="split")
        for n in (1, 2, 16, 32, 48, 64, 128, 480)
    ]
    return [
        replace(case, d_qk=d_qk, dtype=dtype) for case in cases for d_qk in DIMS for dtype in DTYPES
    ]


@runs([*CASES, *special_cases()])
def test_matches_the_reference(
    row: Variant, case: Case, device: torch.device, launches: list[str]
) -> None:
    inputs, expected = solved(case, device)
    result = run(inputs, variant=row.name)
    assert set(launches) <= {row.name}, "another variant ran"
    assert launches or not expected[0].numel(), "no variant ran"
    check(result, expected, case.scale)


@runs([Case((8200,), q_lens=8192, h_q=2, label="8192 query tokens")])
def test_many_query_tokens(
    row: Variant, case: Case, device: torch.device, launches: list[str]
) -> None:
    inputs, expected = solved(case, device)
    check(run(inputs, variant=row.name), expected)
    assert launches == [row.name]


@pytest.mark.parametrize(
    "row", [row for row in GPU_ROWS if row.d_qk == 576], ids=lambda row: row.name
)
def test_single_tiles_beside_long_pieces(row: Variant, device: torch.device) -> None:
    """Some workers go from a piece of several rounds of any ring of stages to one of one tile."""
    workers = torch.cuda.get_device_properties(device).multi_processor_count
    inputs = make_problem(Case(single_tiles_beside_long_pieces(workers), h_q=16), device)
    check(run(inputs, variant=row.name), reference(inputs))


@runs([Case((300, 200, 0, 1500), q_lens=2, d_qk=d_qk, label="nan") for d_qk in DIMS])
def test_nan_stays_in_its_request(row: Variant, case: Case, device: torch.device) -> None:
    inputs = make_problem(case, device)
    # The last token of request 1. Its first query token does not see it, but 0 * nan may be nan.
    page = int(inputs.block_table[1, 199 // case.page_size])
    assert isinstance(inputs.kv_cache, Tensor)
    inputs.kv_cache[page, 199 % case.page_size] = NAN
    out, lse = run(inputs, variant=row.name)
    expected = reference(inputs)
    others = [0, 2, 3]
    assert lse is not None
    assert out[1, 1].isnan().all(), "nan within a request's length must show"
    assert lse[1, 1].isnan().all()
    check((out[others], lse[others]), (expected[0][others], expected[1][others]))


@runs(
    [
        Case((300, 0, 1500), q_lens=(2, 1, 3), d_qk=d_qk, strided=True, label="inputs")
        for d_qk in DIMS
    ]
)
def test_inputs_are_not_written(row: Variant, case: Case, device: torch.device) -> None:
    inputs = make_problem(case, device)
    tensors = [inputs.q, inputs.kv_cache, inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q]
    flat = [
        t.new_empty(0).set_(t.untyped_storage()).view(torch.int16)
        for t in tensors
        if isinstance(t, Tensor)
    ]
    before = [t.clone() for t in flat]
    run(inputs, variant=row.name)
    assert all(torch.equal(x, y) for x, y in zip(flat, before, strict=True))


@runs(
    [
        Case((300, 200, 700), q_lens=3, h_q=20, d_qk=d_qk, label="layouts")
        for d_qk in DIMS
        if d_qk != 512
    ]
)
def test_layouts_give_the_same_bits(row: Variant, case: Case, device: torch.device) -> None:
    """Packed and split, dense and padded, with one content of unused memory and another."""
    want = run(make_problem(case, device), variant=row.name)
    for change in (
        {"split_q": True},
        {"split_cache": True},
        {"split_q": True, "split_cache": True, "strided": True},
        {"poison": float("inf"), "cache_rank": 4},
        {"q_lens": (3, 3, 3)},
    ):
        out, lse = run(make_problem(replace(case, **change), device), variant=row.name)
        assert lse is not None
        assert_same_bits((out.reshape(want[0].shape), lse.reshape(want[0].shape[:-1])), want)


def test_wrong_dimensions_are_refused(
    row: Variant, device: torch.device, launches: list[str]
) -> None:
    if row.on_host:
        pytest.skip("the host variant has no dimensions of its own")
    other = next(d_qk for d_qk in DIMS if d_qk != row.d_qk)
    inputs = make_problem(Case((10,), d_qk=other), device)
    with pytest.raises(mla.UnsupportedError, match=row.name):
        run(inputs, variant=row.name)
    assert not launches


def test_tensors_elsewhere_are_refused(
    row: Variant, device: torch.device, launches: list[str]
) -> None:
    d_qk = row.d_qk or 576
    with pytest.raises(mla.UnsupportedError):
        run(make_problem(Case((10,), d_qk=d_qk), "cpu"), variant=row.name)
    with pytest.raises(mla.UnsupportedError):
        run(make_problem(Case((10,), d_qk=d_qk), device), variant="cpu")
    assert not launches


@pytest.mark.parametrize("d_qk", DIMS)
@pytest.mark.parametrize("heads", [16, 128])
def test_a_pipeline_by_name(
    d_qk: int, heads: int, device: torch.device, launches: list[str]
) -> None:
    case = Case((500, 90), h_q=heads, d_qk=d_qk)
    inputs, expected = solved(case, device)
    for pipeline in dict.fromkeys(row.pipeline for row in rows_for(case)):
        launches.clear()
        check(run(inputs, variant=pipeline), expected)
        assert len(launches) == 1
        assert launches[0].startswith(f"{pipeline}_")


@pytest.mark.parametrize("d_qk", DIMS)
@pytest.mark.parametrize("heads", [1, 16, 40, 128])
def test_explain_names_what_runs(
    d_qk: int, heads: int, device: torch.device, launches: list[str]
) -> None:
    case = Case((500, 90), h_q=heads, q_lens=2, d_qk=d_qk)
    inputs, expected = solved(case, device)
    check(run(inputs), expected)
    explained = mla.explain(
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.seq_lens,
        cu_seqlens_q=inputs.cu_seqlens_q,
    )
    assert explained.variant is not None
    assert launches == [explained.variant.name]


@pytest.mark.filterwarnings("ignore")  # what the profiler says of itself
def test_the_kernel_of_the_row_runs(row: Variant, device: torch.device) -> None:
    """Of the row and of no other: the driver's own record of launches says so."""
    inputs = make_problem(Case((3000,), d_qk=row.d_qk), device)
    run(inputs, variant=row.name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(inputs, variant=row.name)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    if not any(name.startswith("mla_") or "at::" in name for name in names):
        pytest.skip("needs CUPTI: the profiler recorded no kernels, of torch neither")
    ours = {name for name in names if name.startswith("mla_")}
    assert f"mla_{row.name}_bf16" in ours
    assert ours <= {f"mla_{row.name}_bf16", "mla_plan_few", f"mla_combine_bf16_v{row.d_v}_few"}
