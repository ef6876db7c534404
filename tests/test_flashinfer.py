"""mla.compat.flashinfer on a CPU: all forms against float64, conventions, what it refuses."""

from __future__ import annotations

import gc
import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import mla
import pytest
import torch
from cases import Case, make_problem
from flashinfer_calls import (
    FORMS,
    LN_2,
    buffers,
    check_base_2,
    csr,
    dense,
    offsets,
    pages_of,
    plan,
    run,
    sizes,
    split,
    wrapper_on,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mla.compat import flashinfer
from mla.compat.flashinfer import MLAPlanMetadata, pages
from running import NAN, assert_same_bits

CASES = [
    Case((100, 64, 1), (1, 1, 1)),
    Case((100, 64, 1), (1, 1, 1), page_size=1),
    Case((20, 140, 333), (2, 2, 2)),
    Case((20, 140, 333), (2, 1, 5), causal=False, page_size=1),
    Case((20, 140, 333), (2, 1, 5), page_size=37),
    Case((0, 77, 0), (4, 0, 1)),
    Case((0, 0), (1, 2)),
    Case((130, 7), (1, 1), h_q=5, dtype="float16", page_size=16),
    Case((130, 7), (3, 3), split_q=True, split_cache=True),
    Case((130, 7), (3, 3), split_q=True, split_cache=True, strided=True),
    Case((130, 7), (1, 1), cache_rank=4, page_size=1, split_cache=True),
    Case((90, 17), (1, 1), d_qk=512),
    Case((90, 17), (2, 2), d_qk=320, scale=0.3),
    Case((), ()),
    Case((5, 6), (0, 0)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case: Case, form: str) -> None:
    inputs = make_problem(case, "cpu")
    wrapper = wrapper_on("cpu")
    plan(wrapper, inputs, form)
    check_base_2(inputs, run(wrapper, inputs, form))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    requests = draw(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 4)), max_size=5))
    return Case(
        tuple(length for length, _ in requests),
        tuple(tokens for _, tokens in requests),
        h_q=draw(st.integers(1, 9)),
        page_size=draw(st.sampled_from((1, 16, 64, 100))),
        dtype=draw(st.sampled_from(("bfloat16", "float16"))),
        causal=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=30)
@given(case=cases(), form=st.sampled_from(FORMS), graph=st.booleans())
def test_any_case(case: Case, form: str, graph: bool) -> None:
    inputs = make_problem(case, "cpu")
    options = {"use_cuda_graph": True, **buffers(case, 700, "cpu")} if graph else {}
    wrapper = wrapper_on("cpu", **options)
    plan(wrapper, inputs, form)
    check_base_2(inputs, run(wrapper, inputs, form))


