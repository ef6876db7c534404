"""mla.compat.flash_mla on a CPU: both forms against float64, conventions, what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import mla
import pytest
import torch
from flash_mla_calls import FORMS, Call, check_call, make, metadata, run
from hypothesis import given, settings
from hypothesis import strategies as st
from mla.compat import flash_mla
from running import assert_same_bits

CALLS = [
    Call((100, 64, 1)),
    Call((20, 140, 333), s_q=2, causal=True),
    Call((20, 140, 333), s_q=2),
    Call((0, 77, 0), s_q=4, causal=True),
    Call((0, 0)),
    Call((2, 1, 3), s_q=4, causal=True),
    Call((130, 7), h_q=1),
    Call((130, 7), h_q=9, h_kv=3, s_q=2, causal=True),
    Call((130, 7), h_q=63, s_q=3, causal=True),
    Call((200, 0, 65), h_q=8, h_kv=2, s_q=4),
    Call((90,), h_q=24, h_kv=8, dtype=torch.float16),
    Call((90, 17), page_size=1),
    Call((90, 17), page_size=16, s_q=2, causal=True),
    Call((90, 17), page_size=128, h_q=4, h_kv=2),
    Call((90, 17), page_size=37),
    Call((90, 17), d_qk=512),
    Call((90, 17), d_qk=320, d_v=256, h_kv=2),
    Call((90, 17), scale=0.3),
    Call(()),
    Call((5, 6), s_q=0),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_matches_the_reference(call: Call, form: str) -> None:
    tensors = make(call)
    check_call(tensors, run(tensors, form))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    h_kv = draw(st.integers(1, 3))
    return Call(
        tuple(draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))),
        s_q=draw(st.integers(1, 4)),
        h_q=h_kv * draw(st.integers(1, 9)),
        h_kv=h_kv,
        page_size=draw(st.sampled_from((1, 16, 64, 100))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        causal=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=30)
@given(call=calls(), form=st.sampled_from(FORMS))
def test_any_call(call: Call, form: str) -> None:
    tensors = make(call)
    check_call(tensors, run(tensors, form))


class TestForms:
    CALL = Call((100, 33, 0), s_q=2, causal=True)

    def test_what_get_mla_metadata_returns(self) -> None:
        meta, nothing = flash_mla.get_mla_metadata()
        assert isinstance(meta, flash_mla.FlashMLASchedMeta)
        assert nothing is None
        assert not meta.have_initialized
        lens = torch.tensor([5, 6, 7], dtype=torch.int32)
        old, splits = flash_mla.get_mla_metadata(lens, num_heads_per_head_k=32, num_heads_k=1)
        assert (old.shape, splits.shape) == ((1, 8), (4,))
        assert old.dtype == splits.dtype == torch.int32

    def test_arguments_are_flash_mlas(self) -> None:
        """Their names, order and defaults in each form, as its documentation has them."""
        newest = inspect.signature(flash_mla.flash_mla_with_kvcache).parameters
        required = ["q", "k_cache", "block_table", "cache_seqlens", "head_dim_v"]
        required.append("tile_scheduler_metadata")
        options = {"num_splits": None, "softmax_scale": None, "causal": False}
        options |= {"is_fp8_kvcache": False, "indices": None, "attn_sink": None}
        options |= {"extra_k_cache": None, "extra_indices_in_kvcache": None}
        options |= {"topk_length": None, "extra_topk_length": None}
        positional = [p for p in newest.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == required + list(options)
        assert {p.name: p.default for p in positional[len(required) :]} == options
        made = list(inspect.signature(flash_mla.get_mla_metadata).parameters)
        assert made[:3] == ["cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k"]

    def test_one_schedule_serves_all_layers(self) -> None:
        """The same lengths in other tensors, another cache, another mask."""
        meta, nothing = flash_mla.get_mla_metadata()
        plans = set()
        for layer, causal in enumerate((True, False, True)):
            tensors = make(replace(self.CALL, causal=causal), seed=layer)
            result = flash_mla.flash_mla_with_kvcache(
                *tensors.arguments(), meta, nothing, causal=causal
            )
            check_call(tensors, result)
            plans.add(meta.plan)
        assert len(plans) == 1

    def test_old_tensors_may_be_copied_into_larger_ones(self) -> None:
        """As engines do that keep buffers for their graphs; other lengths are no concern."""
        most = torch.ones(10, dtype=torch.int32)
        kept, kept_splits = flash_mla.get_mla_metadata(most, 32, 1)
        wide = torch.empty(132, 8, dtype=torch.int32)
        tensors = make(self.CALL)
        made, splits = metadata(tensors, "old")
        kept.copy_(made)
        wide[: made.shape[0]].copy_(made)
        kept_splits[:4].copy_(splits)
        want = run(tensors, "new")
        for scheduler in (kept, wide, wide[: made.shape[0]], made):
            for num_splits in (kept_splits[:4], None):
                got = flash_mla.flash_mla_with_kvcache(
                    *tensors.arguments(), scheduler, num_splits, **tensors.options()
                )
                assert_same_bits(got, want)

    def test_a_wider_block_table_is_read_to_its_end(self) -> None:
        tensors = make(self.CALL)
        meta, _ = flash_mla.get_mla_metadata()
        want = run(tensors, "old")
        narrow = replace(tensors, block_table=tensors.block_table[:, :1])
        for each, same in ((narrow, False), (tensors, True)):
            got = flash_mla.flash_mla_with_kvcache(*each.arguments(), meta, **each.options())
            assert torch.equal(got[0], want[0]) == same

    def test_variants_are_chosen_as_always(self) -> None:
        tensors = make(self.CALL)
        with mla.use_variant("sm80"), pytest.raises(mla.UnsupportedError, match="sm80"):
            run(tensors, "new")
        with mla.use_variant("cpu"):
            check_call(tensors, run(tensors, "new"))


SOMETHING = torch.zeros(1)


class TestRefuses:
    CALL = Call((100, 33), h_q=8)

    def call(self, form: str = "new", **changes: Any) -> object:
        tensors = make(self.CALL)
        names = ("q", "k_cache", "block_table", "cache_seqlens", "head_dim_v")
        scheduler = ("tile_scheduler_metadata", "num_splits")
        arguments = dict(zip(names, tensors.arguments(), strict=True))
        arguments |= dict(zip(scheduler, metadata(tensors, form), strict=True))
        return flash_mla.flash_mla_with_kvcache(**arguments | changes)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"is_fp8_kvcache": True}, "8-bit"),
            ({"indices": SOMETHING}, "sparse"),
            ({"attn_sink": SOMETHING}, "sinks"),
            ({"extra_k_cache": SOMETHING}, "second cache"),
            ({"extra_indices_in_kvcache": SOMETHING}, "second cache"),
            ({"topk_length": SOMETHING}, "sparse"),
            ({"extra_topk_length": SOMETHING}, "second cache"),
            ({"descale_q": SOMETHING}, "8-bit"),
            ({"descale_k": SOMETHING}, "8-bit"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_is_not_dense_decode(self, changes: dict[str, Any], what: str, form: str) -> None:
        (name,) = changes
        with pytest.raises(mla.UnsupportedError, match=rf"^{name}: mla has no .*{what}"):
            self.call(form, **changes)

    @pytest.mark.parametrize("options", [{"is_fp8_kvcache": True}, {"topk": 64}])
    def test_metadata_of_it(self, options: dict[str, Any]) -> None:
        lens = torch.ones(2, dtype=torch.int32)
        with pytest.raises(mla.UnsupportedError, match=next(iter(options))):
            flash_mla.get_mla_metadata(lens, 8, 1, **options)

    @pytest.mark.parametrize(
        "name", [n for n in flash_mla.__all__ if n.startswith(("flash_attn", "flash_mla_sparse"))]
    )
    def test_functions_that_are_not_decode(self, name: str) -> None:
        with pytest.raises(mla.UnsupportedError, match=name):
            getattr(flash_mla, name)(SOMETHING, softmax_scale=1.0)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"head_dim_v": 256}, ValueError, "head_dim_v: got 256, expected 512 with d_qk = 576"),
            ({"head_dim_v": 576}, ValueError, "head_dim_v: got 576, expected 512"),
            ({"q": torch.zeros(2, 8, 576)}, ValueError, r"q: got shape .*\[b, s_q, h_q, d_qk\]"),
            ({"q": torch.zeros(2, 1, 8, 576)}, TypeError, "q: got torch.float32"),
            ({"q": None}, TypeError, "q: got NoneType"),
            ({"k_cache": SOMETHING}, ValueError, r"k_cache: got shape \[1\]"),
            (
                {"k_cache": torch.zeros(9, 64, 3, 576, dtype=torch.bfloat16)},
                ValueError,
                "k_cache: got 3 KV heads, expected a number that divides the 8 heads of q",
            ),
            ({"cache_seqlens": None}, TypeError, "cache_seqlens: got NoneType"),
            ({"cache_seqlens": torch.ones(2)}, TypeError, "cache_seqlens: got torch.float32"),
            (
                {"cache_seqlens": torch.ones(3, dtype=torch.int32)},
                ValueError,
                r"cache_seqlens: got shape \[3\], expected \[2\]",
            ),
            ({"block_table": None}, TypeError, "block_table: got NoneType"),
            ({"tile_scheduler_metadata": None, "num_splits": None}, TypeError, "NoneType"),
            ({"num_splits": torch.zeros(7, dtype=torch.int32)}, ValueError, "num_splits: got"),
            ({"softmax_scale": "1"}, TypeError, "scale: got '1'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_arguments(
        self, changes: dict[str, Any], kind: type[Exception], message: str, form: str
    ) -> None:
        with pytest.raises(kind, match=message):
            self.call(form, **changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seq_lens": (5,)}, "b = 2, expected b = 1"),
            ({"s_q": 2}, "s_q = 1, expected s_q = 2"),
            ({"h_q": 16}, "h_q = 8, expected h_q = 16"),
            ({"d_qk": 512}, "d_qk = 576, expected d_qk = 512"),
            ({"page_size": 32}, "page_block_size = 64, expected page_block_size = 32"),
            ({"h_kv": 2}, "h_kv = 1, expected h_kv = 2"),
            ({"dtype": torch.float16}, "torch.bfloat16, expected dtype = torch.float16"),
        ],
    )
    def test_a_schedule_for_other_sizes(self, changes: dict[str, Any], message: str) -> None:
        meta, _ = flash_mla.get_mla_metadata()
        flash_mla.flash_mla_with_kvcache(*make(self.CALL).arguments(), meta)
        other = make(replace(self.CALL, **changes))
        with pytest.raises(ValueError, match=f"^tile_scheduler_metadata: got .*{message}"):
            flash_mla.flash_mla_with_kvcache(*other.arguments(), meta)

    def test_a_schedule_of_the_callers_own(self) -> None:
        meta, _ = flash_mla.get_mla_metadata()
        meta.tile_scheduler_metadata = torch.zeros(1, 8, dtype=torch.int32)
        with pytest.raises(mla.UnsupportedError, match="a schedule that the caller made"):
            self.call(tile_scheduler_metadata=meta)
