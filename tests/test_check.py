"""`mla check` passes, and notices mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from command_line import Output, command
from mla import cpu
from mla.cli import check, problems

CpuDecode = Callable[..., None]


def test_check_passes(capsys: Output) -> None:
    assert command("check --device cpu") == 0
    printed = capsys.readouterr().out
    assert "1 of 1 variants are right" in printed
    ran = len(problems.QUICK) * 2 * 4  # dtypes, dims
    assert str(ran) in next(line for line in printed.splitlines() if line.startswith(" cpu"))


def scaled_output(decode: CpuDecode) -> CpuDecode:
    def broken(problem: Any, inputs: Any, out: Any, lse: Any, **options: Any) -> None:
        decode(problem, inputs, out, lse, **options)
        out *= 1.01

    return broken


def shifted_lse(decode: CpuDecode) -> CpuDecode:
    def broken(problem: Any, inputs: Any, out: Any, lse: Any, **options: Any) -> None:
        decode(problem, inputs, out, lse, **options)
        lse += 1e-3

    return broken


def last_token_missed(decode: CpuDecode) -> CpuDecode:
    def broken(problem: Any, inputs: Any, out: Any, lse: Any, **options: Any) -> None:
        inputs.seq_lens = (inputs.seq_lens - 1).clamp(min=0)
        decode(problem, inputs, out, lse, **options)

    return broken


def one_token_too_many(decode: CpuDecode) -> CpuDecode:
    def broken(problem: Any, inputs: Any, out: Any, lse: Any, **options: Any) -> None:
        inputs.seq_lens = inputs.seq_lens + 1
        decode(problem, inputs, out, lse, **options)

    return broken


def nothing_written(decode: CpuDecode) -> CpuDecode:
    return lambda *_, **__: None


def causal_ignored(decode: CpuDecode) -> CpuDecode:
    def broken(*args: Any, causal: bool, **options: Any) -> None:
        decode(*args, causal=False, **options)

    return broken


def differs_between_runs(decode: CpuDecode) -> CpuDecode:
    runs = iter(range(10**6))

    def broken(problem: Any, inputs: Any, out: Any, lse: Any, **options: Any) -> None:
        decode(problem, inputs, out, lse, **options)
        out.view(-1)[0] += 2.0**-13 * (next(runs) % 2)

    return broken


@pytest.mark.parametrize(
    ("breakage", "fault"),
    [
        (scaled_output, "relative RMSE"),
        (shifted_lse, "lse are wrong"),
        (last_token_missed, "lse is -inf for other rows"),
        (one_token_too_many, "elements of out are wrong"),
        (nothing_written, "lse is -inf for other rows"),
        (causal_ignored, "lse is -inf for other rows"),
        (differs_between_runs, "other bits"),
    ],
)
def test_check_notices(
    breakage: Callable[[CpuDecode], CpuDecode],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    monkeypatch.setattr(cpu, "decode", breakage(cpu.decode))
    chosen = ("around a tile, page 1", "rows that see nothing")
    few = tuple(problem for problem in problems.QUICK if problem.name in chosen)
    monkeypatch.setattr(check, "QUICK", few)
    assert command("check --device cpu") == 1
    printed = capsys.readouterr().out
    assert "0 of 1 variants are right" in printed
    assert fault in printed


def test_check_problems_are_poisoned() -> None:
    problem = problems.CheckProblem("", (5, 0, 33), h_q=2, page_size=16)
    inputs = problems.make_inputs(
        problem, 320, 256, torch.float16, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    finite_rows = inputs.kv_packed.isfinite().all(-1)
    assert int(finite_rows.sum()) == 5 + 33
    assert inputs.kv_packed[~finite_rows].isnan().all()
    table = inputs.block_table
    used = torch.cat([table[0, :1], table[2, :3]])
    assert len(set(used.tolist())) == 4
    assert (table[1] == torch.tensor([2147480000, -(2**31), 7, -1, 2147480000])).any()
