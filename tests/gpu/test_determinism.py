"""Same inputs, same bits: over reruns, and whatever scratch memory and unused pages hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, make_problem
from mla.device import resolve
from mla.variants import Variant
from running import GPU_ROWS, assert_same_bits, clone, plan_for, run

RERUNS = 20
SHAPES: dict[str, dict[str, Any]] = {
    "split": {"seq_lens": (7000, 40, 0, 2500), "q_lens": 3},
    "unsplit": {"seq_lens": (110, 128, 100) * 50, "q_lens": 2},
}


def problem(row: Variant, shape: str, device: torch.device, **changes: Any) -> Inputs:
    return make_problem(Case(d_qk=row.d_qk or 576, **(SHAPES[shape] | changes)), device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reruns_give_the_same_bits(
    row: Variant, shape: str, dtype: str, device: torch.device
) -> None:
    inputs = problem(row, shape, device, dtype=dtype)
    first = clone(run(inputs, variant=row.name))
    for _ in range(RERUNS):
        assert_same_bits(run(inputs, variant=row.name), first)


def test_pages_may_lie_anywhere(row: Variant, device: torch.device) -> None:
    inputs = problem(row, "split", device)
    first = clone(run(inputs, variant=row.name))
    assert isinstance(inputs.kv_cache, torch.Tensor)
    order = torch.randperm(inputs.kv_cache.shape[0], device=device)
    inputs.kv_cache = inputs.kv_cache[order]
    valid = (inputs.block_table >= 0) & (inputs.block_table < len(order))
    moved = order.argsort().int()[inputs.block_table.clamp(0, len(order) - 1).long()]
    inputs.block_table = torch.where(valid, moved, inputs.block_table)
    assert_same_bits(run(inputs, variant=row.name), first)


@pytest.mark.parametrize("page_size", [32, 16, 8, 1])
def test_pages_may_have_any_size(row: Variant, page_size: int, device: torch.device) -> None:
    """The same tokens at the same addresses: however a pipeline fetches pages, it gets these."""
    inputs = problem(row, "split", device)
    first = clone(run(inputs, variant=row.name))
    cache, table = inputs.kv_cache, inputs.block_table
    assert isinstance(cache, torch.Tensor)
    pages, whole, d_qk = cache.shape
    part = torch.arange(whole // page_size, dtype=torch.int32, device=device)
    valid = ((table >= 0) & (table < pages))[..., None]
    parts = torch.where(valid, table.clamp(0, pages)[..., None] * len(part) + part, -1)
    inputs.kv_cache = cache.view(-1, page_size, d_qk)
    inputs.block_table = parts.flatten(1)
    assert_same_bits(run(inputs, variant=row.name), first)


@pytest.mark.parametrize("shape", SHAPES)
def test_scratch_memory_holds_nothing_that_matters(
    row: Variant, shape: str, device: torch.device
) -> None:
    """A workspace full of nan, then one with the partial results of another problem."""
    inputs = problem(row, shape, device)
    first = clone(run(inputs, variant=row.name))
    workspace = torch.full(
        (64 << 20,), 0xFF, dtype=torch.uint8, device=device
    )  # 0xFFFFFFFF is a nan
    assert_same_bits(run(inputs, variant=row.name, workspace=workspace), first)
    other = problem(row, "split", device, seq_lens=(9000, 3000, 5), h_q=40)
    run(other, variant=row.name, workspace=workspace)
    assert_same_bits(run(inputs, variant=row.name, workspace=workspace), first)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_changes_no_bits(row: Variant, shape: str, device: torch.device) -> None:
    inputs = problem(row, shape, device)
    plan = plan_for(inputs, variant=row.name)
    first = clone(run(inputs, variant=row.name))
    for _ in range(3):
        assert_same_bits(run(inputs, plan=plan), first)


def test_processes_beside_each_other() -> None:
    """They take turns on the GPU, and what a kernel waits for then comes in another order: here a
    wait that one late load of KV let through gave other bits in one of some 3,000 reruns."""
    rows = [row for row in GPU_ROWS if not row.unsupported_device(resolve(None))]
    names = {(row.pipeline, row.d_qk): row.name for row in reversed(rows)}.values()
    script = str(Path(__file__).with_name("rerunning.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", script, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    ]
    said = [process.communicate()[0] for process in processes]
    wrong = [text for process, text in zip(processes, said, strict=True) if process.returncode]
    assert not wrong, "".join(wrong)
    assert all(" 0 with other bits" in text for text in said), said
