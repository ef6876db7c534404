"""The calls that `mla bench` times: which variant a case gets, and one decode of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mla
from mla import dispatch
from mla.device import facts
from mla.variants import VARIANTS, Variant

from .arguments import UsageError
from .cases import Case, CaseInputs

SCALE = 192**-0.5  # of DeepSeek-V3's un-absorbed heads, without YaRN
HEURISTIC = "heuristic"  # what a run without a forced name is called


def requested(name: str) -> dispatch.Forced | None:
    """Which variants a run is for; None if dispatch chooses."""
    try:
        return dispatch.forced(None if name == HEURISTIC else name)
    except ValueError as error:
        raise UsageError(str(error)) from None


def pick(
    case: Case,
    device: torch.device,
    request: dispatch.Forced | None,
    targets: str | None,
    batch_invariant: bool,
) -> Variant:
    """What dispatch would choose if the table had only the rows of `targets`."""
    problem = case.problem(batch_invariant)
    choice = dispatch.weigh(problem, facts(device), request)
    if choice.variant and targets in (None, choice.variant.targets):
        return choice.variant
    admitted = [
        variant
        for variant in VARIANTS
        if variant.name in choice.estimates
        and (request is None or request.admits(variant))
        and targets in (None, variant.targets)
    ]
    if not admitted:
        raise dispatch.refusal(problem, facts(device), choice)

    def predicted_us(variant: Variant) -> float:
        estimate = choice.estimates[variant.name]
        return estimate.us if estimate else 0.0

    return min(admitted, key=predicted_us)


def call(
    case: Case, inputs: CaseInputs, variant: str, planning: bool, batch_invariant: bool
) -> Callable[[], object]:
    """What is timed: one decode, with its plan made before, or inside when `planning`."""
    plan = None
    if not planning:
        plan = mla.plan(
            inputs.seq_lens,
            s_q=case.s_q,
            h_q=case.h_q,
            d_qk=case.d_qk,
            dtype=case.dtype,
            page_size=case.page_size,
            max_pages=inputs.block_table.shape[1],
            batch_invariant=batch_invariant,
            variant=variant,
        )
    return lambda: mla.decode(
        inputs.q,
        inputs.kv_cache,
        inputs.block_table,
        inputs.seq_lens,
        scale=SCALE,
        causal=case.causal,
        plan=plan,
        batch_invariant=batch_invariant,
        variant=variant,
    )


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, captured now; it was called before, so that all is loaded."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
