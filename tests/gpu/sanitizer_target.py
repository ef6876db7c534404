"""What test_sanitizer.py runs under compute-sanitizer: small problems on every row of one d_qk.

A row runs CASES_PER_ROW cases in which every two of these occur together: split and unsplit, page 1
and 64, causal and not, ragged and not, either dtype, few and many workers (test_cases.py holds them
to that). Then come values that a kernel must clamp. One process also runs `append`. Tensors are
made on the CPU and copied, as only our kernels are instrumented and others' writes go unnoticed.
Results are copied back, but comparing them with a reference is the numerics tests' work. Prints
where the time goes, and the number of decode launches.

    python sanitizer_target.py D_QK [--fault memcheck|initcheck] [--started TIME]

With `--fault` there is one launch, and it does what that tool must find.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # cases, device_plan

import mla
import mla.first_call
import torch
from appending import CASES as APPENDS
from appending import MISTAKES, make_append, make_mistake
from cases import Case, Inputs, make_problem
from device_plan import Batch, host_schedule
from mla import _mla
from mla.device import facts, resolve
from mla.variants import Variant

# Lengths that fill whole groups of the schedule, so that no item is split, and lengths that do not.
UNSPLIT, SPLIT = (120, 128, 125), (300, 0, 70)
UNIFORM, RAGGED = 2, (3, 0, 2)  # query tokens
H_Q = 20  # 40 rows a request: up to three row blocks, the last one not full
# Few workers have several pieces each; partial results are combined by a warp each. With many
# workers, most have one piece or none; the warps of a CTA combine together.
FEW, MANY = 9, 64
CASES_PER_ROW = 6
OVERLAPPING = Batch([40] * 12, [5] + [0] * 11, 2 * H_Q, cuts=[0, 5] * 6 + [0])
OVERLAPPING_WORKERS = 1
APPENDING = 576  # the process that appends as well
DEVICE = "cuda"


def cases(row: Variant, number: int) -> Iterator[tuple[Case, int]]:
    """For the row of this number in its process. With each case the number of workers.

    The first case has the first of two values on every axis. The other five have the second value
    on three of them each time, another three for every axis: two such threes out of five share one
    and differ, so two axes show all four pairs of values. Each row has other threes.
    """
    threes = list(itertools.combinations(range(1, CASES_PER_ROW), 3))
    for i in range(CASES_PER_ROW):
        split, single, full, ragged, second, many = (
            i in threes[(number + axis) % len(threes)] for axis in range(6)
        )
        case = Case(
            SPLIT if split else UNSPLIT,
            q_lens=RAGGED if ragged else UNIFORM,
            h_q=H_Q,
            d_qk=row.d_qk,
            dtype=row.dtypes[second % len(row.dtypes)],
            page_size=1 if single else 64,
            causal=not full,
            split_q=ragged,
            split_cache=full,
        )
        yield case, MANY if many else FEW


@functools.cache
def inputs_of(case: Case) -> Inputs:
    return make_problem(case, "cpu").to(DEVICE)


def is_split(case: Case, row: Variant, workers: int) -> bool:
    batch, shape = (
        Batch(case.seq_lens, case.q_lens, case.h_q),
        (row.block_rows, row.block_n, row.merges_pairs),
    )
    made = host_schedule(batch, shape, workers)
    return bool(made["splits"]) or any(made["pairs"])


def decode(
    inputs: Inputs, row: Variant, workers: int, launch: Callable[..., None] = _mla.launch_decode
) -> tuple[torch.Tensor, torch.Tensor]:
    """As on a GPU with so many SMs, so that the schedule is the same on every GPU."""

    def with_flags(name: str, dtype: str, params: _mla.DecodeParams, *rest: int) -> None:
        # Flags of pairs may hold anything, but initcheck must have seen it: it does not watch the
        # kernel by which torch fills a workspace.
        flags = params.o_partial + 2 * workers * row.block_rows * row.d_v * 2
        ctypes.CDLL("libcuda.so.1").cuMemcpyHtoD_v2(
            ctypes.c_uint64(flags), bytes(16 * workers), ctypes.c_size_t(16 * workers)
        )
        launch(name, dtype, params, *rest)

    _mla.forget()  # what was prepared for another number
    _mla.redirect(_mla.launch_plan, with_flags, _mla.capturing)
    few = mock.patch.object(
        mla.first_call, "facts", lambda it: replace(facts(it), sm_count=workers)
    )
    with few:
        result = mla.decode(**inputs.kwargs(), return_lse=True, variant=row.name)
    torch.cuda.synchronize()
    return result


def run_case(case: Case, row: Variant, workers: int) -> None:
    out, lse = decode(inputs_of(case), row, workers)
    assert out.cpu().isfinite().all(), f"{case} on {row.name}"
    assert not lse.cpu().isnan().any(), f"{case} on {row.name}"


def run_wrong_values(row: Variant) -> None:
    """Lengths, page ids and query offsets out of range: the sanitizer sees where they lead."""
    inputs = inputs_of(Case(SPLIT, q_lens=RAGGED, h_q=H_Q, d_qk=row.d_qk))
    wrong = {
        "seq_lens": torch.tensor([2**31 - 1, -7, 100_000], dtype=torch.int32),
        "block_table": torch.full(inputs.block_table.shape, 2147480000, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([-5, 3, 2, 1000], dtype=torch.int32),
    }
    on_device = {name: tensor.to(DEVICE) for name, tensor in wrong.items()}
    decode(replace(inputs, **on_device), row, FEW)


def run_overlapping_requests(row: Variant) -> None:
    """More pieces of work than there is room for."""
    batch = OVERLAPPING
    assert not isinstance(batch.q_lens, int)
    case = Case(tuple(batch.seq_lens), tuple(batch.q_lens), batch.h_q, row.d_qk)
    cuts = torch.tensor(batch.cu_seqlens_q, dtype=torch.int32).to(DEVICE)
    decode(replace(inputs_of(case), cu_seqlens_q=cuts), row, OVERLAPPING_WORKERS)


def run_row(row: Variant, number: int) -> list[float]:
    """The seconds of its launches; the first of a row loads its image."""
    runs = [functools.partial(run_case, case, row, workers) for case, workers in cases(row, number)]
    runs += [functools.partial(run, row) for run in (run_wrong_values, run_overlapping_requests)]
    seconds = []
    for run in runs:
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def run_appends() -> None:
    """With tokens that lead outside the cache. Of a strided input, a kernel of torch's would write
    the rows."""
    calls = [make_mistake(mistake, DEVICE) for mistake in MISTAKES]
    calls += [make_append(case, DEVICE) for case in APPENDS if not case.strided]
    for call in calls:
        mla.append(**call.kwargs)
    torch.cuda.synchronize()


def run_fault(tool: str, row: Variant) -> None:
    inputs = inputs_of(Case((100,), d_qk=row.d_qk))
    if tool == "initcheck":
        assert isinstance(inputs.q, torch.Tensor)
        inputs.q = torch.empty_like(inputs.q)
        decode(inputs, row, FEW)
        return

    def misdirected(name: str, dtype: str, params: _mla.DecodeParams, *rest: int) -> None:
        params.lse = 4096  # nobody's memory
        _mla.launch_decode(name, dtype, params, *rest)

    decode(inputs, row, FEW, misdirected)


def report(what: str, started: float) -> None:
    """At once: a process that is ended has said how far it came."""
    print(f"[{time.time() - started:5.1f} s] {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("d_qk", type=int)
    parser.add_argument("--fault", choices=["memcheck", "initcheck"])
    parser.add_argument("--started", type=float, default=time.time(), help="as of time.time()")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # there are as many processes as cores
    report("imported torch", arguments.started)
    device = resolve(DEVICE)
    torch.zeros(1).to(DEVICE)
    report("initialised CUDA", arguments.started)
    rows = [
        row
        for row in mla.variants()
        if row.d_qk == arguments.d_qk and not row.unsupported_device(device)
    ]
    if arguments.fault:
        run_fault(arguments.fault, rows[0])
        return
    if arguments.d_qk == APPENDING:
        run_appends()
        report("appended", arguments.started)
    launches = 0
    for number, row in enumerate(rows):
        seconds = run_row(row, number)
        launches += len(seconds)
        each = " ".join(f"{s:.1f}" for s in seconds)
        report(f"{row.name}: {sum(seconds):.1f} s, by launch {each}", arguments.started)
    print(f"decode launches: {launches}")


if __name__ == "__main__":
    main()
