"""The launches of a call as one graph, whose parameters are others in each call."""

from __future__ import annotations

from threading import Thread

import mla
import pytest
import torch
from cases import Case, make_problem
from compare import check, reference
from mla.variants import Variant
from running import one_of_each, plan_for, run
from torch import Tensor

CYCLES = 100_000_000  # of a sleeping kernel: tens of milliseconds


@pytest.mark.parametrize("planned", [False, True], ids=["", "plan"])
@one_of_each
def test_many_in_flight(row: Variant, planned: bool, device: torch.device) -> None:
    """Each with tensors of its own, all queued before the first begins."""
    problems = [
        make_problem(Case((3000, 40, 0, 700), q_lens=2, d_qk=row.d_qk), device, seed=seed)
        for seed in range(4)
    ]
    plans = [plan_for(p, variant=row.name) if planned else None for p in problems]
    wanted = [
        mla.decode(**p.kwargs(), variant=row.name, plan=plan)
        for p, plan in zip(problems, plans, strict=True)
    ]
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    got = [
        [mla.decode(**p.kwargs(), variant=row.name, plan=plan) for _ in range(20)]
        for p, plan in zip(problems, plans, strict=True)
    ]
    for p, want, several in zip(problems, wanted, got, strict=True):
        check((want, None), reference(p))
        for out in several:
            assert torch.equal(out, want)


@pytest.mark.parametrize("planned", [False, True], ids=["", "plan"])
@one_of_each
def test_layers_in_turns(row: Variant, planned: bool, device: torch.device) -> None:
    """Steps of a model, all queued before the first begins: each call sets what differs."""
    layers = [
        make_problem(Case((3000, 40), d_qk=row.d_qk), device, seed=seed) for seed in range(61)
    ]
    plan = plan_for(layers[0], variant=row.name) if planned else None
    outs = [run(p, variant=row.name)[0] for p in layers]

    def step() -> list[Tensor]:
        for p, out in zip(layers, outs, strict=True):
            out.fill_(float("nan"))
            mla.decode(**p.kwargs(), variant=row.name, plan=plan, out=out)
        return [out.clone() for out in outs]

    wanted = step()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    steps = [step() for _ in range(4)]
    for i, (p, want) in enumerate(zip(layers, wanted, strict=True)):
        check((want, None), reference(p))
        for got in steps:
            assert torch.equal(got[i], want)


@one_of_each
def test_a_first_call_while_another_thread_captures(row: Variant, device: torch.device) -> None:
    """On a stream of its own, for which there is no graph yet."""
    inputs = make_problem(Case((3000, 40, 0, 700), q_lens=2, d_qk=row.d_qk), device)
    want, _ = run(inputs, variant=row.name)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    out, counter = torch.empty_like(want), torch.zeros((), device=device)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    failures: list[Exception] = []

    def call() -> None:
        try:
            with torch.cuda.stream(stream):
                mla.decode(**inputs.kwargs(), variant=row.name, workspace=workspace, out=out)
        except Exception as error:
            failures.append(error)

    with torch.cuda.graph(graph):
        counter.add_(1)
        thread = Thread(target=call)
        thread.start()
        thread.join()
    graph.replay()
    torch.cuda.synchronize()
    assert failures == []
    assert counter.item() == 1
    assert isinstance(out, Tensor)
    assert torch.equal(out, want)
