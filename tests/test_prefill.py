"""prefill on a CPU: both methods against the un-absorbed float64 reference, in small steps too."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla import expanded_steps, fused
from mla.chunks import Limits, exact_queries
from mla.models import MODELS
from mla.prefill_choice import WORKSPACE_BYTES
from prefilling import CASES, Case, Dims, Problem, make_prefill
from torch import Tensor

METHODS = ("absorbed", "expanded")


def least_bytes(problem: Problem, method: str) -> int:
    """What the error for too little memory says."""
    with pytest.raises(ValueError, match=r"^workspace_bytes: got 1, expected at least") as error:
        mla.prefill(**problem.kwargs, method=method, workspace_bytes=1)
    return int(re.findall(r"\d+", str(error.value))[-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, method: str) -> None:
    problem = make_prefill(case)
    result = mla.prefill(**problem.kwargs, method=method)
    assert result.method == method
    assert result.attention == ("mla.decode" if method == "absorbed" else "torch, in float32")
    problem.check(result)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_smallest_steps(case: Case, method: str) -> None:
    problem = make_prefill(case)
    bytes_ = least_bytes(problem, method)
    problem.check(mla.prefill(**problem.kwargs, method=method, workspace_bytes=bytes_))


@settings(deadline=None, max_examples=60)
@given(
    lens=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    data=st.data(),
    page_size=st.integers(1, 20),
    causal=st.booleans(),
    queries=st.integers(1, 40),
    kv=st.integers(1, 40),
)
def test_any_lengths_and_steps(
    lens: list[int], data: st.DataObject, page_size: int, causal: bool, queries: int, kv: int
) -> None:
    new = tuple(data.draw(st.integers(0, n + 3)) for n in lens)
    dims = Dims(heads=2, kv_lora=16, nope=8, rope=8, v=8)
    case = Case(tuple(lens), new, dims, page_size, torch.float32, causal)
    problem = make_prefill(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expanded_steps, "limits", lambda *_: Limits(queries, kv))
        problem.check(mla.prefill(**problem.kwargs, method="expanded"))


@settings(deadline=None, max_examples=20)
@given(
    past=st.integers(0, 900),
    new=st.integers(100, 700),
    limits=st.tuples(st.integers(256, 700), st.integers(256, 1500)),
    causal=st.booleans(),
)
def test_with_a_kernel_that_is_prepared_for_sizes(
    past: int, new: int, limits: tuple[int, int], causal: bool
) -> None:
    dims = Dims(heads=2, kv_lora=16, nope=8, rope=8, v=8)
    lens, counts = (50, past + new, 20), (50, new, 7)
    problem = make_prefill(Case(lens, counts, dims, 16, torch.float32, causal))

    def cudnn(q: Tensor, rows: Tensor, scale: float, causal: bool) -> fused.State:
        assert len(q) == exact_queries(len(q))
        assert len(rows) == len(q) if causal else len(rows) in (256, 512, 1024)
        return fused.products(q, rows, scale, causal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expanded_steps, "limits", lambda *_: Limits(*limits))
        patch.setattr(fused, "cudnn_works", lambda *_: True)
        patch.setattr(fused, "cudnn", cudnn)
        result = mla.prefill(**problem.kwargs, method="expanded")
    problem.check(result)
    assert (fused.CUDNN in result.attention) == (new >= 128 and (causal or past + new >= 256))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(MODELS)),
    heads=st.integers(1, 128),
    megabytes=st.integers(16, 2000),
    fused=st.booleans(),
)
def test_a_step_fits_its_memory(name: str, heads: int, megabytes: int, fused: bool) -> None:
    """Queries, keys, values, what they are made of and results, all there at one time."""
    model = replace(MODELS[name], heads=heads)
    try:
        limits = expanded_steps.limits(model, torch.bfloat16, fused, megabytes << 20)
    except ValueError:
        assert heads * 16 * 16 * 2 * 2000 > megabytes << 20
        return
    k, v = model.head_dim, model.v
    queries = limits.queries * heads * (2 * (k + v) + 4 * v + 4)
    kv = limits.kv * (2 * (model.kv_lora + model.rope) + 2 * heads * (k + v))
    wide = 0 if fused else 4 * heads * (limits.queries + limits.kv) * (k + v)
    logits = 0 if fused else 12 * heads * limits.queries * limits.kv
    assert queries + kv + wide + logits <= megabytes << 20
    assert min(limits) >= 16


class TestChoice:
    def test_of_a_call(self) -> None:
        few, many = make_prefill(Case((60,), 20)), make_prefill(Case((60,), 60))
        assert mla.prefill(**few.kwargs).method == "absorbed"
        assert mla.prefill(**many.kwargs).method == "expanded"
        assert mla.prefill(**many.kwargs, variant="cpu").method == "absorbed"
        wide = make_prefill(Case((60,), 20, dtype=torch.float32))
        assert mla.prefill(**wide.kwargs).method == "expanded"
        other = make_prefill(Case((60,), 20, dims=Dims(kv_lora=128)))
        result = mla.prefill(**other.kwargs)
        assert result.method == "expanded"
        other.check(result)

    def test_is_logged(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("MLA_LOG", "dispatch")
        with caplog.at_level(logging.INFO, logger="mla"):
            mla.prefill(**make_prefill(Case((60, 3), (60, 2))).kwargs, method="expanded")
        assert "prefill, 62 new tokens of 2 requests: expanded by torch" in caplog.text


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"method": "both"}, ValueError, "method: got 'both', expected 'absorbed', 'expanded'"),
            ({"method": "expanded", "variant": "cpu"}, ValueError, "variant: got 'cpu', expected"),
            ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes: got 1.5"),
            ({"q": 3}, TypeError, "q: got int"),
            ({"scale": float("nan")}, ValueError, "scale: got nan, expected a finite number"),
            ({"scale": None}, TypeError, "scale: got None, expected a number"),
            ({"scale": torch.ones(())}, TypeError, "scale: got a torch.Tensor, expected a number"),
            ({"w_kv_b": None}, TypeError, "w_kv_b: got NoneType, expected a torch.Tensor"),
            ({"kv_cache": None}, TypeError, "kv_cache: got NoneType, expected a torch.Tensor"),
            ({"plan": 1}, TypeError, "plan: got int, expected an mla.PrefillPlan"),
            ({"q": torch.zeros(2, 3, 4, 96)}, TypeError, "latent: got torch.bfloat16, expected"),
            ({"q": torch.zeros(2, 3, 4, 96).double()}, TypeError, "q: got torch.float64"),
            ({"w_kv_b": torch.zeros(224, 512)}, TypeError, "w_kv_b: got torch.float32, expected"),
            ({"seq_lens": torch.zeros(2).long()}, TypeError, "seq_lens: got torch.int64"),
            ({"block_table": torch.zeros(2, 3).long()}, TypeError, "block_table: got torch.int64"),
        ],
    )
    def test_wrong(self, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
        kwargs = make_prefill(Case((50, 61), 17, packed=True)).kwargs
        for method in ({}, {"method": "expanded"}):
            with pytest.raises(kind, match=f"^{message}"):
                mla.prefill(**kwargs | ({} if "plan" in changes else method) | changes)

    @pytest.mark.parametrize(
        ("w_kv_b", "message"),
        [
            ((224, 500), r"w_kv_b: got strides"),
            ((224, 584), r"w_kv_b: got 584 columns, expected as many as the cache has latent"),
            ((222, 512), r"w_kv_b: got shape \[222, 512\], expected \[4 \* \(32 \+ v\), kv_lora\]"),
            ((4 * 44, 512), "w_kv_b: got v = 12, expected a multiple of 8"),
            ((224,), r"w_kv_b: got shape \[224\], expected \[heads \*"),
        ],
    )
    def test_wrong_weights(self, w_kv_b: tuple[int, ...], message: str) -> None:
        kwargs = make_prefill(Case((50, 61), 17)).kwargs
        wrong = torch.zeros(w_kv_b, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"^{message}"):
            mla.prefill(**kwargs | {"w_kv_b": wrong})

    def test_wrong_queries(self) -> None:
        kwargs = make_prefill(Case((50, 61), 17)).kwargs
        q_nope, q_rope = kwargs["q"]
        for q, message in (
            ((q_nope, q_rope[..., :32]), "q_rope: got 32 columns, expected 64"),
            ((q_nope[:, :5], q_rope), r"q_rope: got shape .* expected \[2, 5, 4\] before"),
            ((q_nope[0], q_rope[0]), r"q_nope: got shape .* expected \[b, s, h, d\]"),
            (q_rope, r"q: got 64 columns, expected nope \+ 64"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                mla.prefill(**kwargs | {"q": q})

    @pytest.mark.parametrize("method", METHODS)
    def test_wrong_values_are_clamped(self, method: str) -> None:
        """Page ids, lengths and cuts that lead outside; other requests are right."""
        case = Case((40, 97, 16), (40, 33, 1))
        for name, index, value in (
            ("block_table", (1, 2), 2**31 - 1),
            ("seq_lens", (1,), -5),
            ("seq_lens", (1,), 2**31 - 1),
        ):
            problem = make_prefill(case)
            problem.kwargs[name][index] = value
            out = mla.prefill(**problem.kwargs, method=method).out
            for rows, want in ((out[:40], problem.want[0][0]), (out[73:], problem.want[2][0])):
                torch.testing.assert_close(rows.double(), want, atol=2e-2, rtol=2e-2)

    def test_default_memory(self) -> None:
        """One step of 128 heads has thousands of tokens."""
        dims = replace(MODELS["DeepSeek-V3"], heads=128)
        limits = expanded_steps.limits(dims, torch.bfloat16, True, WORKSPACE_BYTES)
        assert limits.queries > 500
        assert limits.kv > 2000
