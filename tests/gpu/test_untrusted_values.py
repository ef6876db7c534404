"""Lengths, page ids and query offsets that only the device can see.

Wrong ones are harmless: the call reads and writes inside its tensors, and other requests' rows are
right, unless requests overlap: all results are undefined then. With MLA_VALIDATE=1 they are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import torch
from cases import Case, Inputs, make_problem
from compare import check, reference
from device_plan import OVERLAPPING
from mla.variants import Variant
from running import GPU_ROWS, one_of_each, plan_for, run
from torch import Tensor

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)


@dataclass(frozen=True)
class Mistake:
    tensor: str
    index: tuple[int, ...]
    value: int
    right: tuple[int, ...] = (0, 1, 5)  # query tokens whose rows must still be right
    zero: tuple[int, ...] = ()  # whose rows see no token then

    def __str__(self) -> str:
        return f"{self.tensor}{list(self.index)}={self.value}"


MISTAKES = [
    Mistake("seq_lens", (1,), 100_000),
    Mistake("seq_lens", (1,), INT32_MAX),
    Mistake("seq_lens", (2,), INT32_MAX, right=(0, 1, 2, 3, 4)),
    Mistake("seq_lens", (1,), -7, zero=(2, 3, 4)),
    Mistake("seq_lens", (0,), INT32_MIN, right=(2, 3, 4, 5), zero=(0, 1)),
    Mistake("block_table", (1, 0), 100_000),
    Mistake("block_table", (1, 3), -1),
    Mistake("block_table", (1, 1), INT32_MAX),
    Mistake("block_table", (1, 2), INT32_MIN),
    Mistake("cu_seqlens_q", (3,), 106, right=(0, 1, 2, 3, 4, 5)),
    Mistake("cu_seqlens_q", (3,), INT32_MAX, right=(0, 1, 2, 3, 4, 5)),
    Mistake("cu_seqlens_q", (0,), -5, right=(0, 1, 2, 3, 4, 5)),
    Mistake("cu_seqlens_q", (1,), INT32_MIN, right=(5,)),
    Mistake("cu_seqlens_q", (2,), 1, right=()),  # requests 0 and 2 overlap
    Mistake("cu_seqlens_q", (1,), INT32_MAX, right=()),  # as they do here
]
WORKSPACE_BYTE, GUARD_BYTES = 0x7F, 4096


def problem(row: Variant, device: torch.device) -> Inputs:
    """Outputs and inputs are views, with gaps around them."""
    return make_problem(
        Case((1500, 250, 77), q_lens=(2, 3, 1), d_qk=row.d_qk or 576, strided=True), device
    )


def make(inputs: Inputs, mistake: Mistake) -> Inputs:
    tensor: Tensor = getattr(inputs, mistake.tensor).clone()
    tensor[mistake.index] = mistake.value
    return replace(inputs, **{mistake.tensor: tensor})


@pytest.fixture(autouse=True)
def no_device_error(needs_gpu: None) -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_wrong_values_are_harmless(row: Variant, mistake: Mistake, device: torch.device) -> None:
    inputs = problem(row, device)
    expected_out, expected_lse = reference(inputs)
    out, lse = run(make(inputs, mistake), variant=row.name)
    assert lse is not None
    right, zero = list(mistake.right), list(mistake.zero)
    check((out[right], lse[right]), (expected_out[right], expected_lse[right]))
    assert not out[zero].any()
    assert (lse[zero] == -torch.inf).all()


def bytes_needed(inputs: Inputs, row: Variant) -> int:
    nothing = torch.empty(0, dtype=torch.uint8, device=inputs.rows.device)
    with pytest.raises(ValueError, match="workspace") as error:
        run(inputs, variant=row.name, workspace=nothing)
    found = re.search(r"at least (\d+)", str(error.value))
    assert found is not None, error.value
    return int(found[1])


@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_requests_are_harmless(row: Variant, name: str, device: torch.device) -> None:
    """Their results are undefined. More pieces of work than the workspace has room for are left
    out, and no piece that nobody wrote is followed: it would lead far out of every tensor."""
    batch = OVERLAPPING[name]
    assert not isinstance(batch.q_lens, int)
    case = Case(
        tuple(batch.seq_lens),
        q_lens=tuple(batch.q_lens),
        h_q=batch.h_q,
        d_qk=row.d_qk or 576,
        strided=True,
    )
    inputs = make_problem(case, device)
    cuts = torch.tensor(batch.cu_seqlens_q, dtype=torch.int32, device=device)
    wrong = replace(inputs, cu_seqlens_q=cuts)

    size = bytes_needed(inputs, row)
    memory = torch.full((size + 2 * GUARD_BYTES,), WORKSPACE_BYTE, dtype=torch.uint8, device=device)
    before, workspace, after = memory.split_with_sizes([GUARD_BYTES, size, GUARD_BYTES])
    tensors = [wrong.q, wrong.kv_cache, wrong.block_table, wrong.seq_lens, wrong.cu_seqlens_q]
    bits = [
        t.new_empty(0).set_(t.untyped_storage()).view(torch.int16)
        for t in tensors
        if isinstance(t, Tensor)
    ]
    copies = [t.clone() for t in bits]

    run(wrong, variant=row.name, workspace=workspace)
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(bits, copies, strict=True)), "an input was written"
    assert (before == WORKSPACE_BYTE).all(), "the call wrote before its workspace"
    assert (after == WORKSPACE_BYTE).all(), "the call wrote behind its workspace"
    check(run(inputs, variant=row.name, workspace=workspace), reference(inputs))


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.tensor == "seq_lens"], ids=str)
@one_of_each
def test_wrong_lengths_in_a_plan_are_harmless(
    row: Variant, mistake: Mistake, bounded: bool, device: torch.device
) -> None:
    inputs = problem(row, device)
    expected_out, expected_lse = reference(inputs)
    wrong = make(inputs, mistake)
    plan = plan_for(
        wrong,
        max_pages=wrong.block_table.shape[1] if bounded else None,
        variant=row.name,
    )
    out, lse = run(wrong, plan=plan)
    assert lse is not None
    right = list(mistake.right)
    check((out[right], lse[right]), (expected_out[right], expected_lse[right]))


def test_a_stale_plan_is_harmless(row: Variant, device: torch.device) -> None:
    """Lengths change after the plan was made: the results are undefined, nothing else is."""
    inputs = problem(row, device)
    plan = plan_for(inputs, variant=row.name)
    for lengths in ((0, 0, 0), (1, 250, 77), (1500, 250, 77), (1600, 1600, 1600)):
        inputs.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        run(inputs, plan=plan)


def test_a_pool_without_pages(row: Variant, device: torch.device) -> None:
    inputs = problem(row, device)
    empty = replace(
        inputs, kv_cache=torch.empty(0, 64, row.d_qk or 576, dtype=torch.bfloat16, device=device)
    )
    with suppress(ValueError):  # a fine answer too
        run(empty, variant=row.name)


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_validation_raises(
    mistake: Mistake, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_VALIDATE", "1")
    inputs = problem(GPU_ROWS[0], device)
    run(inputs)
    with pytest.raises(ValueError, match=mistake.tensor):
        run(make(inputs, mistake))


def test_validation_is_off_while_capturing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLA_VALIDATE", "1")
    inputs = problem(GPU_ROWS[0], device)
    inputs.case = replace(inputs.case, given=False)
    expected = reference(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(inputs)
    graph.replay()
    check(result, expected)
