"""The cpu variant against float64: what every variant is asked, on any machine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import mla
import numpy as np
import pytest
import torch
from cases import DIMS, DTYPES, Case, make_problem
from compare import check, reference
from covering import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from mla import cpu
from running import assert_same_bits, clone, plan_for, run
from torch import Tensor


def is_quick(case: Case) -> bool:
    work = sum(s * n for s, n in zip(case.query_lens, case.seq_lens, strict=True)) * case.h_q
    return len(case.seq_lens) < 100 and work < 200_000


def with_speed(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=() if is_quick(case) else pytest.mark.slow)


def solve(case: Case) -> None:
    inputs = make_problem(case, "cpu")
    check(run(inputs), reference(inputs), case.scale)


@pytest.mark.parametrize("case", [with_speed(case) for case in CASES])
def test_matches_the_reference(case: Case) -> None:
    solve(case)


SPECIAL = [
    Case((), q_lens=2, label="no requests"),
    Case((), q_lens=(), label="no requests, ragged"),
    Case((100, 200), q_lens=0, label="no query tokens"),
    Case((100, 200, 0), q_lens=(0, 0, 0), label="no query tokens, ragged"),
    Case((0, 0), q_lens=5, label="no KV"),
    Case((3, 1, 6), q_lens=7, label="rows that see nothing"),
    Case((3, 1, 6), q_lens=(7, 0, 9), label="rows that see nothing, ragged"),
    Case((70, 0, 300), q_lens=3, cache_rank=4, split_cache=True, label="rank 4 cache"),
    Case((1023, 1024, 1025, 2048), q_lens=2, page_size=3, label="around a chunk of KV"),
    Case((40,), q_lens=37, h_q=96, label="more query tokens than a block"),
    Case((3,), h_q=cpu.BLOCK_ROWS + 1, label="more heads than a block"),
    Case((5000,), page_size=4000, label="pages larger than a chunk"),
    Case((70, 50), q_lens=2, h_q=8, scale=1e4, values="ternary", label="exact ties"),
]


@pytest.mark.parametrize("d_qk", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case.label)
def test_special_cases(case: Case, d_qk: int, dtype: str) -> None:
    solve(replace(case, d_qk=d_qk, dtype=dtype))


lengths = st.one_of(st.sampled_from((0, 1, 15, 16, 17, 64)), st.integers(0, 200))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seq_lens = tuple(draw(st.lists(lengths, max_size=5)))
    if draw(st.booleans()):
        b = len(seq_lens)
        q_lens: int | tuple[int, ...] = tuple(
            draw(st.lists(st.integers(0, 6), min_size=b, max_size=b))
        )
    else:
        q_lens = draw(st.integers(0, 6))
    return Case(
        seq_lens,
        q_lens,
        h_q=draw(st.integers(1, 24)),
        d_qk=draw(st.sampled_from(list(DIMS))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        page_size=draw(st.one_of(st.sampled_from((1, 16, 64)), st.integers(1, 100))),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from((192**-0.5, -0.7, 0.0, 20.0))),
        split_q=draw(st.booleans()),
        split_cache=draw(st.booleans()),
        strided=draw(st.booleans()),
        return_lse=draw(st.booleans()),
        given=draw(st.booleans()),
        poison=draw(st.sampled_from((float("nan"), float("inf")))),
        cache_rank=draw(st.sampled_from((3, 4))),
    )


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_any_case(case: Case) -> None:
    solve(case)


class TestClamping:
    """Values that are out of range are brought into it; nothing outside the tensors is read."""

    CASE = Case((40, 64, 7), q_lens=2, page_size=16)

    def call(self, **changes: Tensor) -> tuple[Tensor, Tensor]:
        inputs = make_problem(self.CASE, "cpu")
        return mla.decode(**inputs.kwargs() | changes, return_lse=True)

    def test_lengths(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        table = inputs.block_table.clamp(0, inputs.kv_cache.shape[0] - 1)  # type: ignore[union-attr]
        reach = table.shape[1] * self.CASE.page_size
        cache = inputs.kv_cache.nan_to_num(0)  # type: ignore[union-attr]
        wild = torch.tensor([2**31 - 1, -5, 7], dtype=torch.int32)
        tame = torch.tensor([reach, 0, 7], dtype=torch.int32)
        with_table = {"block_table": table, "kv_cache": cache}
        assert_same_bits(
            self.call(seq_lens=wild, **with_table), self.call(seq_lens=tame, **with_table)
        )

    def test_page_ids(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        cache = inputs.kv_cache.nan_to_num(0)  # type: ignore[union-attr]
        wild, tame = inputs.block_table.clone(), inputs.block_table.clone()
        wild[0, 0], wild[1, 1] = -1, 2147480000
        tame[0, 0], tame[1, 1] = 0, cache.shape[0] - 1
        assert_same_bits(
            self.call(block_table=wild, kv_cache=cache), self.call(block_table=tame, kv_cache=cache)
        )

    @pytest.mark.parametrize("cuts", [(0, 9, 3, 6), (-4, 2, 4, 100), (6, 6, 6, 6), (5, 4, 3, 2)])
    def test_query_offsets(self, cuts: tuple[int, ...]) -> None:
        inputs = make_problem(replace(self.CASE, q_lens=(2, 2, 2)), "cpu")
        wild = torch.tensor(cuts, dtype=torch.int32)
        out, lse = mla.decode(**inputs.kwargs() | {"cu_seqlens_q": wild}, return_lse=True)
        assert out.isfinite().all()
        assert not lse.isnan().any()


class TestNothingToAttend:
    """Legal, and written all the same."""

    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize(
        ("b", "tokens", "pages", "max_pages"),
        [(0, 0, 4, 2), (3, 0, 4, 2), (3, 6, 0, 2), (3, 6, 4, 0), (0, 0, 0, 0)],
    )
    def test_is_legal(self, b: int, tokens: int, pages: int, max_pages: int, ragged: bool) -> None:
        leading = (tokens, 5) if ragged else (b, tokens // max(b, 1), 5)
        out = torch.full((*leading, 512), torch.nan, dtype=torch.float16)
        lse = torch.full(leading, torch.nan)
        step = tokens // max(b, 1)
        got = mla.decode(
            torch.randn(*leading, 576).half(),
            torch.randn(pages, 16, 576).half(),
            torch.zeros(b, max_pages, dtype=torch.int32),
            torch.full((b,), 9, dtype=torch.int32),
            scale=0.1,
            cu_seqlens_q=torch.arange(b + 1, dtype=torch.int32) * step if ragged else None,
            out=out,
            lse=lse,
            return_lse=True,
        )
        assert got == (out, lse) or (got[0] is out and got[1] is lse)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()

    def test_tokens_of_no_request(self) -> None:
        out, lse = mla.decode(
            torch.randn(4, 5, 576).half(),
            torch.randn(2, 16, 576).half(),
            torch.zeros(0, 2, dtype=torch.int32),
            torch.zeros(0, dtype=torch.int32),
            scale=0.1,
            cu_seqlens_q=torch.zeros(1, dtype=torch.int32),
            return_lse=True,
        )
        assert not out.any()
        assert (lse == -torch.inf).all()


class TestOutputs:
    CASE = Case((40, 0, 130), q_lens=3, h_q=6)

    def test_lse_is_written_whenever_it_is_given(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        lse = torch.full((3, 3, 6), torch.nan)
        out = mla.decode(**inputs.kwargs(), lse=lse)
        assert isinstance(out, Tensor)
        check((out, lse), reference(inputs))

    def test_inference_mode(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        with torch.inference_mode():
            result = mla.decode(**inputs.kwargs(), return_lse=True)
        check(result, reference(inputs))

    @pytest.mark.parametrize("s_q", [1, 3])
    def test_defaults_of_torch_change_nothing(self, s_q: int) -> None:
        """Those that a script for a GPU sets; `meta` in the place of one."""
        inputs = make_problem(replace(self.CASE, q_lens=s_q, given=False), "cpu")
        want = run(inputs)
        before = torch.get_default_dtype()
        try:
            torch.set_default_device("meta")
            torch.set_default_dtype(torch.bfloat16)
            got = mla.decode(**inputs.kwargs(), return_lse=True)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(before)
        assert_same_bits(got, want)

    def test_reruns_give_the_same_bits(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        assert_same_bits(clone(run(inputs)), run(inputs))

    def test_lists_are_pairs_too(self) -> None:
        inputs = make_problem(replace(self.CASE, split_q=True, split_cache=True), "cpu")
        call = inputs.kwargs()
        result = mla.decode(
            **call | {"q": list(inputs.q), "kv_cache": list(inputs.kv_cache)}, return_lse=True
        )
        check(result, reference(inputs))

    @pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
    def test_any_number_is_a_scale(self, number: float) -> None:
        call = make_problem(replace(self.CASE, scale=0.25), "cpu").kwargs()
        want = mla.decode(**call)
        assert torch.equal(mla.decode(**call | {"scale": number}), want)

    def test_workspace_is_not_needed(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        mla.decode(**inputs.kwargs(), workspace=torch.empty(0, dtype=torch.uint8))


class TestPlan:
    """On a CPU there is nothing to schedule, and the same code runs."""

    @pytest.mark.parametrize("q_lens", [2, (3, 0, 1)])
    def test_serves_every_step(self, q_lens: int | tuple[int, ...]) -> None:
        case = Case((100, 33, 64), q_lens=q_lens, h_q=4)
        inputs = make_problem(case, "cpu")
        plan = plan_for(inputs)
        assert plan.variant.name == "cpu"
        for seq_lens in itertools.islice(itertools.permutations((100, 33, 0)), 3):
            step = inputs.with_lengths(
                [min(a, b) for a, b in zip(seq_lens, case.seq_lens, strict=True)]
            )
            plan.update(step.seq_lens)
            result = mla.decode(**step.kwargs(), plan=plan, return_lse=True)
            check(result, reference(step))

    def test_bounds_lengths(self) -> None:
        inputs = make_problem(Case((100, 33)), "cpu")
        plan = plan_for(inputs, max_pages=1)
        result = mla.decode(**inputs.kwargs(), plan=plan, return_lse=True)
        inputs.seq_lens[0] = 64
        assert_same_bits(result, mla.decode(**inputs.kwargs(), return_lse=True))

    def test_of_nothing(self) -> None:
        empty = torch.zeros(0, dtype=torch.int32)
        plan = mla.plan(empty, h_q=16, d_qk=576, dtype=torch.bfloat16, page_size=64)
        plan.update(empty)
        assert "b=0" in repr(plan)
