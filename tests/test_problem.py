"""What a caller can get wrong, and what he is told, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import mla
import pytest
import torch
from hypothesis import given as given_data
from hypothesis import strategies as st
from mla import _mla, outputs
from mla.problem import Problem
from torch import Tensor
from wrong_calls import (
    DT,
    MAX_PAGES,
    PAGE_SIZE,
    PAGES,
    S_Q,
    VALUES,
    WRONG,
    Arguments,
    B,
    H,
    T,
    V,
    given,
    ints,
    padded,
    pairs,
    ragged,
    uniform,
    zeros,
)


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    make, error, message = WRONG[what]
    with pytest.raises(error, match="^" + re.escape(message)):
        mla.decode(**make())


def test_scale_has_no_default() -> None:
    call = uniform()
    del call["scale"]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'scale'"):
        mla.decode(**call)


@pytest.mark.parametrize("name", ["q", "kv_cache", "out", "lse"])
def test_gradients_are_refused_rather_than_lost(name: str) -> None:
    call = uniform() | {
        "out": zeros(B, S_Q, H, 512),
        "lse": zeros(B, S_Q, H, dtype=torch.float32),
    }
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: requires grad, but mla has no backward"):
        mla.decode(**call)
    with torch.no_grad():
        mla.decode(**call)
    with torch.inference_mode():
        mla.decode(**call)


@pytest.mark.parametrize("make", [uniform, ragged, pairs])
def test_the_calls_that_the_wrong_ones_are_made_of_are_right(
    make: Callable[[], Arguments],
) -> None:
    out = mla.decode(**make())
    assert not out.any()


class TestAccepted:
    """What looks wrong and is not."""

    def test_strides_of_single_elements(self) -> None:
        q = zeros(B, 1, 1, 576).as_strided((B, 1, 1, 576), (576, 3, 5, 1))
        cache = zeros(PAGES, 1, 576).as_strided((PAGES, 1, 576), (576, 7, 1))
        table = ints(B, 3)[:, :1]
        mla.decode(**given(uniform, q=q, kv_cache=cache, block_table=table))

    def test_padded_rows(self) -> None:
        mla.decode(
            **given(
                uniform,
                q=padded(B, S_Q, H, 576, by=8),
                kv_cache=padded(PAGES, PAGE_SIZE, 576, by=64),
                block_table=ints(B, MAX_PAGES + 3)[:, :MAX_PAGES],
                out=padded(B, S_Q, H, 512, by=16),
                lse=zeros(B, H, S_Q, dtype=torch.float32).transpose(1, 2),
            )
        )

    def test_one_page_table_for_all(self) -> None:
        mla.decode(**given(uniform, block_table=ints(1, MAX_PAGES).expand(B, MAX_PAGES)))

    def test_q_and_out_side_by_side(self) -> None:
        buffer = zeros(B, S_Q, H, 576 + 512)
        out = mla.decode(**given(uniform, q=buffer[..., :576], out=buffer[..., 576:]))
        assert out.data_ptr() == buffer[..., 576:].data_ptr()

    def test_out_between_pages(self) -> None:
        """Halves of one buffer whose address ranges are interleaved page by page."""
        buffer = zeros(PAGES, 2, PAGE_SIZE, 576)
        q = buffer[:B, 1, : S_Q * H].unflatten(1, (S_Q, H))
        out = buffer[5 : 5 + B, 1, : S_Q * H, :512].unflatten(1, (S_Q, H))
        mla.decode(**given(uniform, q=q, kv_cache=buffer[:, 0], out=out))

    def test_rope_of_no_columns(self) -> None:
        call = given(
            uniform,
            q=(zeros(B, S_Q, H, 512), zeros(B, S_Q, H, 0)),
            kv_cache=zeros(PAGES, PAGE_SIZE, 1, 512),
        )
        assert mla.decode(**call).shape == (B, S_Q, H, 512)

    def test_d_v_that_agrees(self) -> None:
        mla.decode(**given(uniform, d_v=512))


views = st.tuples(
    st.integers(0, 30),  # first element
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 16)), min_size=1, max_size=3),
)


@given_data(a=views, b=views)
def test_overlaps_are_found(
    a: tuple[int, list[tuple[int, int]]], b: tuple[int, list[tuple[int, int]]]
) -> None:
    """Of random views of one buffer, none that share an element pass as apart."""
    buffer = torch.arange(200, dtype=torch.int16)

    def view(offset: int, dims: list[tuple[int, int]]) -> Tensor:
        return buffer.as_strided([n for n, _ in dims], [stride for _, stride in dims], offset)

    first, second = view(*a), view(*b)
    elements = first.flatten().tolist()
    if len(set(elements)) < len(elements):
        assert outputs.overlaps_itself(first)
    if set(elements) & set(second.flatten().tolist()):
        assert outputs.overlap(first, second)
        assert outputs.overlap(second, first)


class TestValues:
    """What only the tensors' values show: clamped by default, refused under MLA_VALIDATE."""

    @pytest.mark.parametrize("what", VALUES)
    def test_refused_when_asked(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make, message = VALUES[what]
        out, lse = mla.decode(**make(), return_lse=True)  # clamped
        assert out.isfinite().all()
        assert not lse.isnan().any()
        monkeypatch.setenv("MLA_VALIDATE", "0")
        mla.decode(**make())
        monkeypatch.setenv("MLA_VALIDATE", "1")
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            mla.decode(**make())

    @pytest.mark.parametrize("make", [uniform, ragged, pairs])
    def test_right_ones_pass(
        self, make: Callable[[], Arguments], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLA_VALIDATE", "1")
        table = torch.full((B, MAX_PAGES), 2147480000, dtype=torch.int32)
        table[0, 0], table[2] = 3, torch.arange(4)
        mla.decode(**make() | {"block_table": table})
        mla.decode(
            **given(uniform, q=zeros(0, S_Q, H, 576), block_table=ints(0, 3), seq_lens=ints(0))
        )


GOOD = {"h_q": H, "d_qk": 576, "dtype": DT, "page_size": PAGE_SIZE}


class TestSizes:
    """Of `plan` and `explain`, which take numbers."""

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"h_q": 0}, V, "h_q: got 0, expected 1 to 2^31 - 1"),
            ({"h_q": -8}, V, "h_q: got -8, expected 1 to 2^31 - 1"),
            ({"h_q": 8.0}, T, "h_q: got 8.0, expected an int"),
            ({"s_q": -1}, V, "s_q: got -1, expected 0 to 2^31 - 1"),
            ({"page_size": 0}, V, "page_size: got 0, expected 1 to 2^31 - 1"),
            ({"max_pages": -1}, V, "max_pages: got -1, expected 0 to 2^31 - 1"),
            (
                {"h_q": 2**20, "s_q": 2**11},
                V,
                "q: got 6144 query tokens of 1048576 heads, expected at most 2147482624 query rows",
            ),
            ({"d_qk": 64}, V, "d_qk: got d_qk = 64, expected one of 576 (d_v = 512)"),
            ({"dtype": torch.float32}, T, "dtype: got torch.float32, expected torch.bfloat16 or"),
            ({"total_q": 3}, V, "total_q: got 3, expected None without cu_seqlens_q"),
            ({"cu_seqlens_q": ints(B + 1)}, V, "total_q: got None, expected the number of query"),
            (
                {"cu_seqlens_q": ints(B + 1), "total_q": -1},
                V,
                "total_q: got -1, expected 0 to 2^31 - 1",
            ),
            ({"cu_seqlens_q": ints(B), "total_q": 3}, V, "cu_seqlens_q: got shape [3], expected"),
            ({"variant": "sm75"}, V, "variant: got 'sm75' (forced by variant=), expected a pipe"),
        ],
    )
    def test_plan(self, change: Arguments, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match="^" + re.escape(message)):
            mla.plan(ints(B), **GOOD | change)

    def test_lengths_of_a_plan(self) -> None:
        with pytest.raises(TypeError, match=r"^seq_lens: got torch.int64, expected torch.int32: "):
            mla.plan(ints(B, dtype=torch.int64), **GOOD)
        with pytest.raises(ValueError, match=r"^seq_lens: got shape \[3, 1\], expected \[b\]"):
            mla.plan(ints(B, 1), **GOOD)
        with pytest.raises(TypeError, match=r"^seq_lens: got list, expected a torch.Tensor"):
            mla.plan([1, 2], **GOOD)  # type: ignore[arg-type]
        plan = mla.plan(ints(B), **GOOD)
        with pytest.raises(ValueError, match=r"^seq_lens: got shape \[4\], expected \[3\]"):
            plan.update(ints(B + 1))
        with pytest.raises(
            ValueError, match=r"^seq_lens: got stride 2 in its last dimension, expected 1"
        ):
            plan.update(ints(2 * B)[::2])
        with pytest.raises(ValueError, match=r"^seq_lens: got device meta, expected cpu"):
            plan.update(ints(B, device="meta"))
        with pytest.raises(ValueError, match=r"^cu_seqlens_q: got shape \[4\], expected none"):
            plan.update(ints(B), ints(B + 1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"h_q": H + 1}, "a plan for h_q = 9, expected h_q = 8 as in the call"),
            ({"s_q": 1}, "a plan for s_q = 1, expected s_q = 2 as in the call"),
            ({"d_qk": 320}, "a plan for d_qk = 320, expected d_qk = 576 as in the call"),
            ({"page_size": 1}, "a plan for page_size = 1, expected page_size = 16 as in the call"),
            (
                {"dtype": torch.float16},
                "a plan for dtype = torch.float16, expected dtype = torch.bfloat16 as in the call",
            ),
            (
                {"cu_seqlens_q": ints(B + 1), "total_q": 6},
                "a plan for ragged = True, expected ragged = False as in the call",
            ),
        ],
    )
    def test_plan_of_another_call(self, change: Arguments, message: str) -> None:
        plan = mla.plan(ints(B), **{"s_q": S_Q} | GOOD | change)
        with pytest.raises(ValueError, match="^" + re.escape(f"plan: got {message}")):
            mla.decode(**uniform(), plan=plan)

    def test_lengths_stay_countable(self) -> None:
        sizes = {"b": 1, "h_q": 1, "d_qk": 576, "dtype": DT, "page_size": 2**20}
        assert Problem.from_sizes(**sizes, max_pages=2**11 - 1).max_len == 2**31 - 2**20
        assert Problem.from_sizes(**sizes, max_pages=2**11).max_len == _mla.MAX_LEN < 2**31

    def test_plan_of_other_requests(self) -> None:
        plan = mla.plan(ints(B + 1), s_q=S_Q, **GOOD)
        with pytest.raises(ValueError, match=r"^plan: got a plan for b = 4, expected b = 3"):
            mla.decode(**uniform(), plan=plan)

    def test_plan_is_a_plan(self) -> None:
        with pytest.raises(TypeError, match=r"^plan: got dict, expected an mla.Plan"):
            mla.decode(**uniform(), plan={})

    def test_explain(self) -> None:
        with pytest.raises(ValueError, match=r"^b: got -1, expected 0 to 2\^31 - 1"):
            mla.explain(b=-1)
        with pytest.raises(ValueError, match=r"^kv_len: got -5, expected 0 to 2\^31 - 1"):
            mla.explain(kv_len=-5)
        with pytest.raises(ValueError, match=r"^device: got 'Voodoo 2', expected a torch device"):
            mla.explain(device="Voodoo 2")
        with pytest.raises(TypeError, match=r"^explain: got some of q, kv_cache, block_table"):
            mla.explain(uniform()["q"])
        with pytest.raises(ValueError, match=r"^kv_cache: got rows of 320, expected 576"):
            mla.explain(**given(uniform, kv_cache=zeros(PAGES, PAGE_SIZE, 320)))
