"""Streams, threads, devices: decode follows torch's current stream and never waits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import Any

import mla
import pytest
import torch
from cases import Case, Inputs, make_problem
from compare import check, reference
from mla.variants import Variant
from running import NAN, assert_same_bits, clone, one_of_each, plan_for, run
from torch import Tensor

CYCLES = 100_000_000  # of a sleeping kernel: tens of milliseconds


pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


def problem(row: Variant, device: torch.device, **changes: Any) -> Inputs:
    options: dict[str, Any] = {
        "seq_lens": (3000, 40, 0, 700),
        "q_lens": 2,
        "d_qk": row.d_qk,
        "given": False,
    }
    return make_problem(Case(**(options | changes)), device)


def test_follows_a_side_stream(row: Variant, device: torch.device) -> None:
    """The query arrives late on the stream; work queued anywhere else would read nan."""
    inputs = problem(row, device)
    expected = reference(inputs)
    assert isinstance(inputs.q, Tensor)
    late = inputs.q.clone()
    inputs.q.fill_(NAN)
    run(inputs, variant=row.name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        inputs.q.copy_(late)
        result = run(inputs, variant=row.name)
    stream.synchronize()
    check(result, expected)


def test_does_not_wait_for_the_device(row: Variant, device: torch.device) -> None:
    inputs = problem(row, device)
    run(inputs, variant=row.name)
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, variant=row.name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()
    done.record()
    assert not done.query(), "decode returned after the device had finished"
    torch.cuda.synchronize()


@one_of_each
def test_a_plan_does_not_wait_for_the_device(row: Variant, device: torch.device) -> None:
    inputs = problem(row, device)

    def step() -> None:
        plan = plan_for(inputs, variant=row.name)
        plan.update(inputs.seq_lens)
        run(inputs, plan=plan)

    step()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def test_two_streams_at_once(row: Variant, device: torch.device) -> None:
    """Each stream has partial results of its own; the problems alternate between the streams."""
    problems = [problem(row, device), problem(row, device, seq_lens=(5000, 100), h_q=40)]
    wanted = [clone(run(inputs, variant=row.name)) for inputs in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            which = i // 2 % 2
            results.append((which, run(problems[which], variant=row.name)))
            which = 1 - which
            results.append((which, run(problems[which], variant=row.name)))
    torch.cuda.synchronize()
    for which, result in results:
        assert_same_bits(result, wanted[which])


@one_of_each
def test_threads_with_streams_of_their_own(row: Variant, device: torch.device) -> None:
    inputs = problem(row, device)
    want = clone(run(inputs, variant=row.name))
    torch.cuda.synchronize()

    def work(_: int) -> list[tuple[Tensor, Tensor | None]]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            results = [run(inputs, variant=row.name) for _ in range(20)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for result in results:
                assert_same_bits(result, want)


@one_of_each
def test_threads_on_one_stream(row: Variant, device: torch.device) -> None:
    """Their launches share one workspace, so the launches of two calls must not mix."""
    problems = [problem(row, device), problem(row, device, seq_lens=(5000, 100), h_q=40)]
    wanted = [clone(run(inputs, variant=row.name)) for inputs in problems]

    def work(i: int) -> list[tuple[Tensor, Tensor | None]]:
        return [clone(run(problems[i % 2], variant=row.name)) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for i, results in enumerate(pool.map(work, range(8))):
            for result in results:
                assert_same_bits(result, wanted[i % 2])


@one_of_each
def test_thread_without_context(row: Variant, device: torch.device) -> None:
    """In a new thread no context is current, and with all memory given torch makes none."""
    inputs = problem(row, device)
    want = clone(run(inputs, variant=row.name))
    out, lse = torch.full_like(want[0], NAN), torch.full(want[0].shape[:-1], NAN, device=device)
    workspace = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    failures: list[Exception] = []

    def work() -> None:
        try:
            mla.decode(
                **inputs.kwargs(),
                out=out,
                lse=lse,
                return_lse=True,
                workspace=workspace,
                variant=row.name,
            )
        except Exception as failure:
            failures.append(failure)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures
    assert_same_bits((out, lse), want)


def test_device_that_is_not_current(row: Variant, device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    inputs = problem(row, other)
    check(run(inputs, variant=row.name), reference(inputs))
    plan = plan_for(inputs, variant=row.name)
    check(run(inputs, plan=plan), reference(inputs))
    assert torch.cuda.current_device() == current
