"""Calls `mla.decode` and `mla.plan` on a case, and checks what decode must leave alone."""

from __future__ import annotations

from typing import Any

import mla
import pytest
import torch
from cases import DTYPES, Inputs, gaps_hold, poisoned
from torch import Tensor

NAN = float("nan")
# KV tokens of five requests whose graph is captured and replayed with other lengths: what the cache
# holds, and what the replays have, the shortest first.
MOST = (4000, 300, 2000, 64, 1)
STEPS = (
    (1, 1, 1, 1, 1),
    MOST,
    (63, 65, 64, 0, 0),
    (0, 0, 0, 0, 0),
    (100, 0, 1999, 3, 1),
    (3999, 299, 0, 64, 0),
)
GPU_ROWS = [row for row in mla.variants() if not row.on_host]
# The first of each pipeline and kind of GPU, for what the shape of the tile does not matter to.
one_of_each = pytest.mark.parametrize(
    "row",
    list({(row.pipeline, row.targets): row for row in reversed(GPU_ROWS)}.values()),
    ids=lambda row: row.name,
)


def run(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`mla.decode` on the case.

    Outputs that the caller gives are full of nan, and what lies between the rows of a strided one
    must stay nan. Memory that decode will probably get for outputs of its own is left full of nan.
    """
    case, device = inputs.case, inputs.rows.device
    shape, dtype = (*case.row_shape, case.d_v), DTYPES[case.dtype]
    out = poisoned(shape, dtype, device, strided=case.strided, poison=NAN)
    lse = _poisoned_lse(inputs)
    given: dict[str, Any] = {}
    if case.given:
        given = {"out": out, "lse": lse} if case.return_lse else {"out": out}
    else:
        out = lse = torch.empty(0)  # frees both: a caching allocator hands their memory out again
    returned = mla.decode(**inputs.kwargs(), return_lse=case.return_lse, **given, **options)
    got: tuple[Tensor, Tensor | None] = returned if case.return_lse else (returned, None)
    assert got[0].dtype == dtype
    for view, tensor in zip((out, lse), got, strict=True):
        if case.given and tensor is not None:
            assert tensor.data_ptr() == view.data_ptr(), "given outputs are returned"
            assert tensor.stride() == view.stride()
            assert gaps_hold(view, NAN), "decode wrote between the rows of its output"
    return got


def plan_for(inputs: Inputs, **options: Any) -> mla.Plan:
    """`mla.plan` for the case, of the lengths that its tensors hold."""
    case = inputs.case
    return mla.plan(
        inputs.seq_lens,
        h_q=case.h_q,
        d_qk=case.d_qk,
        dtype=inputs.rows.dtype,
        page_size=case.page_size,
        s_q=1 if case.ragged else case.query_lens[0],
        cu_seqlens_q=inputs.cu_seqlens_q,
        total_q=inputs.rows.shape[0] if case.ragged else None,
        **options,
    )


def _poisoned_lse(inputs: Inputs) -> Tensor:
    """[.., h_q]; of a strided uniform case a view of [b, h_q, s_q], as other libraries have it."""
    case, device = inputs.case, inputs.rows.device
    if case.strided and not case.ragged:
        b, s_q, h_q = case.row_shape
        return poisoned((b, h_q, s_q), torch.float32, device, strided=True, poison=NAN).transpose(
            1, 2
        )
    return poisoned(case.row_shape, torch.float32, device, strided=case.strided, poison=NAN)


def clone(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    out, lse = result
    return out.clone(), None if lse is None else lse.clone()


def assert_same_bits(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None]) -> None:
    for name, x, y in zip(("out", "lse"), got, want, strict=True):
        if x is None or y is None:
            assert x is y
            continue
        integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
        differ = (x.contiguous().view(integer) != y.contiguous().view(integer)).nonzero()
        assert len(differ) == 0, (
            f"{name}: {len(differ)} elements differ, the first at {differ[0].tolist()}"
        )
