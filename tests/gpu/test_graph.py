"""Captured once, replayed with other lengths: growing, shrinking, zero."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, make_problem
from compare import check, reference
from mla.variants import Variant
from running import MOST, NAN, STEPS, assert_same_bits, clone, one_of_each, plan_for, run
from torch import Tensor

TESTS = Path(__file__).parent.parent

Result = tuple[Tensor, Tensor | None]


def problem(row: Variant, device: torch.device, **changes: Any) -> Inputs:
    options: dict[str, Any] = {
        "seq_lens": MOST,
        "q_lens": 2,
        "d_qk": row.d_qk or 576,
        "given": False,
    }
    return make_problem(Case(**(options | changes)), device)


def capture(call: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """What `call` queues as a graph, and where its results will be. Nothing is warmed up."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("plan", ["no plan", "plan updated outside", "plan updated inside"])
def test_replay_follows_the_lengths(
    row: Variant, plan: str, device: torch.device, launches: list[str]
) -> None:
    inputs = problem(row, device).with_lengths(STEPS[0])
    made = None if plan == "no plan" else plan_for(inputs, variant=row.name)

    def call() -> Result:
        if made is None:
            return run(inputs, variant=row.name)
        if plan == "plan updated inside":
            made.update(inputs.seq_lens)
        return run(inputs, plan=made)

    graph, result = capture(call)
    assert launches == [row.name]
    whole = problem(row, device)
    for lengths in (*STEPS, *reversed(STEPS)):
        inputs.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        if made is not None and plan == "plan updated outside":
            made.update(inputs.seq_lens)
        for tensor in result:
            assert tensor is not None
            tensor.fill_(NAN)
        graph.replay()
        step = whole.with_lengths(lengths)
        check(result, reference(step))
        assert_same_bits(result, run(step, variant=row.name))


def test_replay_follows_ragged_queries(row: Variant, device: torch.device) -> None:
    """Query tokens move from request to request, and some belong to none."""
    inputs = problem(row, device, q_lens=(2, 1, 3, 0, 4))
    graph, (out, lse) = capture(lambda: run(inputs, variant=row.name))
    assert lse is not None
    for lengths, q_lens in zip(
        STEPS,
        (
            (2, 1, 3, 0, 4),
            (10, 0, 0, 0, 0),
            (0, 0, 0, 0, 0),
            (1, 1, 1, 1, 1),
            (0, 5, 0, 5, 0),
            (0, 0, 0, 2, 1),
        ),
        strict=True,
    ):
        step = inputs.with_lengths(lengths, q_lens)
        out.fill_(NAN)
        lse.fill_(NAN)
        graph.replay()
        used = sum(q_lens)
        check((out[:used], lse[:used]), reference(step))


def test_replays_follow_each_other(row: Variant, device: torch.device) -> None:
    """Fifty replays without a wait, each with the inputs that the one before left."""
    inputs = problem(row, device)
    graph, result = capture(lambda: run(inputs, variant=row.name))
    for _ in range(50):
        graph.replay()
    assert_same_bits(result, run(inputs, variant=row.name))


@one_of_each
def test_a_graph_keeps_its_workspace(row: Variant, device: torch.device) -> None:
    """Larger calls on the same stream, and other graphs, come between two replays."""
    inputs, other = problem(row, device), problem(row, device, seq_lens=(5000, 10), h_q=40)
    want, other_want = clone(run(inputs, variant=row.name)), clone(run(other, variant=row.name))
    graph, result = capture(lambda: run(inputs, variant=row.name))
    other_graph, other_result = capture(lambda: run(other, variant=row.name))
    large = make_problem(Case((3000,) * 40, h_q=128, q_lens=2, d_qk=row.d_qk), device)
    for _ in range(3):
        run(large)
        graph.replay()
        other_graph.replay()
        run(large, variant=row.name)
        assert_same_bits(result, want)
        assert_same_bits(other_result, other_want)
        for tensor in (*result, *other_result):
            assert tensor is not None
            tensor.zero_()


@one_of_each
def test_two_calls_in_one_graph(row: Variant, device: torch.device) -> None:
    """As the layers of a model: the second call reads what the first wrote."""
    inputs = problem(row, device)

    def layers() -> Result:
        out, _ = run(inputs, variant=row.name)
        assert isinstance(inputs.q, Tensor)
        q = inputs.q.clone()
        q[..., : row.d_v] = out
        return run(replace(inputs, q=q), variant=row.name)

    want = clone(layers())
    graph, result = capture(layers)
    graph.replay()
    assert_same_bits(result, want)


FRESH = """
import torch
from cases import Case, make_problem
from compare import check, reference
from running import run

inputs = make_problem(Case((3000, 40), d_qk={d_qk}, q_lens=2, given=False), "cuda")
{before}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = run(inputs, variant="{name}")
graph.replay()
check(result, reference(inputs))
print("replayed")
"""


@pytest.mark.parametrize(
    "before", ["", "import mla; mla.preload(variant='{name}')"], ids=["bare", "preloaded"]
)
@one_of_each
def test_first_launch_inside_a_capture(row: Variant, before: str) -> None:
    """In a fresh process, so that images are loaded while the stream is being captured."""
    code = FRESH.format(d_qk=row.d_qk, name=row.name, before=before.format(name=row.name))
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout == "replayed\n", done.stderr[-3000:]
