"""What decode hands to the extension: addresses, strides, scratch memory.

No GPU: launches are recorded, and the tensors lie on the CPU, where every address that a kernel
would form can be looked up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from cases import Case, Inputs, make_problem
from mla import _mla, launch, workspace
from mla.device import Device
from recording import STREAM, Launch, set_stream
from running import plan_for
from torch import Tensor


def rows_of(p: dict[str, Any], name: str, itemsize: int, index: tuple[int, int, int]) -> int:
    """The address that a kernel forms of (request, token, head)."""
    strides = [p[f"{name}_{axis}"] for axis in ("batch", "token", "head")]
    return int(p[name] + itemsize * sum(i * s for i, s in zip(index, strides, strict=True)))


def address(tensor: Tensor, *index: int) -> int:
    return tensor[index].data_ptr()


def parts(value: Tensor | tuple[Tensor, Tensor], d_v: int) -> tuple[Tensor, Tensor]:
    return value if isinstance(value, tuple) else (value[..., :d_v], value[..., d_v:])


LAYOUTS = [
    Case((70, 33, 5), q_lens=2, h_q=3, page_size=16),
    Case((70, 33, 5), q_lens=2, h_q=3, page_size=16, strided=True),
    Case((70, 33, 5), q_lens=2, h_q=3, page_size=16, split_q=True, split_cache=True),
    Case((70, 33, 5), q_lens=2, h_q=3, page_size=16, split_q=True, strided=True),
    Case((70, 33, 5), q_lens=2, h_q=3, page_size=16, split_cache=True, cache_rank=4, d_qk=288),
    Case((70, 33, 5), q_lens=(2, 0, 4), h_q=3, page_size=16, strided=True, d_qk=320),
    Case((70, 33, 5), q_lens=(2, 0, 4), h_q=3, page_size=1, split_q=True, dtype="float16"),
    Case((70, 33, 5), q_lens=1, h_q=1, page_size=480, cache_rank=4, d_qk=512),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_addresses(case: Case, launches: list[Launch]) -> None:
    inputs = make_problem(case, "cpu")
    out = torch.empty(*case.row_shape[:-1], 2 * case.h_q, case.d_v, dtype=inputs.rows.dtype)
    out = out[..., ::2, :]
    lse = torch.empty(*case.row_shape[::-1]).permute(*reversed(range(len(case.row_shape))))
    mla.decode(**inputs.kwargs(), out=out, lse=lse)
    first, second = launches
    assert (first.kind, second.kind) == ("plan", "decode")
    assert first.stream == second.stream == STREAM
    assert first.variant == second.variant
    assert second.dtype == case.dtype
    p = second.params

    q_nope, q_rope = parts(inputs.q, case.d_v)
    latent, rope = parts(inputs.kv_cache, case.d_v)
    if case.ragged:
        places = [((0, t, h), (t, h)) for t in range(case.row_shape[0]) for h in range(case.h_q)]
    else:
        b, s_q, h_q = case.row_shape
        places = [((i, t, h),) * 2 for i in range(b) for t in range(s_q) for h in range(h_q)]
    for index, place in places:
        assert rows_of(p, "q_nope", 2, index) == address(q_nope, *place)
        assert rows_of(p, "out", 2, index) == address(out, *place)
        assert rows_of(p, "lse", 4, index) == address(lse, *place)
        if case.d_qk > case.d_v:
            assert rows_of(p, "q_rope", 2, index) == address(q_rope, *place)
    for page in (0, 1, latent.shape[0] - 1):
        for slot in range(case.page_size):
            at = page * p["latent_page"] + slot * p["latent_token"]
            assert p["latent"] + 2 * at == address(latent, page, slot)
            if case.d_qk > case.d_v:
                at = page * p["rope_page"] + slot * p["rope_token"]
                assert p["rope"] + 2 * at == address(rope, page, slot)
    for i in range(len(case.seq_lens)):
        assert p["block_table"] + 4 * i * p["block_table_stride"] == address(inputs.block_table, i)

    assert p["seq_lens"] == inputs.seq_lens.data_ptr()
    cuts = inputs.cu_seqlens_q
    assert p["cu_seqlens_q"] == (0 if cuts is None else cuts.data_ptr())
    assert (p["num_pages"], p["page_size"]) == latent.shape[:2]
    assert p["num_requests"] == 3
    assert p["s_q"] == (0 if case.ragged else case.q_lens)
    assert p["total_q"] == sum(case.query_lens)
    assert p["h_q"] == case.h_q
    assert p["max_len"] == inputs.block_table.shape[1] * case.page_size
    assert p["num_workers"] == 108
    assert p["scale_log2"] == pytest.approx(case.scale / math.log(2))
    assert p["causal"] == 1
    for name in ("seq_lens", "cu_seqlens_q", "num_requests", "s_q", "total_q", "h_q", "max_len"):
        assert first.params[name] == p[name]
    assert (first.params["num_workers"], first.params["plan"]) == (108, p["plan"])


def call(case: Case | None = None) -> Inputs:
    return make_problem(case or Case((70, 33, 5), q_lens=2, h_q=16), "cpu")


def test_without_lse(launches: list[Launch]) -> None:
    mla.decode(**call().kwargs() | {"causal": False})
    p = launches[-1].params
    assert p["lse"] == p["lse_batch"] == p["lse_token"] == p["lse_head"] == 0
    assert p["causal"] == 0


def test_nothing_is_launched_for_nothing(launches: list[Launch]) -> None:
    mla.decode(**call(Case((), q_lens=2)).kwargs())
    mla.decode(**call(Case((5, 6), q_lens=0)).kwargs())
    mla.decode(**call().kwargs() | {"block_table": torch.empty(3, 0, dtype=torch.int32)})
    empty = torch.zeros(0, dtype=torch.int32)
    mla.plan(empty, h_q=16, d_qk=576, dtype=torch.float16, page_size=64).update(empty)
    assert launches == []


class TestWorkspace:
    def test_parts_follow_each_other(self, launches: list[Launch]) -> None:
        inputs = call()
        told = mla.explain(**inputs.kwargs(), variant=None)
        assert told.variant is not None
        mla.decode(**inputs.kwargs())
        p = launches[-1].params
        row = next(v for v in mla.variants() if v.name == launches[-1].variant)
        (kept,) = workspace.sizes()
        assert kept["stream"] == STREAM
        base, size = p["plan"], kept["bytes"]
        schedule = p["o_partial"] - base
        params = _mla.DecodeParams()
        params.num_requests, params.s_q, params.h_q, params.num_workers = 3, 2, 16, 108
        assert schedule % 256 == 0
        assert 0 <= schedule - _mla.plan_bytes(row.name, params) < 256
        assert p["lse2_partial"] - p["o_partial"] == (2 * 108 + 1) * row.block_rows * row.d_v * 2
        assert base + size - p["lse2_partial"] == (2 * 108 + 1) * row.block_rows * 36

    def test_is_kept_and_grown(self, launches: list[Launch]) -> None:
        small, large = call(), call(Case((70, 33, 5) * 3, q_lens=2, h_q=128))
        mla.decode(**small.kwargs())
        first = workspace.sizes()
        mla.decode(**small.kwargs())
        assert workspace.sizes() == first
        assert launches[1].params["plan"] == launches[3].params["plan"]
        mla.decode(**large.kwargs())
        grown = workspace.sizes()
        assert grown[0]["bytes"] > first[0]["bytes"]
        mla.decode(**small.kwargs())
        assert workspace.sizes() == grown == mla.info()["workspaces"]

    def test_each_stream_has_its_own(
        self, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mla.decode(**call().kwargs())
        set_stream(monkeypatch, STREAM + 1)
        mla.decode(**call().kwargs())
        assert [kept["stream"] for kept in workspace.sizes()] == [STREAM, STREAM + 1]
        assert launches[1].params["plan"] != launches[3].params["plan"]

    def test_a_captured_graph_has_its_own(
        self, launches: list[Launch], captured: list[int]
    ) -> None:
        captured.append(STREAM)
        mla.decode(**call().kwargs())
        assert len(launches) == 2
        assert workspace.sizes() == []

    def test_of_the_caller(self, launches: list[Launch]) -> None:
        inputs = call()
        needed = "workspace: got 0 bytes, expected at least "
        with pytest.raises(ValueError, match=f"^{needed}") as caught:
            mla.decode(**inputs.kwargs(), workspace=torch.empty(0, dtype=torch.uint8))
        assert launches == []
        size = int(str(caught.value).removeprefix(needed))
        mine = torch.empty(size, dtype=torch.uint8)
        mla.decode(**inputs.kwargs(), workspace=mine)
        assert launches[-1].params["plan"] == mine.data_ptr()
        assert workspace.sizes() == []
        smaller = size - (launches[-1].params["o_partial"] - mine.data_ptr())
        plan = plan_for(inputs, max_pages=inputs.block_table.shape[1])  # for the same variant
        mla.decode(**inputs.kwargs(), workspace=mine[:smaller], plan=plan)
        assert launches[-1].params["o_partial"] == mine.data_ptr()
        with pytest.raises(ValueError, match=f"^workspace: got {smaller - 1} bytes, expected"):
            mla.decode(**inputs.kwargs(), workspace=mine[: smaller - 1], plan=plan)

    @pytest.mark.parametrize("plan_pages", [None, 40, 400])
    def test_of_a_batch_invariant_call(
        self, plan_pages: int | None, launches: list[Launch]
    ) -> None:
        """It has room for what was planned, whatever the block table reaches."""
        inputs = call(Case((5000, 70), h_q=16, page_size=64))
        mode = {"batch_invariant": True, "variant": "sm80"}
        plan = plan_pages and plan_for(inputs, max_pages=plan_pages, **mode)
        mla.decode(**inputs.kwargs(), **mode, plan=plan)
        p = launches[-1].params
        assert p["batch_invariant"] == 1
        reach = inputs.block_table.shape[1] * 64
        planned = reach if plan_pages is None else plan_pages * 64
        assert p["max_len"] == min(planned, reach)
        row = next(v for v in mla.variants() if v.name == launches[-1].variant)
        sizes = _mla.DecodeParams()
        sizes.num_requests, sizes.s_q, sizes.total_q, sizes.h_q = 2, 1, 2, 16
        sizes.num_workers, sizes.max_len, sizes.batch_invariant = 108, planned, 1
        slots = _mla.partial_slots(row.name, sizes)
        assert slots > 0
        assert p["lse2_partial"] - p["o_partial"] == slots * row.block_rows * row.d_v * 2
        (kept,) = workspace.sizes()
        base = p["plan"] if plan is None else p["o_partial"]
        assert base + kept["bytes"] - p["lse2_partial"] == slots * row.block_rows * 36
        short = torch.empty(kept["bytes"] - 1, dtype=torch.uint8)
        with pytest.raises(ValueError, match=f"expected at least {kept['bytes']}"):
            mla.decode(**inputs.kwargs(), **mode, plan=plan, workspace=short)
        written = launches[0]
        assert (written.kind, written.params["max_len"]) == ("plan", planned)
        assert written.params["batch_invariant"] == 1


class TestPlan:
    def test_is_written_once_and_read_by_every_call(self, launches: list[Launch]) -> None:
        inputs = call()
        made = plan_for(inputs)
        assert made.schedule is not None
        for _ in range(3):
            mla.decode(**inputs.kwargs(), plan=made)
        assert [launch.kind for launch in launches] == ["plan", "decode", "decode", "decode"]
        assert {launch.params["plan"] for launch in launches} == {made.schedule.data_ptr()}
        assert {launch.variant for launch in launches} == {made.variant.name}
        assert {launch.params["num_workers"] for launch in launches} == {108}
        assert launches[0].params["seq_lens"] == inputs.seq_lens.data_ptr()

    def test_update_writes_in_place(self, launches: list[Launch]) -> None:
        made = plan_for(call())
        other = torch.tensor([1, 2, 3], dtype=torch.int32)
        made.update(other)
        assert launches[0].params["plan"] == launches[1].params["plan"]
        assert launches[1].params["seq_lens"] == other.data_ptr()

    def test_ragged_update(self, launches: list[Launch]) -> None:
        inputs = make_problem(Case((70, 33), q_lens=(1, 2)), "cpu")
        assert inputs.cu_seqlens_q is not None
        made = plan_for(inputs)
        other = inputs.cu_seqlens_q.clone()
        made.update(inputs.seq_lens, other)
        made.update(inputs.seq_lens)
        cuts = [launch.params["cu_seqlens_q"] for launch in launches]
        assert cuts == [inputs.cu_seqlens_q.data_ptr(), other.data_ptr(), other.data_ptr()]

    def test_lengths_are_bounded_by_the_smaller_reach(self, launches: list[Launch]) -> None:
        inputs = call()
        reach = inputs.block_table.shape[1] * 64
        for max_pages, planned, used in (
            (None, _mla.MAX_LEN, reach),
            (1, 64, 64),
            (99, 99 * 64, reach),
        ):
            launches.clear()
            mla.decode(**inputs.kwargs(), plan=plan_for(inputs, max_pages=max_pages))
            assert [launch.params["max_len"] for launch in launches] == [planned, used]

    def test_forcing(self, launches: list[Launch], gpu: Device) -> None:
        inputs = call()
        rows = [v for v in mla.variants() if v.d_qk == 576 and v.block_rows == 64]
        names = [v.name for v in rows if not v.unsupported_device(gpu)]
        assert len(names) > 1
        for name in names:
            mla.decode(**inputs.kwargs(), plan=plan_for(inputs, variant=name))
            assert launches[-1].variant == name
            mla.decode(**inputs.kwargs(), variant=name)
            assert launches[-1].variant == name
        with mla.use_variant(names[0]):
            mla.decode(**inputs.kwargs())
        assert launches[-1].variant == names[0]


def test_validation_is_off_while_capturing(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_VALIDATE", "1")
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    bad = call().kwargs() | {"seq_lens": torch.tensor([-1, 0, 0], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"^seq_lens\[0\]: got -1"):
        mla.decode(**bad)
    assert launches == []
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    mla.decode(**bad)
    assert launches


def test_strides_of_a_mixed_pair(launches: list[Launch]) -> None:
    """Packed queries, a cache in two parts of different rank and padding."""
    inputs = call(replace(Case((70, 33, 5), q_lens=2), split_cache=True))
    latent, rope = parts(inputs.kv_cache, 512)
    padded = torch.zeros(*rope.shape[:-1], 1, 128, dtype=rope.dtype)[..., :64]
    padded.copy_(rope[..., None, :])
    mla.decode(**inputs.kwargs() | {"kv_cache": (latent, padded)})
    p = launches[-1].params
    assert (p["latent_page"], p["latent_token"]) == (64 * 512, 512)
    assert (p["rope_page"], p["rope_token"]) == (64 * 128, 128)
