"""The batch-invariant mode without a GPU: its arguments, its choice, and the cpu variant's bits."""

from __future__ import annotations

import mla
import pytest
import torch
from batches import assert_same, batch_of, run_each
from cases import Case, make_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mla import dispatch
from mla.device import KNOWN, Device
from mla.problem import Problem
from running import clone, plan_for


def test_a_plan_is_for_one_mode() -> None:
    inputs = make_problem(Case((70, 33, 5)), "cpu")
    for planned in (False, True):
        plan = plan_for(inputs, batch_invariant=planned)
        mla.decode(**inputs.kwargs(), plan=plan, batch_invariant=planned)
        got = (
            f"got a plan for batch_invariant = {planned}, expected batch_invariant = {not planned}"
        )
        with pytest.raises(ValueError, match=f"^plan: {got} as in the call"):
            mla.decode(**inputs.kwargs(), plan=plan, batch_invariant=not planned)


def test_explain_says_so() -> None:
    told = mla.explain(b=7, h_q=16, device="H200", batch_invariant=True)
    assert told.problem.batch_invariant
    assert "batch-invariant" in str(told)
    assert "by heads, dims and dtype alone" in told.headline()
    inputs = make_problem(Case((70, 33, 5)), "cpu")
    assert mla.explain(**inputs.kwargs(), batch_invariant=True).problem.batch_invariant


@pytest.mark.parametrize("gpu", KNOWN, ids=lambda gpu: gpu.name)
def test_the_workspace_is_bounded_by_formula(gpu: Device) -> None:
    """It grows with requests, rows and what the block table reaches, and nothing else."""
    sizes = [
        mla.explain(b=b, h_q=h_q, kv_len=kv_len, device=gpu, batch_invariant=True).workspace_bytes
        for b, h_q, kv_len in [(8, 16, 512), (8, 16, 8192), (16, 16, 8192), (16, 128, 8192)]
    ]
    assert sizes == sorted(sizes)
    bound = mla.explain(b=16, h_q=16, kv_len=2**30, device=gpu, batch_invariant=True)
    rows = bound.variant.block_rows * 16 * 4 * 513  # type: ignore[union-attr]
    assert bound.workspace_bytes < rows * (64 + 4 * 4) + (1 << 20)


problems = st.builds(
    Problem.from_sizes,
    b=st.integers(1, 5000),
    h_q=st.just(16),
    d_qk=st.just(576),
    dtype=st.just(torch.bfloat16),
    page_size=st.sampled_from([1, 3, 16, 64, 480]),
    max_pages=st.integers(1, 100_000),
    s_q=st.integers(1, 9),
    total_q=st.one_of(st.none(), st.integers(1, 9000)),
    batch_invariant=st.just(True),
)


@settings(max_examples=200)
@given(problems, st.sampled_from(KNOWN), st.sampled_from([None, "sm80"]))
def test_the_choice_follows_heads_dims_and_dtype_alone(
    problem: Problem, gpu: Device, name: str | None
) -> None:
    request = dispatch.forced(name)
    plain = Problem.from_sizes(
        b=1,
        h_q=16,
        d_qk=576,
        dtype=torch.bfloat16,
        page_size=64,
        max_pages=1,
        batch_invariant=True,
    )
    want = dispatch.choose(plain, gpu, request)
    assert dispatch.choose(problem, gpu, request) == want


def test_more_heads_than_fit_twice() -> None:
    """What a choice is made by has no more rows than the problem."""
    h_q = 2**31 - 1024
    problem = Problem.from_sizes(
        b=1,
        h_q=h_q,
        d_qk=576,
        dtype=torch.bfloat16,
        page_size=64,
        max_pages=1,
        batch_invariant=True,
    )
    assert problem.without_batch().h_q == h_q


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 4)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 16, 64]),
)
def test_the_cpu_variant_is_batch_invariant(
    requests: list[tuple[int, int]], rng: st.DataObject, page_size: int
) -> None:
    lens, q_lens = zip(*requests, strict=True)
    whole = make_problem(Case(lens, q_lens, h_q=3, d_qk=288), "cpu")
    want = [
        clone(result) for i in range(len(requests)) for result in run_each(batch_of(whole, [i]))
    ]
    order = [rng.randrange(len(requests)) for _ in range(8)]  # type: ignore[attr-defined]
    assert_same(run_each(batch_of(whole, order, page_size=page_size)), order, want)