class TestForms:
    CASE = Case((100, 33, 0), (2, 1, 3), page_size=16)

    def test_the_modules_names(self) -> None:
        for name in ("BatchMLAPagedAttentionWrapper", "MLAPlanMetadata"):
            assert getattr(flashinfer.mla, name) is getattr(flashinfer, name)

    def test_arguments_are_flashinfers(self) -> None:
        """Names, order and defaults of what may be positional, as its documentation has them."""
        wrapper = flashinfer.BatchMLAPagedAttentionWrapper
        positional = {
            method: [
                p.name
                for p in inspect.signature(getattr(wrapper, method)).parameters.values()
                if p.kind is p.POSITIONAL_OR_KEYWORD
            ][1:]
            for method in ("__init__", "plan", "run")
        }
        tensors = ["qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"]
        assert positional["__init__"] == [
            *("float_workspace_buffer", "use_cuda_graph", *tensors, "backend")
        ]
        assert positional["plan"] == [
            *tensors,
            *("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size", "causal", "sm_scale"),
            *("q_data_type", "kv_data_type", "use_profiler"),
        ]
        assert positional["run"] == [
            *("q_nope", "q_pe", "ckv_cache", "kpe_cache", "out", "lse", "return_lse"),
            *("profiler_buffer", "kv_len", "page_table", "return_lse_base_on_e", "o_scale"),
        ]

    def test_query_and_cache_in_every_form(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu")
        plan(wrapper, inputs, "csr")
        want = run(wrapper, inputs, "csr")
        q, kv = inputs.q, inputs.kv_cache
        for query in (q, split(q, inputs), (q, split(q, inputs)), (split(q, inputs), q)):
            for cache in (kv, split(kv, inputs), (split(kv, inputs), kv)):
                got = wrapper.run(query=query, kv_cache=cache, return_lse=True)
                assert_same_bits(got, want)

    def test_outputs_that_are_given(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu")
        plan(wrapper, inputs, "flat")
        tensors = (*split(inputs.q, inputs), *split(inputs.kv_cache, inputs))
        out, lse = torch.full((6, 16, 512), NAN).bfloat16(), torch.full((6, 16), NAN)
        got = wrapper.run(*tensors, out, lse, True)
        assert got[0] is out
        assert got[1] is lse
        check_base_2(inputs, got)
        lse.fill_(NAN)
        assert wrapper.run(*tensors, out=out, lse=lse) is out
        check_base_2(inputs, (out, lse))

    def test_the_base_of_lse(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu")
        cases: list[tuple[dict[str, Any], bool, bool]] = [
            (csr(inputs), False, False),
            (csr(inputs), True, True),
            ({"metadata": MLAPlanMetadata.csr(**csr(inputs)), "lse_mode": "base2"}, False, False),
            ({"metadata": MLAPlanMetadata.csr(**csr(inputs)), "lse_mode": "basee"}, True, True),
            ({"metadata": MLAPlanMetadata.csr(**csr(inputs)), "lse_mode": "basee"}, False, True),
        ]
        for requests, asked, natural in cases:
            wrapper.plan(**requests, **sizes(self.CASE))
            out, lse = wrapper.run(
                query=inputs.q,
                kv_cache=inputs.kv_cache,
                return_lse=True,
                return_lse_base_on_e=asked,
            )
            check_base_2(inputs, (out, lse / LN_2 if natural else lse))

    def test_no_rope_columns(self) -> None:
        case = Case((90, 17), (1, 1), d_qk=512)
        inputs = make_problem(case, "cpu")
        wrapper = wrapper_on("cpu")
        plan(wrapper, inputs, "flat")
        want = run(wrapper, inputs, "csr")
        got = wrapper.run(inputs.q, None, inputs.kv_cache, None, return_lse=True)
        assert_same_bits(got, want)

    def test_sizes_change_from_plan_to_plan(self) -> None:
        wrapper = wrapper_on("cpu")
        for case in CASES:
            inputs = make_problem(case, "cpu")
            plan(wrapper, inputs, "flat")
            check_base_2(inputs, run(wrapper, inputs, "flat"))


class TestGraphs:
    """What a graph reads stays where it is; here the same calls without a graph."""

    CASE = Case((300, 77, 130, 1), (1, 1, 1, 1), page_size=1)

    def test_addresses_stay_and_requests_change(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        reserved = buffers(self.CASE, 1200, "cpu")
        wrapper = wrapper_on("cpu", use_cuda_graph=True, **reserved)
        addresses = set()
        for lens, q_lens in (
            ((1, 1, 1, 1), (1, 1, 1, 1)),
            ((300, 77, 130, 1), (1, 1, 1, 1)),
            ((0, 0, 130, 0), (0, 0, 4, 0)),
            ((5, 0, 0, 1), (1, 0, 0, 1)),
        ):
            step = inputs.with_lengths(lens, q_lens)
            plan(wrapper, step, "csr")
            result = run(wrapper, step, "csr")
            check_base_2(step, result)
            addresses.add(tuple(t.data_ptr() for t in wrapper._planned.step))
        assert len(addresses) == 1

    def test_updates_in_every_way(self) -> None:
        """`plan`, `update_cuda_graph_plan`, and what SGLang does in their place."""
        inputs = make_problem(self.CASE, "cpu")
        flat = csr(inputs)
        reserved = buffers(self.CASE, len(flat["kv_indices"]), "cpu")
        wrapper = wrapper_on(
            "cpu", use_cuda_graph=True, enable_cuda_graph_plan_update=True, **reserved
        )
        plan(wrapper, inputs.with_lengths((1, 1, 1, 1)), "flat")
        step = inputs.with_lengths((40, 77, 2, 1))
        flat = csr(step)

        def fast_plan() -> None:
            # As sglang's fast_mla_decode_plan: page ids are in the buffer, the rest on the host.
            wrapper._kv_indices_buf[: len(flat["kv_indices"])].copy_(flat["kv_indices"])
            wrapper._cached_module.plan(
                wrapper._float_workspace_buffer,
                wrapper._int_workspace_buffer,
                wrapper._pin_memory_int_workspace_buffer,
                flat["qo_indptr"],
                flat["kv_indptr"],
                flat["kv_len_arr"],
                16,
                512,
                False,
            )

        metadata = MLAPlanMetadata.csr(**flat)
        for update in (
            partial(plan, wrapper, step, "dense"),
            partial(wrapper.update_cuda_graph_plan, metadata=metadata),
            fast_plan,
        ):
            other = inputs.with_lengths((3, 3, 3, 1))
            plan(wrapper, other, "flat")
            inputs.with_lengths((40, 77, 2, 1))
            update()
            check_base_2(step, run(wrapper, step, "flat"))

    def test_wrappers_with_one_buffer_share_one_table(self) -> None:
        ids = torch.zeros(1 << 19, dtype=torch.int32)
        made = [
            wrapper_on("cpu", use_cuda_graph=True, **buffers(case, 0, "cpu") | {"kv_indices": ids})
            for case in (self.CASE, Case((5,), (1,)))
        ]
        tables = [wrapper._planned.buffers.table for wrapper in made]
        assert tables[0].data_ptr() == tables[1].data_ptr()
        assert [tuple(t.shape) for t in tables] == [(4, 1 << 17), (1, 1 << 19)]
        for case, wrapper in zip((self.CASE, Case((5,), (1,))), made, strict=True):
            inputs = make_problem(case, "cpu")
            plan(wrapper, inputs, "flat")
            check_base_2(inputs, run(wrapper, inputs, "flat"))
        del made, tables, wrapper
        gc.collect()
        assert not pages._reserved

    def test_page_ids_in_the_buffer_are_left_alone(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        flat = csr(inputs)
        reserved = buffers(self.CASE, 0, "cpu") | {"kv_indices": flat["kv_indices"]}
        before = flat["kv_indices"].clone()
        wrapper = wrapper_on("cpu", use_cuda_graph=True, **reserved)
        plan(wrapper, inputs, "flat")
        check_base_2(inputs, run(wrapper, inputs, "flat"))
        assert torch.equal(flat["kv_indices"], before)


SOMETHING = torch.zeros(1)
INT = partial(torch.tensor, dtype=torch.int32)


class TestRefuses:
    CASE = Case((100, 33), (1, 1), h_q=8)

    def plan(self, **changes: Any) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper_on("cpu").plan(**csr(inputs) | sizes(self.CASE) | changes)

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"use_profiler": True}, "profiler"),
            ({"output_dtype": torch.float16}, "outputs of another dtype"),
            ({"output_scale": "per-tensor"}, "8-bit outputs"),
            ({"scale_mode": "kv-per-tensor"}, "8-bit caches"),
            ({"skip_softmax": True}, "threshold"),
            ({"use_sinks": True}, "sinks"),
            ({"kv_data_type": torch.float8_e4m3fn}, "8-bit caches"),
            ({"q_data_type": torch.float8_e4m3fn}, "8-bit queries"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_plans_for_what_mla_has_not(self, changes: dict[str, Any], what: str) -> None:
        (name,) = changes
        with pytest.raises(mla.UnsupportedError, match=rf"^{name}: mla has no .*{what}"):
            self.plan(**changes)

    @pytest.mark.parametrize(
        "name",
        [
            *("profiler_buffer", "kv_len", "page_table", "o_scale"),
            *("ckv_scale", "ckv_scale_arr", "kpe_scale"),
        ],
    )
    def test_runs_of_it(self, name: str) -> None:
        wrapper = wrapper_on("cpu")
        inputs = make_problem(self.CASE, "cpu")
        plan(wrapper, inputs, "flat")
        with pytest.raises(mla.UnsupportedError, match=f"^{name}: mla has no "):
            run(wrapper, inputs, "flat", **{name: SOMETHING})

    def test_two_16_bit_dtypes(self) -> None:
        with pytest.raises(mla.UnsupportedError, match=r"kv_data_type: got torch\.float16"):
            self.plan(kv_data_type=torch.float16)

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"num_heads": None}, TypeError, "num_heads: got None, expected a value"),
            ({"sm_scale": None}, TypeError, "sm_scale: got None, expected a value"),
            ({"sm_scale": float("nan")}, ValueError, "sm_scale: got nan, expected a finite number"),
            ({"sm_scale": torch.ones(())}, TypeError, "sm_scale: got a torch.Tensor, expected a"),
            ({"num_heads": 0}, ValueError, "num_heads: got 0"),
            ({"page_size": 1.5}, TypeError, "page_size: got 1.5, expected an int"),
            ({"head_dim_kpe": 32}, ValueError, r"head_dim_kpe: got 512 \+ 32, expected one of 512"),
            ({"q_data_type": torch.float32}, TypeError, "q_data_type: got torch.float32"),
            (
                {"lse_mode": "natural"},
                ValueError,
                "lse_mode: got 'natural', expected one of 'none'",
            ),
            ({"query_layout": "flat"}, ValueError, "query_layout: got 'flat'"),
            ({"qo_indptr": None}, ValueError, "metadata: got no qo_indptr, expected all of qo_"),
            ({"qo_indptr": SOMETHING}, TypeError, "qo_indptr: got torch.float32"),
            ({"qo_indptr": INT([0, 1])}, ValueError, r"qo_indptr: got shape \[2\], expected \[3\]"),
            ({"qo_indptr": INT([1, 1, 2])}, ValueError, r"qo_indptr\[0\]: got 1, expected 0"),
            ({"kv_indptr": INT([0, 2])}, ValueError, r"kv_indptr: got shape \[2\], expected \[3\]"),
            (
                {"kv_indptr": INT([0, 2, 1])},
                ValueError,
                r"kv_indptr\[2\]: got 1, expected at least 2",
            ),
            (
                {"kv_indptr": INT([0, 2, 9])},
                ValueError,
                r"kv_indices: got 6 pages, expected .* = 9",
            ),
            (
                {"kv_indptr": INT([0, 1, 2])},
                ValueError,
                r"kv_len_arr\[0\]: got 100, expected 0 to 64, the tokens of its 1 pages of 64",
            ),
            (
                {"kv_len_arr": INT([-1, 2])},
                ValueError,
                r"kv_len_arr\[0\]: got -1, expected 0 to 128",
            ),
            ({"kv_len_arr": INT([[1, 2]])}, ValueError, r"kv_len_arr: got shape \[1, 2\]"),
            ({"metadata": MLAPlanMetadata()}, ValueError, "metadata: got it and qo_indptr"),
            ({"metadata": 3}, TypeError, "metadata: got int"),
            ({"seq_lens": INT([1, 2])}, ValueError, "metadata: got none and qo_indptr"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_plans(
        self, changes: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        with pytest.raises(kind, match=message):
            self.plan(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seq_lens": INT([300, 3])}, r"seq_lens\[0\]: got 300, expected 0 to"),
            ({"block_tables": None}, "metadata: got no block_tables"),
            ({"block_tables": INT([[1]])}, r"block_tables: got shape \[1, 1\]"),
        ],
        ids=str,
    )
    def test_wrong_block_tables(self, changes: dict[str, Any], message: str) -> None:
        inputs = make_problem(replace(self.CASE, seq_lens=(30, 33)), "cpu")
        metadata = MLAPlanMetadata.dense(**dense(inputs) | changes)
        with pytest.raises(ValueError, match=message):
            wrapper_on("cpu").plan(metadata=metadata, **sizes(self.CASE))

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"float_workspace_buffer": None}, TypeError, "float_workspace_buffer: got NoneType"),
            ({"backend": "fa4"}, ValueError, "backend: got 'fa4', expected one of 'auto', 'fa2'"),
            ({"use_cuda_graph": True}, ValueError, "use_cuda_graph: got True without its buffers"),
            (
                {"use_cuda_graph": True, **buffers(CASE, 9, "cpu"), "kv_indptr": INT([0])},
                ValueError,
                r"kv_indptr: got shape \[1\], expected \[3\], b \+ 1",
            ),
        ],
        ids=str,
    )
    def test_wrong_wrappers(
        self, options: dict[str, Any], kind: type[Exception], message: str
    ) -> None:
        options = {"float_workspace_buffer": SOMETHING} | options
        with pytest.raises(kind, match=message):
            flashinfer.BatchMLAPagedAttentionWrapper(**options)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_heads": 4}, "num_heads: got 4, expected 8 as in the first plan"),
            ({"page_size": 32}, "page_size: got 32, expected 64 as in the first plan"),
            ({"qo_indptr": INT([0, 1, 3])}, "qo_indptr: got 3 query tokens, expected at most 2"),
            (
                {"qo_indptr": INT([0, 1]), "kv_indptr": INT([0, 1]), "kv_len_arr": INT([5])},
                "kv_len_arr: got 1 requests, expected 2",
            ),
        ],
        ids=str,
    )
    def test_other_sizes_of_a_graph(self, changes: dict[str, Any], message: str) -> None:
        """And what was planned before is still there."""
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu", use_cuda_graph=True, **buffers(self.CASE, 9, "cpu"))
        plan(wrapper, inputs, "flat")
        with pytest.raises(ValueError, match=message):
            wrapper.plan(**csr(inputs) | sizes(self.CASE) | changes)
        check_base_2(inputs, run(wrapper, inputs, "flat"))

    def test_more_pages_than_a_graph_has_room_for(self) -> None:
        case = Case((200_000, 5, 5), (1, 1, 1), page_size=1, h_q=1)
        room = pages.LEAST_ENTRIES // 3
        flat = {
            "qo_indptr": offsets((1, 1, 1)),
            "kv_indptr": offsets(pages_of(case)),
            "kv_indices": torch.zeros(200_010, dtype=torch.int32),
            "kv_len_arr": INT(case.seq_lens),
        }
        wrapper = wrapper_on("cpu", use_cuda_graph=True, **buffers(case, 200_010, "cpu"))
        with pytest.raises(ValueError, match=f"of 200000 pages, expected at most {room} with a"):
            wrapper.plan(**flat, **sizes(case))

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"query": None}, TypeError, "query: got None, expected it, or q_nope and q_pe"),
            ({"q_nope": SOMETHING}, TypeError, "query: got it and q_nope or q_pe"),
            ({"kv_cache": None}, TypeError, "kv_cache: got None"),
            ({"query": SOMETHING.bfloat16()}, ValueError, r"q: got shape \[1\], expected"),
            (
                {"query": torch.zeros(3, 8, 576).bfloat16()},
                ValueError,
                "total_q = 2, expected .* 3",
            ),
            ({"query": torch.zeros(2, 8, 576)}, TypeError, "q: got torch.float32"),
            ({"out": torch.zeros(2, 8, 512)}, TypeError, "out: got torch.float32"),
            ({"lse": torch.zeros(2, 9)}, ValueError, r"lse: got shape \[2, 9\], expected \[2, 8\]"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_runs(self, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu")
        plan(wrapper, inputs, "flat")
        with pytest.raises(kind, match=message):
            wrapper.run(**{"query": inputs.q, "kv_cache": inputs.kv_cache} | changes)

    def test_lse_that_was_not_planned(self) -> None:
        inputs = make_problem(self.CASE, "cpu")
        wrapper = wrapper_on("cpu")
        metadata = MLAPlanMetadata.csr(**csr(inputs))
        wrapper.plan(metadata=metadata, **sizes(self.CASE))
        with pytest.raises(ValueError, match="lse_mode: got 'none' in plan"):
            run(wrapper, inputs, "csr")
        wrapper.plan(metadata=metadata, lse_mode="base2", **sizes(self.CASE))
        with pytest.raises(ValueError, match="return_lse_base_on_e: got True"):
            run(wrapper, inputs, "csr", return_lse_base_on_e=True)

    def test_no_plan(self) -> None:
        with pytest.raises(RuntimeError, match="run: got no plan"):
            wrapper_on("cpu").run()
        for wrapper in (
            wrapper_on("cpu"),
            wrapper_on("cpu", use_cuda_graph=True, **buffers(self.CASE, 9, "cpu")),
        ):
            with pytest.raises(RuntimeError, match="update_cuda_graph_plan: got a wrapper without"):
                wrapper.update_cuda_graph_plan(metadata=MLAPlanMetadata())
